package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
)

// Requirements of watches.
const (
	crowdWatchers = 10_000
	// Resident memory, 6 KiB a watcher.
	crowdGrows = 60 << 20
	// Share of one core for a heartbeat every 25 s of each watcher.
	heartbeatShare = 0.03
	silence        = 25 * time.Second
	// The p99 of the time from the reply that brings a state to its arrival at a watcher, and that of unary calls on a connection
	// with watches. A short run, which may share its machine, allows more.
	changeWithin      = 500 * time.Millisecond
	unaryWithin       = 50 * time.Millisecond
	shortRunAllowance = 2 * time.Second
	// How long a message may wait for room, with an allowance.
	unreadLimit = 75 * time.Second
)

// watchMeasure is one kind of load.
type watchMeasure struct {
	name string
	run  func(*watchBench) error
}

var watchMeasures = []watchMeasure{
	{"shared connection", (*watchBench).sharedConnection},
	{"one task", (*watchBench).oneTask},
	{"one credential", (*watchBench).oneCredential},
	{"deaf reader", (*watchBench).deafReader},
	{"rolling restarts", (*watchBench).rollingRestarts},
	{"drain", (*watchBench).drain},
}

// watches measures what watches cost, and what their callers see, each with real sockets and a fresh program. A run below a minute is
// for CI: loads that need the facade's default rate use a faster one, a deaf reader is not awaited for a minute, and most loads run
// next to the one that waits for heartbeats.
func watches(results *results, program string, duration time.Duration, only string) {
	bench := &watchBench{results, program, duration, duration < time.Minute}
	inTurn := func(measures []watchMeasure) {
		for _, measure := range measures {
			if only != "" && only != measure.name {
				continue
			}
			if err := measure.run(bench); err != nil {
				results.check(false, "%s: %v", measure.name, err)
			}
		}
	}
	if !bench.short {
		inTurn(watchMeasures)
		return
	}
	inTurn(watchMeasures[:1])
	var running sync.WaitGroup
	running.Go(func() { inTurn(watchMeasures[1:2]) })
	running.Go(func() { inTurn(watchMeasures[2:]) })
	running.Wait()
}

type watchBench struct {
	*results
	program  string
	duration time.Duration
	short    bool
}

// start starts an upstream and a facade with the server's credential.
func (b *watchBench) start(flags ...string) (*taskUpstream, *facade, error) {
	upstream, err := startTaskUpstream()
	if err != nil {
		return nil, nil, err
	}
	facade, err := b.startOver(upstream, flags...)
	if err != nil {
		upstream.close()
	}
	return upstream, facade, err
}

func (b *watchBench) startOver(upstream *taskUpstream, flags ...string) (*facade, error) {
	flags = append([]string{"--credentials", "token"}, flags...)
	return startFacadeIn([]string{"RDS_TASK_FACADE_TOKEN=" + serverToken}, b.program, upstream.url, nil, flags...)
}

func (b *watchBench) allowance() time.Duration {
	if b.short {
		return shortRunAllowance
	}
	return 0
}

// audience is watchers that read all messages.
type audience struct {
	upstream    *taskUpstream
	pairs       []string
	connections []*grpc.ClientConn
	ctx         context.Context
	cancel      context.CancelFunc
	reading     sync.WaitGroup
	// Watchers with a first message, states and heartbeats after it.
	begun, states, heartbeats atomic.Int64
	// From the upstream's reply to a watcher's message, without the first messages.
	delays latencies
	lock   sync.Mutex
	ends   []ended
}

// ended is the end of a watch.
type ended struct {
	at  time.Time
	err error
}

