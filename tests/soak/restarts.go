package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
)

const (
	terminate = syscall.SIGTERM
	interrupt = syscall.SIGINT

	restartWorkers = 16
	// The sandbox takes 150 ms for this instance id. Every other worker uses it, so that calls are in flight at each signal.
	slowTask = "slow-150"
	// A call for this id is in flight at both of two signals, so that the drain does not end before the second one.
	heldTask = "slow-2000"
	// From the start of the new process to its first reply.
	readyWithin = 2 * time.Second
	// A call that starts this soon after a death may still use the dead connection.
	unnoticed = 100 * time.Millisecond
)

// ending is one way to end the process, with the expected exit code; -1 is an end by signal.
type ending struct {
	name     string
	signals  []syscall.Signal
	exitCode int
	// Per cent of the restarts.
	share int
}

// A second signal ends a drain at once. SIGQUIT is not handled, so the system ends the process.
var endings = []ending{
	{"SIGTERM", []syscall.Signal{terminate}, 0, 35},
	{"SIGINT", []syscall.Signal{interrupt}, 0, 20},
	{"SIGKILL", []syscall.Signal{syscall.SIGKILL}, -1, 20},
	{"SIGQUIT", []syscall.Signal{syscall.SIGQUIT}, -1, 5},
	{"SIGTERM twice", []syscall.Signal{terminate, terminate}, 1, 8},
	{"SIGINT, SIGTERM", []syscall.Signal{interrupt, terminate}, 1, 6},
	{"SIGTERM, SIGKILL", []syscall.Signal{terminate, syscall.SIGKILL}, -1, 6},
}

func (e ending) drains() bool { return e.exitCode == 0 }

// death is the period in which a process ended without a drain.
type death struct{ from, until time.Time }

// lost is a failed call.
type lost struct {
	begun, ended time.Time
	result       callResult
}

