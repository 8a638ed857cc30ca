package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// Requirements of a fleet: replicas with one quota store behave like one process.
const (
	replicaCount = 3
	// Upstream calls above those of one process with a cache.
	cacheAllowance = 1.1
	// Added to the p50 of a unary call by the store on loopback.
	storeCost = 300 * time.Microsecond
	// How soon the replicas respect what one of them has seen.
	sharedWithin = 50 * time.Millisecond
)

// fleetCase is one kind of load or damage.
type fleetCase struct {
	name string
	run  func(*fleetBench) error
	// Needs the whole machine, because it measures time.
	alone bool
}

func fleetCases() []fleetCase {
	cases := []fleetCase{
		{name: "cost", run: (*fleetBench).cost, alone: true},
		{name: "cache", run: (*fleetBench).cache},
		{name: "watches", run: (*fleetBench).watches},
		{name: "rate", run: (*fleetBench).rate},
		{name: "throttle window", run: (*fleetBench).throttleWindow},
		{name: "key guard", run: (*fleetBench).keyGuard},
		{name: "lease", run: (*fleetBench).lease},
		{name: "lease of a call", run: (*fleetBench).leaseOfCall},
		{name: "forged entries", run: (*fleetBench).forgedEntries},
	}
	for _, fault := range storeFaults {
		cases = append(cases, fleetCase{name: fault.name, run: func(b *fleetBench) error { return b.storeFault(fault) }})
	}
	return cases
}

// fleetLanes is the number of cases that run at the same time, each with its own store and replicas.
const fleetLanes = 4

// fleet measures what three replicas with one store cost together, and what faults of the store do. A run below a minute is for CI:
// its rates have shorter periods, and bounds on time leave room for a busy machine.
func fleetRun(results *results, program string, duration time.Duration, only string) {
	bench := &fleetBench{results, program, duration, duration < time.Minute}
	run := func(measure fleetCase) {
		if err := measure.run(bench); err != nil {
			bench.check(false, "%s: %v", measure.name, err)
		}
	}
	shared := make(chan fleetCase, len(fleetCases()))
	for _, measure := range fleetCases() {
		switch {
		case only != "" && only != measure.name:
		case measure.alone:
			run(measure)
		default:
			shared <- measure
		}
	}
	close(shared)
	var lanes sync.WaitGroup
	for range fleetLanes {
		lanes.Go(func() {
			for measure := range shared {
				run(measure)
			}
		})
	}
	lanes.Wait()
}

type fleetBench struct {
	*results
	program  string
	duration time.Duration
	short    bool
}

// allowance is added to bounds on time.
func (b *fleetBench) allowance(quiet time.Duration) time.Duration {
	if b.short {
		return shortRunAllowance
	}
	return quiet
}

// replicas are facades with one store and one upstream.
type replicas struct {
	store       *store
	upstream    *recorder
	facades     []*facade
	connections []*grpc.ClientConn
}

// start starts a store, an upstream and the replicas.
func (b *fleetBench) start(flags ...string) (*replicas, error) {
	upstream, err := startRecorder()
	if err != nil {
		return nil, err
	}
	store, err := startStore()
	if err != nil {
		upstream.close()
		return nil, err
	}
	replicas, err := b.startOver(store, upstream, upstream.url, store.address, flags...)
	if err != nil {
		upstream.close()
		store.close()
	}
	return replicas, err
}

// startOver starts the replicas with a new key and a store at this address.
func (b *fleetBench) startOver(store *store, upstream *recorder, upstreamURL, storeAddress string, flags ...string) (*replicas, error) {
	all := &replicas{store: store, upstream: upstream}
	storeFlags, err := store.flags(storeAddress)
	if err != nil {
		return nil, err
	}
	flags = append(storeFlags, flags...)
	for range replicaCount {
		if err := all.add(b.program, upstreamURL, flags...); err != nil {
			all.stop()
			return nil, err
		}
	}
	return all, eventually(func() bool { return all.up() == replicaCount })
}

func (r *replicas) add(program, upstreamURL string, flags ...string) error {
	environment := []string{"RDS_TASK_FACADE_TOKEN=" + serverToken, "HUAWEICLOUD_SDK_AK=FLEETACCESSKEY", "HUAWEICLOUD_SDK_SK=fleet-secret-key"}
	facade, err := startFacadeIn(environment, program, upstreamURL, nil, flags...)
	if err != nil {
		return err
	}
	r.facades = append(r.facades, facade)
	connection, err := dial(facade.address)
	if err != nil {
		return err
	}
	r.connections = append(r.connections, connection)
	return nil
}

