package main

import (
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
)

const (
	prefaceLimit = 10 * time.Second // docs/behaviour.md, "Silent peers".
	silenceLimit = 40 * time.Second // 30 s until the PING, 10 s for its reply.
	idlePeers    = 10_000
	slack        = 5 * time.Second
)

var waits = []attack{
	{name: "slow preface", run: slowPreface},
	{name: "silent connections", run: silentConnections},
	{name: "10000 idle connections", flags: []string{"--max-connections", "10500", "--max-in-flight", "500"}, grows: idlePeers * 32 << 10, run: idleConnections},
	{name: "slow headers", run: slowHeaders},
	{name: "incomplete long headers", run: longHeaders},
}

// slowPreface sends a byte of the preface every second.
func slowPreface(t *target) (string, error) {
	return t.hold(500, prefaceLimit+slack, nil, func(socket net.Conn, second int) error {
		if second >= len(http2.ClientPreface) {
			return nil
		}
		_, err := io.WriteString(socket, http2.ClientPreface[second:second+1])
		return err
	})
}

// silentConnections send nothing.
func silentConnections(t *target) (string, error) {
	return t.hold(500, prefaceLimit+slack, nil, nil)
}

// idleConnections send their preface and acknowledge no PING.
func idleConnections(t *target) (string, error) {
	return t.hold(idlePeers, silenceLimit+slack, opening(), nil)
}

// slowHeaders starts a call and sends a byte of its headers every second.
func slowHeaders(t *target) (string, error) {
	// A literal field whose value of 120 bytes never ends (RFC 7541, section 6.2.2).
	first := frame(0x1, 0, []byte{0, 1, 'a', 120})
	return t.hold(200, silenceLimit+slack, append(opening(), first...), func(socket net.Conn, _ int) error {
		_, err := socket.Write(frame(0x9, 0, []byte{'b'}))
		return err
	})
}

// longHeaders sends 60 KB of a header block that never ends.
func longHeaders(t *target) (string, error) {
	// A literal field (RFC 7541, section 6.2.2) with a value of 16 000 = 127 + 1 + 124 * 128 bytes.
	field := append([]byte{0, 1, 'a', 127, 0x81, 124}, make([]byte, 16_000)...)
	for index := range field[6:] {
		field[6+index] = 'a'
	}
	first := opening()
	for kind := byte(0x1); len(first) < 60_000; kind = 0x9 {
		first = append(first, frame(kind, 0, field)...)
	}
	return t.hold(200, silenceLimit+slack, first, nil)
}

func opening() []byte { return append([]byte(http2.ClientPreface), frame(0x4, 0, nil)...) }

// frame encodes a frame on stream 1, or on stream 0 for SETTINGS (RFC 9113, section 4.1).
func frame(kind, flags byte, payload []byte) []byte {
	stream := byte(1)
	if kind == 0x4 {
		stream = 0
	}
	return append([]byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags, 0, 0, 0, stream}, payload...)
}

// hold opens connections and calls everySecond for each of them every second. The server must close all of them within the
// limit.
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
	maxOpen := metrics.sum("grpc_server_connections")

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
					// Writes to closed connections fail.
					_ = everySecond(socket, second)
				}
			}
			second++
		case <-end:
			return "", fmt.Errorf("%d of %d connections are still open after %v", count-gone, count, limit)
		}
	}
	return fmt.Sprintf("%d connections in %.1f s, %.0f open at once in %.1f MiB, all closed after %.1f s",
		count, opened.Seconds(), maxOpen, mebibytes(held.resident), last.Seconds()), nil
}
