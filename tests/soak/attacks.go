package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Requirements of every attack, unless the attack has its own.
const (
	// The honest caller has no failed call and a p99 below this. The attacker runs on the same machine.
	honestWithin = 500 * time.Millisecond
	// Growth of the peak memory during the attack.
	attackGrows = 32 << 20
	// Share of one core in use shortly after the attack.
	maxIdleShare = 0.1
	// Open files of this process: the idle connections, 1200 connections of the attacks that run at the same time, and some
	// hundreds for everything else.
	attackDescriptors = idlePeers + 2000
)

// attack is one kind of hostile peer.
type attack struct {
	name string
	// Flags of the program, in addition to the defaults.
	flags []string
	// Allowed growth of the program's memory; attackGrows if zero.
	grows int64
	// Limit of the honest caller's p99; honestWithin if zero.
	honestWithin time.Duration
	// The attack is on watches: the upstream's tasks change, and the honest caller watches, too.
	watches bool
	// Attacks and returns figures, and an error if the program did not stand the attack.
	run func(*target) (string, error)
}

// target is the program under attack.
type target struct {
	*facade
	sandbox *sandbox
	program string
	calls   int
	honest  *honest
	// The upstream of an attack on watches.
	tasks *taskUpstream
	// The program's log after its first line.
	log *logLines
}

// attacks runs each attack against a fresh program: first those that load the machine, one after the other, then those that
// mostly wait, at the same time.
func attacks(results *results, program string, calls int, only string) error {
	upstream, err := startSandbox(program, anyPort)
	if err != nil {
		return err
	}
	defer upstream.kill()
	inTurn := func(attacks []attack) {
		for _, attack := range attacks {
			if only != "" && only != attack.name {
				continue
			}
			text, err := attack.against(program, upstream, calls)
			if err != nil {
				text += fmt.Sprintf("; %v", err)
			}
			results.check(err == nil, "%s: %s", attack.name, text)
		}
	}
	inTurn(floods)
	inTurn(names)
	inTurn(watchAttacks)
	var waiting sync.WaitGroup
	waiting.Go(func() { inTurn(hangs) })
	together := slices.Concat(waits, watchWaits)
	for index := range together {
		waiting.Go(func() { inTurn(together[index : index+1]) })
	}
	waiting.Wait()
	return nil
}

func (a attack) against(program string, upstream *sandbox, calls int) (string, error) {
	log := &logLines{}
	url := upstream.url()
	var tasks *taskUpstream
	if a.watches {
		var err error
		if tasks, err = startTaskUpstream(); err != nil {
			return "", err
		}
		defer tasks.close()
		url = tasks.url
	}
	facade, err := startFacade(program, url, log.add, a.flags...)
	if err != nil {
		return "", err
	}
	defer facade.kill()
	honest, err := startHonest(facade.address, a.watches)
	if err != nil {
		return "", err
	}
	defer honest.stop()
	if err := honest.more(50); err != nil {
		return "", err
	}
	before, err := facade.resources()
	if err != nil {
		return "", err
	}
	begun := time.Now()
	figures, err := a.run(&target{facade, upstream, program, calls, honest, tasks, log})
	took := time.Since(begun)
	if err != nil {
		return figures, err
	}
	// So many calls that some of them overlap even with a short attack.
	if err := honest.more(50); err != nil {
		return figures, err
	}
	after, err := facade.resources()
	if err != nil {
		return figures, err
	}
	honest.stop()
	figures = fmt.Sprintf("%s | %.1f s, CPU %.1f s, memory %.1f MiB and at most %.1f more | honest: %d calls, p50 %v, p99 %v, %d failed",
		figures, took.Seconds(), (after.cpu - before.cpu).Seconds(), mebibytes(before.resident), mebibytes(after.peak-before.resident),
		honest.succeeded.count(), honest.succeeded.percentile(50), honest.succeeded.percentile(99), honest.failed)
	if honest.failed > 0 {
		return figures, fmt.Errorf("calls of the honest caller failed; the first: %v", honest.first)
	}
	within := cmp.Or(a.honestWithin, honestWithin)
	if p99 := honest.succeeded.percentile(99); p99 > within {
		return figures, fmt.Errorf("honest p99 %v; the limit is %v", p99, within)
	}
	if grows := cmp.Or(a.grows, attackGrows); after.peak-before.resident > grows {
		return figures, fmt.Errorf("memory grew by more than %.0f MiB", mebibytes(grows))
	}
	return figures, facade.checkIdle()
}

