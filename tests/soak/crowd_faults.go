package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// Limits that the rogue exceeds alone. Honest calls need less than half of them even if the machine delays each by a second. Honest
// watches need more than the reserve of each caller, so that they fail if only the reserves stay free.
const (
	maxInFlight = "600"
	maxWatches  = "300"
	rogueCalls  = 700
	// The rogue's pause before it repeats a call that has ended.
	rogueRetryPause = 250 * time.Millisecond
)

// crowdFaults has at least one fault for each owner of state that callers share. New shared state gets a row here.
var crowdFaults = []crowdFault{
	// The circuit breaker: an upstream that replies to some callers is up.
	{name: "one instance replies with 504", owner: "circuit breaker",
		script: rogueInstances(respond(http.StatusGatewayTimeout, "")), inject: callBadInstance},
	{name: "one instance replies with 503", owner: "circuit breaker",
		script: rogueInstances(respond(http.StatusServiceUnavailable, "")), inject: callBadInstance},
	{name: "one instance resets connections", owner: "circuit breaker",
		script: rogueInstances(resetConnection), inject: callBadInstance},
	{name: "one instance does not reply", owner: "circuit breaker", flags: []string{"--attempt-timeout", "250ms"},
		script: rogueInstances(neverRespond), inject: callBadInstance},
	{name: "ever-new instances reply with 503", owner: "circuit breaker",
		script: rogueInstances(respond(http.StatusServiceUnavailable, "")), inject: callNewBadInstances},
	{name: "ever-new instances reset connections", owner: "circuit breaker",
		script: rogueInstances(resetConnection), inject: callNewBadInstances},
	{name: "one workflow name resets connections on a shared instance", owner: "circuit breaker",
		script: rogueName(resetConnection), inject: callBadName},
	{name: "one instance sends a control character in a header", owner: "circuit breaker",
		script: rogueInstances(respondRaw(headWith("Set-Cookie: a=b\x01c\r\n"))), inject: callBadInstance},
	{name: "one instance sends 150 headers", owner: "circuit breaker",
		script: rogueInstances(respondRaw(headWith(manyHeaders(150)))), inject: callBadInstance},
	{name: "1000 calls at once while the process gets little CPU time", owner: "circuit breaker",
		flags: []string{"--connect-timeout", "200ms"}, interval: 250 * time.Millisecond, delays: 2 * starvedFor, alone: true, inject: starveDuringBurst},

	// The server's credential: the replies to one project's calls prove nothing for the others.
	{name: "one project's calls get 401 and IAM replies with 403", owner: "IAM token", credentials: "iam", iamFailure: http.StatusForbidden,
		script: foreignProject(respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: project mismatch"))),
		inject: callForeignProject},
	{name: "one project's calls get 401 APIGW.0307 and IAM replies with 429", owner: "IAM token", credentials: "iam", iamFailure: http.StatusTooManyRequests,
		script: foreignProject(respond(http.StatusUnauthorized, gatewayError("APIGW.0307", "The token must be updated."))),
		inject: callForeignProject},
	{name: "one project's calls get 401 without a signature failure", owner: "key guard", credentials: "env",
		script: foreignProject(respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: project mismatch"))),
		inject: callForeignProject},
	{name: "one project's calls get 401 for their signature", owner: "key guard", credentials: "env",
		script: foreignProject(rejectedSignature), inject: callForeignProject},
	{name: "one project's calls get 401 with a truncated body", owner: "key guard", credentials: "env",
		script: foreignProject(truncated401), inject: callForeignProject},
	{name: "two replicas with a wrong secret key", owner: "key guard", credentials: "env",
		script: lockedKey, inject: startWrongReplicas(rejectedSignature)},
	{name: "two replicas with a wrong secret key get truncated replies", owner: "key guard", credentials: "env",
		script: lockedKey, inject: startWrongReplicas(truncated401)},
	{name: "one project's 401 has a server time 2 hours ahead", owner: "signing clock", credentials: "env",
		script: foreignProject(withClock(2*time.Hour, true)), inject: callForeignProject},
	{name: "one project's 401 has a Date 2 hours ahead", owner: "signing clock", credentials: "env",
		script: foreignProject(withClock(2*time.Hour, false)), inject: callForeignProject},

	// Limits and budgets: one caller cannot use all of them.
	{name: "100 different requests of one caller under --upstream-rate", owner: "rate limiter", credentials: "token",
		flags: []string{"--upstream-rate", "15/500ms"}, interval: 500 * time.Millisecond, delays: time.Second,
		inject: callManyRequests},
	{name: "all calls of one caller are retried", owner: "retry budget", script: transientErrors, inject: callBadInstance},
	{name: "slow calls of one caller", owner: "permits", flags: []string{"--max-in-flight", maxInFlight},
		script: rogueInstances(neverRespond), inject: holdPermits},
	{name: "slow calls of one connection", owner: "permits", credentials: "token", flags: []string{"--max-in-flight", maxInFlight},
		script: rogueInstances(neverRespond), inject: holdPermits},
	{name: "one caller does not read replies", owner: "permits", flags: []string{"--max-in-flight", maxInFlight}, inject: readNoReplies},
	{name: "more connections than allowed", owner: "connection limit", flags: []string{"--max-connections", "40"}, alone: true,
		inject: floodConnections},
	{name: "idle connections under a limit of 256 descriptors", owner: "descriptors", descriptors: 256, alone: true, inject: floodConnections},
	{name: "200 slow sockets on the metrics port", owner: "metrics port", alone: true, inject: slowAdminSockets},

	// The resolver's threads, and those of the system.
	{name: "the name server does not reply", owner: "name lookups", isolated: true, delays: lookupDelay,
		script: rogueInstances(resetConnection), inject: silenceNameServer(callBadInstance)},
	{name: "1000 calls at once while the name server does not reply", owner: "name lookups", isolated: true, delays: lookupDelay, alone: true,
		inject: silenceNameServer(burst)},
	{name: "no thread may start while one project's calls get 401", owner: "threads", isolated: true, credentials: "iam",
		script: foreignProject(respond(http.StatusUnauthorized, gatewayError("APIGW.0307", "The token must be updated."))),
		inject: forbidThreads(callForeignProject)},
	{name: "1000 calls at once while no thread may start", owner: "threads", isolated: true, alone: true, inject: forbidThreads(burst)},

	// Connections: behind a mesh, many callers share one.
	{name: "late DATA of one caller's rejected calls", owner: "connection", inject: sendLateData},
	{name: "metadata of 33 to 63 KiB", owner: "connection", inject: sendLongMetadata},

	// Throttle windows: a 429 for one token stops the calls with that token and no others.
	{name: "429 for one token", owner: "throttle windows",
		script: throttledRogue(tooManyRequests("300")), inject: callGoodInstance},
	{name: "429 with Retry-After 0", owner: "throttle windows",
		script: throttledRogue(tooManyRequests("0")), inject: callGoodInstance},
	{name: "429 with a Retry-After date in the past", owner: "throttle windows",
		script: throttledRogue(tooManyRequests("Sun, 01 Nov 2020 08:00:00 GMT")), inject: callGoodInstance},
	{name: "429 for ever-new tokens", owner: "throttle windows", alone: true,
		script: rogueTokens(tooManyRequests("300")), inject: callWithNewTokens},

	// Coalescing and the cache.
	{name: "one caller cancels requests that others send", owner: "coalescing", credentials: "token", repeats: true, inject: cancelSharedRequests},
	{name: "ever-new requests fill the cache", owner: "cache", flags: []string{"--cache-ttl", "1h", "--cache-entries", "100"}, repeats: true,
		inject: fillCache},

	// Watches: their permits, the pollers that watchers of a task share, and the rate of polls.
	{name: "one caller opens watches without end", owner: "watch permits", watches: true,
		flags: []string{"--max-watches", maxWatches, "--watch-rate", "off", "--watch-interval", "200ms"}, inject: holdWatches},
	{name: "one connection opens watches without end", owner: "watch permits", credentials: "token", watches: true,
		flags: []string{"--max-watches", maxWatches, "--watch-rate", "off", "--watch-interval", "200ms"}, inject: holdWatches},
	{name: "one caller does not read its watches", owner: "watch permits", watches: true,
		flags: []string{"--max-watches", maxWatches, "--watch-rate", "off", "--watch-interval", "200ms"}, inject: readNoWatches},
	{name: "watches of shared tasks are opened and cancelled", owner: "pollers", credentials: "token", watches: true,
		flags: []string{"--watch-rate", "off", "--watch-interval", "200ms"}, inject: cancelSharedWatches},
	{name: "ever-new tasks are watched", owner: "watch rate", credentials: "token", watches: true,
		flags: []string{"--watch-rate", "40/1s", "--watch-interval", "200ms"}, delays: time.Second, inject: watchNewTasks},
	{name: "500 tasks of one caller are watched", owner: "watch rate", credentials: "token", watches: true,
		flags: []string{"--watch-rate", "40/1s", "--watch-interval", "200ms"}, delays: time.Second, inject: watchManyTasks},
	{name: "watches with ever-new tokens", owner: "watch rate", watches: true, alone: true,
		flags:  []string{"--watch-rate", "40/1s", "--watch-interval", "200ms"},
		script: rogueTokens(respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: decrypt token fail"))),
		inject: watchWithNewTokens},
	{name: "unary calls next to watches that are opened and reset", owner: "workers", alone: true,
		flags: []string{"--watch-rate", "off", "--watch-interval", "200ms"}, inject: cancelSharedWatches},

	// The quota store, which two replicas share: what one caller leaves there, and faults of the store itself.
	{name: "429 for one token at two replicas with a store", owner: "quota store", store: true,
		script: throttledRogue(tooManyRequests("300")), inject: callGoodInstance},
	{name: "429 for ever-new tokens at two replicas with a full store", owner: "quota store", store: true, alone: true,
		script: rogueTokens(tooManyRequests("300")), inject: fillStore(callWithNewTokens)},
	{name: "ever-new tokens and results fill the store", owner: "quota store", store: true, alone: true,
		flags: []string{"--cache-ttl", "1h", "--upstream-rate", "1000/1s"}, inject: fillStore(callWithNewTokens)},
	{name: "one project's calls at two replicas get 401 for their signature", owner: "quota store", store: true, credentials: "env",
		script: foreignProject(rejectedSignature), inject: callForeignProject},
	{name: "another replica with a wrong secret key and the same store", owner: "quota store", store: true, credentials: "env",
		script: lockedKeyOfStore, inject: startWrongReplicaWithStore},
	{name: "100 different requests of one caller at two replicas under --upstream-rate", owner: "quota store", store: true, credentials: "token",
		flags: []string{"--upstream-rate", "15/500ms"}, interval: 500 * time.Millisecond, delays: time.Second, inject: callManyRequests},
	{name: "500 tasks of one caller are watched at two replicas", owner: "quota store", store: true, credentials: "token", watches: true,
		flags: []string{"--watch-rate", "80/1s", "--watch-interval", "200ms"}, delays: time.Second, inject: watchManyTasks},
	{name: "results in the store are forged", owner: "quota store", store: true, credentials: "token", repeats: true,
		flags: []string{"--cache-ttl", "300ms"}, inject: forgeResults},
	{name: "the store is slow by 200 ms", owner: "quota store", store: true, flags: storeFlags, inject: damageStore("store slow by 200 ms")},
	{name: "the store is killed", owner: "quota store", store: true, flags: storeFlags, inject: damageStore("store killed")},
	{name: "the store is stopped by SIGSTOP", owner: "quota store", store: true, flags: storeFlags, inject: damageStore("store stopped by SIGSTOP")},
	{name: "packets to the store are lost", owner: "quota store", store: true, flags: storeFlags, inject: damageStore("store cut off")},

	// Workers and upstream connections.
	{name: "malformed requests", owner: "workers", alone: true, inject: sendMalformedRequests},
	{name: "1000 calls at once", owner: "workers", alone: true, inject: burst},
	{name: "100 replies of 1 MiB at once with 349 000 parts", owner: "workers", alone: true, script: rogueInstances(manyParts),
		inject: callForLargeReplies},
	{name: "cancelled calls", owner: "upstream connections", alone: true, inject: cancelCalls},
	{name: "one instance replies with 500", owner: "upstream connections",
		script: rogueInstances(respond(http.StatusInternalServerError, gatewayError("DBS.200001", "internal"))), inject: countConnects(callBadInstance)},
	{name: "replies about another instance", owner: "upstream connections",
		script: rogueInstances(otherInstance), inject: countConnects(callForOtherInstance)},
}

// The gateway's reply to a signature that does not match, and a truncated one.
var (
	rejectedSignature = respond(http.StatusUnauthorized,
		gatewayError("APIGW.0301", "Incorrect IAM authentication information: verify aksk signature fail"))
	truncated401 = respondRaw("HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: 200\r\n\r\n" +
		`{"error_code":"APIGW.0301","err`)
)

// headWith is a reply with these header lines.
func headWith(lines string) string {
	return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + lines + "\r\n{}"
}

func manyHeaders(count int) string {
	var lines strings.Builder
	for number := range count {
		fmt.Fprintf(&lines, "X-Header-%d: a\r\n", number)
	}
	return lines.String()
}

func tooManyRequests(retryAfter string) http.HandlerFunc {
	return respond(http.StatusTooManyRequests, gatewayError("APIGW.0308", "The throttling threshold has been reached"), "Retry-After", retryAfter)
}

// ---- Injections ----

func callBadInstance(ctx context.Context, s *stage) error {
	return s.callAsRogue(ctx, func(number int) taskRequest { return rogueRequest(rogueInstance, number) })
}

func callNewBadInstances(ctx context.Context, s *stage) error {
	return s.callAsRogue(ctx, func(number int) taskRequest { return rogueRequest(fmt.Sprint(rogueInstance, "-", number), number) })
}

func callBadName(ctx context.Context, s *stage) error {
	return s.callAsRogue(ctx, func(number int) taskRequest {
		// Workflow ids differ, so that the calls are not coalesced.
		return taskRequest{projectID, "instance-0", fmt.Sprint("rogue-", number), rogueWorkflowName}
	})
}

func callGoodInstance(ctx context.Context, s *stage) error {
	return s.callAsRogue(ctx, func(number int) taskRequest { return rogueRequest("instance-0", number) })
}

func callForeignProject(ctx context.Context, s *stage) error {
	return s.callAsRogue(ctx, func(number int) taskRequest {
		request := rogueRequest("instance-0", number)
		request.project = foreignProjectID
		return request
	})
}

// rogueRequest differs from every other rogue request.
func rogueRequest(instance string, number int) taskRequest {
	return taskRequest{projectID, instance, "task", fmt.Sprint("rogue call ", number)}
}

// callAsRogue makes calls with one token on one connection and ignores their ends.
func (s *stage) callAsRogue(ctx context.Context, request func(number int) taskRequest) error {
	return s.repeatAsRogue(ctx, rogueWorkers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		call(ctx, connection, method, request(number).encoded(), []string{"x-auth-token", rogueToken})
	})
}

// repeatAsRogue repeats a call on one connection, or on one to each replica in turn, until the context ends, with a pause after each.
func (s *stage) repeatAsRogue(ctx context.Context, workers int, once func(ctx context.Context, connection *grpc.ClientConn, number int)) error {
	var connections []*grpc.ClientConn
	for _, replica := range s.replicas {
		connection, err := dial(replica.address)
		if err != nil {
			return err
		}
		defer connection.Close()
		connections = append(connections, connection)
	}
	var numbers atomic.Int64
	var running sync.WaitGroup
	for range workers {
		running.Go(func() {
			for ctx.Err() == nil {
				callCtx, cancel := context.WithTimeout(ctx, rogueDeadline)
				number := int(numbers.Add(1))
				once(callCtx, connections[number%len(connections)], number)
				cancel()
				pause(ctx, roguePause)
			}
		})
	}
	running.Wait()
	return nil
}

func pause(ctx context.Context, duration time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(duration):
	}
}

// callManyRequests keeps a hundred different requests in flight, which is what one connection allows.
func callManyRequests(ctx context.Context, s *stage) error {
	const inFlight = 100
	return s.repeatAsRogue(ctx, inFlight, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		call(ctx, connection, method, rogueRequest("instance-0", number).encoded(), nil)
	})
}

