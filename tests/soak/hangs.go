package main

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// hangs are calls whose callers keep them from ending.
var hangs = []attack{
	{name: "slow body", flags: []string{"--timeout", "5s"}, grows: 128 << 20, run: slowBody},
	{name: "unfinished health checks", flags: []string{"--timeout", "5s"}, grows: 64 << 20, run: unfinishedChecks},
	// The honest caller's next call waits behind 300 MiB.
	{name: "bodies that are not gRPC", honestWithin: 2 * time.Second, run: webBodies},
	// The honest caller's next call waits behind 20 000 others.
	{name: "rejected calls without a message", honestWithin: 5 * time.Second, run: incompleteCalls},
	{name: "health watches", grows: 64 << 20, run: healthWatches},
	{name: "window 0", flags: []string{"--timeout", "3s"}, grows: 64 << 20, run: closedWindow},
}

// slowBody starts a thousand calls, half of the limit, each with all but the end of the longest message, and sends a byte
// every half second.
func slowBody(t *target) (string, error) {
	almost := framed(make([]byte, 64<<10))[:60<<10]
	return t.hang(1000, 10, nil, func(peer *peer, streams int) {
		peer.awaitWindow()
		for number := range streams {
			peer.headers(streamID(number), pairs(), false)
			peer.data(streamID(number), almost)
		}
		_ = peer.writer.Flush()
		for range 8 {
			time.Sleep(500 * time.Millisecond)
			for number := range streams {
				_ = peer.framer.WriteData(streamID(number), false, []byte{0})
			}
			_ = peer.writer.Flush()
		}
	}, "gRPC 4")
}

// unfinishedChecks starts five thousand health checks and sends only half of each message.
func unfinishedChecks(t *target) (string, error) {
	half := framed(make([]byte, 4000))[:2000]
	return t.hang(5000, 50, nil, func(peer *peer, streams int) {
		peer.awaitWindow()
		for number := range streams {
			peer.headers(streamID(number), pairs([2]string{":path", healthMethod}), false)
			peer.data(streamID(number), half)
		}
		_ = peer.writer.Flush()
	}, "gRPC 4", "gRPC 8")
}

// webBodies posts 60 KiB each of another content type and does not end the body. The sixteen bodies of a connection just fit into its
// flow-control window: more connections would measure their buffers, 46 KiB each when busy, and not the bodies.
func webBodies(t *target) (string, error) {
	return t.hang(5008, 16, nil, func(peer *peer, streams int) {
		peer.awaitWindow()
		for number := range streams {
			peer.headers(streamID(number), pairs([2]string{"content-type", "text/plain"}), false)
			peer.data(streamID(number), make([]byte, 60<<10))
		}
		_ = peer.writer.Flush()
	}, "HTTP 415")
}

// incompleteCalls makes twenty thousand calls of an unknown method and never sends their messages.
func incompleteCalls(t *target) (string, error) {
	return t.hang(20_000, 100, nil, func(peer *peer, streams int) {
		for number := range streams {
			peer.headers(streamID(number), pairs([2]string{":path", "/no/such"}), false)
		}
		_ = peer.writer.Flush()
	}, "gRPC 12")
}

// healthWatches starts ten thousand health watches.
func healthWatches(t *target) (string, error) {
	return t.hang(10_000, 100, nil, func(peer *peer, streams int) {
		watch := pairs([2]string{":path", "/grpc.health.v1.Health/Watch"}, [2]string{"grpc-timeout", "5S"})
		for number := range streams {
			peer.headers(streamID(number), watch, false)
			_ = peer.framer.WriteData(streamID(number), true, framed(nil))
		}
		_ = peer.writer.Flush()
	}, "gRPC 4", "gRPC 8")
}

// closedWindow makes valid calls with a flow-control window of 0, so that no byte of a reply can be sent.
func closedWindow(t *target) (string, error) {
	settings := []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}
	return t.hang(1000, 100, settings, func(peer *peer, streams int) {
		for number := range streams {
			peer.call(streamID(number), pairs(), example(number))
		}
		_ = peer.writer.Flush()
	}, "reset CANCEL")
}

// hang makes calls, streams of them per connection. The server must end all of them in the expected ways.
func (t *target) hang(calls, streams int, settings []http2.Setting, begin func(*peer, int), expected ...string) (string, error) {
	connections := calls / streams
	begun := time.Now()
	var lock sync.Mutex
	total := map[string]int{}
	failures := make([]error, connections)
	var running sync.WaitGroup
	for index := range connections {
		running.Go(func() {
			peer, err := t.open(settings...)
			if err != nil {
				failures[index] = err
				return
			}
			defer peer.close()
			peer.read()
			begin(peer, streams)
			outcomes := peer.outcomes(streams, 15*time.Second)
			lock.Lock()
			defer lock.Unlock()
			for outcome, count := range outcomes {
				total[outcome] += count
			}
		})
	}
	running.Wait()
	text := fmt.Sprintf("%d calls on %d connections, ended after %.1f s: %v", calls, connections, time.Since(begun).Seconds(), total)
	for _, outcome := range expected {
		if total[outcome] == 0 {
			failures = append(failures, fmt.Errorf("no call ended with: %s", outcome))
		}
	}
	for outcome := range total {
		if !slices.Contains(expected, outcome) {
			failures = append(failures, fmt.Errorf("calls ended with: %s", outcome))
		}
	}
	return text, errors.Join(failures...)
}