// startAudience opens watches round robin on the connections and among the tasks, and waits for the first message of each. pairs are
// metadata.
func startAudience(upstream *taskUpstream, address string, connections, watchers, tasks int, pairs ...string) (*audience, error) {
	ctx, cancel := context.WithCancel(context.Background())
	audience := &audience{upstream: upstream, pairs: pairs, ctx: ctx, cancel: cancel}
	for range connections {
		connection, err := dial(address)
		if err != nil {
			audience.close()
			return nil, err
		}
		audience.connections = append(audience.connections, connection)
	}
	if err := audience.add(watchers, tasks); err != nil {
		audience.close()
		return nil, err
	}
	return audience, nil
}

// add opens more watches and waits for the first message of each.
func (a *audience) add(watchers, tasks int) error {
	enough := a.begun.Load() + int64(watchers)
	for number := range watchers {
		connection, task := a.connections[number%len(a.connections)], watchedTask(number%tasks)
		a.reading.Go(func() { a.watch(connection, task) })
	}
	err := eventually(func() bool { return a.begun.Load() == enough || len(a.ended()) > 0 })
	if ends := a.ended(); err != nil || len(ends) > 0 {
		var first error
		if len(ends) > 0 {
			first = ends[0].err
		}
		return fmt.Errorf("%d of %d watches have begun; %d ended, the first with: %v", a.begun.Load(), enough, len(ends), first)
	}
	return nil
}

func watchedTask(number int) taskRequest {
	return taskRequest{projectID, "instance", fmt.Sprint("task-", number), ""}
}

func (a *audience) watch(connection *grpc.ClientConn, task taskRequest) {
	err := func() error {
		watch, err := openWatch(a.ctx, connection, task, "", a.pairs)
		if err != nil {
			return err
		}
		for number := 0; ; number++ {
			message, err := watch.next()
			switch {
			case err != nil:
				return err
			case number == 0:
				a.begun.Add(1)
			case message.hasTask:
				a.states.Add(1)
				a.delays.add(message.at.Sub(a.upstream.sentAt(message.state)))
			default:
				a.heartbeats.Add(1)
			}
		}
	}()
	if a.ctx.Err() == nil {
		a.lock.Lock()
		a.ends = append(a.ends, ended{time.Now(), err})
		a.lock.Unlock()
	}
}

func (a *audience) ended() []ended {
	a.lock.Lock()
	defer a.lock.Unlock()
	return a.ends
}

func (a *audience) close() {
	a.cancel()
	a.reading.Wait()
	for _, connection := range a.connections {
		connection.Close()
	}
}

// oneTask has ten thousand watchers of one task on twenty connections.
func (b *watchBench) oneTask() error {
	upstream, facade, err := b.start("--max-watches", fmt.Sprint(crowdWatchers))
	if err != nil {
		return err
	}
	defer upstream.close()
	defer facade.kill()
	before, err := facade.resources()
	if err != nil {
		return err
	}
	audience, err := startAudience(upstream, facade.address, 20, crowdWatchers, 1)
	if err != nil {
		return err
	}
	defer audience.close()
	time.Sleep(b.duration)
	upstream.stopChanges()
	// A poll that is under way and its messages.
	time.Sleep(time.Second)
	open, err := facade.resources()
	if err != nil {
		return err
	}
	const moment = silence + 2*time.Second
	time.Sleep(moment)
	after, err := facade.resources()
	if err != nil {
		return err
	}
	const perMinute = 12
	b.check(upstream.busiest(time.Minute) <= perMinute, "%d watchers of one task: %d upstream calls in the busiest minute (at most %d)",
		crowdWatchers, upstream.busiest(time.Minute), perMinute)
	grown := open.resident - before.resident
	b.check(grown <= crowdGrows, "%d watchers of one task: %.1f MiB more, %.1f KiB a watcher (at most %.0f MiB); %.1f MiB at the peak",
		crowdWatchers, mebibytes(grown), float64(grown)/1024/crowdWatchers, mebibytes(crowdGrows), mebibytes(open.peak-before.resident))
	seen, p99 := audience.delays.count(), audience.delays.percentile(99)
	expected := crowdWatchers * upstream.newest()
	b.check(seen == expected, "%d watchers of one task: %d messages with a state of %d", crowdWatchers, seen, expected)
	b.check(p99 <= changeWithin+b.allowance(), "%d watchers of one task: from the upstream's reply to the watcher p50 %v, p99 %v (limit %v)",
		crowdWatchers, audience.delays.percentile(50), p99, changeWithin+b.allowance())
	heartbeats := audience.heartbeats.Load()
	share := (after.cpu - open.cpu).Seconds() / moment.Seconds()
	b.check(heartbeats >= crowdWatchers && share <= heartbeatShare, "%d watchers of one task: %d heartbeats, with all else %.2f %% of a core (at most %.0f %%)",
		crowdWatchers, heartbeats, 100*share, 100*heartbeatShare)
	b.check(len(audience.ended()) == 0, "%d watchers of one task: %d watches ended", crowdWatchers, len(audience.ended()))
	return nil
}

