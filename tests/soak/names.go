package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

var names = []attack{
	{name: "huge metadata", run: hugeMetadata},
	{name: "HPACK bomb", run: hpackBomb},
	{name: "ids that are paths, lines, headers", run: hostileIDs},
	{name: "headers that choose, break, smuggle", run: hostileHeaders},
	{name: "ever new names", run: everNewNames},
	{name: "log forging, JSON", run: func(t *target) (string, error) { return forgeLog(t, "json") }},
	{name: "log forging, text", run: func(t *target) (string, error) { return forgeLog(t, "text") }},
}

// hugeMetadata sends more headers than the server accepts: a thousand small ones, one of 60 KB, one of 70 KB, one of 1 MiB.
func hugeMetadata(t *target) (string, error) {
	many := pairs()
	for number := range 1000 {
		many = append(many, [2]string{fmt.Sprintf("x-%d", number), "a"})
	}
	outcomes := map[string]int{}
	lists := [][][2]string{many}
	for _, size := range []int{60_000, 70_000, 1 << 20} {
		lists = append(lists, pairs([2]string{"x-huge", strings.Repeat("a", size)}))
	}
	for _, fields := range lists {
		for range 20 {
			err := t.tally(outcomes, 5, func(p *peer) {
				for number := range 5 {
					p.call(streamID(number), fields, example(number))
				}
			})
			if err != nil {
				return "", err
			}
		}
	}
	return rejected(outcomes)
}

// hpackBomb fills the header table once and then refers to the entry thousands of times, at one byte each.
func hpackBomb(t *target) (string, error) {
	entry := [2]string{"x-bomb", strings.Repeat("a", 3900)}
	bomb := pairs()
	for range 4000 {
		bomb = append(bomb, entry)
	}
	outcomes := map[string]int{}
	for range 50 {
		err := t.tally(outcomes, 3, func(p *peer) {
			for number := range 3 {
				p.headers(streamID(number), bomb, true)
			}
		})
		if err != nil {
			return "", err
		}
	}
	return rejected(outcomes)
}

// tally makes calls on a separate connection and adds the ends of the streams to the outcomes.
func (t *target) tally(outcomes map[string]int, streams int, ask func(*peer)) error {
	peer, err := t.open()
	if err != nil {
		return err
	}
	defer peer.close()
	peer.read()
	ask(peer)
	// The server may close the connection in the middle.
	_ = peer.writer.Flush()
	for outcome, count := range peer.outcomes(streams, 5*time.Second) {
		outcomes[outcome] += count
	}
	return nil
}

// rejected requires that every call ended and that none reached the service: one with RESOURCE_EXHAUSTED, 8, has too long metadata.
func rejected(outcomes map[string]int) (string, error) {
	text := fmt.Sprint(outcomes)
	for outcome := range outcomes {
		if outcome == "nothing" || strings.HasPrefix(outcome, "gRPC ") && outcome != "gRPC 8" {
			return text, fmt.Errorf("calls ended with: %s", outcome)
		}
	}
	return text, nil
}

var hostileTexts = []string{"", ".", "..", "../..", "a/b", "a\\b", "%2f", "%2e%2e%2f", "a%00", "a\x00b", "a\r\nx-auth-token: b", "a\nb", "a\rb",
	"a?b=c", "a#b", "a;b", "a b", "a@b", "a:b", "http://169.254.169.254/", "//127.0.0.1/", "\u4e2d\u6587", "a\u202eb", "\uff0e\uff0e\uff0f",
	"\u2028", "<script>", "${jndi:ldap://a}", "{{7*7}}", "' or 1=1 --", "\x1b[31m", strings.Repeat("a", 129), strings.Repeat("a", 60_000)}

// hostileIDs puts texts into each id that would change a path, a line or a header. None may reach the upstream.
func hostileIDs(t *target) (string, error) {
	isolated, stop, err := t.startIsolated()
	if err != nil {
		return "", err
	}
	defer stop()
	connection, err := dial(isolated.address)
	if err != nil {
		return "", err
	}
	defer connection.Close()
	calls := 0
	for _, text := range hostileTexts {
		for field := range 3 {
			request := taskRequest{projectID, "hostile", "hostile", ""}
			*[]*string{&request.project, &request.instance, &request.workflow}[field] = text
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			result := call(ctx, connection, method, request.encoded(), []string{"x-auth-token", token})
			cancel()
			calls++
			if result.code != codes.InvalidArgument {
				return "", fmt.Errorf("id %d is %.40q: %v", field+1, text, result)
			}
			if strings.ContainsFunc(result.message, unicode.IsControl) || len(result.message) > 256 {
				return "", fmt.Errorf("id %d is %.40q: message %q", field+1, text, result.message)
			}
		}
	}
	heard, err := isolated.sandbox.count("task_requests")
	if err != nil {
		return "", err
	}
	if heard != 0 {
		return "", fmt.Errorf("the upstream got %d requests", heard)
	}
	connection.Close()
	return fmt.Sprintf("%d calls, all InvalidArgument, no upstream request", calls), isolated.checkIdle()
}

