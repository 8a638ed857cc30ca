package main

import (
	"context"
	crypto "crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

//go:embed clock/clock.c
var clockSource []byte

// store is a running Valkey or Redis without persistence, with a connection of its administrator.
type store struct {
	program, folder, address string
	environment              []string
	command                  *exec.Cmd
	admin                    *redis.Client
}

func startStore() (*store, error) {
	program, err := exec.LookPath("valkey-server")
	if err != nil {
		program, err = exec.LookPath("redis-server")
	}
	if err != nil {
		return nil, errors.New("neither valkey-server nor redis-server is installed; Debian's package redis-server has the latter")
	}
	folder, err := os.MkdirTemp("", "soak-store-")
	if err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	store := &store{program: program, folder: folder, address: address, environment: os.Environ()}
	store.admin = redis.NewClient(&redis.Options{Addr: address, DialTimeout: time.Second, MaxRetries: -1})
	return store, store.start()
}

// freeAddress is an address of loopback that was free a moment ago. Its port is below those that the system gives to clients, so that no client
// takes it while its server is restarted.
func freeAddress() (string, error) {
	for {
		listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 15_000+rand.IntN(15_000)))
		switch {
		case err == nil:
			defer listener.Close()
			return listener.Addr().String(), nil
		case !errors.Is(err, syscall.EADDRINUSE):
			return "", err
		}
	}
}

// start starts the server, again at the same address after kill.
func (s *store) start() error {
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		return err
	}
	s.command = exec.Command(s.program, "--bind", host, "--port", port, "--dir", s.folder, "--save", "", "--appendonly", "no", "--loglevel", "warning")
	s.command.Env = s.environment
	s.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.command.Start(); err != nil {
		return err
	}
	if err := eventually(func() bool { return s.admin.Ping(context.Background()).Err() == nil }); err != nil {
		s.kill()
		return fmt.Errorf("%s does not reply to PING: %w", s.program, err)
	}
	return nil
}

// restartWithClock restarts the store with a clock that setClock moves.
func (s *store) restartWithClock() error {
	s.kill()
	source, library, file := filepath.Join(s.folder, "clock.c"), filepath.Join(s.folder, "clock.so"), filepath.Join(s.folder, "clock")
	if err := errors.Join(os.WriteFile(source, clockSource, 0o600), s.setClock(0)); err != nil {
		return err
	}
	if output, err := exec.Command("cc", "-shared", "-fPIC", "-O2", "-o", library, source).CombinedOutput(); err != nil {
		return fmt.Errorf("cc: %w: %s", err, output)
	}
	s.environment = append(s.environment, "LD_PRELOAD="+library, "STORE_CLOCK="+file)
	return s.start()
}

// setClock moves the store's clock that far from the true time.
func (s *store) setClock(offset time.Duration) error {
	file := filepath.Join(s.folder, "clock")
	// Replaced at once, because the store may read it at any time.
	if err := os.WriteFile(file+".new", fmt.Append(nil, int(offset.Seconds())), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func (s *store) kill() {
	_ = s.command.Process.Kill()
	_ = s.command.Wait()
}

func (s *store) signal(signal syscall.Signal) error { return s.command.Process.Signal(signal) }

// flags writes a new key, and returns the flags of a replica that uses the store at this address, which may be a relay's.
func (s *store) flags(address string) ([]string, error) {
	file, key := filepath.Join(s.folder, "key"), make([]byte, 32)
	_, _ = crypto.Read(key)
	return []string{"--quota-store", "redis://" + address, "--quota-store-key-file", file}, os.WriteFile(file, key, 0o600)
}

// do sends one command of the administrator.
func (s *store) do(arguments ...any) error {
	return s.admin.Do(context.Background(), arguments...).Err()
}

func (s *store) close() {
	_ = s.admin.Close()
	s.kill()
	_ = os.RemoveAll(s.folder)
}

// keys returns the names of all entries.
func (s *store) keys() ([]string, error) {
	return s.admin.Keys(context.Background(), "*").Result()
}

// relay forwards TCP connections to the store, and can delay or stop the data.
type relay struct {
	address  string
	listener net.Listener
	target   string
	// Between the arrival of data from the store and its delivery, in nanoseconds.
	delay atomic.Int64
	// No data passes, and no connection is closed: what a firewall does that drops packets.
	mute    atomic.Bool
	lock    sync.Mutex
	sockets []net.Conn
}

func startRelay(target string) (*relay, error) {
	listener, err := net.Listen("tcp", anyPort)
	if err != nil {
		return nil, err
	}
	relay := &relay{address: listener.Addr().String(), listener: listener, target: target}
	go relay.accept()
	return relay, nil
}

func (r *relay) accept() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", r.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		r.lock.Lock()
		r.sockets = append(r.sockets, client, server)
		r.lock.Unlock()
		go r.forward(server, client, false)
		go r.forward(client, server, true)
	}
}

func (r *relay) forward(to, from net.Conn, delays bool) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 64<<10)
	for {
		size, err := from.Read(buffer)
		if err != nil {
			return
		}
		if delays {
			time.Sleep(time.Duration(r.delay.Load()))
		}
		for r.mute.Load() {
			time.Sleep(10 * time.Millisecond)
		}
		if _, err := to.Write(buffer[:size]); err != nil {
			return
		}
	}
}

func (r *relay) close() {
	_ = r.listener.Close()
	r.mute.Store(false)
	r.lock.Lock()
	defer r.lock.Unlock()
	for _, socket := range r.sockets {
		_ = socket.Close()
	}
}

// strings returns the entries that are strings, by name.
func (s *store) strings() (map[string]string, error) {
	names, err := s.keys()
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, name := range names {
		value, err := s.admin.Get(context.Background(), name).Result()
		switch {
		case err == nil:
			found[name] = value
		case errors.Is(err, redis.Nil) || strings.HasPrefix(err.Error(), "WRONGTYPE"):
		default:
			return nil, err
		}
	}
	return found, nil
}

// usedMemory is what maxmemory limits, in bytes.
func (s *store) usedMemory() (int64, error) {
	text, err := s.admin.Info(context.Background(), "memory").Result()
	return number(statusField([]byte(text), "used_memory")), err
}