// oneCredential has a thousand watchers of ten tasks with the server's credential.
func (b *watchBench) oneCredential() error {
	const watchers, tasks = 1000, 10
	limit, period := 30, time.Minute
	var flags []string
	if b.short {
		limit, period = 15, 5*time.Second
		flags = []string{"--watch-rate", "15/5s", "--watch-interval", "200ms"}
	}
	upstream, facade, err := b.start(flags...)
	if err != nil {
		return err
	}
	defer upstream.close()
	defer facade.kill()
	audience, err := startAudience(upstream, facade.address, 10, watchers, tasks)
	if err != nil {
		return err
	}
	defer audience.close()
	time.Sleep(b.duration)
	busiest, all := upstream.busiest(period), upstream.requests()
	b.check(busiest <= limit && all > limit, "%d watchers of %d tasks: %d upstream calls, %d in the busiest %v (at most %d)",
		watchers, tasks, all, busiest, period, limit)
	b.check(len(audience.ended()) == 0, "%d watchers of %d tasks: %d watches ended", watchers, tasks, len(audience.ended()))
	return nil
}

// sharedConnection makes unary calls on a connection, first alone and then with a hundred watches that change all the time.
func (b *watchBench) sharedConnection() error {
	const watchers, callsEach = 100, 500
	upstream, facade, err := b.start("--watch-rate", "off", "--watch-interval", "100ms")
	if err != nil {
		return err
	}
	defer upstream.close()
	defer facade.kill()
	audience, err := startAudience(upstream, facade.address, 1, 1, 1)
	if err != nil {
		return err
	}
	defer audience.close()
	measure := func() (*latencies, error) {
		taken := &latencies{}
		for number := range callsEach {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			request := taskRequest{projectID, "instance", fmt.Sprint("unary-", number), ""}
			result := call(ctx, audience.connections[0], method, request.encoded(), nil)
			cancel()
			if result.code != codes.OK {
				return nil, errors.New(result.String())
			}
			taken.add(result.took)
			time.Sleep(2 * time.Millisecond)
		}
		return taken, nil
	}
	alone, err := measure()
	if err != nil {
		return err
	}
	if err := audience.add(watchers-1, watchers); err != nil {
		return err
	}
	statesBefore := audience.states.Load()
	shared, err := measure()
	if err != nil {
		return err
	}
	limit := unaryWithin
	if b.short {
		limit = max(limit, 5*alone.percentile(99))
	}
	b.check(shared.percentile(99) <= limit, "%d unary calls next to %d watches on one connection: p50 %v, p99 %v (limit %v), alone p99 %v; %d states meanwhile",
		callsEach, watchers, shared.percentile(50), shared.percentile(99), limit, alone.percentile(99), audience.states.Load()-statesBefore)
	return nil
}