// holdPermits keeps calls in flight that the upstream does not reply to.
func holdPermits(ctx context.Context, s *stage) error {
	return s.repeatAsRogue(ctx, rogueCalls, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		call(ctx, connection, method, rogueRequest(rogueInstance, number).encoded(), []string{"x-auth-token", rogueToken})
		pause(ctx, rogueRetryPause)
	})
}

// readNoReplies makes calls on a connection that lets no byte of a reply through.
func readNoReplies(ctx context.Context, s *stage) error {
	peer, err := s.open(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	if err != nil {
		return err
	}
	defer peer.close()
	peer.read()
	for number := range rogueCalls {
		peer.call(streamID(number), pairs([2]string{"x-auth-token", rogueToken}), rogueRequest("instance-0", number))
	}
	if err := peer.writer.Flush(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// sendLateData makes calls of an unknown method and sends the message of each 80 calls later. Valid calls on the same connection must
// succeed.
func sendLateData(ctx context.Context, s *stage) error {
	const lag = 80
	peer, err := s.open()
	if err != nil {
		return err
	}
	defer peer.close()
	peer.read()
	unknown, valid := pairs([2]string{":path", "/no/such"}), pairs([2]string{"x-auth-token", rogueToken})
	message := framed(rogueRequest("instance-0", 0).encoded())
	var rejected []uint32
	number, succeeded := 0, 0
	for ; ctx.Err() == nil; number++ {
		if number%20 == 0 {
			peer.call(streamID(number), valid, rogueRequest("instance-0", number))
			succeeded++
		} else {
			peer.headers(streamID(number), unknown, false)
			rejected = append(rejected, streamID(number))
		}
		if len(rejected) > lag {
			_ = peer.framer.WriteData(rejected[0], true, message)
			rejected = rejected[1:]
		}
		if err := peer.writer.Flush(); err != nil {
			return err
		}
		pause(ctx, roguePause)
	}
	outcomes := peer.outcomes(number, rogueDeadline)
	if outcomes["gRPC 0"] != succeeded || outcomes["gRPC 12"] != number-succeeded {
		return fmt.Errorf("%d calls on the connection of the late DATA: %v", number, outcomes)
	}
	return nil
}

// sendLongMetadata makes calls whose metadata is over the limit of the server but not over that of its HTTP library.
func sendLongMetadata(ctx context.Context, s *stage) error {
	const workers = 16
	var others atomic.Int64
	err := s.repeatAsRogue(ctx, workers, func(callCtx context.Context, connection *grpc.ClientConn, number int) {
		long := strings.Repeat("a", (33+number%31)<<10)
		got := call(callCtx, connection, method, rogueRequest("instance-0", number).encoded(), []string{"x-auth-token", rogueToken, "x-long", long})
		if got.code != codes.ResourceExhausted && ctx.Err() == nil {
			others.Add(1)
		}
	})
	if others.Load() > 0 {
		return fmt.Errorf("%d calls did not fail with RESOURCE_EXHAUSTED", others.Load())
	}
	return err
}

// slowAdminSockets sends requests of the metrics port a byte at a time, on sockets that it opens again when they are closed. Each probe must
// get its response within a second.
func slowAdminSockets(ctx context.Context, s *stage) error {
	const sockets, interval = 200, 250 * time.Millisecond
	var running sync.WaitGroup
	defer running.Wait()
	for range sockets {
		running.Go(func() {
			for ctx.Err() == nil {
				socket, err := net.Dial("tcp", s.metrics)
				for err == nil && ctx.Err() == nil {
					_, err = io.WriteString(socket, "G")
					pause(ctx, 100*time.Millisecond)
				}
				if socket != nil {
					_ = socket.Close()
				}
			}
		})
	}
	return s.probe(ctx, interval)
}

// probe fails if a probe gets no response within a second.
func (s *stage) probe(ctx context.Context, interval time.Duration) error {
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for ctx.Err() == nil {
		for _, path := range []string{"/livez", "/readyz"} {
			reply, err := client.Get("http://" + s.metrics + path)
			if err != nil {
				return err
			}
			reply.Body.Close()
			if reply.StatusCode != http.StatusOK {
				return fmt.Errorf("%s: %s", path, reply.Status)
			}
		}
		pause(ctx, interval)
	}
	return nil
}

// floodConnections opens connections without a pause and keeps those that are accepted. Each probe must get its response.
func floodConnections(ctx context.Context, s *stage) error {
	var opened []net.Conn
	defer func() {
		for _, socket := range opened {
			_ = socket.Close()
		}
	}()
	probed := make(chan error, 1)
	go func() { probed <- s.probe(ctx, 100*time.Millisecond) }()
	for ctx.Err() == nil && len(opened) < 5000 {
		// Waits if the kernel's queue is full.
		socket, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.address)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		opened = append(opened, socket)
		pause(ctx, time.Millisecond)
	}
	<-ctx.Done()
	return errors.Join(<-probed, s.requireCount("grpc_server_connections_refused_total"))
}

func callWithNewTokens(ctx context.Context, s *stage) error {
	return s.repeatAsRogue(ctx, rogueWorkers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		call(ctx, connection, method, rogueRequest("instance-0", number).encoded(), []string{"x-auth-token", fmt.Sprint(rogueToken, "-", number)})
	})
}

// cancelSharedRequests cancels calls for the requests that honest callers send, too, before the upstream has replied: a
// cancelled leader must not fail its followers.
func cancelSharedRequests(ctx context.Context, s *stage) error {
	err := s.repeatAsRogue(ctx, rogueWorkers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		ctx, cancel := context.WithTimeout(ctx, upstreamDelay/2)
		defer cancel()
		call(ctx, connection, method, honestRequest(0, number, true).encoded(), nil)
	})
	return errors.Join(err, s.requireCount("rds_coalesced_calls_total"))
}