// stop ends the replicas only.
func (r *replicas) stop() {
	for _, connection := range r.connections {
		connection.Close()
	}
	for _, facade := range r.facades {
		facade.kill()
	}
}

func (r *replicas) close() {
	r.stop()
	r.upstream.close()
	r.store.close()
}

// up returns the number of replicas that use the store and see each other.
func (r *replicas) up() int {
	up := 0
	for _, facade := range r.facades {
		metrics, err := facade.scrape()
		if err == nil && metrics.sum("quota_store_up") == 1 {
			up++
		}
	}
	return up
}

// sum adds up a metric of all replicas.
func (r *replicas) sum(name string, labels ...string) float64 {
	total := 0.0
	for _, facade := range r.facades {
		if metrics, err := facade.scrape(); err == nil {
			total += metrics.sum(name, labels...)
		}
	}
	return total
}

// ask calls one replica about a task, with a token unless the replicas have a credential of their own. The error is that of a reply
// about another task.
func (r *replicas) ask(replica int, token, task string, deadline time.Duration) (callResult, error) {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	var pairs []string
	if token != "" {
		pairs = []string{"x-auth-token", token}
	}
	result := call(ctx, r.connections[replica], method, taskRequest{projectID, "instance", task, ""}.encoded(), pairs)
	if result.code != codes.OK {
		return result, nil
	}
	for number, value := range fields(result.reply) {
		if number == 3 && string(value) != task {
			return result, fmt.Errorf("a reply about %q to a call about %q", value, task)
		}
	}
	return result, nil
}

// recorder is an upstream that replies with the requested task and records all requests.
type recorder struct {
	url    string
	server *http.Server
	lock   sync.Mutex
	all    []recordedRequest
	// Replaces replies; nil means the ordinary reply.
	script func(upstreamRequest) http.HandlerFunc
}

type recordedRequest struct {
	at          time.Time
	token, task string
}

func startRecorder() (*recorder, error) {
	upstream := &recorder{}
	upstream.server = &http.Server{Handler: upstream}
	var err error
	upstream.url, err = serveHTTP(upstream.server)
	return upstream, err
}

func (r *recorder) close() { _ = r.server.Close() }

func (r *recorder) ServeHTTP(reply http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return
	}
	parsed := parseUpstreamRequest(request, body)
	r.lock.Lock()
	r.all = append(r.all, recordedRequest{time.Now(), parsed.token, parsed.workflow})
	number, script := len(r.all), r.script
	r.lock.Unlock()
	if script != nil {
		if handler := script(parsed); handler != nil {
			handler(reply, request)
			return
		}
	}
	reply.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(reply, `{"instance_id":"i","instance_name":"n","job_id":%q,"job_name":"%d","status":"Running","process":"%d%%"}`,
		parsed.workflow, number, number%100)
}

// requests returns the number of requests with a token that begins so.
func (r *recorder) requests(token string) int { return len(r.times(token)) }

func (r *recorder) times(token string) []time.Time {
	r.lock.Lock()
	defer r.lock.Unlock()
	var times []time.Time
	for _, line := range r.all {
		if strings.HasPrefix(line.token, token) {
			times = append(times, line.at)
		}
	}
	return times
}

// busiest is that of busiestOf among the requests with a token.
func (r *recorder) busiest(token string, period time.Duration) int {
	return busiestOf(r.times(token), period)
}

// ---- Loads without faults ----