// checkIdle requires that the attack left no connection, no call and no work behind.
func (f *facade) checkIdle() error {
	metrics, err := f.settled()
	if err != nil {
		return err
	}
	if panics := metrics.sum("panics_total"); panics > 0 {
		return fmt.Errorf("%.0f panics", panics)
	}
	const moment = time.Second
	before, err := f.resources()
	if err != nil {
		return err
	}
	time.Sleep(moment)
	after, err := f.resources()
	if err != nil {
		return err
	}
	if share := (after.cpu - before.cpu).Seconds() / moment.Seconds(); share > maxIdleShare {
		return fmt.Errorf("the program still uses %.2f of a core; the limit is %.2f", share, maxIdleShare)
	}
	return nil
}

// honest is a caller with a separate connection that takes no part in the attack.
type honest struct {
	connection *grpc.ClientConn
	cancel     context.CancelFunc
	running    sync.WaitGroup
	succeeded  latencies
	lock       sync.Mutex
	failed     int
	first      callResult
}

func startHonest(address string, watches bool) (*honest, error) {
	connection, err := dial(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	honest := &honest{connection: connection, cancel: cancel}
	if watches {
		// Stays open during the whole attack.
		honest.running.Go(func() { honest.stay(ctx) })
	}
	for worker := range 4 {
		honest.running.Go(func() {
			for number := worker; ctx.Err() == nil; number += 4 {
				if watches && worker%2 == 0 {
					honest.watch()
				} else {
					honest.ask(number)
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return honest, nil
}

func (h *honest) ask(number int) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	h.count(call(ctx, h.connection, method, example(number).encoded(), []string{"x-auth-token", token}))
}

// stay watches until the context ends; another end counts as failed.
func (h *honest) stay(ctx context.Context) {
	watch, err := openWatch(ctx, h.connection, watchedTask(0), "", []string{"x-auth-token", token})
	for err == nil {
		_, err = watch.next()
	}
	if ctx.Err() == nil {
		h.count(callResult{code: status.Code(err), message: fmt.Sprint("a watch ended: ", status.Convert(err).Message())})
	}
}

// watch opens another watch of the same task and ends it after the first message.
func (h *honest) watch() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	begun := time.Now()
	watch, err := openWatch(ctx, h.connection, watchedTask(0), "", []string{"x-auth-token", token})
	if err == nil {
		_, err = watch.next()
	}
	h.count(callResult{code: status.Code(err), message: status.Convert(err).Message(), took: time.Since(begun)})
}

func (h *honest) count(result callResult) {
	if result.code == codes.OK {
		h.succeeded.add(result.took)
		return
	}
	h.lock.Lock()
	defer h.lock.Unlock()
	if h.failed++; h.failed == 1 {
		h.first = result
	}
}

// more waits for that many further replies.
func (h *honest) more(successes int) error {
	enough := h.succeeded.count() + successes
	for deadline := time.Now().Add(startLimit); h.succeeded.count() < enough; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("the honest caller got no replies; the first failure: %v", h.first)
		}
	}
	return nil
}

func (h *honest) stop() {
	h.cancel()
	h.running.Wait()
	h.connection.Close()
}

// logLines are lines of the program's log.
type logLines struct {
	lock  sync.Mutex
	lines []string
}

func (l *logLines) add(line []byte) {
	l.lock.Lock()
	l.lines = append(l.lines, string(line))
	l.lock.Unlock()
}

func (l *logLines) all() []string {
	l.lock.Lock()
	defer l.lock.Unlock()
	return l.lines
}
