package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
)

// The load. The fractions are shares of the calls or watches.
const (
	faultsCallers  = 24
	faultsTokens   = 6
	faultsLines    = 6
	faultsWatchers = 24
	// Watchers of one task share a token.
	watchersOfTask = 4
	cancelled      = 0.08
	hurried        = 0.08
	repeated       = 0.1
	sharedTasks    = 4
	pausedReads    = 0.15
	// Six times --upstream-rate, which is more than faults of the store allow.
	faultsGreedyEvery = 5 * time.Millisecond
	// After the end of the faults, a watcher sees the end of its task: the upstream's circuit closes, and the token's throttle window ends.
	watchersFinish = time.Minute
)

// line is one client with a connection to each replica, which it renews.
type line struct {
	client  *grpc.ClientConn
	lock    sync.Mutex
	sockets map[string]*net.TCPConn
	drops   []connectionDrop
}

type connectionDrop struct {
	address string
	at      time.Time
}

func dialLine(addresses []resolver.Address) (*line, error) {
	line := &line{sockets: map[string]*net.TCPConn{}}
	var err error
	line.client, err = dialAll(addresses, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		socket, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			line.lock.Lock()
			line.sockets[address] = socket.(*net.TCPConn)
			line.lock.Unlock()
		}
		return socket, err
	}))
	return line, err
}

// drop resets an open connection to one replica, and reports whether there was one.
func (l *line) drop() bool {
	l.lock.Lock()
	defer l.lock.Unlock()
	for address, socket := range l.sockets {
		delete(l.sockets, address)
		at := time.Now()
		if socket.SetLinger(0) != nil {
			// The client has closed it.
			continue
		}
		_ = socket.Close()
		l.drops = append(l.drops, connectionDrop{address, at})
		return true
	}
	return false
}

// call makes unary calls until the context ends. Some are cancelled or have deadlines of milliseconds.
func (s *faultySoak) call(ctx context.Context, random *rand.Rand, line *line, token string) {
	for ctx.Err() == nil {
		timeout, cancelAfter := 10*time.Second, time.Duration(0)
		switch share := random.Float64(); {
		case share < cancelled:
			cancelAfter = time.Duration(random.IntN(50_000)) * time.Microsecond
		case share < cancelled+hurried:
			timeout = time.Duration(1+random.IntN(30_000)) * time.Microsecond
		}
		shared := -1
		if random.Float64() < repeated {
			shared = random.IntN(sharedTasks)
		}
		s.callOnce(line, token, shared, timeout, cancelAfter)
		pause(ctx, time.Duration(random.IntN(200))*time.Millisecond)
	}
}

