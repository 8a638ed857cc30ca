package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

const (
	prefaceLimit = 10 * time.Second // README, "Silent peers".
	silenceLimit = 40 * time.Second // 30 s until the PING, 10 s for its answer.
	idlePeers    = 10_000
	slack        = 5 * time.Second
)

var waits = []attack{
	{name: "slow preface", waits: true, run: slowPreface},
	{name: "silent connections", waits: true, run: silentConnections},
	{name: "10000 idle connections", waits: true, flags: []string{"--max-connections", "12000"}, grows: idlePeers * 32 << 10, run: idleConnections},
	{name: "slow headers", waits: true, run: slowHeaders},
	{name: "slow body", waits: true, flags: []string{"--timeout", "5s"}, grows: 128 << 20, run: slowBody},
	{name: "health checks half said", waits: true, flags: []string{"--timeout", "5s"}, grows: 64 << 20, run: halfChecks},
	{name: "bodies that are no gRPC", waits: true, flags: []string{"--timeout", "5s"}, grows: 128 << 20, run: webBodies},
	{name: "health watches", waits: true, grows: 128 << 20, run: healthWatches},
	{name: "window 0", waits: true, flags: []string{"--timeout", "3s"}, grows: 64 << 20, run: closedWindow},
}

// slowPreface says a byte of the preface every second.
func slowPreface(t *target) (string, error) {
	return t.hold(500, prefaceLimit+slack, nil, func(socket net.Conn, second int) error {
		if second >= len(http2.ClientPreface) {
			return nil
		}
		_, err := io.WriteString(socket, http2.ClientPreface[second:second+1])
		return err
	})
}

// silentConnections never say a word.
func silentConnections(t *target) (string, error) {
	return t.hold(500, prefaceLimit+slack, nil, nil)
}

// idleConnections say their preface and answer no PING.
func idleConnections(t *target) (string, error) {
	return t.hold(idlePeers, silenceLimit+slack, opening(), nil)
}

// slowHeaders begins a call and goes on with a byte of its headers every second.
func slowHeaders(t *target) (string, error) {
	// A literal field whose value of 120 bytes never comes to its end (RFC 7541, section 6.2.2).
	first := frame(0x1, 0, []byte{0, 1, 'a', 120})
	return t.hold(200, silenceLimit+slack, append(opening(), first...), func(socket net.Conn, _ int) error {
		_, err := socket.Write(frame(0x9, 0, []byte{'b'}))
		return err
	})
}

func opening() []byte { return append([]byte(http2.ClientPreface), frame(0x4, 0, nil)...) }

// frame is one on stream 1, but for SETTINGS (RFC 9113, section 4.1).
func frame(kind, flags byte, payload []byte) []byte {
	stream := byte(1)
	if kind == 0x4 {
		stream = 0
	}
	return append([]byte{0, 0, byte(len(payload)), kind, flags, 0, 0, 0, stream}, payload...)
}

// hold opens connections, does something to each of them every second, and demands that the other side closes them all
// within the limit.
func (t *target) hold(count int, limit time.Duration, first []byte, everySecond func(net.Conn, int) error) (string, error) {
	var open []net.Conn
	closed := make(chan time.Duration, count)
	begun := time.Now()
	defer func() {
		for _, socket := range open {
			_ = socket.Close()
		}
	}()
	for range count {
		socket, err := net.Dial("tcp", t.address)
		if err != nil {
			return fmt.Sprintf("%d connections", len(open)), err
		}
		if _, err := socket.Write(first); err != nil {
			return "", err
		}
		open = append(open, socket)
		go func() {
			_, _ = io.Copy(io.Discard, socket)
			closed <- time.Since(begun)
		}()
	}
	opened := time.Since(begun)
	metrics, err := t.scrape()
	if err != nil {
		return "", err
	}
	held, err := t.resources()
	if err != nil {
		return "", err
	}
	most := metrics.sum("grpc_server_connections")

	ticks := time.NewTicker(time.Second)
	defer ticks.Stop()
	end := time.After(limit + opened)
	gone, last, second := 0, time.Duration(0), 0
	for gone < count {
		select {
		case last = <-closed:
			gone++
		case <-ticks.C:
			for _, socket := range open {
				if everySecond != nil {
					// What is closed already takes no more.
					_ = everySecond(socket, second)
				}
			}
			second++
		case <-end:
			return "", fmt.Errorf("%d of %d connections are still open after %v", count-gone, count, limit)
		}
	}
	return fmt.Sprintf("%d connections in %.1f s, %.0f open at once in %.1f MiB, all closed after %.1f s",
		count, opened.Seconds(), most, mebibytes(held.resident), last.Seconds()), nil
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

// hang makes calls, so many on each connection, that must all be ended by the other side in one of the ways expected.
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
	for outcome := range total {
		if !slices.Contains(expected, outcome) {
			failures = append(failures, fmt.Errorf("not expected: %s", outcome))
		}
	}
	return text, errors.Join(failures...)
}
