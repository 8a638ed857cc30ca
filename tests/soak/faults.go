package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// The load: half of --max-in-flight is always in flight. The fractions are shares of the calls.
const (
	faultsLimit       = 64
	faultsWorkers     = faultsLimit / 2
	faultsConnections = 8
	upstreamFaults    = 0.12
	cancelled         = 0.08
	hurried           = 0.08
	dropped           = 0.005
)

// Allowed growth from the second to the last quarter of a run. An allocator keeps some memory after a burst.
const (
	growthResident    = 4 << 20
	growthDescriptors = 8
	growthThreads     = 1
	growthGauges      = 8
)

// misbehavingInstances are instance ids of docs/sandbox.md for which the sandbox misbehaves.
var misbehavingInstances = strings.Fields(`status-500 status-502 status-503 status-504 status-400 status-404-empty status-409 status-307
	task-not-found policy-denial token-outdated html-200 huge huge-chunked malformed-json gzip reset close cut-body cut-chunked
	reset-body bad-chunk garbage two-lengths early-hints dribble-head dribble-body slow-60000 flaky-1 flaky-2`)

// faults keeps half of the limit in flight while the upstream misbehaves or is down, and callers cancel calls, set short
// deadlines or drop connections.
func faults(results *results, program string, duration time.Duration, seed uint64) error {
	upstream, err := startSandbox(program, anyPort)
	if err != nil {
		return err
	}
	// Each outage replaces the sandbox.
	defer func() { upstream.kill() }()
	ledger := &ledger{}
	facade, err := startFacade(program, upstream.url(), ledger.log, "--max-in-flight", fmt.Sprint(faultsLimit),
		"--max-connection-age", "20s", "--timeout", "3s", "--attempt-timeout", "1s", "--connect-timeout", "500ms")
	if err != nil {
		return err
	}
	defer facade.kill()
	load := &faultyLoad{ledger: ledger, address: facade.address}
	if err := load.issueToken(upstream.url()); err != nil {
		return err
	}

	ctx, stop := context.WithTimeout(context.Background(), duration)
	defer stop()
	var running sync.WaitGroup
	for worker := range faultsWorkers {
		random := rand.New(rand.NewPCG(seed, uint64(worker)))
		line := load.line(worker % faultsConnections)
		if line.err != nil {
			return line.err
		}
		running.Go(func() { load.run(ctx, random, line) })
	}
	var samples []sample
	running.Go(func() { samples = watch(ctx, facade, duration) })
	var times int
	upstream, times, err = outages(ctx, program, upstream, duration, load)
	if err != nil {
		return err
	}
	running.Wait()
	load.hangUp()

	metrics, err := facade.settled()
	if err != nil {
		return err
	}
	facade.signal(terminate)
	if _, err := facade.wait(); err != nil {
		return err
	}
	results.check(facade.command.ProcessState.ExitCode() == 0, "exit code %d", facade.command.ProcessState.ExitCode())
	results.check(times > 0, "%d outages of the upstream, %d connections dropped by callers", times, load.drops.Load())
	ledger.balance(results, metrics)
	flat(results, samples)
	return nil
}

// faultyLoad makes calls that succeed and calls that fail.
type faultyLoad struct {
	ledger  *ledger
	address string
	lines   [faultsConnections]*line
	// A second token: throttling it must not hold back calls with the first.
	throttled atomic.Value
	drops     atomic.Int64
}

// line is one client, whose TCP connection can be dropped.
type line struct {
	client *grpc.ClientConn
	socket atomic.Pointer[net.TCPConn]
	// Time of the last drop in Unix nanoseconds.
	dropped atomic.Int64
	err     error
}

func (l *faultyLoad) line(index int) *line {
	if l.lines[index] == nil {
		line := &line{}
		line.client, line.err = dial(l.address, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			socket, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			if err == nil {
				line.socket.Store(socket.(*net.TCPConn))
			}
			return socket, err
		}))
		l.lines[index] = line
	}
	return l.lines[index]
}

