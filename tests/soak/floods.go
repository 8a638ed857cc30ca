package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// Allowed frames are sent in bursts with pauses, because the honest caller shares this process and its machine.
const (
	floodFor   = time.Second
	floodBurst = 1000
	floodPause = 10 * time.Millisecond
)

var floods = []attack{
	{name: "rapid reset", run: func(t *target) (string, error) {
		return t.provoke(100, func(p *peer) {
			for number := range 2000 {
				p.headers(streamID(number), pairs(), false)
				_ = p.framer.WriteRSTStream(streamID(number), http2.ErrCodeCancel)
			}
		})
	}},
	{name: "streams that the server must reset", run: func(t *target) (string, error) {
		return t.provoke(100, func(p *peer) {
			for number := range 2000 {
				p.headers(streamID(number), pairs(), false)
				// A flow-control window that overflows is an error of the stream, not of the connection.
				_ = p.framer.WriteWindowUpdate(streamID(number), 1<<31-1)
			}
		})
	}},
	{name: "CONTINUATION flood", run: func(t *target) (string, error) {
		return t.provoke(100, func(p *peer) {
			_ = p.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(pairs())})
			for range 10_000 {
				_ = p.framer.WriteContinuation(1, false, []byte{0, 1, 'a', 1, 'b'})
			}
		})
	}},
	{name: "empty CONTINUATION flood", run: func(t *target) (string, error) {
		return t.provoke(100, func(p *peer) {
			_ = p.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(pairs())})
			for range 10_000 {
				_ = p.framer.WriteContinuation(1, false, nil)
			}
		})
	}},
	{name: "empty DATA flood", run: func(t *target) (string, error) {
		return t.provoke(20, func(p *peer) {
			p.headers(1, pairs(), false)
			for range 200_000 {
				_ = p.framer.WriteData(1, false, nil)
			}
		})
	}},
	{name: "PING flood", run: func(t *target) (string, error) {
		return t.repeat(true, func(p *peer) { _ = p.framer.WritePing(false, [8]byte{}) })
	}},
	{name: "PING flood, replies not read", run: func(t *target) (string, error) {
		return t.repeat(false, func(p *peer) { _ = p.framer.WritePing(false, [8]byte{}) })
	}},
	{name: "SETTINGS flood", run: func(t *target) (string, error) {
		return t.repeat(true, func(p *peer) { _ = p.framer.WriteSettings() })
	}},
	{name: "SETTINGS flood, replies not read", run: func(t *target) (string, error) {
		return t.repeat(false, func(p *peer) { _ = p.framer.WriteSettings() })
	}},
	{name: "PRIORITY flood", run: func(t *target) (string, error) {
		return t.repeat(true, func(p *peer) { _ = p.framer.WritePriority(1, http2.PriorityParam{Weight: 1}) })
	}},
	{name: "reset of calls in flight", run: resetInFlight},
	// The honest caller's next call waits behind 20 000 others.
	{name: "all streams at once", grows: 64 << 20, honestWithin: 5 * time.Second, run: allAtOnce},
	{name: "more connections than allowed", flags: []string{"--max-connections", "100"}, run: connectStorm},
}

// provoke opens connections one after the other in each of four goroutines and misbehaves on each, so that the server must
// close it.
func (t *target) provoke(connections int, misbehave func(*peer)) (string, error) {
	const threads = 4
	var calmed atomic.Int64
	failures := make([]error, threads)
	var running sync.WaitGroup
	for thread := range threads {
		running.Go(func() {
			for range connections / threads {
				peer, err := t.open()
				if err != nil {
					failures[thread] = err
					return
				}
				peer.read()
				// The server closes the connection in the middle.
				misbehave(peer)
				_ = peer.writer.Flush()
				code, err := peer.ends(5 * time.Second)
				peer.close()
				if err != nil {
					failures[thread] = err
				} else if code == http2.ErrCodeEnhanceYourCalm {
					calmed.Add(1)
				}
			}
		})
	}
	running.Wait()
	for _, err := range failures {
		if err != nil {
			return "", err
		}
	}
	text := fmt.Sprintf("%d connections, %d closed with ENHANCE_YOUR_CALM", connections, calmed.Load())
	if int(calmed.Load()) != connections {
		return text, fmt.Errorf("not all were closed with ENHANCE_YOUR_CALM")
	}
	return text, nil
}

// repeat sends one frame over and over on four connections.
func (t *target) repeat(reads bool, send func(*peer)) (string, error) {
	const connections = 4
	end := time.Now().Add(floodFor)
	var sent, acknowledged atomic.Int64
	var failure atomic.Value
	var running sync.WaitGroup
	for range connections {
		running.Go(func() {
			peer, err := t.open()
			if err != nil {
				failure.Store(err)
				return
			}
			defer peer.close()
			if reads {
				peer.read()
			}
			// A server whose acknowledgements are not read stops reading.
			_ = peer.socket.SetWriteDeadline(end)
			for time.Now().Before(end) {
				for range floodBurst {
					send(peer)
				}
				sent.Add(floodBurst)
				if peer.writer.Flush() != nil {
					break
				}
				time.Sleep(floodPause)
			}
			time.Sleep(time.Until(end))
			peer.received.lock.Lock()
			acknowledged.Add(int64(peer.received.acknowledged))
			peer.received.lock.Unlock()
		})
	}
	running.Wait()
	if err, ok := failure.Load().(error); ok {
		return "", err
	}
	text := fmt.Sprintf("%d connections, %d frames in %v", connections, sent.Load(), floodFor)
	if reads {
		text += fmt.Sprintf(", %d acknowledged", acknowledged.Load())
	}
	return text, nil
}