// deafReader has watchers of one task of whom one stops to read.
func (b *watchBench) deafReader() error {
	const readers, window = 20, 3000
	upstream, facade, err := b.start("--watch-rate", "off", "--watch-interval", "50ms")
	if err != nil {
		return err
	}
	defer upstream.close()
	defer facade.kill()
	audience, err := startAudience(upstream, facade.address, 2, readers, 1)
	if err != nil {
		return err
	}
	defer audience.close()
	peer, err := facade.open(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	if err != nil {
		return err
	}
	defer peer.close()
	deaf := peer.readWatch(1)
	peer.call(1, pairs([2]string{":path", watchMethod}), watchedTask(0))
	if err := peer.writer.Flush(); err != nil {
		return err
	}
	if err := deaf.await(func() bool { return deaf.received == window }); err != nil {
		return fmt.Errorf("%d bytes of a window of %d: %w", deaf.received, window, err)
	}
	statesBefore, stateBefore := audience.states.Load(), upstream.newest()
	time.Sleep(3 * time.Second)
	upstream.stopChanges()
	newest := upstream.newest()
	if err := eventually(func() bool { return audience.states.Load() == int64(readers*newest) }); err != nil {
		b.check(false, "a deaf reader: %d states at %d readers; %d are expected", audience.states.Load(), readers, readers*newest)
	}
	others := audience.states.Load() - statesBefore
	_ = peer.framer.WriteWindowUpdate(1, 1<<20)
	if err := peer.writer.Flush(); err != nil {
		return err
	}
	_ = deaf.await(func() bool { return len(deaf.messages) > 0 && deaf.messages[len(deaf.messages)-1].state == newest })
	// Another message would follow at once.
	time.Sleep(500 * time.Millisecond)
	deaf.lock.Lock()
	after := 0
	for _, message := range deaf.messages {
		if message.begins >= window {
			after++
		}
	}
	last := deaf.messages[len(deaf.messages)-1]
	deaf.lock.Unlock()
	b.check(after == 1 && last.state == newest,
		"a deaf reader: after its window %d message, with state %d of %d; %d other readers got %d messages about %d states meanwhile",
		after, last.state, newest, readers, others, newest-stateBefore)
	if b.short {
		return nil
	}
	peer, err = facade.open(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	if err != nil {
		return err
	}
	defer peer.close()
	peer.acknowledges = true
	peer.readWatch(1)
	peer.call(1, pairs([2]string{":path", watchMethod}), watchedTask(0))
	if err := peer.writer.Flush(); err != nil {
		return err
	}
	begun := time.Now()
	outcomes := peer.outcomes(1, unreadLimit)
	b.check(outcomes["reset CANCEL"] == 1, "a deaf reader: %v after %.1f s without room", outcomes, time.Since(begun).Seconds())
	return nil
}

// deafWatch is a watch without window updates for its stream.
type deafWatch struct {
	lock     sync.Mutex
	received int
	rest     []byte
	messages []positioned
}

// positioned is a message with the offset of its first byte.
type positioned struct {
	watchMessage
	begins int
}

// readWatch reads like `read` and parses the messages of a stream.
func (p *peer) readWatch(stream uint32) *deafWatch {
	watch := &deafWatch{}
	p.onData = func(frame *http2.DataFrame) {
		if frame.StreamID == stream {
			watch.add(frame.Data())
		}
	}
	p.read()
	return watch
}

func (w *deafWatch) add(data []byte) {
	w.lock.Lock()
	defer w.lock.Unlock()
	w.rest = append(w.rest, data...)
	w.received += len(data)
	for len(w.rest) >= 5 {
		size := 5 + int(uint32(w.rest[1])<<24|uint32(w.rest[2])<<16|uint32(w.rest[3])<<8|uint32(w.rest[4]))
		if len(w.rest) < size {
			return
		}
		message, _ := parseWatchMessage(w.rest[5:size])
		w.messages = append(w.messages, positioned{message, w.received - len(w.rest)})
		w.rest = w.rest[size:]
	}
}

func (w *deafWatch) await(holds func() bool) error {
	return eventually(func() bool {
		w.lock.Lock()
		defer w.lock.Unlock()
		return holds()
	})
}

func eventually(holds func() bool) error {
	for deadline := time.Now().Add(startLimit); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v", startLimit)
		}
	}
	return nil
}

