package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/resolver"
)

// The replicas. A small rate has many calls wait for it; the grace period is longer than a call's time limit, so that a drain loses no call.
const (
	faultsRate   = 120
	faultsPeriod = 4 * time.Second
	// An ordinary call waits for longer.
	faultsTimeout = 3 * time.Second
)

var faultsFlags = []string{"--max-in-flight", "64", "--max-connection-age", "20s", "--timeout", faultsTimeout.String(), "--attempt-timeout", "1s", "--connect-timeout", "500ms",
	"--shutdown-grace", "4s", "--cache-ttl", "1s", "--upstream-rate", rateFlag(faultsRate, faultsPeriod),
	"--watch-rate", rateFlag(faultsRate/2, faultsPeriod), "--watch-interval", "200ms", "--max-watch-duration", "5s"}

// faultsRecovery is the time after a fault of the store in which upstream requests may exceed the rate: the replicas find the store again, and
// keep to their own shares for one window more.
const faultsRecovery = storeRecovers + 2*faultsPeriod

// faults runs three replicas with one quota store under load while their upstream, the store, the replicas and the callers misbehave at
// random. Replica 0 is never ended, so that its memory can be compared.
func faults(results *results, program string, duration time.Duration, seed uint64) error {
	soak, err := startFaultySoak(results, program, seed, max(2*time.Second, min(duration/60, 20*time.Second)))
	if err != nil {
		return err
	}
	defer soak.close()
	warmUp := max(duration/5, 2*time.Second)
	if _, err := soak.load(warmUp); err != nil {
		return err
	}
	before, err := soak.idle()
	if err != nil {
		return fmt.Errorf("after the warm-up: %w", err)
	}
	samples, err := soak.load(duration - warmUp)
	if err != nil {
		return err
	}
	after, err := soak.idle()
	if err != nil {
		return fmt.Errorf("after the load: %w", err)
	}
	metrics, err := soak.finalMetrics()
	if err != nil {
		return err
	}
	// Their logs are complete when they have ended.
	for _, replica := range soak.replicas {
		replica.signal(syscall.SIGTERM)
		if state, err := replica.wait(); err != nil || state.ExitCode() != 0 {
			soak.problem("%s, idle, after SIGTERM: %v, %v", replica.name, state, err)
		}
	}
	flat(results, samples)
	unloaded(results, before, after)
	soak.balance(metrics, duration)
	return nil
}

// faultySoak is the replicas, everything around them, and what has happened to them.
type faultySoak struct {
	*results
	program  string
	seed     uint64
	every    time.Duration // Mean time between two faults of one kind.
	ledger   *ledger
	upstream *faultyUpstream
	store    *store
	relay    *relay
	flags    []string // Of the replicas.
	// Running replicas, and those that have ended.
	replicas [replicaCount]*replica
	ended    []*replica
	loads    int
	watchers []*follower
	lock     sync.Mutex
	deaths   []replicaDeath
	// When faults of the store began and ended, when a replica had no reply of it, and when replicas were started.
	disturbed, started []time.Time
	happened           map[string]int
	problems           []string
}

// replicaDeath is the time from the kill of a replica until callers use it again.
type replicaDeath struct {
	address     string
	from, until time.Time
}

func startFaultySoak(results *results, program string, seed uint64, every time.Duration) (*faultySoak, error) {
	soak := &faultySoak{results: results, program: program, seed: seed, every: every, happened: map[string]int{}, ledger: &ledger{logged: map[int]string{}}}
	var err error
	if soak.upstream, err = startFaultyUpstream(seed); err != nil {
		return nil, err
	}
	if soak.store, err = startStore(); err != nil {
		soak.close()
		return nil, err
	}
	if soak.relay, err = startRelay(soak.store.address); err != nil {
		soak.close()
		return nil, err
	}
	storeFlags, err := soak.store.flags(soak.relay.address)
	if err != nil {
		soak.close()
		return nil, err
	}
	soak.flags = append(storeFlags, faultsFlags...)
	for index := range replicaCount {
		address, err := freeAddress()
		if err == nil {
			err = soak.startReplica(index, address)
		}
		if err != nil {
			soak.close()
			return nil, err
		}
	}
	return soak, nil
}