// fillCache sends new requests, whose replies replace those of honest callers in the cache.
func fillCache(ctx context.Context, s *stage) error {
	return errors.Join(callGoodInstance(ctx, s), s.requireCount("rds_cache_hits_total"))
}

// requireCount fails if a counter is zero: then the calls did not reach the state under attack.
func (s *stage) requireCount(name string, labels ...string) error {
	count, err := s.sum(name, labels...)
	if err == nil && count == 0 {
		err = fmt.Errorf("%s%v is 0", name, labels)
	}
	return err
}

// holdWatches keeps watches open on one connection, and opens more whenever some are rejected.
func holdWatches(ctx context.Context, s *stage) error {
	err := s.repeatAsRogue(ctx, rogueCalls, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		watch, err := openWatch(ctx, connection, rogueRequest("instance-0", number%4), "", []string{"x-auth-token", rogueToken})
		for err == nil {
			_, err = watch.next()
		}
		pause(ctx, rogueRetryPause)
	})
	return errors.Join(err, s.requireCount("rds_watch_messages_total"))
}

// readNoWatches opens watches on a connection that lets no byte of them through.
func readNoWatches(ctx context.Context, s *stage) error {
	peer, err := s.open(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	if err != nil {
		return err
	}
	defer peer.close()
	peer.read()
	for number := range rogueCalls {
		peer.startWatch(streamID(number), rogueToken, rogueRequest("instance-0", number%4), "")
	}
	if err := peer.writer.Flush(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// cancelSharedWatches opens and cancels watches of the tasks that honest callers watch, too: before the first message, and after it.
func cancelSharedWatches(ctx context.Context, s *stage) error {
	const workers = 32
	err := s.repeatAsRogue(ctx, workers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		ctx, cancel := context.WithTimeout(ctx, upstreamDelay)
		defer cancel()
		watch, err := openWatch(ctx, connection, honestRequest(0, number, true), "", []string{"x-auth-token", rogueToken})
		for messages := 0; err == nil && messages < number%3; messages++ {
			_, err = watch.next()
		}
	})
	return errors.Join(err, s.requireCount("rds_watch_polls_total"))
}

// watchNewTasks opens watches of new tasks, each of which needs a first poll.
func watchNewTasks(ctx context.Context, s *stage) error {
	const workers = 100
	return s.repeatAsRogue(ctx, workers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		watch, err := openWatch(ctx, connection, rogueRequest("instance-0", number), "", nil)
		if err == nil {
			_, _ = watch.next()
		}
	})
}

// watchManyTasks keeps watches of many tasks open, each of which needs repeated polls.
func watchManyTasks(ctx context.Context, s *stage) error {
	const workers = 500
	return s.repeatAsRogue(ctx, workers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		watch, err := openWatch(ctx, connection, rogueRequest("instance-0", number), "", nil)
		for err == nil {
			_, err = watch.next()
		}
	})
}