// hostileHeaders sends headers that would redirect the upstream request, end a line, or smuggle another request.
func hostileHeaders(t *target) (string, error) {
	values := []string{"a\r\nx-injected: 1", "a\nb", "a\rb", "a\x00b", "a\x1b[31m", "\x80\xff", strings.Repeat("a", 8000), "../../", "http://169.254.169.254/"}
	fields := []string{"x-request-id", "x-auth-token", "traceparent", "tracestate", "b3", "user-agent", "grpc-timeout", "grpc-encoding", "authorization",
		"cookie", "host", "x-forwarded-host", "x-forwarded-for", "x-forwarded-client-cert", "x-project-id", "x-domain-id", "x-sdk-date", "x-security-token",
		"x-envoy-original-path", "x-http-method-override", "content-length", "transfer-encoding", "connection", "upgrade", "te", "expect", "baggage"}
	isolated, stop, err := t.startIsolated()
	if err != nil {
		return "", err
	}
	defer stop()
	outcomes := map[string]int{}
	calls := 0
	// The sandbox remembers more requests than any field has values.
	try := func(field string, values []string) error {
		for _, value := range values {
			calls++
			err := isolated.tally(outcomes, 1, func(p *peer) {
				p.call(1, pairs([2]string{field, value}), taskRequest{projectID, "hostile-header", fmt.Sprint("w-", calls), ""})
			})
			if err != nil {
				return err
			}
		}
		return isolated.checkUpstreamRequests()
	}
	for _, field := range fields {
		if err := try(field, values); err != nil {
			return "", fmt.Errorf("%s: %w", field, err)
		}
	}
	for _, pseudo := range []string{":path", ":authority", ":method", ":scheme", ":protocol", ":status"} {
		if err := try(pseudo, slices.Concat(values, []string{"", method + "/../x", method + "?a=b", "*"})); err != nil {
			return "", fmt.Errorf("%s: %w", pseudo, err)
		}
	}
	if outcomes["nothing"] > 0 || outcomes["gRPC 13"] > 0 {
		return "", fmt.Errorf("%v", outcomes)
	}
	return fmt.Sprintf("%d calls %v; the upstream received only the fixed path and none of their headers", calls, outcomes), isolated.checkIdle()
}

// startIsolated starts another program with its own sandbox, which gets no requests of the honest caller.
func (t *target) startIsolated() (*target, func(), error) {
	upstream, err := startSandbox(t.program, anyPort)
	if err != nil {
		return nil, nil, err
	}
	facade, err := startFacade(t.program, upstream.url(), nil)
	if err != nil {
		upstream.kill()
		return nil, nil, err
	}
	stop := func() {
		facade.kill()
		upstream.kill()
	}
	return &target{facade: facade, sandbox: upstream}, stop, nil
}

var (
	onlyPath    = regexp.MustCompile(`^/v3/[A-Za-z0-9_-]{1,64}/instances/[A-Za-z0-9_-]{1,64}/task-center-detail$`)
	onlyHeaders = map[string]bool{"host": true, "content-type": true, "content-length": true, "x-auth-token": true, "user-agent": true, "accept": true}
)

// checkUpstreamRequests checks the last requests that the sandbox got.
func (t *target) checkUpstreamRequests() error {
	var requests []struct {
		Method, Path string
		Headers      [][2]string
	}
	if err := t.sandbox.control("requests", &requests); err != nil {
		return err
	}
	if len(requests) == 0 {
		return fmt.Errorf("the sandbox lists no requests")
	}
	for _, request := range requests {
		if request.Method != http.MethodPost || !onlyPath.MatchString(request.Path) {
			return fmt.Errorf("the upstream got %s %q", request.Method, request.Path)
		}
		for _, header := range request.Headers {
			if !onlyHeaders[header[0]] || strings.ContainsFunc(header[1], unicode.IsControl) {
				return fmt.Errorf("the upstream got the header %q", header)
			}
		}
	}
	return nil
}

