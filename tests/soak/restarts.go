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
	// Every other worker asks for a task that takes so long: something is always in flight when a signal comes.
	slowTask = "slow-150"
	// From the start of the new process to its first answer.
	readyWithin = 2 * time.Second
	// A call that begins so soon after a death may still be written to the dead connection.
	unnoticed = 100 * time.Millisecond
)

// ending is one way to end the process, and the exit code for it; -1 is a death by signal.
type ending struct {
	name     string
	signals  []syscall.Signal
	exitCode int
	// Out of a hundred.
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

// death is when a process was ended that did not drain.
type death struct{ from, until time.Time }

// lost is one call that failed.
type lost struct {
	begun, ended time.Time
	answer       answer
}

// restarts ends one instance again and again while calls go on, and starts it on the same port. Callers wait for a
// connection, as gRPC lets them, and repeat nothing that a server has seen. A drain loses no call; a death loses those
// in flight and no other.
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
	facade, err := startFacade(program, upstream.url(), onLine)
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
		time.Sleep(200*time.Millisecond + time.Duration(random.IntN(300))*time.Millisecond)
		ending := pick(random)
		times[ending.name]++
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
				return fmt.Errorf("restart %d: %s is not noticed", restart+1, ending.name)
			}
			facade.signal(ending.signals[1])
		}
		state, err := facade.wait()
		if err != nil {
			return fmt.Errorf("restart %d: %s: %w", restart+1, ending.name, err)
		}
		if state.ExitCode() != ending.exitCode {
			results.that(false, "restart %d: %s: exit code %d, expected %d", restart+1, ending.name, state.ExitCode(), ending.exitCode)
		}
		if ending.drains() {
			drained.add(time.Since(from))
		} else {
			deaths = append(deaths, death{from, time.Now().Add(unnoticed)})
		}
		begun := time.Now()
		facade, err = startFacade(program, upstream.url(), onLine, "--listen", facade.address)
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

	results.that(true, "%d restarts: %v", count, times)
	results.that(ready.percentile(100) < readyWithin, "from start to the first answer: p50 %v, at most %v (below %v)",
		ready.percentile(50), ready.percentile(100), readyWithin)
	results.that(true, "from signal to exit code 0: p50 %v, at most %v", drained.percentile(50), drained.percentile(100))
	inFlight, mostAtOnce := 0, 0
	atDeath := make([]int, len(deaths))
	for _, lost := range load.lost {
		at := duringDeath(deaths, lost)
		if at < 0 || lost.answer.code != codes.Unavailable {
			results.that(false, "a call that began %s and failed %s, when no process was dying: %v",
				lost.begun.Format(time.StampMilli), lost.ended.Format(time.StampMilli), lost.answer)
			continue
		}
		inFlight++
		atDeath[at]++
		mostAtOnce = max(mostAtOnce, atDeath[at])
	}
	results.that(inFlight == len(load.lost) && mostAtOnce <= restartWorkers,
		"%d calls, %d failed: %d of them in flight at one of %d deaths (at most %d at one), 0 at %d drains",
		load.answered.count()+len(load.lost), len(load.lost), inFlight, len(deaths), mostAtOnce, count-len(deaths))
	return nil
}

func pick(random *rand.Rand) ending {
	share := random.IntN(100)
	for _, ending := range endings {
		if share -= ending.share; share < 0 {
			return ending
		}
	}
	panic("the shares are a hundred together")
}

// duringDeath is the death at which the call was in flight, or -1.
func duringDeath(deaths []death, lost lost) int {
	for index, death := range deaths {
		if lost.begun.Before(death.until) && lost.ended.After(death.from) {
			return index
		}
	}
	return -1
}

// steadyLoad makes good calls, one after the other on each worker.
type steadyLoad struct {
	connection *grpc.ClientConn
	answered   latencies
	lock       sync.Mutex
	lost       []lost
}

func (l *steadyLoad) run(ctx context.Context, worker int) {
	for number := worker; ctx.Err() == nil; number += restartWorkers {
		asked := example(number)
		if worker%2 == 0 {
			asked = taskRequest{projectID, slowTask, fmt.Sprint("w-", number), ""}
		}
		// A call that has begun is finished even when the load stops.
		callCtx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		begun := time.Now()
		answer := call(callCtx, l.connection, method, asked.encoded(), []string{"x-auth-token", token}, grpc.WaitForReady(true))
		cancel()
		if answer.code == codes.OK {
			l.answered.add(answer.took)
		} else {
			l.lock.Lock()
			l.lost = append(l.lost, lost{begun, time.Now(), answer})
			l.lock.Unlock()
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (l *steadyLoad) awaitAnswer() error {
	before := l.answered.count()
	for deadline := time.Now().Add(startLimit); l.answered.count() == before; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("no answers")
		}
	}
	return nil
}