func (s *faultySoak) close() {
	for _, replica := range s.replicas {
		if replica != nil {
			replica.kill()
		}
	}
	if s.relay != nil {
		s.relay.close()
	}
	if s.store != nil {
		s.store.close()
	}
	s.upstream.close()
}

// note counts something that has happened.
func (s *faultySoak) note(what string) {
	s.lock.Lock()
	s.happened[what]++
	s.lock.Unlock()
}

// problem records something that no replica may do.
func (s *faultySoak) problem(format string, arguments ...any) {
	s.lock.Lock()
	s.problems = append(s.problems, fmt.Sprintf(format, arguments...))
	s.lock.Unlock()
}

// replica is one process; a restarted replica is another one.
type replica struct {
	*facade
	name string
	// Access lines, with the ledger's lock.
	lines map[methodCode]int
	lock  sync.Mutex
	// The last scrape, its start, and the end of the process.
	last          series
	scraped, died time.Time
	drained       bool
	// Requests to the store without a reply so far.
	unanswered float64
}

func (s *faultySoak) startReplica(index int, address string) error {
	replica := &replica{scraped: time.Now(), name: fmt.Sprintf("replica %d at %s", index, time.Now().Format(time.TimeOnly)), lines: map[methodCode]int{}}
	flags := append([]string{"--listen", address}, s.flags...)
	var err error
	replica.facade, err = startFacade(s.program, "http://"+s.upstream.address, func(line []byte) { s.ledger.log(replica, line) }, flags...)
	if err != nil {
		return err
	}
	s.replicas[index] = replica
	go func() {
		for {
			s.scrape(replica)
			select {
			case <-replica.exited:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return nil
}

// count returns the number of access lines.
func (r *replica) count() int {
	total := 0
	for _, count := range r.lines {
		total += count
	}
	return total
}

// lastMetrics returns the latest metrics and when their scrape began.
func (r *replica) lastMetrics() (series, time.Time) {
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.last, r.scraped
}

// scrape keeps the metrics of a replica, which end with the process. A replica without a reply of the store, which a busy machine may delay, too,
// uses its own share of the rate.
func (s *faultySoak) scrape(r *replica) {
	begun := time.Now()
	metrics, err := r.scrape()
	r.lock.Lock()
	defer r.lock.Unlock()
	if err != nil || len(metrics) == 0 || begun.Before(r.scraped) {
		return
	}
	unanswered := 0.0
	for _, outcome := range []string{"timeout", "error", "skipped"} {
		unanswered += metrics.sum("quota_store_requests_total", fmt.Sprintf("outcome=%q", outcome))
	}
	if unanswered > r.unanswered {
		s.lock.Lock()
		if count := len(s.disturbed); count == 0 || begun.Sub(s.disturbed[count-1]) > time.Second {
			s.disturbed = append(s.disturbed, r.scraped)
		}
		s.lock.Unlock()
	}
	r.last, r.scraped, r.unanswered = metrics, begun, unanswered
}

// load runs callers and watchers under random faults for the duration, then ends the faults and waits for the watchers. Returns samples of
// replica 0.
func (s *faultySoak) load(duration time.Duration) ([]resources, error) {
	s.loads++
	s.upstream.setCalm(false)
	ctx, stop := context.WithTimeout(context.Background(), duration)
	defer stop()
	random := func(role int) *rand.Rand { return rand.New(rand.NewPCG(s.seed, uint64(100*s.loads+role))) }
	var addresses []resolver.Address
	for _, replica := range s.replicas {
		addresses = append(addresses, resolver.Address{Addr: replica.address})
	}
	var lines []*line
	for range faultsLines {
		line, err := dialLine(addresses)
		if err != nil {
			return nil, err
		}
		lines = append(lines, line)
	}
	var callers, faults sync.WaitGroup
	for worker := range faultsCallers {
		callers.Go(func() {
			s.call(ctx, random(10+worker), lines[worker%faultsLines], fmt.Sprint("caller-", worker%faultsTokens))
		})
	}
	callers.Go(func() { s.callGreedily(ctx, lines[0]) })
	for worker := range faultsWatchers {
		callers.Go(func() { s.watch(ctx, random(60+worker), lines[worker%faultsLines], worker) })
	}
	var samples []resources
	faults.Go(func() { samples = watch(ctx, s.replicas[0].facade, duration) })
	failures := make(chan error, 4)
	repeat := func(role int, every time.Duration, fault func(*rand.Rand) error) {
		faults.Go(func() {
			random := random(role)
			for made := 0; ; made++ {
				pause(ctx, every/2+time.Duration(random.Int64N(int64(every))))
				// Each kind happens at least once.
				if ctx.Err() != nil && made > 0 {
					return
				}
				if err := fault(random); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	// An outage opens the replicas' circuits for some seconds more.
	repeat(0, 2*s.every, s.breakUpstream)
	repeat(1, s.every*3/2, s.breakStore)
	repeat(2, s.every, s.endReplica)
	repeat(3, s.every, func(*rand.Rand) error {
		for _, line := range lines {
			if line.drop() {
				s.note("connections dropped")
			}
		}
		return nil
	})
	faults.Wait()
	s.upstream.setCalm(true)
	callers.Wait()
	for _, line := range lines {
		line.client.Close()
	}
	close(failures)
	return samples, <-failures
}

// breakUpstream closes all connections to the upstream and refuses others for up to 2 s.
func (s *faultySoak) breakUpstream(random *rand.Rand) error {
	s.note("outages of the upstream")
	return s.upstream.disappear(time.Duration(random.Int64N(int64(min(2*time.Second, s.every)))))
}

// breakStore damages the store for 1 to 5 s, or with a fault that is over at once.
func (s *faultySoak) breakStore(random *rand.Rand) error {
	var all []storeFault
	for _, fault := range storeFaults {
		if !fault.clock {
			all = append(all, fault)
		}
	}
	fault := all[random.IntN(len(all))]
	s.note(fault.name)
	disturb := func() {
		s.lock.Lock()
		s.disturbed = append(s.disturbed, time.Now())
		s.lock.Unlock()
	}
	disturb()
	if err := fault.begin(s.store, s.relay); err != nil {
		return fmt.Errorf("%s: %w", fault.name, err)
	}
	if fault.end == nil {
		return nil
	}
	defer disturb()
	time.Sleep(time.Second + time.Duration(random.Int64N(int64(min(4*time.Second, s.every)))))
	if err := fault.end(s.store, s.relay); err != nil {
		return fmt.Errorf("end of %s: %w", fault.name, err)
	}
	return nil
}

// endReplica drains or kills, in turn, one of the replicas except the first, and starts it again at the same address.
func (s *faultySoak) endReplica(random *rand.Rand) error {
	index := 1 + random.IntN(replicaCount-1)
	replica := s.replicas[index]
	begun := time.Now()
	drains := len(s.ended)%2 == 0
	if drains {
		s.note("replicas drained")
		replica.signal(syscall.SIGTERM)
		state, err := replica.wait()
		if err != nil {
			return fmt.Errorf("%s after SIGTERM: %w", replica.name, err)
		}
		if state.ExitCode() != 0 {
			s.problem("%s: exit code %d after SIGTERM", replica.name, state.ExitCode())
		}
	} else {
		s.note("replicas killed")
		s.scrape(replica)
		begun = time.Now()
		replica.kill()
	}
	replica.died, replica.drained = time.Now(), drains
	s.ended = append(s.ended, replica)
	time.Sleep(time.Duration(random.Int64N(int64(s.every / 2))))
	s.lock.Lock()
	s.started = append(s.started, time.Now())
	s.lock.Unlock()
	err := s.startReplica(index, replica.address)
	if !drains {
		s.lock.Lock()
		s.deaths = append(s.deaths, replicaDeath{replica.address, begun, time.Now().Add(noticedWithin)})
		s.lock.Unlock()
	}
	return err
}

// idle waits until replica 0 is idle and returns its resources.
func (s *faultySoak) idle() (resources, error) {
	// Kept connections to the upstream are not a leak, but their number changes.
	if err := s.upstream.disappear(0); err != nil {
		return resources{}, err
	}
	if _, err := s.replicas[0].settled(); err != nil {
		return resources{}, err
	}
	return s.replicas[0].resources()
}

// finalMetrics waits until all replicas are idle and use the store, and returns their metrics.
func (s *faultySoak) finalMetrics() ([]series, error) {
	var all []series
	for _, replica := range s.replicas {
		if err := eventually(func() bool {
			metrics, err := replica.scrape()
			return err == nil && metrics.sum("quota_store_up") == 1
		}); err != nil {
			return nil, fmt.Errorf("%s uses the store again: %w", replica.name, err)
		}
		metrics, err := replica.settled()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", replica.name, err)
		}
		all = append(all, metrics)
	}
	return all, nil
}

// Allowed growth without load, from the end of the warm-up to the end of the run.
const (
	keptResident    = 8 << 20
	keptDescriptors = 4
)

// unloaded compares a replica without load at the end of the warm-up and at the end of the run.
func unloaded(results *results, before, after resources) {
	results.check(after.resident <= before.resident+keptResident && after.descriptors <= before.descriptors+keptDescriptors && after.threads <= before.threads+growthThreads,
		"without load, after the warm-up and at the end: %.1f and %.1f MiB (at most %.0f more), %d and %d descriptors (at most %d more), %d and %d threads (at most %d more); "+
			"no connection, call, watch, watched task or upstream request is left",
		mebibytes(before.resident), mebibytes(after.resident), mebibytes(keptResident), before.descriptors, after.descriptors, keptDescriptors,
		before.threads, after.threads, growthThreads)
}

// balance compares what callers, replicas and the upstream have seen. The metrics are those of the running replicas.
func (s *faultySoak) balance(metrics []series, duration time.Duration) {
	for _, needed := range []string{"outages of the upstream", "replicas killed", "replicas drained", "connections dropped", "watches cancelled", "watches resumed", "readers paused"} {
		if s.happened[needed] == 0 {
			s.problem("the run had no %s", needed)
		}
	}
	s.check(len(s.problems) == 0, "%v: %d problems%s", s.happened, len(s.problems), evidence(s.problems))
	s.ledger.balance(s.results, s.deaths)
	for index, replica := range s.replicas {
		s.ledger.balanceReplica(s.results, replica, metrics[index])
		opened, ended := metrics[index].sum("grpc_server_started_total", `grpc_method="WatchTaskDetail"`), metrics[index].sum("rds_watch_ended_total")
		s.check(opened == ended, "%s: %.0f watches opened, %.0f ended", replica.name, opened, ended)
	}
	for _, replica := range s.ended {
		// A killed one may lose lines, which the ledger judges; a drained one may end calls after its last scrape.
		last, _ := replica.lastMetrics()
		if lines, handled := replica.count(), int(last.sum("grpc_server_handled_total")); replica.drained && lines < handled {
			s.check(false, "%s, drained: %d calls and watches handled, %d access lines", replica.name, handled, lines)
		}
		requireNoAlarm(s.results, replica.name, last)
	}
	s.balanceWatchers()
	s.balanceUpstream(metrics, duration)
}

// balanceWatchers requires that each watcher saw the last state of its task.
func (s *faultySoak) balanceWatchers() {
	var incomplete []string
	states, reopened := 0, 0
	for _, follower := range s.watchers {
		states += follower.states
		reopened += follower.reopened
		if last := s.upstream.last(follower.task.workflow); !follower.over || follower.last.state != last {
			incomplete = append(incomplete, fmt.Sprintf("%s: state %d of %d, over: %v", follower.task.workflow, follower.last.state, last, follower.over))
		}
	}
	s.check(len(incomplete) == 0 && len(s.watchers) > 2*faultsWatchers,
		"%d watchers, %d states, %d watches resumed: %d watchers did not see the end of their task%s",
		len(s.watchers), states, reopened, len(incomplete), evidence(incomplete))
}

// balanceUpstream compares the requests at the upstream with the attempts of all replicas, and with the rate.
func (s *faultySoak) balanceUpstream(metrics []series, duration time.Duration) {
	answered, attempts, unseen := 0, 0, 0
	for _, running := range metrics {
		answered += int(running.sum("rds_upstream_requests_total", `outcome="answer"`))
		attempts += int(running.sum("rds_upstream_requests_total"))
	}
	for _, replica := range s.ended {
		last, scraped := replica.lastMetrics()
		answered += int(last.sum("rds_upstream_requests_total", `outcome="answer"`))
		attempts += int(last.sum("rds_upstream_requests_total") + last.sum("rds_upstream_in_flight"))
		// Its attempts since its last scrape are among these.
		unseen += s.upstream.received(scraped, replica.died)
	}
	received := s.upstream.received(time.Time{}, time.Now())
	s.check(answered <= received && received <= attempts+unseen,
		"%d requests at the upstream; the replicas count %d attempts, %d of them with a reply; %d requests arrived between the last scrape of a replica and its end",
		received, attempts, answered, unseen)

	// An attempt may take --connect-timeout until its request arrives.
	window := faultsPeriod - 500*time.Millisecond
	calm, busiestCalm, busiest := 0, 0, 0
	var over []string
	for token, arrivals := range s.upstream.arrivals {
		first := 0
		for last, at := range arrivals {
			for at.Sub(arrivals[first]) >= window {
				first++
			}
			count := last - first + 1
			between := func(times []time.Time, from time.Time) int {
				count := 0
				for _, changed := range times {
					if changed.After(from) && changed.Before(at) {
						count++
					}
				}
				return count
			}
			// Each fault of the store and each start of a replica meanwhile may cost a burst, and no process exceeds the rate alone, even
			// without the store.
			recent := arrivals[first].Add(-faultsRecovery)
			limit, disturbances := faultsRate+1, between(s.disturbed, recent)
			if disturbances > 0 {
				limit += min(disturbances+between(s.started, recent), replicaCount-1+between(s.started, arrivals[first])) * faultsRate
			} else {
				calm++
				busiestCalm = max(busiestCalm, count)
			}
			busiest = max(busiest, count)
			if count > limit {
				over = append(over, fmt.Sprintf("%s: %d requests in %v until %s, limit %d after %d disturbances", token, count, window, at.Format(time.StampMilli), limit, disturbances))
			}
		}
	}
	slices.Sort(over)
	// A short run has a fault of the store at almost any time.
	s.check(len(over) == 0 && (calm > 0 || duration < 5*time.Minute), "--upstream-rate %s: at most %d requests of one token in %v, %d without a disturbance in the last %v (%d windows): %d windows exceed the rate%s",
		rateFlag(faultsRate, faultsPeriod), busiest, window, busiestCalm, faultsRecovery, calm, len(over), evidence(over))
}

// settled waits until no connection, call, watch or upstream request is open and returns the metrics.
func (f *facade) settled() (series, error) {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		metrics, err := f.scrape()
		if err != nil {
			return nil, err
		}
		connections, upstream := metrics.sum("grpc_server_connections"), metrics.sum("rds_upstream_in_flight")
		inFlight := metrics.sum("grpc_server_started_total") - metrics.sum("grpc_server_handled_total")
		watched := metrics.sum("rds_watches") + metrics.sum("rds_watched_tasks")
		if connections == 0 && upstream == 0 && inFlight == 0 && watched == 0 {
			return metrics, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("still %.0f connections, %.0f calls, %.0f upstream requests, %.0f watches and watched tasks", connections, inFlight, upstream, watched)
		}
	}
}