func watchWithNewTokens(ctx context.Context, s *stage) error {
	return s.repeatAsRogue(ctx, rogueWorkers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		watch, err := openWatch(ctx, connection, rogueRequest("instance-0", number), "", []string{"x-auth-token", fmt.Sprint(rogueToken, "-", number)})
		if err == nil {
			_, _ = watch.next()
		}
	})
}

func cancelCalls(ctx context.Context, s *stage) error {
	const workers = 16
	return s.repeatAsRogue(ctx, workers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		ctx, cancel := context.WithTimeout(ctx, upstreamDelay/2)
		defer cancel()
		call(ctx, connection, method, rogueRequest("instance-0", number).encoded(), []string{"x-auth-token", rogueToken})
	})
}

// countConnects fails if the injection makes the program open more than one connection for each scripted reply.
func countConnects(inject injection) injection {
	// Connections of honest callers, and of calls that have no reply yet.
	const others = 50
	return func(ctx context.Context, s *stage) error {
		before := s.upstream.connections.Load() - s.upstream.misbehaved.Load()
		err := inject(ctx, s)
		if more := s.upstream.connections.Load() - s.upstream.misbehaved.Load() - before; more > others {
			return errors.Join(err, fmt.Errorf("%d connections more than scripted replies", more))
		}
		return err
	}
}

