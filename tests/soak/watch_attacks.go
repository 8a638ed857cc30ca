package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// The attacker's token, and the prefix of tokens that the upstream rejects.
const (
	watchRogue   = "rogue"
	inventedName = "invented"
	// The default of --watch-rate, per minute.
	watchRate = 30
	// Fewer than the half of --max-watches that one of two callers can hold.
	deafStreams = 450
)

// Pollers end with the next poll after their last watcher; this makes that soon.
var soonPolls = []string{"--watch-interval", "1s"}

// watchAttacks load the machine and run one after the other.
var watchAttacks = []attack{
	// Two callers can hold half of the limit each.
	{name: "10000 watches", flags: append([]string{"--max-watches", "21000"}, soonPolls...), grows: 128 << 20, honestWithin: 2 * time.Second,
		watches: true, run: tenThousandWatches},
	{name: "more watches than allowed", flags: soonPolls, watches: true, run: tooManyWatches},
	{name: "rapid reset of watches", flags: soonPolls, watches: true, run: rapidResetOfWatches},
	{name: "reset of open watches", flags: soonPolls, watches: true, run: resetOpenWatches},
	{name: "reconnect storm of watches", flags: soonPolls, watches: true, run: reconnectStorm},
	{name: "ever new etags", flags: soonPolls, watches: true, run: everNewEtags},
	{name: "ever new tasks are watched", flags: soonPolls, watches: true, run: everNewTasks},
	{name: "watches with invented tokens", flags: soonPolls, watches: true, run: inventedTokens},
}

// watchWaits mostly wait and run at the same time as others.
var watchWaits = []attack{
	{name: "watches with window 0", flags: soonPolls, watches: true, run: deafWatches},
	// The kernel's buffers, and then the bytes that the server buffers for each stream.
	{name: "watches on a connection that is not read", flags: soonPolls, grows: 80 << 20, watches: true, run: unreadConnection},
}

// watchFields are the headers of a watch by the attacker.
func watchFields(token string) [][2]string {
	return pairs([2]string{":path", watchMethod}, [2]string{"x-auth-token", token})
}

// startWatch sends a complete watch.
func (p *peer) startWatch(stream uint32, token string, task taskRequest, etag string) {
	p.headers(stream, watchFields(token), false)
	_ = p.framer.WriteData(stream, true, framed(watchRequest(task, etag)))
}

// openWatchPeer opens a connection whose own window never ends, counts the streams with data, and acknowledges PINGs.
func (t *target) openWatchPeer(settings ...http2.Setting) (*peer, *begun, error) {
	peer, err := t.open(settings...)
	if err != nil {
		return nil, nil, err
	}
	begun := &begun{streams: map[uint32]bool{}}
	peer.onData = begun.note
	peer.acknowledges = true
	_ = peer.framer.WriteWindowUpdate(0, 1<<30)
	peer.read()
	return peer, begun, nil
}

// begun are the streams that have received data.
type begun struct {
	lock    sync.Mutex
	streams map[uint32]bool
}

func (b *begun) note(frame *http2.DataFrame) {
	b.lock.Lock()
	b.streams[frame.StreamID] = true
	b.lock.Unlock()
}

func (b *begun) count() int {
	b.lock.Lock()
	defer b.lock.Unlock()
	return len(b.streams)
}

func (p *peer) ended() map[string]int {
	p.received.lock.Lock()
	defer p.received.lock.Unlock()
	counts := map[string]int{}
	for _, how := range p.received.ended {
		counts[how]++
	}
	return counts
}

func (p *peer) endedCount() int {
	all := 0
	for _, count := range p.ended() {
		all += count
	}
	return all
}

// checkPolls requires that the attacker's token was used for no more upstream calls than --watch-rate allows.
func (t *target) checkPolls(text string, since time.Time) (string, error) {
	polls := t.tasks.requestsOf(watchRogue)
	text += fmt.Sprintf(", %d upstream calls", polls)
	if allowed := watchRate * (1 + int(time.Since(since)/time.Minute)); polls > allowed {
		return text, fmt.Errorf("the rate allows %d upstream calls", allowed)
	}
	return text, nil
}

func tenThousandWatches(t *target) (string, error) {
	since := time.Now()
	audience, err := startAudience(t.tasks, t.address, 20, crowdWatchers, 1, "x-auth-token", watchRogue)
	if err != nil {
		return "", err
	}
	defer audience.close()
	opened := time.Since(since)
	if err := t.honest.more(100); err != nil {
		return "", err
	}
	if ends := audience.ended(); len(ends) > 0 {
		return "", fmt.Errorf("%d watches ended; the first: %v", len(ends), ends[0].err)
	}
	return t.checkPolls(fmt.Sprintf("%d watches on 20 connections in %.1f s", crowdWatchers, opened.Seconds()), since)
}