// cache has callers that call about ten tasks every second.
func (b *fleetBench) cache() error {
	const tasks = 10
	callers, seconds, life := 1000, 60, 10
	if b.short {
		callers, seconds, life = 150, 10, 2
	}
	replicas, err := b.start("--credentials", "token", "--cache-ttl", fmt.Sprintf("%ds", life))
	if err != nil {
		return err
	}
	defer replicas.close()
	outcomes := &phase{}
	// Before the entries expire once more.
	early := 100 * time.Millisecond
	if b.short {
		early = time.Duration(life) * time.Second / 4
	}
	end := time.Now().Add(time.Duration(seconds)*time.Second - early)
	var running sync.WaitGroup
	for caller := range callers {
		running.Go(func() {
			start := time.Now().Add(time.Second * time.Duration(caller) / time.Duration(callers))
			for number := 0; start.Before(end); number++ {
				time.Sleep(time.Until(start))
				outcomes.add(replicas.honest(caller%replicaCount, "", fmt.Sprint("task-", (caller+number)%tasks)))
				start = start.Add(time.Second)
			}
		})
	}
	running.Wait()
	single := tasks * seconds / life
	made, limit := replicas.upstream.requests(""), int(cacheAllowance*float64(single))
	b.check(made <= limit && outcomes.failed == 0,
		"cache: %d callers of %d tasks, %d s with --cache-ttl %ds: %d calls, %d failed %s, %d upstream calls (at most %d; one replica needs %d); "+
			"%.0f requests to the store timed out",
		callers, tasks, seconds, life, outcomes.calls(), outcomes.failed, outcomes.first, made, limit, single,
		replicas.sum("quota_store_requests_total", `outcome="timeout"`))
	return nil
}

// honest makes a call that must succeed.
func (r *replicas) honest(replica int, token, task string) (callResult, error) {
	result, err := r.ask(replica, token, task, honestDeadline)
	if err == nil && result.code != codes.OK {
		err = errors.New(result.String())
	}
	return result, err
}

// watches has 300 watchers of ten tasks, a third of them at each replica.
func (b *fleetBench) watches() error {
	const watchers, tasks = 300, 10
	limit, period, duration := 30, time.Minute, 2*time.Minute
	flags := []string{"--credentials", "token"}
	if b.short {
		limit, period, duration = 15, 5*time.Second, 15*time.Second
		flags = append(flags, "--watch-rate", rateFlag(limit, period), "--watch-interval", "200ms")
	}
	upstream, err := startTaskUpstream()
	if err != nil {
		return err
	}
	defer upstream.close()
	store, err := startStore()
	if err != nil {
		return err
	}
	defer store.close()
	replicas, err := b.startOver(store, nil, upstream.url, store.address, flags...)
	if err != nil {
		return err
	}
	defer replicas.stop()
	var audiences []*audience
	for _, facade := range replicas.facades {
		audience, err := startAudience(upstream, facade.address, 1, watchers/replicaCount, tasks)
		if err != nil {
			return err
		}
		defer audience.close()
		audiences = append(audiences, audience)
	}
	time.Sleep(duration)
	delays, ended := &latencies{}, 0
	for _, audience := range audiences {
		audience.delays.lock.Lock()
		delays.all = append(delays.all, audience.delays.all...)
		audience.delays.lock.Unlock()
		ended += len(audience.ended())
	}
	// Ten tasks share the rate, which makes the time between two polls of a task longer than --watch-interval.
	interval := period * tasks / time.Duration(limit)
	busiest, p99 := upstream.busiest(period), delays.percentile(99)
	b.check(busiest <= limit+1 && upstream.requests() > limit, "watches: %d watchers of %d tasks at %d replicas, --watch-rate %s: %d upstream calls, %d in the busiest %v (at most %d)",
		watchers, tasks, replicaCount, rateFlag(limit, period), upstream.requests(), busiest, period, limit+1)
	b.check(p99 <= 2*interval && delays.count() > watchers && ended == 0, "watches: %d states reach watchers after p50 %v, p99 %v (limit %v, two intervals); %d watches ended",
		delays.count(), delays.percentile(50), p99, 2*interval, ended)
	return nil
}

// rate has ten times as many calls as the rate allows.
func (b *fleetBench) rate() error {
	limit, period, duration := 60, time.Minute, 2*time.Minute
	if b.short {
		limit, period, duration = 30, 3*time.Second, 12*time.Second
	}
	replicas, err := b.start("--credentials", "token", "--upstream-rate", rateFlag(limit, period))
	if err != nil {
		return err
	}
	defer replicas.close()
	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	calls := replicas.greedy(ctx, "", period/time.Duration(10*limit))
	made, busiest := replicas.upstream.requests(""), replicas.upstream.busiest("", period)
	least := limit * int(duration/period) * 9 / 10
	b.check(busiest <= limit+1 && made >= least, "rate: --upstream-rate %s, %d calls in %v: %d upstream calls (at least %d), %d in the busiest %v (at most %d)",
		rateFlag(limit, period), calls, duration, made, least, busiest, period, limit+1)
	return nil
}