func callForOtherInstance(ctx context.Context, s *stage) error {
	return errors.Join(callBadInstance(ctx, s), s.requireCount("rds_upstream_mismatched_replies_total"))
}

// callForLargeReplies keeps a hundred calls in flight whose replies are as large as allowed.
func callForLargeReplies(ctx context.Context, s *stage) error {
	const inFlight = 100
	return s.repeatAsRogue(ctx, inFlight, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		call(ctx, connection, method, rogueRequest(rogueInstance, number).encoded(), []string{"x-auth-token", rogueToken})
	})
}

// sendMalformedRequests alternates between bytes that are not a message, ids against the rules, an unknown method and
// calls without a token.
func sendMalformedRequests(ctx context.Context, s *stage) error {
	const workers = 16
	valid := rogueRequest("instance-0", 0).encoded()
	invalid := rogueRequest("../instance", 0).encoded()
	var accepted atomic.Int64
	err := s.repeatAsRogue(ctx, workers, func(ctx context.Context, connection *grpc.ClientConn, number int) {
		token := []string{"x-auth-token", rogueToken}
		var got callResult
		switch number % 4 {
		case 0:
			got = call(ctx, connection, method, []byte{0xff, 0xff, 0xff}, token)
		case 1:
			got = call(ctx, connection, method, invalid, token)
		case 2:
			got = call(ctx, connection, "/no/such", valid, token)
		case 3:
			got = call(ctx, connection, method, valid, nil)
		}
		if got.code == codes.OK {
			accepted.Add(1)
		}
	})
	if accepted.Load() > 0 {
		return fmt.Errorf("%d malformed requests succeeded", accepted.Load())
	}
	return err
}