// tooManyWatches opens five times as many watches as the default limit allows.
func tooManyWatches(t *target) (string, error) {
	const connections, streams, allowed = 10, 500, 1000
	since := time.Now()
	rejected, open := 0, 0
	var peers []*peer
	defer func() {
		for _, peer := range peers {
			peer.close()
		}
	}()
	for range connections {
		peer, begun, err := t.openWatchPeer()
		if err != nil {
			return "", err
		}
		peers = append(peers, peer)
		for number := range streams {
			peer.startWatch(streamID(number), watchRogue, watchedTask(0), "")
		}
		if err := peer.writer.Flush(); err != nil {
			return "", err
		}
		if err := eventually(func() bool { return begun.count()+peer.endedCount() == streams }); err != nil {
			return "", fmt.Errorf("%d watches have begun, %v: %w", begun.count(), peer.ended(), err)
		}
		open += begun.count()
		rejected += peer.ended()["gRPC 8"]
	}
	text := fmt.Sprintf("%d watches: %d open, %d rejected", connections*streams, open, rejected)
	if open > allowed || open+rejected != connections*streams {
		return text, fmt.Errorf("the limit is %d", allowed)
	}
	if err := t.honest.more(100); err != nil {
		return text, err
	}
	return t.checkPolls(text, since)
}

// rapidResetOfWatches resets each watch at once. The server closes a connection on which it finds more than a thousand resets before it has
// accepted their streams. If it reads slower than the attacker writes, it finds them; otherwise it must end the watches and serve the
// connection.
func rapidResetOfWatches(t *target) (string, error) {
	const connections = 50
	since := time.Now()
	closed := 0
	for range connections {
		peer, err := t.open()
		if err != nil {
			return "", err
		}
		peer.read()
		for number := range 2000 {
			peer.startWatch(streamID(number), watchRogue, watchedTask(0), "")
			_ = peer.framer.WriteRSTStream(streamID(number), http2.ErrCodeCancel)
		}
		isCalmed, err := peer.calmed()
		peer.close()
		if err != nil {
			return "", err
		}
		if isCalmed {
			closed++
		}
	}
	return t.checkPolls(fmt.Sprintf("%d connections, %d closed with ENHANCE_YOUR_CALM, the others served", connections, closed), since)
}

// resetOpenWatches opens two hundred watches at a time and resets them once all have a message.
func resetOpenWatches(t *target) (string, error) {
	const rounds, streams = 50, 200
	since := time.Now()
	peer, begun, err := t.openWatchPeer()
	if err != nil {
		return "", err
	}
	defer peer.close()
	for round := range rounds {
		for number := range streams {
			peer.startWatch(streamID(round*streams+number), watchRogue, watchedTask(number%5), "")
		}
		if err := peer.writer.Flush(); err != nil {
			return "", err
		}
		if err := eventually(func() bool { return begun.count() == (round+1)*streams }); err != nil {
			return "", fmt.Errorf("round %d: %d watches have begun, %v: %w", round+1, begun.count(), peer.ended(), err)
		}
		for number := range streams {
			_ = peer.framer.WriteRSTStream(streamID(round*streams+number), http2.ErrCodeCancel)
		}
		if err := peer.writer.Flush(); err != nil {
			return "", err
		}
	}
	return t.checkPolls(fmt.Sprintf("%d watches reset", rounds*streams), since)
}

// reconnectStorm resumes a hundred watches on a new connection and closes it, again and again: at once, or after a moment, in which
// those get a message whose task is polled.
func reconnectStorm(t *target) (string, error) {
	const connections, threads, streams = 200, 4, 100
	since := time.Now()
	failures := make([]error, threads)
	var running sync.WaitGroup
	for thread := range threads {
		running.Go(func() {
			for number := range connections / threads {
				peer, _, err := t.openWatchPeer()
				if err != nil {
					failures[thread] = err
					return
				}
				for stream := range streams {
					peer.startWatch(streamID(stream), watchRogue, watchedTask(stream%10), "00ff")
				}
				_ = peer.writer.Flush()
				if number%2 == 0 {
					time.Sleep(200 * time.Millisecond)
				}
				peer.close()
			}
		})
	}
	running.Wait()
	if err := errors.Join(failures...); err != nil {
		return "", err
	}
	return t.checkPolls(fmt.Sprintf("%d connections with %d watches each", connections, streams), since)
}