// restarts ends one instance again and again under load and starts it on the same port. Callers wait for a connection, as
// gRPC allows, and retry no call that a server has received. A drain must lose no call; a death may lose only calls in flight.
func restarts(results *results, program string, count int, seed uint64) error {
	upstream, err := startSandbox(program, anyPort)
	if err != nil {
		return err
	}
	defer upstream.kill()
	draining := make(chan struct{}, 1)
	onLine := func(line []byte) {
		if bytes.Contains(line, []byte(`"signal: draining"`)) {
			select {
			case draining <- struct{}{}:
			default:
			}
		}
	}
	address, err := freeAddress()
	if err != nil {
		return err
	}
	facade, err := startFacade(program, upstream.url(), onLine, "--listen", address)
	if err != nil {
		return err
	}
	defer func() { facade.kill() }()
	connection, err := dial(facade.address, grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.2, MaxDelay: 100 * time.Millisecond},
		MinConnectTimeout: time.Second,
	}))
	if err != nil {
		return err
	}
	defer connection.Close()

	load := &steadyLoad{connection: connection}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var running sync.WaitGroup
	for worker := range restartWorkers {
		running.Go(func() { load.run(ctx, worker) })
	}

	random := rand.New(rand.NewPCG(seed, 0))
	var deaths []death
	var ready, drained latencies
	times := map[string]int{}
	for restart := range count {
		ending := pick(random)
		times[ending.name]++
		held := make(chan callResult, 1)
		if len(ending.signals) > 1 {
			go func() { held <- load.call(taskRequest{projectID, heldTask, fmt.Sprint("w-", restart), ""}) }()
		}
		time.Sleep(200*time.Millisecond + time.Duration(random.IntN(300))*time.Millisecond)
		select {
		case <-draining:
		default:
		}
		from := time.Now()
		facade.signal(ending.signals[0])
		if len(ending.signals) > 1 {
			select {
			case <-draining:
			case <-time.After(stopLimit):
				return fmt.Errorf("restart %d: no drain after %s", restart+1, ending.name)
			}
			facade.signal(ending.signals[1])
		}
		state, err := facade.wait()
		if err != nil {
			return fmt.Errorf("restart %d: %s: %w", restart+1, ending.name, err)
		}
		hasDrained := ending.drains()
		if len(ending.signals) > 1 {
			// Without a reply, the call may have come too late to hold the drain.
			hasDrained = (<-held).code != codes.OK && state.ExitCode() == 0
		}
		if state.ExitCode() != ending.exitCode && !hasDrained {
			results.check(false, "restart %d: %s: exit code %d, expected %d", restart+1, ending.name, state.ExitCode(), ending.exitCode)
		}
		if hasDrained {
			drained.add(time.Since(from))
		} else {
			deaths = append(deaths, death{from, time.Now().Add(unnoticed)})
		}
		begun := time.Now()
		facade, err = startFacade(program, upstream.url(), onLine, "--listen", address)
		if err != nil {
			return fmt.Errorf("restart %d after %s: %w", restart+1, ending.name, err)
		}
		if err := load.awaitAnswer(); err != nil {
			return fmt.Errorf("restart %d after %s: %w", restart+1, ending.name, err)
		}
		ready.add(time.Since(begun))
	}
	stop()
	running.Wait()

	results.check(true, "%d restarts: %v", count, times)
	results.check(ready.percentile(100) < readyWithin, "from start to the first reply: p50 %v, at most %v (limit %v)",
		ready.percentile(50), ready.percentile(100), readyWithin)
	results.check(true, "from signal to exit code 0: p50 %v, at most %v", drained.percentile(50), drained.percentile(100))
	inFlight, mostAtOnce := 0, 0
	atDeath := make([]int, len(deaths))
	for _, lost := range load.lost {
		at := duringDeath(deaths, lost)
		if at < 0 || lost.result.code != codes.Unavailable {
			results.check(false, "a call failed although no process ended without a drain meanwhile: from %s to %s, %v",
				lost.begun.Format(time.StampMilli), lost.ended.Format(time.StampMilli), lost.result)
			continue
		}
		inFlight++
		atDeath[at]++
		mostAtOnce = max(mostAtOnce, atDeath[at])
	}
	results.check(inFlight == len(load.lost) && mostAtOnce <= restartWorkers,
		"%d calls, %d failed: %d in flight at one of %d deaths (at most %d at one), 0 at %d drains",
		load.succeeded.count()+len(load.lost), len(load.lost), inFlight, len(deaths), mostAtOnce, count-len(deaths))
	return nil
}

func pick(random *rand.Rand) ending {
	share := random.IntN(100)
	for _, ending := range endings {
		if share -= ending.share; share < 0 {
			return ending
		}
	}
	panic("the shares do not add up to 100")
}

// duringDeath returns the index of the death at which the call was in flight, or -1.
func duringDeath(deaths []death, lost lost) int {
	for index, death := range deaths {
		if lost.begun.Before(death.until) && lost.ended.After(death.from) {
			return index
		}
	}
	return -1
}

// steadyLoad makes valid calls, one after the other on each worker.
type steadyLoad struct {
	connection *grpc.ClientConn
	succeeded  latencies
	lock       sync.Mutex
	lost       []lost
}

func (l *steadyLoad) run(ctx context.Context, worker int) {
	for number := worker; ctx.Err() == nil; number += restartWorkers {
		request := example(number)
		if worker%2 == 0 {
			request = taskRequest{projectID, slowTask, fmt.Sprint("w-", number), ""}
		}
		begun := time.Now()
		result := l.call(request, grpc.WaitForReady(true))
		if result.code == codes.OK {
			l.succeeded.add(result.took)
		} else {
			l.lock.Lock()
			l.lost = append(l.lost, lost{begun, time.Now(), result})
			l.lock.Unlock()
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// call makes a call that finishes even if the load stops.
func (l *steadyLoad) call(request taskRequest, options ...grpc.CallOption) callResult {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return call(ctx, l.connection, method, request.encoded(), []string{"x-auth-token", token}, options...)
}

func (l *steadyLoad) awaitAnswer() error {
	before := l.succeeded.count()
	for deadline := time.Now().Add(startLimit); l.succeeded.count() == before; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("no reply within %v", startLimit)
		}
	}
	return nil
}