// lookupDelay is the time after which a connect uses the addresses of an earlier lookup.
const lookupDelay = time.Second

// silenceNameServer fails if the program looks up no name during the injection.
func silenceNameServer(inject injection) injection {
	return func(ctx context.Context, s *stage) error {
		s.names.silent.Store(true)
		err := inject(ctx, s)
		if s.names.ignored.Load() == 0 {
			return errors.Join(err, errors.New("the program looked up no name"))
		}
		return err
	}
}

// forbidThreads limits the threads of the program's user id to less than it has.
func forbidThreads(inject injection) injection {
	return func(ctx context.Context, s *stage) error {
		pid := s.command.Process.Pid
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return err
		}
		// A process of the same user id may do that, root not everywhere.
		limit := exec.Command("setpriv", "--reuid="+statusField(status, "Uid"), "--clear-groups", "prlimit", fmt.Sprint("--pid=", pid), "--nproc=1")
		if output, err := limit.CombinedOutput(); err != nil {
			return fmt.Errorf("prlimit: %w: %s", err, output)
		}
		// Reads all files again.
		s.signal(syscall.SIGHUP)
		return inject(ctx, s)
	}
}

// burst starts a thousand calls at once on ten connections, again and again.
func burst(ctx context.Context, s *stage) error {
	return s.burstEvery(ctx, time.Second, 1000, func() {})
}