// everNewNames sends a new method, host and request id with each call. They must add no series to the metrics.
func everNewNames(t *target) (string, error) {
	before, err := t.scrape()
	if err != nil {
		return "", err
	}
	const workers, connections = 40, 8
	var clients []*grpc.ClientConn
	for range connections {
		client, err := dial(t.address)
		if err != nil {
			return "", err
		}
		defer client.Close()
		clients = append(clients, client)
	}
	var next, unexpected atomic.Int64
	var first atomic.Value
	var running sync.WaitGroup
	for worker := range workers {
		running.Go(func() {
			for number := next.Add(1); number <= int64(t.calls); number = next.Add(1) {
				unheard := fmt.Sprintf("%x", rand.Uint64())
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				result := call(ctx, clients[worker%connections], "/"+unheard+"/"+unheard, nil,
					[]string{"x-request-id", unheard, "x-auth-token", unheard, "x-" + unheard, unheard}, grpc.CallAuthority(unheard))
				cancel()
				if result.code != codes.Unimplemented {
					unexpected.Add(1)
					first.CompareAndSwap(nil, result)
				}
			}
		})
	}
	running.Wait()
	after, err := t.scrape()
	if err != nil {
		return "", err
	}
	text := fmt.Sprintf("%d calls, %d series before and %d after", t.calls, len(before), len(after))
	if unexpected.Load() > 0 {
		return text, fmt.Errorf("%d calls did not end with UNIMPLEMENTED; the first: %v", unexpected.Load(), first.Load())
	}
	if len(after) != len(before) {
		return text, fmt.Errorf("the number of series changed")
	}
	return text, nil
}

// forged are texts that would end a log line, break out of JSON, or control a terminal.
var forged = []string{"\"},{\"level\":\"ERROR\",\"msg\":\"forged", "a\",\"grpc_code\":\"OK", "\\", "\\\"", "\\u000a", "\x80\x9b31m", "\xff\xfe", "{}", "a=b level=ERROR",
	"\t", "a b", "\u2028\u202e"}

// forgeLog sends the forged texts in all that a log line may contain of a caller and of the upstream.
func forgeLog(t *target, format string) (string, error) {
	upstream, err := net.Listen("tcp", anyPort)
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: http.HandlerFunc(replyForged)}
	go func() { _ = server.Serve(upstream) }()
	defer server.Close()
	log := &logLines{}
	facade, err := startFacade(t.program, "http://"+upstream.Addr().String(), log.add, "--log-format", format)
	if err != nil {
		return "", err
	}
	defer facade.kill()
	victim := &target{facade: facade}
	calls := 0
	for _, field := range []string{"x-request-id", "user-agent", "traceparent", "tracestate", "b3", "grpc-timeout", "x-auth-token", ":authority", ":path"} {
		for number, text := range forged {
			err := victim.tally(map[string]int{}, 1, func(p *peer) {
				p.call(1, pairs([2]string{field, text}), taskRequest{"p", fmt.Sprint("reply-", number), fmt.Sprint("w-", calls), text})
			})
			if err != nil {
				return "", err
			}
			calls++
		}
	}
	metrics, err := facade.settled()
	if err != nil {
		return "", err
	}
	facade.signal(terminate)
	if _, err := facade.wait(); err != nil {
		return "", err
	}
	access := 0
	for _, line := range log.all() {
		if err := checkLogLine(line, format); err != nil {
			return "", err
		}
		if strings.Contains(line, `"target":"access`) || strings.Contains(line, ": rpc ") {
			access++
		}
	}
	handled := metrics.sum("grpc_server_handled_total")
	text := fmt.Sprintf("%d calls, %.0f reached the service, %d access lines, %d lines in total, all valid", calls, handled, access, len(log.all()))
	if access != int(handled) || access == 0 {
		return text, fmt.Errorf("%.0f handled calls, but %d access lines", handled, access)
	}
	return text, nil
}

// replyForged replies with an error whose code, message and request id are forged texts.
func replyForged(reply http.ResponseWriter, request *http.Request) {
	_, _ = io.Copy(io.Discard, request.Body)
	number := 0
	_, _ = fmt.Sscanf(request.URL.Path, "/v3/p/instances/reply-%d", &number)
	text := forged[number] + "\n\x1b[31m"
	// Go leaves out header values that are invalid.
	reply.Header().Set("X-Request-Id", forged[number])
	reply.WriteHeader(http.StatusBadRequest)
	_ = json.NewEncoder(reply).Encode(map[string]string{"error_code": text, "error_msg": text})
}

var textLine = regexp.MustCompile(`^\d{4}-\d\d-\d\dT[0-9:.]+Z (ERROR|WARN|INFO) `)

// checkLogLine checks that a log line is valid and has no control characters.
func checkLogLine(line, format string) error {
	if strings.ContainsFunc(line, func(r rune) bool {
		return unicode.IsControl(r) || r == unicode.ReplacementChar || r >= 0x2028 && r <= 0x202e
	}) {
		return fmt.Errorf("a control character in %q", line)
	}
	if format == "text" {
		if !textLine.MatchString(line) {
			return fmt.Errorf("not the beginning of a text line: %q", line)
		}
		return nil
	}
	var object map[string]any
	if err := json.Unmarshal([]byte(line), &object); err != nil {
		return fmt.Errorf("%w: %q", err, line)
	}
	return nil
}