// resumingWatcher resumes its watch with the last etag until the task is over.
type resumingWatcher struct {
	// States by etag.
	seen     map[string]int
	last     watchMessage
	over     bool
	reopened int
	// An end that a watcher must not see.
	failure error
}

func (w *resumingWatcher) run(ctx context.Context, connection *grpc.ClientConn, task taskRequest) {
	w.seen = map[string]int{}
	for ctx.Err() == nil && !w.over && w.failure == nil {
		err := w.watchOnce(ctx, connection, task)
		if errors.Is(err, io.EOF) {
			w.over = true
			return
		}
		reply := status.Convert(err)
		if reply.Code() != codes.Unavailable {
			w.failure = err
			return
		}
		w.reopened++
		pause(ctx, retryDelay(reply))
	}
}

// retryDelay is the delay in RetryInfo, or 100 ms without it.
func retryDelay(reply *status.Status) time.Duration {
	for _, detail := range reply.Details() {
		if retry, ok := detail.(*errdetails.RetryInfo); ok {
			return retry.GetRetryDelay().AsDuration()
		}
	}
	return 100 * time.Millisecond
}

func (w *resumingWatcher) watchOnce(ctx context.Context, connection *grpc.ClientConn, task taskRequest) error {
	watch, err := openWatch(ctx, connection, task, w.last.etag, nil, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for {
		message, err := watch.next()
		if err != nil {
			return err
		}
		if message.hasTask {
			w.seen[message.etag]++
			w.last = message
		}
	}
}

// rollingRestarts ends two instances in turn while watchers of ten tasks follow, and then the tasks.
func (b *watchBench) rollingRestarts() error {
	watchers, restarts, tasks := 1000, 6, 10
	limit, period := 30, time.Minute
	var flags []string
	if b.short {
		watchers, restarts = 200, 2
		limit, period = 20, 5*time.Second
		flags = []string{"--watch-rate", "20/5s", "--watch-interval", "1s", "--shutdown-grace", "4s"}
	}
	const instances = 2
	var facades [instances]*facade
	var addresses []resolver.Address
	// The upstream of each process, all with the same tasks.
	shared := &taskUpstream{byToken: map[string]int{}}
	var upstreams []*taskUpstream
	start := func(index int, address string) error {
		upstream, err := shared.another()
		if err != nil {
			return err
		}
		upstreams = append(upstreams, upstream)
		facades[index], err = b.startOver(upstream, append([]string{"--listen", address}, flags...)...)
		return err
	}
	defer func() {
		for _, facade := range facades {
			if facade != nil {
				facade.kill()
			}
		}
		for _, upstream := range upstreams {
			upstream.close()
		}
	}()
	for index := range instances {
		address, err := freeAddress()
		if err != nil {
			return err
		}
		if err := start(index, address); err != nil {
			return err
		}
		addresses = append(addresses, resolver.Address{Addr: address})
	}
	const connections = 4
	var channels []*grpc.ClientConn
	for range connections {
		channel, err := dialAll(addresses)
		if err != nil {
			return err
		}
		defer channel.Close()
		channels = append(channels, channel)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	all := make([]resumingWatcher, watchers)
	var running sync.WaitGroup
	for number := range all {
		running.Go(func() { all[number].run(ctx, channels[number%connections], watchedTask(number%tasks)) })
	}
	for restart := range restarts {
		time.Sleep(max(time.Second, b.duration/20))
		index := restart % instances
		facade := facades[index]
		facade.signal(syscall.SIGTERM)
		state, err := facade.wait()
		if err != nil {
			return fmt.Errorf("restart %d: %w", restart+1, err)
		}
		if state.ExitCode() != 0 {
			b.check(false, "restart %d: exit code %d", restart+1, state.ExitCode())
		}
		if err := start(index, facade.address); err != nil {
			return fmt.Errorf("restart %d: %w", restart+1, err)
		}
	}
	time.Sleep(max(time.Second, b.duration/20))
	shared.complete()
	newest := shared.newest()
	finished := make(chan struct{})
	go func() {
		running.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-time.After(2 * time.Minute):
		cancel()
		<-finished
	}
	complete, repeated, reopened := 0, 0, 0
	var failures []error
	for index := range all {
		watcher := &all[index]
		if watcher.over && watcher.last.state == newest {
			complete++
		}
		for _, times := range watcher.seen {
			if times > 1 {
				repeated++
			}
		}
		reopened += watcher.reopened
		if watcher.failure != nil {
			failures = append(failures, watcher.failure)
		}
	}
	busiest, requests := 0, 0
	for _, upstream := range upstreams {
		busiest = max(busiest, upstream.busiest(period))
		requests += upstream.requests()
	}
	b.check(complete == watchers && len(failures) == 0, "%d rolling restarts, %d watchers: %d watches resumed, %d watchers saw the end, %d failed %v",
		restarts, watchers, reopened, complete, len(failures), errors.Join(failures[:min(3, len(failures))]...))
	b.check(repeated == 0, "%d rolling restarts, %d watchers: %d states delivered twice", restarts, watchers, repeated)
	b.check(busiest <= limit, "%d rolling restarts, %d watchers: %d upstream calls, by one process at most %d in %v (limit %d)",
		restarts, watchers, requests, busiest, period, limit)
	return nil
}

// another is an upstream on a port of its own with the tasks of u, which counts its own requests only.
func (u *taskUpstream) another() (*taskUpstream, error) {
	other := &taskUpstream{}
	other.server = &http.Server{Handler: http.HandlerFunc(func(reply http.ResponseWriter, request *http.Request) {
		other.lock.Lock()
		other.arrivals = append(other.arrivals, time.Now())
		other.lock.Unlock()
		u.ServeHTTP(reply, request)
	})}
	var err error
	other.url, err = serveHTTP(other.server)
	return other, err
}

// dialAll connects to all addresses and distributes calls round robin.
func dialAll(addresses []resolver.Address, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	static := manual.NewBuilderWithScheme("static")
	static.InitialState(resolver.State{Addresses: addresses})
	return dialTarget("static:///facade", append(options, grpc.WithResolvers(static),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}))...)
}