func (l *faultyLoad) hangUp() {
	for _, line := range l.lines {
		line.client.Close()
	}
}

// issueToken fetches the second token from the sandbox's IAM.
func (l *faultyLoad) issueToken(sandbox string) error {
	const body = `{"auth":{"identity":{"methods":["password"],"password":{"user":{"name":"sandbox-user","password":"sandbox-password",` +
		`"domain":{"name":"sandbox-domain"}}}},"scope":{"project":{"id":"` + projectID + `"}}}}`
	reply, err := http.Post(sandbox+"/v3/auth/tokens", "application/json", strings.NewReader(body))
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	token := reply.Header.Get("X-Subject-Token")
	if token == "" {
		text, _ := io.ReadAll(reply.Body)
		return fmt.Errorf("the sandbox issued no token: %s %s", reply.Status, text)
	}
	l.throttled.Store(token)
	return nil
}

func (l *faultyLoad) run(ctx context.Context, random *rand.Rand, line *line) {
	for ctx.Err() == nil {
		number := l.ledger.open()
		request, identity := example(number), token
		switch share := random.Float64(); {
		case share < upstreamFaults:
			request = taskRequest{projectID, misbehavingInstances[random.IntN(len(misbehavingInstances))], fmt.Sprint("w-", number), ""}
		case share < upstreamFaults+0.01:
			request, identity = taskRequest{projectID, "throttled-retry-after", fmt.Sprint("w-", number), ""}, l.throttled.Load().(string)
		case share < 0.5:
			request = taskRequest{projectID, fmt.Sprint("slow-", random.IntN(150)), fmt.Sprint("w-", number), ""}
		}
		timeout, cancelAfter := 10*time.Second, time.Duration(0)
		switch share := random.Float64(); {
		case share < cancelled:
			cancelAfter = time.Duration(random.IntN(50_000)) * time.Microsecond
		case share < cancelled+hurried:
			timeout = time.Duration(1+random.IntN(30_000)) * time.Microsecond
		case share < cancelled+hurried+dropped:
			if socket := line.socket.Load(); socket != nil {
				line.dropped.Store(time.Now().UnixNano())
				_ = socket.SetLinger(0)
				_ = socket.Close()
				l.drops.Add(1)
			}
		}
		callCtx, cancel := context.WithTimeout(context.Background(), timeout)
		if cancelAfter > 0 {
			time.AfterFunc(cancelAfter, cancel)
		}
		metadata := []string{"x-auth-token", identity, "x-request-id", requestID(number)}
		begun := time.Now()
		result := call(callCtx, line.client, method, request.encoded(), metadata, grpc.WaitForReady(true))
		cancel()
		// A drop fails all calls on the connection, and those that start before the client notices it.
		hungUp := line.dropped.Load() > begun.Add(-unnoticed).UnixNano()
		l.ledger.close(number, result, hungUp)
		time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
	}
}

// outages kills the sandbox and starts another on the same port, at most twelve times per run.
func outages(ctx context.Context, program string, upstream *sandbox, duration time.Duration, load *faultyLoad) (*sandbox, int, error) {
	every := max(duration/12, 5*time.Second)
	pause := min(2*time.Second, every/10)
	for count := 0; ; count++ {
		select {
		case <-ctx.Done():
			return upstream, count, nil
		case <-time.After(every - pause):
		}
		upstream.kill()
		time.Sleep(pause)
		again, err := startSandbox(program, upstream.address)
		if err != nil {
			return upstream, count, fmt.Errorf("restart of the sandbox after an outage: %w", err)
		}
		upstream = again
		if err := load.issueToken(upstream.url()); err != nil {
			return upstream, count, err
		}
	}
}

const idPrefix = "soak-"

func requestID(number int) string { return fmt.Sprint(idPrefix, number) }

// entry is the end of one call at its caller.
type entry struct {
	code codes.Code
	// The server sent the code.
	fromServer bool
	// The caller dropped the connection during the call.
	hungUp bool
}

