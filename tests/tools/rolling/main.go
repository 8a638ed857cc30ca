// Command rolling restarts two instances in turn under load: it stops one with SIGTERM and starts it again on the same port,
// while a client-side round robin with health checking calls both. No call may fail.
//
// Usage: rolling [-restarts 20] PROGRAM
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // The client side of health checking.
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	method = "/huaweicloud.rds.task.v1.TaskService/GetTaskDetail"
	// No retry policy: gRPC transparently retries only calls that no server has received.
	// [balancing]
	serviceConfig = `{
		"loadBalancingConfig": [{"round_robin": {}}],
		"healthCheckConfig": {"serviceName": "huaweicloud.rds.task.v1.TaskService"}
	}`
	// [/balancing]
	workers      = 12
	pause        = 5 * time.Millisecond
	callDeadline = 5 * time.Second
	startLimit   = 15 * time.Second
	stopLimit    = 30 * time.Second
	wholeLimit   = 5 * time.Minute
)

// The example task of the vendor's page, and an instance id for which the sandbox takes 100 ms, so that calls are in flight
// whenever an instance stops.
const (
	projectID    = "0483b6b16e954cb88930a360d2c4e663"
	quick        = "1ffc4167903840cb93a3da56d28c14fdin01"
	slow         = "slow-100"
	workflowID   = "102772a9-31fa-4129-b9f8-7638e2792f3b"
	workflowName = "worker %d"
)

func main() {
	restarts := flag.Int("restarts", 20, "number of restarts of both instances together")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: rolling [-restarts 20] PROGRAM")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), wholeLimit)
	defer cancel()
	if err := run(ctx, flag.Arg(0), *restarts); err != nil {
		fmt.Println("FAIL ", err)
		fmt.Println("0 passed, 1 failed")
		os.Exit(1)
	}
	fmt.Println("1 passed, 0 failed")
}

func run(ctx context.Context, program string, restarts int) error {
	instances := make([]*instance, 2)
	for i := range instances {
		address, err := freeAddress()
		if err != nil {
			return err
		}
		instances[i] = &instance{program: program, address: address}
		if err := instances[i].start(); err != nil {
			return err
		}
		defer instances[i].kill()
	}

	connection, err := dial(instances)
	if err != nil {
		return err
	}
	defer connection.Close()

	load := &load{connection: connection, replies: map[string]*atomic.Int64{}}
	for _, instance := range instances {
		load.replies[instance.address] = &atomic.Int64{}
	}
	loadCtx, stopLoad := context.WithCancel(ctx)
	defer stopLoad()
	// No call counts until the first instance replies.
	first, cancelFirst := context.WithTimeout(ctx, startLimit)
	defer cancelFirst()
	if err := load.call(first, 0, quick, grpc.WaitForReady(true)); err != nil {
		return fmt.Errorf("the first call: %w", err)
	}
	var running sync.WaitGroup
	for worker := range workers {
		running.Go(func() { load.run(loadCtx, worker) })
	}
	for _, instance := range instances {
		if err := load.awaitReplies(ctx, instance.address); err != nil {
			return err
		}
	}

	for restart := range restarts {
		instance := instances[restart%len(instances)]
		took, err := instance.stop()
		if err != nil {
			return fmt.Errorf("restart %d: %w", restart+1, err)
		}
		if err := instance.start(); err != nil {
			return fmt.Errorf("restart %d: %w", restart+1, err)
		}
		// The next instance stops only when the client uses this one again.
		if err := load.awaitReplies(ctx, instance.address); err != nil {
			return fmt.Errorf("restart %d: %w", restart+1, err)
		}
		fmt.Printf("ok    restart %d: drained in %d ms, %d calls so far, %d failed\n",
			restart+1, took.Milliseconds(), load.calls.Load(), load.failed.Load())
	}

	stopLoad()
	running.Wait()
	fmt.Printf("%d restarts, %d calls, %d failed\n", restarts, load.calls.Load(), load.failed.Load())
	if failed := load.failed.Load(); failed > 0 {
		return fmt.Errorf("%d of %d calls failed; the first: %v", failed, load.calls.Load(), load.firstFailure)
	}
	return nil
}

