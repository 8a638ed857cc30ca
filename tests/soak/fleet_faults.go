package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// storeFault damages the store under load.
type storeFault struct {
	name string
	// Causes the fault, and ends it.
	begin, end func(*store, *relay) error
	// The fault loses the store's data, but is over at once.
	losesData bool
	// The store gets a clock that can be moved.
	clock bool
}

const wrongPassword = "another-password"

var storeFaults = []storeFault{
	{name: "store killed",
		begin: func(s *store, _ *relay) error { s.kill(); return nil },
		end:   func(s *store, _ *relay) error { return s.start() }, losesData: true},
	{name: "store stopped by SIGSTOP",
		begin: func(s *store, _ *relay) error { return s.signal(syscall.SIGSTOP) },
		end:   func(s *store, _ *relay) error { return s.signal(syscall.SIGCONT) }},
	{name: "store restarted",
		begin: func(s *store, _ *relay) error { s.kill(); return s.start() }, losesData: true},
	{name: "store flushed",
		begin: func(s *store, _ *relay) error { return s.do("FLUSHALL") }, losesData: true},
	{name: "store cut off",
		begin: func(_ *store, r *relay) error { r.mute.Store(true); return nil },
		end:   func(_ *store, r *relay) error { r.mute.Store(false); return nil }},
	{name: "store slow by 200 ms",
		begin: func(_ *store, r *relay) error { r.delay.Store(int64(200 * time.Millisecond)); return nil },
		end:   func(_ *store, r *relay) error { r.delay.Store(0); return nil }},
	{name: "store with another password",
		begin: func(s *store, r *relay) error {
			err := s.do("CONFIG", "SET", "requirepass", wrongPassword)
			// An open connection would keep its permission.
			r.reset()
			return err
		},
		end: func(s *store, _ *relay) error { return s.authenticated("CONFIG", "SET", "requirepass", "") }},
	{name: "store read-only",
		begin: func(s *store, _ *relay) error { return s.do("REPLICAOF", "127.0.0.1", "1") },
		end:   func(s *store, _ *relay) error { return s.do("REPLICAOF", "NO", "ONE") }},
	{name: "store out of memory",
		begin: func(s *store, _ *relay) error { return s.do("CONFIG", "SET", "maxmemory", "1") },
		end:   func(s *store, _ *relay) error { return s.do("CONFIG", "SET", "maxmemory", "0") }},
	// All entries expire.
	{name: "store's clock an hour ahead", clock: true,
		begin: func(s *store, _ *relay) error { return s.setClock(time.Hour) }, losesData: true},
	// All times in the store are in the future.
	{name: "store's clock an hour back", clock: true,
		begin: func(s *store, _ *relay) error { return s.setClock(-time.Hour) }, losesData: true},
}

// Loads next to a fault: polite callers have several tokens and use a fifth of the rate of each, so that they also stay below the share of
// each replica that paces itself alone. The greedy caller has one token. The period is longer than the time in which all replicas find
// the store again.
const (
	faultRate     = 60
	faultPeriod   = 6 * time.Second
	politeTokens  = 6
	politeEvery   = 80 * time.Millisecond
	politePrefix  = "polite-"
	greedyToken   = "greedy"
	greedyEvery   = 20 * time.Millisecond
	storeWait     = 50 * time.Millisecond
	storeSettles  = 200 * time.Millisecond
	storeRecovers = 10 * time.Second
)

// timedCall is a call of the polite callers.
type timedCall struct {
	begun time.Time
	took  time.Duration
}

