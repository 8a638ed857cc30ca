package main

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// A small limit and a slow upstream: 32 permits for 400 ms each are 80 replies a second. Ten times that is little work for a
// client, so that the limit is measured and not the machine.
const (
	overloadLimit       = 32
	upstreamTakes       = 400 * time.Millisecond
	capacity            = overloadLimit * int(time.Second) / int(upstreamTakes)
	overloadConnections = 8
)

// Requirements.
const (
	goodputShare  = 0.9                    // Of the peak goodput, at ten times the load.
	healthWithin  = 100 * time.Millisecond // At the caller: p99, or the median of fewer than healthSamples.
	healthSamples = 200                    // Enough for p99 to be more than one or two samples.
	overloadGrows = 16 << 20               // Peak memory at ten times the load above that at the single load.
)

// bounds are requirements that depend on the window: one pause of a busy machine is a large part of a short window.
type bounds struct {
	shedWithin    time.Duration // p99 in the program; p50 at the caller, which shares the machine.
	acceptedAfter time.Duration // p99 at the caller, beyond the upstream's time.
	offeredInTime float64       // Share of the load that the generator must offer in time.
}

func boundsFor(window time.Duration) bounds {
	if window < 10*time.Second {
		return bounds{50 * time.Millisecond, 600 * time.Millisecond, 0.85}
	}
	return bounds{10 * time.Millisecond, 300 * time.Millisecond, 0.95}
}

// level is one load and its results.
type level struct {
	times, offered      int
	window              time.Duration
	good, shed, healthy latencies
	shedInProgram       latencies // Duration in the access log.
	other               atomic.Int64
	firstOther          atomic.Value
	peakMemory          int64
	cpuShare, demand    float64
}

func (l *level) goodput() float64 { return float64(l.good.count()) / l.window.Seconds() }

// overload offers 1, 2, 5 and 10 times the capacity in an open loop: calls start at fixed times, however long others take.
func overload(results *results, program string, window time.Duration) error {
	upstream, err := startSandbox(program, anyPort)
	if err != nil {
		return err
	}
	defer upstream.kill()
	var current atomic.Pointer[level]
	facade, err := startFacade(program, upstream.url(), func(line []byte) {
		if level := current.Load(); level != nil && textField(line, "grpc_code") == "ResourceExhausted" {
			level.shedInProgram.add(durationField(line))
		}
	}, "--max-in-flight", fmt.Sprint(overloadLimit))
	if err != nil {
		return err
	}
	defer facade.kill()
	var connections []*grpc.ClientConn
	for range overloadConnections {
		connection, err := dial(facade.address)
		if err != nil {
			return err
		}
		defer connection.Close()
		connections = append(connections, connection)
	}
	// Opens the connections on both sides.
	if err := (&level{times: 1, window: time.Second}).offer(facade, connections); err != nil {
		return err
	}

	var levels []*level
	peak := 0.0
	for _, times := range []int{1, 2, 5, 10} {
		level := &level{times: times, window: window}
		current.Store(level)
		if err := level.offer(facade, connections); err != nil {
			return err
		}
		levels = append(levels, level)
		peak = max(peak, level.goodput())
	}
	demanded := boundsFor(window)
	for _, level := range levels {
		others := level.other.Load()
		results.check(others == 0,
			"%2dx: %d calls in %.0f s, goodput %.1f/s, accepted p50 %v p99 %v, rejected %d p50 %v p99 %v "+
				"(%v in the program), health p99 %v, "+
				"memory at most %.1f MiB, CPU %.2f; %d other ends %v",
			level.times, level.offered, level.window.Seconds(), level.goodput(), level.good.percentile(50), level.good.percentile(99),
			level.shed.count(), level.shed.percentile(50), level.shed.percentile(99), level.shedInProgram.percentile(99),
			level.healthy.percentile(99),
			mebibytes(level.peakMemory), level.cpuShare, others, level.firstOther.Load())
		results.check(level.demand >= demanded.offeredInTime, "%2dx: the generator kept up: %.1f %% of the load was offered in time (at least %.0f %%)",
			level.times, 100*level.demand, 100*demanded.offeredInTime)
		acceptedWithin := upstreamTakes + demanded.acceptedAfter
		results.check(level.good.percentile(99) < acceptedWithin, "%2dx: accepted calls, p99 below %v", level.times, acceptedWithin)
		percent := 50
		if level.healthy.count() >= healthSamples {
			percent = 99
		}
		results.check(level.healthy.percentile(percent) < healthWithin, "%2dx: health, p%d below %v", level.times, percent, healthWithin)
		results.check(level.shedInProgram.percentile(99) < demanded.shedWithin && level.shed.percentile(50) < demanded.shedWithin,
			"%2dx: rejections, p99 in the program and p50 at the caller below %v", level.times, demanded.shedWithin)
	}
	last := levels[len(levels)-1]
	results.check(last.shed.count() > last.offered*8/10, "ten times the load: %d of %d calls rejected", last.shed.count(), last.offered)
	results.check(last.goodput() >= goodputShare*peak, "goodput at ten times the load is %.1f %% of the peak of %.1f/s (at least %.0f %%)",
		100*last.goodput()/peak, peak, 100*goodputShare)
	growth := last.peakMemory - levels[0].peakMemory
	results.check(growth < overloadGrows, "memory at ten times the load: %.1f MiB more than at the single load (below %.0f)",
		mebibytes(growth), mebibytes(overloadGrows))
	return nil
}