// drain sends SIGTERM to a program with a thousand watches.
func (b *watchBench) drain() error {
	const watchers = 1000
	upstream, facade, err := b.start()
	if err != nil {
		return err
	}
	defer upstream.close()
	defer facade.kill()
	audience, err := startAudience(upstream, facade.address, 4, watchers, 1)
	if err != nil {
		return err
	}
	defer audience.close()
	begun := time.Now()
	facade.signal(syscall.SIGTERM)
	state, err := facade.wait()
	if err != nil {
		return err
	}
	took := time.Since(begun)
	audience.reading.Wait()
	perSecond := map[int]int{}
	most, unexpected := 0, 0
	for _, end := range audience.ended() {
		second := int(end.at.Sub(begun) / time.Second)
		perSecond[second]++
		most = max(most, perSecond[second])
		if status.Code(end.err) != codes.Unavailable {
			unexpected++
		}
	}
	const grace = 20 * time.Second
	b.check(state.ExitCode() == 0 && took < grace, "SIGTERM with %d watches: exit code %d after %.1f s (grace %v)",
		watchers, state.ExitCode(), took.Seconds(), grace)
	b.check(unexpected == 0 && most <= watchers/5, "SIGTERM with %d watches: %d ended, %d not with UNAVAILABLE, at most %d in one second (limit %d)",
		watchers, len(audience.ended()), unexpected, most, watchers/5)
	return nil
}