// The process runs for 10 ms out of 50 ms, which is a CPU limit of a fifth of a core, for this long.
const starvedFor = 800 * time.Millisecond

// starveDuringBurst gives the process little CPU time while it opens upstream connections, so that its connects are late.
func starveDuringBurst(ctx context.Context, s *stage) error {
	// The process must not stay stopped.
	defer s.signal(syscall.SIGCONT)
	return s.burstEvery(ctx, 500*time.Millisecond, 1000, func() {
		for end := time.Now().Add(starvedFor); time.Now().Before(end) && ctx.Err() == nil; {
			s.signal(syscall.SIGSTOP)
			time.Sleep(40 * time.Millisecond)
			s.signal(syscall.SIGCONT)
			time.Sleep(10 * time.Millisecond)
		}
	})
}

// burstEvery starts many calls at once on ten connections, runs meanwhile, and repeats that after the interval.
func (s *stage) burstEvery(ctx context.Context, interval time.Duration, calls int, meanwhile func()) error {
	const connections = 10
	var clients []*grpc.ClientConn
	defer func() {
		for _, client := range clients {
			client.Close()
		}
	}()
	for range connections {
		client, err := dial(s.address)
		if err != nil {
			return err
		}
		clients = append(clients, client)
	}
	var running sync.WaitGroup
	defer running.Wait()
	for number := 0; ctx.Err() == nil; pause(ctx, interval) {
		for range calls {
			number++
			request := rogueRequest("instance-0", number)
			client := clients[number%connections]
			running.Go(func() {
				callCtx, cancel := context.WithTimeout(ctx, rogueDeadline)
				defer cancel()
				call(callCtx, client, method, request.encoded(), []string{"x-auth-token", rogueToken})
			})
		}
		meanwhile()
	}
	return nil
}