func (l *level) offer(facade *facade, connections []*grpc.ClientConn) error {
	l.offered = int(float64(l.times*capacity) * l.window.Seconds())
	before, err := facade.resources()
	if err != nil {
		return err
	}
	begun := time.Now()
	interval := l.window / time.Duration(l.offered)
	var running sync.WaitGroup
	watching, stop := context.WithCancel(context.Background())
	running.Go(func() { l.watch(watching, facade, connections[0]) })
	for number := range l.offered {
		time.Sleep(time.Until(begun.Add(interval * time.Duration(number))))
		running.Go(func() { l.ask(connections[number%len(connections)], number) })
	}
	l.demand = l.window.Seconds() / max(l.window.Seconds(), time.Since(begun).Seconds())
	time.Sleep(2 * upstreamTakes)
	stop()
	running.Wait()
	after, err := facade.resources()
	if err != nil {
		return err
	}
	l.cpuShare = (after.cpu - before.cpu).Seconds() / time.Since(begun).Seconds()
	return nil
}

// durationField returns the duration of an access line's call.
func durationField(line []byte) time.Duration {
	_, rest, _ := bytes.Cut(line, []byte(`"duration_ms":`))
	value, _, _ := bytes.Cut(rest, []byte(","))
	milliseconds, _ := strconv.ParseFloat(string(value), 64)
	return time.Duration(milliseconds * float64(time.Millisecond))
}

func (l *level) ask(connection *grpc.ClientConn, number int) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	request := taskRequest{projectID, fmt.Sprint("slow-", upstreamTakes.Milliseconds()), fmt.Sprintf("w-%d-%d", l.times, number), ""}
	result := call(ctx, connection, method, request.encoded(), []string{"x-auth-token", token})
	switch result.code {
	case codes.OK:
		l.good.add(result.took)
	case codes.ResourceExhausted:
		l.shed.add(result.took)
	default:
		l.other.Add(1)
		l.firstOther.CompareAndSwap(nil, result)
	}
}

// watch checks health and samples the memory, ten times a second.
func (l *level) watch(ctx context.Context, facade *facade, connection *grpc.ClientConn) {
	every := time.NewTicker(100 * time.Millisecond)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		if used, err := facade.resources(); err == nil {
			l.peakMemory = max(l.peakMemory, used.resident)
		}
		if result := call(ctx, connection, healthMethod, nil, nil); result.code == codes.OK {
			l.healthy.add(result.took)
		} else if ctx.Err() == nil {
			l.other.Add(1)
			l.firstOther.CompareAndSwap(nil, result)
		}
	}
}
