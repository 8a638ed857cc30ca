package main

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// hangs are calls that their callers do not let end.
var hangs = []attack{
	{name: "slow body", flags: []string{"--timeout", "5s"}, grows: 128 << 20, run: slowBody},
	{name: "health checks half said", flags: []string{"--timeout", "5s"}, grows: 64 << 20, run: halfChecks},
	{name: "bodies that are no gRPC", flags: []string{"--timeout", "5s"}, grows: 128 << 20, run: webBodies},
	{name: "health watches", grows: 64 << 20, run: healthWatches},
	{name: "window 0", flags: []string{"--timeout", "3s"}, grows: 64 << 20, run: closedWindow},
}

// slowBody begins a thousand calls, half of the limit, each with all but the end of the longest message, and goes on with
// a byte every half second.
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

// halfChecks asks for health five thousand times and keeps half of each message to itself.
func halfChecks(t *target) (string, error) {
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

// webBodies posts what is no gRPC, 60 KiB each, and does not end it.
func webBodies(t *target) (string, error) {
	return t.hang(5000, 10, nil, func(peer *peer, streams int) {
		peer.awaitWindow()
		for number := range streams {
			peer.headers(streamID(number), pairs([2]string{"content-type", "text/plain"}), false)
			peer.data(streamID(number), make([]byte, 60<<10))
		}
		_ = peer.writer.Flush()
	}, "HTTP 415")
}

// healthWatches watches ten thousand times.
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

// closedWindow asks properly and lets no byte of the answers through.
func closedWindow(t *target) (string, error) {
	settings := []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}
	return t.hang(1000, 100, settings, func(peer *peer, streams int) {
		for number := range streams {
			peer.ask(streamID(number), pairs(), example(number))
		}
		_ = peer.writer.Flush()
	}, "reset CANCEL")
}

// hang makes calls, so many on each connection, that must all be ended by the other side in the ways expected.
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
			failures = append(failures, fmt.Errorf("expected: %s", outcome))
		}
	}
	for outcome := range total {
		if !slices.Contains(expected, outcome) {
			failures = append(failures, fmt.Errorf("not expected: %s", outcome))
		}
	}
	return text, errors.Join(failures...)
}