// inBatches starts watches, a hundred per connection, and counts their first messages and ends.
func (t *target) inBatches(count int, start func(peer *peer, stream uint32, number int)) (map[string]int, error) {
	const batch = 100
	outcomes := map[string]int{}
	for first := 0; first < count; first += batch {
		peer, begun, err := t.openWatchPeer()
		if err != nil {
			return outcomes, err
		}
		for number := range batch {
			start(peer, streamID(number), first+number)
		}
		_ = peer.writer.Flush()
		err = eventually(func() bool { return begun.count()+peer.endedCount() >= batch })
		for how, times := range peer.ended() {
			outcomes[how] += times
		}
		outcomes["open"] += begun.count()
		peer.close()
		if err != nil {
			return outcomes, err
		}
	}
	return outcomes, nil
}

// everNewEtags resumes each watch with an etag that no other has, every tenth with an invalid one. An etag that is not that of the
// state waits for the next poll.
func everNewEtags(t *target) (string, error) {
	count := t.calls / 10
	since := time.Now()
	outcomes, err := t.inBatches(count, func(peer *peer, stream uint32, number int) {
		etag := fmt.Sprintf("%064x", rand.Uint64())
		if number%10 == 0 {
			etag += "0"
		}
		peer.startWatch(stream, watchRogue, watchedTask(0), etag)
	})
	text := fmt.Sprintf("%d watches: %v", count, outcomes)
	if err == nil && outcomes["gRPC 3"] != count/10 {
		err = errors.New("not every invalid etag was rejected")
	}
	if err != nil {
		return text, err
	}
	return t.checkPolls(text, since)
}

// everNewTasks watches a new task with each call.
func everNewTasks(t *target) (string, error) {
	since := time.Now()
	outcomes, err := t.inBatches(t.calls, func(peer *peer, stream uint32, _ int) {
		task := taskRequest{projectID, "instance", fmt.Sprintf("new-%x", rand.Uint64()), ""}
		peer.startWatch(stream, watchRogue, task, "")
	})
	text := fmt.Sprintf("%d watches: %v", t.calls, outcomes)
	if err != nil {
		return text, err
	}
	return t.checkPolls(text, since)
}

// inventedTokens sends a new token, which the upstream rejects, with each watch.
func inventedTokens(t *target) (string, error) {
	count := t.calls / 5
	outcomes, err := t.inBatches(count, func(peer *peer, stream uint32, number int) {
		peer.startWatch(stream, fmt.Sprint(inventedName, "-", number), watchedTask(0), "")
	})
	text := fmt.Sprintf("%d watches: %v", count, outcomes)
	if err == nil && outcomes["gRPC 16"] != count {
		err = errors.New("not all ended with UNAUTHENTICATED")
	}
	return text, err
}

// deafWatches opens watches with a flow-control window of 0.
func deafWatches(t *target) (string, error) {
	const streams = deafStreams
	since := time.Now()
	peer, _, err := t.openWatchPeer(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	if err != nil {
		return "", err
	}
	defer peer.close()
	for number := range streams {
		peer.startWatch(streamID(number), watchRogue, watchedTask(0), "")
	}
	if err := peer.writer.Flush(); err != nil {
		return "", err
	}
	outcomes := peer.outcomes(streams, unreadLimit+slack)
	text := fmt.Sprintf("%d watches, ended after %.1f s: %v", streams, time.Since(since).Seconds(), outcomes)
	if outcomes["reset CANCEL"] != streams {
		return text, errors.New("not all were reset")
	}
	// They are polled for a minute.
	return t.checkPolls(text, since)
}

// unreadConnection opens watches of a task with long states, with as much room as HTTP/2 allows, and does not read the connection.
func unreadConnection(t *target) (string, error) {
	const streams, size = deafStreams, 20 << 10
	since := time.Now()
	t.tasks.lengthen(size)
	peer, err := t.open(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	if err != nil {
		return "", err
	}
	defer peer.close()
	_ = peer.framer.WriteWindowUpdate(0, 1<<30)
	for number := range streams {
		peer.startWatch(streamID(number), watchRogue, watchedTask(0), "")
	}
	if err := peer.writer.Flush(); err != nil {
		return "", err
	}
	highest := 0.0
	for time.Since(since) < silenceLimit+slack {
		metrics, err := t.scrape()
		if err != nil {
			return "", err
		}
		open := metrics.sum("rds_watches")
		highest = max(highest, open)
		if highest >= streams && open < streams/2 {
			return t.checkPolls(fmt.Sprintf("%d watches, all ended after %.1f s", streams, time.Since(since).Seconds()), since)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return "", fmt.Errorf("the connection is still open; at most %.0f watches were open", highest)
}