// resetInFlight starts a hundred calls at a time and resets them once their upstream requests are in flight.
func resetInFlight(t *target) (string, error) {
	const rounds, streams = 30, 100
	before, err := t.sandbox.count("task_requests")
	if err != nil {
		return "", err
	}
	peer, err := t.open()
	if err != nil {
		return "", err
	}
	defer peer.close()
	peer.read()
	for round := range rounds {
		for number := range streams {
			stream := streamID(round*streams + number)
			peer.call(stream, pairs(), taskRequest{projectID, "slow-5000", fmt.Sprintf("reset-%d", stream), ""})
		}
		if err := peer.writer.Flush(); err != nil {
			return "", err
		}
		if err := t.awaitInFlight(func(inFlight float64) bool { return inFlight >= streams }); err != nil {
			return "", fmt.Errorf("round %d: %w", round+1, err)
		}
		for number := range streams {
			_ = peer.framer.WriteRSTStream(streamID(round*streams+number), http2.ErrCodeCancel)
		}
		if err := peer.writer.Flush(); err != nil {
			return "", err
		}
		if err := t.awaitInFlight(func(inFlight float64) bool { return inFlight < streams/2 }); err != nil {
			return "", fmt.Errorf("round %d: %w", round+1, err)
		}
	}
	after, err := t.sandbox.count("task_requests")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d calls reset, %d upstream requests, including the honest caller's", rounds*streams, after-before), nil
}

func (t *target) awaitInFlight(holds func(float64) bool) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		metrics, err := t.scrape()
		if err != nil {
			return err
		}
		inFlight := metrics.sum("rds_upstream_in_flight")
		if holds(inFlight) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%.0f upstream requests in flight", inFlight)
		}
	}
}

// count returns one of the sandbox's counters.
func (s *sandbox) count(name string) (int, error) {
	counts := map[string]int{}
	err := s.control("counts", &counts)
	return counts[name], err
}

func (s *sandbox) control(path string, into any) error {
	reply, err := http.Get(s.url() + "/sandbox/" + path)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	return json.NewDecoder(reply.Body).Decode(into)
}

// allAtOnce opens two hundred connections and then starts a hundred calls of an unknown method on each.
func allAtOnce(t *target) (string, error) {
	const connections, streams = 200, 100
	var peers []*peer
	defer func() {
		for _, peer := range peers {
			peer.close()
		}
	}()
	for range connections {
		peer, err := t.open()
		if err != nil {
			return "", err
		}
		peer.read()
		peers = append(peers, peer)
	}
	for _, peer := range peers {
		for number := range streams {
			peer.headers(streamID(number), pairs([2]string{":path", "/no/such"}), true)
		}
		if err := peer.writer.Flush(); err != nil {
			return "", err
		}
	}
	outcomes := map[string]int{}
	for _, peer := range peers {
		for outcome, count := range peer.outcomes(streams, 15*time.Second) {
			outcomes[outcome] += count
		}
	}
	text := fmt.Sprintf("%d connections: %v", connections, outcomes)
	if outcomes["gRPC 12"] != connections*streams {
		return text, errors.New("not all calls ended with UNIMPLEMENTED")
	}
	return text, nil
}

// connectStorm opens far more connections than the limit allows and keeps the accepted ones open.
func connectStorm(t *target) (string, error) {
	const attempts, allowed = 3000, 100
	var kept []net.Conn
	defer func() {
		for _, socket := range kept {
			_ = socket.Close()
		}
	}()
	refused := 0
	for range attempts {
		socket, err := net.Dial("tcp", t.address)
		if err != nil {
			return "", err
		}
		// A refused connection is closed before the first byte; on an accepted one the server waits for our preface.
		_ = socket.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
		_, err = socket.Read(make([]byte, 1))
		if failure, ok := err.(net.Error); ok && failure.Timeout() {
			kept = append(kept, socket)
			continue
		}
		refused++
		_ = socket.Close()
	}
	// On a slow machine the server closes the first accepted connections for their silence and accepts others.
	const least = attempts - 2*allowed
	var open, counted float64
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		metrics, err := t.scrape()
		if err != nil {
			return "", err
		}
		open, counted = metrics.sum("grpc_server_connections"), metrics.sum("grpc_server_connections_refused_total")
		if counted >= least || time.Now().After(deadline) {
			break
		}
	}
	text := fmt.Sprintf("%d connections, %.0f open, %.0f refused", attempts, open, counted)
	if open > allowed || counted < least || refused == 0 {
		return text, fmt.Errorf("the limit is %d", allowed)
	}
	return text, nil
}