// startWrongReplicas starts two more programs whose secret key is wrong, as a bad rollout does. Their gateway rejects each
// signature and counts it for the one key that all replicas share.
func startWrongReplicas(reject http.HandlerFunc) injection {
	return func(ctx context.Context, s *stage) error {
		gateway := &http.Server{Handler: http.HandlerFunc(func(reply http.ResponseWriter, request *http.Request) {
			// A connection that is closed before its request is read would be reset.
			_, _ = io.Copy(io.Discard, request.Body)
			s.upstream.badSignatures.Add(1)
			s.upstream.misbehaved.Add(1)
			reject(reply, request)
		})}
		url, err := serveHTTP(gateway)
		if err != nil {
			return err
		}
		defer gateway.Close()
		environment, flags, err := s.fault.configuration(url, "")
		if err != nil {
			return err
		}
		const replicas = 2
		failures := make([]error, replicas)
		var running sync.WaitGroup
		for index := range replicas {
			running.Go(func() {
				replica, err := startFacadeIn(environment, s.program, url, nil, flags...)
				if err != nil {
					failures[index] = err
					return
				}
				defer replica.kill()
				failures[index] = callBadInstance(ctx, &stage{fault: s.fault, facade: replica, replicas: []*facade{replica}})
			})
		}
		running.Wait()
		return errors.Join(failures...)
	}
}

// ---- Faults of the store and of what it holds ----

// storeFlags have every call ask the store.
var storeFlags = []string{"--cache-ttl", "1s", "--upstream-rate", "1000/1s"}

// fillStore leaves the store room for about a hundred entries. It fails if the store rejects none.
func fillStore(inject injection) injection {
	const room = 64 << 10
	return func(ctx context.Context, s *stage) error {
		used, err := s.store.usedMemory()
		if err != nil {
			return err
		}
		if err := s.store.do("CONFIG", "SET", "maxmemory", used+room); err != nil {
			return err
		}
		return errors.Join(inject(ctx, s), s.requireCount("quota_store_requests_total", `outcome="error"`))
	}
}

// damageStore lets one of storeFaults last until the context ends. The rogue calls meanwhile. It fails if a replica does not notice.
func damageStore(name string) injection {
	return func(ctx context.Context, s *stage) error {
		for _, fault := range storeFaults {
			if fault.name != name {
				continue
			}
			if err := fault.begin(s.store, s.relay); err != nil {
				return err
			}
			err := callGoodInstance(ctx, s)
			up, scraped := s.sum("quota_store_up")
			if up > 0 {
				err = errors.Join(err, fmt.Errorf("%.0f replicas still use the store", up))
			}
			return errors.Join(err, scraped, fault.end(s.store, s.relay))
		}
		return fmt.Errorf("%q is not a fault of the store", name)
	}
}

// forgeResults rewrites all results in the store again and again, in every way. It fails if the replicas reject none.
func forgeResults(ctx context.Context, s *stage) error {
	for number := 0; ctx.Err() == nil; number++ {
		entries, err := s.store.strings()
		if err != nil {
			return err
		}
		maps.DeleteFunc(entries, func(_, value string) bool { return len(value) <= shortestResult })
		// Some of them have expired meanwhile, and cannot be renamed or replaced.
		_ = forgeries[number%len(forgeries)].forge(s.store, entries)
		pause(ctx, roguePause)
	}
	return s.requireCount("quota_store_requests_total", `outcome="rejected"`)
}

// lockedKeyOfStore rejects the signatures of rogue calls, which only the replica with the wrong key gets, and all others as lockedKey does.
func lockedKeyOfStore(upstream *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
	if strings.HasPrefix(request.instance, rogueInstance) {
		upstream.badSignatures.Add(1)
		return rejectedSignature
	}
	return lockedKey(upstream, request)
}

// startWrongReplicaWithStore starts another program whose secret key is wrong, with the upstream and the store of the others.
func startWrongReplicaWithStore(ctx context.Context, s *stage) error {
	environment := append(slices.Clone(s.environment), "HUAWEICLOUD_SDK_SK=wrong-secret-key")
	replica, err := startFacadeIn(environment, s.program, s.upstream.url, nil, s.flags...)
	if err != nil {
		return err
	}
	defer replica.kill()
	return callBadInstance(ctx, &stage{fault: s.fault, facade: replica, replicas: []*facade{replica}})
}