// ledger records each call as its caller and as the access log report it.
type ledger struct {
	lock    sync.Mutex
	callers []entry
	logged  map[int]string
	// Access lines with an unknown request id, and further lines of a known one.
	odd []string
	// Number of access lines by gRPC code.
	lines map[string]int
}

func (l *ledger) open() int {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.callers = append(l.callers, entry{})
	return len(l.callers) - 1
}

func (l *ledger) close(number int, result callResult, hungUp bool) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.callers[number] = entry{result.code, result.fromServer, hungUp}
}

// log records one line of the program's log.
func (l *ledger) log(line []byte) {
	if !bytes.Contains(line, []byte(`"target":"access"`)) {
		return
	}
	number := -1
	id, code := textField(line, "request_id"), textField(line, "grpc_code")
	_, _ = fmt.Sscanf(id, idPrefix+"%d", &number)
	l.lock.Lock()
	defer l.lock.Unlock()
	if l.logged == nil {
		l.logged, l.lines = map[int]string{}, map[string]int{}
	}
	l.lines[code]++
	if _, twice := l.logged[number]; twice || number < 0 || number >= len(l.callers) {
		l.odd = append(l.odd, string(line))
		return
	}
	l.logged[number] = code
}

// textField returns the value of a JSON text field. It does not undo escapes.
func textField(line []byte, name string) string {
	_, rest, _ := bytes.Cut(line, []byte(`"`+name+`":"`))
	value, _, _ := bytes.Cut(rest, []byte(`"`))
	return string(value)
}

// balance compares the calls at their callers with the program's log and metrics. A call that its caller abandoned, or whose
// connection was dropped, may have any code in the log or no line; every other call must have the same code in both.
func (l *ledger) balance(results *results, metrics series) {
	differ, lost, givenUp, arrived, hurried, codesSeen := 0, 0, 0, 0, 0, map[string]int{}
	first := ""
	for number, seen := range l.callers {
		code := seen.code.String()
		codesSeen[code]++
		logged, found := l.logged[number]
		switch {
		case seen.fromServer && logged == code:
		case seen.fromServer:
			differ++
			first = fmt.Sprintf("%s: %s at the caller, %q in the log", requestID(number), code, logged)
		case seen.code == codes.Canceled || seen.code == codes.DeadlineExceeded || seen.hungUp:
			givenUp++
			if found {
				arrived++
			}
		default:
			lost++
			first = fmt.Sprintf("%s: %s without a reply of the server", requestID(number), code)
		}
		if seen.code == codes.Canceled || seen.code == codes.DeadlineExceeded {
			hurried++
		}
	}
	results.check(differ == 0 && lost == 0 && len(l.odd) == 0,
		"%d calls: %d logged with another code, %d failed without a reply of the server, %d unexpected access lines; %d abandoned by callers, %d of them logged %s",
		len(l.callers), differ, lost, len(l.odd), givenUp, arrived, first)
	results.check(len(codesSeen) >= 8, "codes at the callers (at least 8): %v", codesSeen)
	results.check(true, "Canceled and DeadlineExceeded: %d at the callers, %d in the program", hurried, l.lines["Canceled"]+l.lines["DeadlineExceeded"])
	started, handled := metrics.sum("grpc_server_started_total"), metrics.sum("grpc_server_handled_total")
	results.check(int(started) == len(l.logged) && int(handled) == len(l.logged),
		"%.0f started, %.0f handled, %d access lines", started, handled, len(l.logged))
	for code, count := range l.lines {
		counted := metrics.sum("grpc_server_handled_total", `grpc_code="`+code+`"`)
		results.check(int(counted) == count, "%s: %d access lines, %.0f in the metrics", code, count, counted)
	}
	for _, name := range []string{"log_lines_dropped_total", "panics_total"} {
		results.check(metrics.sum(name) == 0, "%s %.0f", name, metrics.sum(name))
	}
}

// settled waits until no connection, call, watch or upstream request is open and returns the metrics.
func (f *facade) settled() (series, error) {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
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