// callOnce makes one call about a shared task, or about a new one if that is negative. The reply must be about that task.
func (s *faultySoak) callOnce(line *line, token string, shared int, timeout, cancelAfter time.Duration) {
	number := s.ledger.open(method, line, cancelAfter > 0 || timeout < faultsTimeout)
	task, name := number, fmt.Sprintf("number %d.", number)
	if shared >= 0 {
		task, name = shared, fmt.Sprintf("shared %d.", shared)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if cancelAfter > 0 {
		time.AfterFunc(cancelAfter, cancel)
	}
	request := taskRequest{projectID, fmt.Sprint("instance-", task%16), "task", name}
	result := call(ctx, line.client, method, request.encoded(), []string{"x-auth-token", token, "x-request-id", requestID(number)}, grpc.WaitForReady(true))
	s.ledger.close(number, result.code, result.fromServer, result.reasons, result.peer)
	if result.code == codes.OK && !bytes.Contains(result.reply, []byte(name)) {
		s.problem("%s: the reply is not about %q", requestID(number), name)
	}
}

// callGreedily makes more calls with one token than the rate allows.
func (s *faultySoak) callGreedily(ctx context.Context, line *line) {
	var calls sync.WaitGroup
	for ctx.Err() == nil {
		calls.Go(func() { s.callOnce(line, greedyToken, -1, 300*time.Millisecond, 0) })
		pause(ctx, faultsGreedyEvery)
	}
	calls.Wait()
}

// watch watches one task after the other until the context ends, each until it is over.
func (s *faultySoak) watch(ctx context.Context, random *rand.Rand, line *line, worker int) {
	group := worker / watchersOfTask
	for number := 0; ctx.Err() == nil; number++ {
		follower := &follower{task: taskRequest{projectID, fmt.Sprint("instance-", group), fmt.Sprintf("%s%d-%d-%d", watchedPrefix, s.loads, group, number), ""}}
		s.lock.Lock()
		s.watchers = append(s.watchers, follower)
		s.lock.Unlock()
		s.follow(ctx, random, line, fmt.Sprint("watcher-", group%2), follower)
	}
}

// follower is a watcher of one task, which resumes its watch.
type follower struct {
	task             taskRequest
	last             watchMessage
	over             bool
	states, reopened int
}

func (s *faultySoak) follow(ctx context.Context, random *rand.Rand, line *line, token string, follower *follower) {
	// Ends some time after the load.
	finish, stop := context.WithCancel(context.Background())
	defer stop()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(watchersFinish, stop) })()
	for finish.Err() == nil && !follower.over {
		watchCtx, cancel := context.WithCancel(finish)
		pausedFor := time.Duration(0)
		if ctx.Err() == nil {
			switch share := random.Float64(); {
			case share < cancelled:
				s.note("watches cancelled")
				time.AfterFunc(time.Duration(random.IntN(3000))*time.Millisecond, cancel)
			case share < cancelled+hurried:
				cancel()
				watchCtx, cancel = context.WithTimeout(finish, time.Duration(1+random.IntN(2000))*time.Millisecond)
			case share < cancelled+hurried+pausedReads:
				pausedFor = time.Duration(1+random.IntN(3000)) * time.Millisecond
			}
		}
		err := s.watchOnce(watchCtx, line, token, follower, pausedFor)
		cancel()
		if follower.over {
			return
		}
		follower.reopened++
		s.note("watches resumed")
		pause(finish, min(retryDelay(status.Convert(err)), 2*time.Second))
	}
}

// watchOnce opens a watch, which resumes after the last state, and reads it to its end.
func (s *faultySoak) watchOnce(ctx context.Context, line *line, token string, follower *follower, pausedFor time.Duration) error {
	number := s.ledger.open(watchMethod, line, false)
	var server grpcpeer.Peer
	resumed, first := follower.last, true
	err := func() error {
		watch, err := openWatch(ctx, line.client, follower.task, resumed.etag, []string{"x-auth-token", token, "x-request-id", requestID(number)},
			grpc.WaitForReady(true), grpc.Peer(&server))
		if err != nil {
			return err
		}
		for {
			message, err := watch.next()
			if err != nil {
				return err
			}
			if pausedFor > 0 {
				s.note("readers paused")
				pause(ctx, pausedFor)
				pausedFor = 0
			}
			if !message.hasTask {
				continue
			}
			follower.states++
			last := follower.last
			switch {
			case message.etag == last.etag && !message.over:
				s.problem("%s of %s: etag %s was delivered twice", requestID(number), follower.task.workflow, message.etag)
			case message.state < last.state || last.over && !message.over:
				s.problem("%s of %s: state %d after state %d", requestID(number), follower.task.workflow, message.state, last.state)
			}
			follower.last, first = message, false
		}
	}()
	s.ledger.closeWatch(ctx, number, err, addressOf(server))
	if errors.Is(err, io.EOF) {
		follower.over = true
		if !follower.last.over || first {
			s.problem("%s of %s: the watch ended with OK, its last state was %d, over: %v", requestID(number), follower.task.workflow, follower.last.state, follower.last.over)
		}
	}
	return err
}