// rateFlag is the value of --upstream-rate and --watch-rate.
func rateFlag(calls int, period time.Duration) string {
	return fmt.Sprintf("%d/%.0fs", calls, period.Seconds())
}

// greedy calls all replicas in turn about distinct tasks, each call with a deadline of a second, until the context ends. Returns the
// number of calls.
func (r *replicas) greedy(ctx context.Context, token string, every time.Duration) int {
	var running sync.WaitGroup
	number := 0
	for start := time.Now(); ctx.Err() == nil; start = start.Add(every) {
		pause(ctx, time.Until(start))
		replica, task := number%len(r.connections), fmt.Sprint("greedy-", number)
		running.Go(func() { _, _ = r.ask(replica, token, task, time.Second) })
		number++
	}
	running.Wait()
	return number
}

// throttleWindow has an upstream that throttles a token. Each replica has a connection to the store.
func (b *fleetBench) throttleWindow() error {
	replicas, err := b.start()
	if err != nil {
		return err
	}
	defer replicas.close()
	replicas.upstream.script = func(upstreamRequest) http.HandlerFunc {
		return respond(http.StatusTooManyRequests, gatewayError("APIGW.0308", "The throttling threshold has been reached: policy user over ratelimit,limit:60,time:1 minute"))
	}
	const rounds = 10
	var unexpected []string
	for round := range rounds {
		token := fmt.Sprint("throttled-", round)
		for replica := range replicaCount {
			result, err := replicas.ask((round+replica)%replicaCount, token, fmt.Sprint("task-", replica), honestDeadline)
			if err != nil || result.code != codes.ResourceExhausted {
				unexpected = append(unexpected, result.String())
			}
			time.Sleep(sharedWithin)
		}
	}
	made := replicas.upstream.requests("")
	b.check(made == rounds && len(unexpected) == 0, "throttle window: %d tokens are throttled at one replica and used at all: %d upstream calls; %d unexpected replies %v",
		rounds, made, len(unexpected), unexpected[:min(3, len(unexpected))])
	return nil
}

// keyGuard has an upstream that rejects the signature of a key that it has never accepted.
func (b *fleetBench) keyGuard() error {
	replicas, err := b.start("--credentials", "env")
	if err != nil {
		return err
	}
	defer replicas.close()
	replicas.upstream.script = func(upstreamRequest) http.HandlerFunc { return rejectedSignature }
	var codesSeen []codes.Code
	for number := range 3 * replicaCount {
		result, err := replicas.ask(number%replicaCount, "", fmt.Sprint("task-", number), honestDeadline)
		if err != nil {
			return err
		}
		codesSeen = append(codesSeen, result.code)
		time.Sleep(sharedWithin)
	}
	made := replicas.upstream.requests("")
	b.check(made == 1, "key guard: a key that was never accepted is rejected at one replica: %d upstream calls of %d calls at all replicas (at most 1): %v",
		made, 3*replicaCount, codesSeen)
	return nil
}

// lease kills the replica that polls a task which all replicas watch.
func (b *fleetBench) lease() error {
	interval := 5 * time.Second
	if b.short {
		interval = 2 * time.Second
	}
	replicas, err := b.start("--watch-interval", interval.String())
	if err != nil {
		return err
	}
	defer replicas.close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	const token = "watcher"
	for _, connection := range replicas.connections {
		watch, err := openWatch(ctx, connection, watchedTask(0), "", []string{"x-auth-token", token})
		if err != nil {
			return err
		}
		watching.Go(func() {
			for {
				if _, err := watch.next(); err != nil {
					return
				}
			}
		})
	}
	if err := eventually(func() bool { return replicas.upstream.requests(token) >= 2 }); err != nil {
		return fmt.Errorf("two polls: %w", err)
	}
	// The next poll hangs, so that its replica is known, and dies with it.
	var hangs sync.Once
	polled := make(chan struct{})
	replicas.upstream.setScript(func(request upstreamRequest) http.HandlerFunc {
		var handler http.HandlerFunc
		if request.token == token {
			hangs.Do(func() {
				handler = neverRespond
				close(polled)
			})
		}
		return handler
	})
	select {
	case <-polled:
	case <-time.After(startLimit + 4*interval):
		return errors.New("no third poll")
	}
	honest := &phase{}
	stop := make(chan struct{})
	var calling sync.WaitGroup
	holder := -1
	for index, facade := range replicas.facades {
		if metrics, err := facade.scrape(); err == nil && metrics.sum("rds_upstream_in_flight") > 0 {
			holder = index
		}
	}
	if holder < 0 {
		return errors.New("no replica has an upstream call in flight")
	}
	calling.Go(func() {
		for number := 0; ; number++ {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			honest.add(replicas.honest((holder+1+number%(replicaCount-1))%replicaCount, fmt.Sprint("honest-", number%4), fmt.Sprint("task-", number)))
		}
	})
	killed := time.Now()
	before := replicas.upstream.requests(token)
	replicas.facades[holder].kill()
	err = eventually(func() bool { return replicas.upstream.requests(token) > before })
	took := time.Since(killed)
	close(stop)
	calling.Wait()
	// Intervals are up to a fifth longer at random.
	limit := 2*interval*12/10 + b.allowance(200*time.Millisecond)
	b.check(err == nil && took <= limit && honest.failed == 0 && honest.calls() > 0,
		"lease: a replica is killed while it polls with --watch-interval %v: another one polls after %v (at most %v); %d honest calls, %d failed %s",
		interval, took.Round(10*time.Millisecond), limit, honest.calls(), honest.failed, honest.first)
	return nil
}