func dial(instances []*instance) (*grpc.ClientConn, error) {
	var addresses []resolver.Address
	for _, instance := range instances {
		addresses = append(addresses, resolver.Address{Addr: instance.address})
	}
	static := manual.NewBuilderWithScheme("static")
	static.InitialState(resolver.State{Addresses: addresses})
	return grpc.NewClient("static:///facade",
		grpc.WithResolvers(static),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}))
}

// load makes calls and counts them.
type load struct {
	connection    *grpc.ClientConn
	calls, failed atomic.Int64
	replies       map[string]*atomic.Int64
	firstOnce     sync.Once
	firstFailure  error
}

func (l *load) run(ctx context.Context, worker int) {
	instanceID := quick
	if worker%2 == 0 {
		instanceID = slow
	}
	for ctx.Err() == nil {
		// A call that has started finishes even if the load stops.
		callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callDeadline)
		err := l.call(callCtx, worker, instanceID)
		cancel()
		l.calls.Add(1)
		if err != nil {
			l.failed.Add(1)
			l.firstOnce.Do(func() { l.firstFailure = err })
		}
		time.Sleep(pause)
	}
}

func (l *load) call(ctx context.Context, worker int, instanceID string, options ...grpc.CallOption) error {
	var message []byte
	for number, text := range []string{projectID, instanceID, workflowID, fmt.Sprintf(workflowName, worker)} {
		message = protowire.AppendTag(message, protowire.Number(number+1), protowire.BytesType)
		message = protowire.AppendString(message, text)
	}
	var from peer.Peer
	var reply []byte
	options = append(options, grpc.ForceCodec(rawCodec{}), grpc.Peer(&from))
	if err := l.connection.Invoke(ctx, method, &message, &reply, options...); err != nil {
		return fmt.Errorf("%s from %v: %s", status.Code(err), from.Addr, status.Convert(err).Message())
	}
	// Field 1 of the reply is the requested instance id.
	number, kind, size := protowire.ConsumeTag(reply)
	if size < 0 || number != 1 || kind != protowire.BytesType {
		return errors.New("the reply does not start with an instance id")
	}
	if text, _ := protowire.ConsumeString(reply[size:]); text != instanceID {
		return fmt.Errorf("the reply is for instance %q", text)
	}
	l.replies[from.Addr.String()].Add(1)
	return nil
}

func (l *load) awaitReplies(ctx context.Context, address string) error {
	before := l.replies[address].Load()
	for deadline := time.Now().Add(startLimit); l.replies[address].Load() < before+10; time.Sleep(20 * time.Millisecond) {
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("no replies from %s", address)
		}
	}
	return nil
}

// rawCodec passes encoded messages through, so that no generated code is needed.
type rawCodec struct{}

func (rawCodec) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }

func (rawCodec) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = append([]byte(nil), data...)
	return nil
}

func (rawCodec) Name() string { return "proto" }

// instance is one server process on a fixed address.
type instance struct {
	program, address string
	command          *exec.Cmd
	exited           chan error
}

func (i *instance) start() error {
	i.command = exec.Command(i.program, "serve", "--sandbox", "--listen", i.address, "--metrics-listen", "off",
		"--log-format", "json", "--drain-delay", "500ms")
	output, err := i.command.StdoutPipe()
	if err != nil {
		return err
	}
	i.command.Stderr = os.Stderr
	if err := i.command.Start(); err != nil {
		return err
	}
	started, drained := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(drained)
		lines := bufio.NewReader(output)
		line, _ := lines.ReadString('\n')
		started <- line
		_, _ = io.Copy(io.Discard, lines)
	}()
	exited, command := make(chan error, 1), i.command
	i.exited = exited
	go func() {
		<-drained
		exited <- command.Wait()
	}()
	select {
	case line := <-started:
		if !strings.HasPrefix(line, "{") {
			return fmt.Errorf("the first log line is not JSON: %q", line)
		}
		return nil
	case <-time.After(startLimit):
		i.kill()
		return errors.New("the program logged nothing after the start")
	}
}

// stop sends SIGTERM and returns how long the process took to end.
func (i *instance) stop() (time.Duration, error) {
	begun := time.Now()
	if err := i.command.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	select {
	case err := <-i.exited:
		return time.Since(begun), err
	case <-time.After(stopLimit):
		return 0, errors.New("still running after SIGTERM")
	}
}

func (i *instance) kill() { _ = i.command.Process.Kill() }

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