// storeFault has polite and greedy callers before, during and after a fault.
func (b *fleetBench) storeFault(fault storeFault) error {
	store, err := startStore()
	if err != nil {
		return err
	}
	defer store.close()
	if fault.clock {
		if err := store.restartWithClock(); err != nil {
			return err
		}
	}
	relay, err := startRelay(store.address)
	if err != nil {
		return err
	}
	defer relay.close()
	upstream, err := startRecorder()
	if err != nil {
		return err
	}
	defer upstream.close()
	replicas, err := b.startOver(store, upstream, upstream.url, relay.address, "--upstream-rate", rateFlag(faultRate, faultPeriod))
	if err != nil {
		return err
	}
	defer replicas.stop()
	// Each of them must have counted the others, to know its share.
	if err := eventually(func() bool { return replicas.sum("quota_store_replicas") == replicaCount*replicaCount }); err != nil {
		return fmt.Errorf("the replicas do not see each other: %w", err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() { replicas.greedy(ctx, greedyToken, greedyEvery) })
	var lock sync.Mutex
	var calls []timedCall
	failures := &phase{}
	running.Go(func() {
		var each sync.WaitGroup
		defer each.Wait()
		number := 0
		for start := time.Now(); ctx.Err() == nil; start = start.Add(politeEvery) {
			pause(ctx, time.Until(start))
			replica, token, task := number/politeTokens%replicaCount, fmt.Sprint(politePrefix, number%politeTokens), fmt.Sprint("polite-", number)
			number++
			each.Go(func() {
				begun := time.Now()
				result, err := replicas.honest(replica, token, task)
				failures.add(result, err)
				lock.Lock()
				calls = append(calls, timedCall{begun, result.took})
				lock.Unlock()
			})
		}
	})

	calm, lasts, after := 4*time.Second, faultPeriod, 2*time.Second
	if !b.short {
		calm, lasts, after = 2*faultPeriod, 5*faultPeriod, 2*faultPeriod
	}
	begun := time.Now()
	time.Sleep(calm)
	if err := fault.begin(store, relay); err != nil {
		return err
	}
	broken := time.Now()
	time.Sleep(lasts)
	noticed := replicaCount - replicas.up()
	if fault.end != nil {
		if err := fault.end(store, relay); err != nil {
			return err
		}
	}
	healed := time.Now()
	recovery := eventually(func() bool { return replicas.up() == replicaCount })
	recovered := time.Since(healed)
	time.Sleep(after)
	cancel()
	running.Wait()

	between := func(from, to time.Time) *latencies {
		found := &latencies{}
		for _, call := range calls {
			if !call.begun.Before(from) && call.begun.Before(to) {
				found.add(call.took)
			}
		}
		return found
	}
	before, first, later := between(begun, broken), between(broken, broken.Add(storeSettles)), between(broken.Add(storeSettles), healed)
	b.check(failures.failed == 0, "%s: %d polite calls, %d failed %s", fault.name, failures.calls(), failures.failed, failures.first)
	// A tenth more, because the replicas have not used the last window equally.
	limit := faultRate*11/10 + replicaCount
	if fault.losesData {
		limit = 2 * faultRate
	}
	busiest := upstream.busiest(greedyToken, faultPeriod)
	b.check(busiest <= limit, "%s: at most %d upstream calls of the greedy caller in %v (at most %d)", fault.name, busiest, faultPeriod, limit)
	allowance := b.allowance(25 * time.Millisecond)
	b.check(first.percentile(100) <= before.percentile(100)+storeWait+allowance && later.percentile(99) <= before.percentile(99)+allowance && later.percentile(50) <= before.percentile(50)+allowance/10,
		"%s: calls take p50 %v, p99 %v, at most %v before the fault; at most %v in the first %v; then p50 %v, p99 %v, at most %v",
		fault.name, before.percentile(50), before.percentile(99), before.percentile(100), first.percentile(100), storeSettles,
		later.percentile(50), later.percentile(99), later.percentile(100))
	b.check(recovery == nil && recovered <= storeRecovers, "%s: %d of %d replicas were without the store after %v; all use it again %v after its end",
		fault.name, noticed, replicaCount, lasts, recovered.Round(10*time.Millisecond))
	b.check(fault.end == nil || noticed == replicaCount, "%s: all replicas notice it", fault.name)
	return nil
}

// authenticated sends one command with the password of the fault.
func (s *store) authenticated(arguments ...any) error {
	pipeline := s.admin.Pipeline()
	ctx := context.Background()
	pipeline.Do(ctx, "AUTH", wrongPassword)
	last := pipeline.Do(ctx, arguments...)
	_, _ = pipeline.Exec(ctx)
	return last.Err()
}

// reset closes all connections.
func (r *relay) reset() {
	r.lock.Lock()
	defer r.lock.Unlock()
	for _, socket := range r.sockets {
		_ = socket.Close()
	}
	r.sockets = nil
}

// shortestResult is the size of a result in the store; leases are shorter.
const shortestResult = 64

// forgery rewrites the entries of the store, whose names and values it gets.
type forgery struct {
	name  string
	forge func(*store, map[string]string) error
}

var forgeries = []forgery{
	{"with a flipped bit", rewrite(func(value string) string {
		last := len(value) - 1
		return value[:last] + string([]byte{value[last] ^ 1})
	})},
	{"truncated", rewrite(func(value string) string { return value[:len(value)/2] })},
	{"empty", rewrite(func(string) string { return "" })},
	{"with a flipped bit in the middle", rewrite(func(value string) string {
		middle := len(value) / 2
		return value[:middle] + string([]byte{value[middle] ^ 1}) + value[middle+1:]
	})},
	{"foreign", rewrite(func(string) string { return `{"job_id":"forged","status":"Completed"}` })},
	{"over 64 KiB", rewrite(func(value string) string { return value + strings.Repeat("x", 65<<10) })},
	{"of another type", func(s *store, entries map[string]string) error {
		for name := range entries {
			if err := errors.Join(s.do("DEL", name), s.do("RPUSH", name, "a", "b"), s.do("PEXPIRE", name, "60000")); err != nil {
				return err
			}
		}
		return nil
	}},
	{"swapped", func(s *store, entries map[string]string) error {
		names := slices.Sorted(maps.Keys(entries))
		for index, name := range names {
			if err := s.do("SET", name, entries[names[(index+1)%len(names)]], "KEEPTTL"); err != nil {
				return err
			}
		}
		return nil
	}},
}

func rewrite(change func(string) string) func(*store, map[string]string) error {
	return func(s *store, entries map[string]string) error {
		for name, value := range entries {
			if err := s.do("SET", name, change(value), "KEEPTTL"); err != nil {
				return err
			}
		}
		return nil
	}
}

// forgedEntries rewrites cached results, and calls the replicas that have not got them yet.
func (b *fleetBench) forgedEntries() error {
	replicas, err := b.start("--credentials", "token", "--cache-ttl", "5m")
	if err != nil {
		return err
	}
	defer replicas.close()
	const tasks = 8
	// Asks all tasks of one name at a replica. Returns the number of upstream calls.
	ask := func(replica int, name string) (int, error) {
		before := replicas.upstream.requests("")
		for number := range tasks {
			if _, err := replicas.honest(replica, "", fmt.Sprint(name, number)); err != nil {
				return 0, err
			}
		}
		return replicas.upstream.requests("") - before, nil
	}
	stored := func(known map[string]string) (map[string]string, error) {
		var fresh map[string]string
		err := eventually(func() bool {
			all, err := replicas.store.strings()
			if err != nil {
				return false
			}
			fresh = map[string]string{}
			for name, value := range all {
				if _, old := known[name]; !old && len(value) > shortestResult {
					fresh[name] = value
				}
			}
			return len(fresh) == tasks
		})
		if err != nil {
			return fresh, fmt.Errorf("%d entries of %d tasks: %w", len(fresh), tasks, err)
		}
		return fresh, nil
	}
	known := map[string]string{}
	for _, forgery := range append([]forgery{{"untouched", rewrite(func(value string) string { return value })}}, forgeries...) {
		name := strings.ReplaceAll(forgery.name, " ", "-") + "-"
		first, err := ask(0, name)
		if err != nil {
			return fmt.Errorf("%s: %w", forgery.name, err)
		}
		entries, err := stored(known)
		if err != nil {
			return fmt.Errorf("%s: %w", forgery.name, err)
		}
		for name, value := range entries {
			known[name] = value
			if strings.Contains(value, "job_id") || strings.Contains(value, name) || strings.Contains(value, serverToken) {
				b.check(false, "forged entries: an entry is readable: %q", value)
			}
		}
		if err := forgery.forge(replicas.store, entries); err != nil {
			return fmt.Errorf("%s: %w", forgery.name, err)
		}
		rejectedBefore := replicas.sum("quota_store_requests_total", `outcome="rejected"`)
		again, err := ask(1, name)
		if err != nil {
			return fmt.Errorf("%s: %w", forgery.name, err)
		}
		rejected := replicas.sum("quota_store_requests_total", `outcome="rejected"`) - rejectedBefore
		expected := tasks
		if forgery.name == "untouched" {
			expected = 0
		}
		b.check(first == tasks && again == expected, "forged entries: %d %s: %d are used, %d are counted as rejected", tasks, forgery.name, tasks-again, int(rejected))
	}
	return b.replayed(replicas)
}

// replayed puts an entry back that has expired.
func (b *fleetBench) replayed(earlier *replicas) error {
	replicas, err := b.startOver(earlier.store, earlier.upstream, earlier.upstream.url, earlier.store.address, "--credentials", "token", "--cache-ttl", "1s")
	if err != nil {
		return err
	}
	defer replicas.stop()
	old, err := replicas.store.strings()
	if err != nil {
		return err
	}
	if _, err := replicas.honest(0, "", "replayed"); err != nil {
		return err
	}
	var name, value string
	if err := eventually(func() bool {
		all, err := replicas.store.strings()
		for found := range all {
			if _, known := old[found]; !known && len(all[found]) > shortestResult {
				name, value = found, all[found]
			}
		}
		return err == nil && name != ""
	}); err != nil {
		return fmt.Errorf("the entry to replay: %w", err)
	}
	time.Sleep(1500 * time.Millisecond)
	// The time at the start of an entry, in milliseconds, is for the store's scripts only.
	const stamp = 13
	for _, forged := range []struct{ kind, value string }{
		{"expired", value},
		{"expired, with the present time", fmt.Sprint(time.Now().UnixMilli()) + value[stamp:]},
	} {
		if err := replicas.store.do("SET", name, forged.value, "PX", "60000"); err != nil {
			return err
		}
		before := replicas.upstream.requests("")
		if _, err := replicas.honest(1, "", "replayed"); err != nil {
			return err
		}
		made := replicas.upstream.requests("") - before
		b.check(made == 1, "forged entries: 1 %s: %d are used", forged.kind, 1-made)
		time.Sleep(1500 * time.Millisecond)
	}
	return nil
}