// leaseOfCall kills the replica that asks RDS while another one waits for its result.
func (b *fleetBench) leaseOfCall() error {
	replicas, err := b.start("--credentials", "token", "--cache-ttl", "10s")
	if err != nil {
		return err
	}
	defer replicas.close()
	const task, deadline = "shared", 8 * time.Second
	var hangs sync.Once
	replicas.upstream.setScript(func(upstreamRequest) http.HandlerFunc {
		var handler http.HandlerFunc
		hangs.Do(func() { handler = neverRespond })
		return handler
	})
	var calling sync.WaitGroup
	defer calling.Wait()
	calling.Go(func() { _, _ = replicas.ask(0, "", task, deadline) })
	if err := eventually(func() bool { return replicas.upstream.requests("") == 1 }); err != nil {
		return fmt.Errorf("the first upstream call: %w", err)
	}
	waited := make(chan callResult, 1)
	calling.Go(func() {
		result, _ := replicas.ask(1, "", task, deadline)
		waited <- result
	})
	time.Sleep(500 * time.Millisecond)
	alone := replicas.upstream.requests("")
	replicas.facades[0].kill()
	result := <-waited
	b.check(alone == 1 && result.code == codes.OK, "lease of a call: another replica waits for the result, with %d upstream call; after the death of the first one its call ends after %v with %v",
		alone, result.took.Round(10*time.Millisecond), result.code)
	return nil
}

func (r *recorder) setScript(script func(upstreamRequest) http.HandlerFunc) {
	r.lock.Lock()
	r.script = script
	r.lock.Unlock()
}

// cost compares unary calls with and without the store, in turns.
func (b *fleetBench) cost() error {
	rounds, callsEach := 10, 1000
	if b.short {
		rounds, callsEach = 3, 200
	}
	with, err := b.start("--upstream-rate", "100000/1s")
	if err != nil {
		return err
	}
	defer with.close()
	without := &replicas{}
	defer without.stop()
	if err := without.add(b.program, with.upstream.url, "--upstream-rate", "100000/1s"); err != nil {
		return err
	}
	measure := func(replicas *replicas, name string) (time.Duration, error) {
		taken := &latencies{}
		for number := range callsEach {
			result, err := replicas.honest(0, "cost", fmt.Sprint(name, number))
			if err != nil {
				return 0, err
			}
			taken.add(result.took)
		}
		return taken.percentile(50), nil
	}
	// The best round of each, which a busy machine disturbs least.
	best := [2]time.Duration{time.Hour, time.Hour}
	for round := range rounds {
		for index, replicas := range []*replicas{without, with} {
			p50, err := measure(replicas, fmt.Sprint("cost-", round, "-", index, "-"))
			if err != nil {
				return err
			}
			best[index] = min(best[index], p50)
		}
	}
	limit := storeCost
	if b.short {
		limit = 5 * storeCost
	}
	added := best[1] - best[0]
	b.check(added <= limit, "cost: p50 of a unary call %v without and %v with the store on loopback: %v more (at most %v)", best[0], best[1], added, limit)
	return nil
}
