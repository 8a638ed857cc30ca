package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	idPrefix = "soak-"
	// A caller notices the end of a connection within this time.
	noticedWithin = time.Second
	// A process writes an access line within this time, even on a busy machine.
	loggedWithin = 3 * time.Second
)

// documented are the reasons of errors.md that the faults can cause, with their codes.
var documented = map[string]codes.Code{
	"THROTTLED": codes.ResourceExhausted, "OVERLOADED": codes.ResourceExhausted,
	"UPSTREAM_UNAVAILABLE": codes.Unavailable, "UPSTREAM_CONNECT": codes.Unavailable, "UPSTREAM_RESET": codes.Unavailable,
	"UPSTREAM_TRUNCATED": codes.Unavailable, "UPSTREAM_PROTOCOL": codes.Unavailable, "CIRCUIT_OPEN": codes.Unavailable,
	"DEADLINE_EXCEEDED": codes.DeadlineExceeded, "UPSTREAM_TIMEOUT": codes.DeadlineExceeded,
	"UPSTREAM_INTERNAL": codes.Internal, "UPSTREAM_REDIRECT": codes.Internal,
	"UPSTREAM_MALFORMED_RESPONSE": codes.Internal, "UPSTREAM_RESPONSE_TOO_LARGE": codes.Internal,
	"UPSTREAM_INVALID_ARGUMENT": codes.InvalidArgument, "UPSTREAM_API_NOT_FOUND": codes.Unimplemented, "UPSTREAM_UNKNOWN": codes.Unknown,
	"CREDENTIAL_REJECTED": codes.Unauthenticated, "PERMISSION_DENIED": codes.PermissionDenied,
	"TASK_NOT_FOUND": codes.NotFound, "INSTANCE_BUSY": codes.Aborted,
}

// documentedWatchEnds end watches only.
var documentedWatchEnds = map[string]codes.Code{"SHUTTING_DOWN": codes.Unavailable, "WATCH_EXPIRED": codes.Unavailable}

func requestID(number int) string { return fmt.Sprint(idPrefix, number) }

// entry is one call or watch at its caller.
type entry struct {
	method       string
	line         *line
	begun, ended time.Time
	code         codes.Code
	// The caller may have ended it before the server had to.
	impatient bool
	// The server sent the code.
	fromServer bool
	reasons    []string
	// The address of the replica.
	peer string
}

// ledger records each call and watch as its caller and as the access log report it.
type ledger struct {
	lock    sync.Mutex
	entries []entry
	// Codes of the access lines.
	logged map[int]string
	// Access lines with an unknown request id, and further lines of a known one.
	odd []string
}

func (l *ledger) open(method string, line *line, impatient bool) int {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.entries = append(l.entries, entry{method: method, line: line, impatient: impatient, begun: time.Now()})
	return len(l.entries) - 1
}

func (l *ledger) close(number int, code codes.Code, fromServer bool, reasons []string, peer string) {
	l.lock.Lock()
	defer l.lock.Unlock()
	entry := &l.entries[number]
	entry.ended, entry.code, entry.fromServer, entry.reasons, entry.peer = time.Now(), code, fromServer, reasons, peer
}

// closeWatch records the end of a watch; io.EOF is the status OK. It is impatient if its own context has ended.
func (l *ledger) closeWatch(ctx context.Context, number int, err error, peer string) {
	l.lock.Lock()
	l.entries[number].impatient = ctx.Err() != nil
	l.lock.Unlock()
	if errors.Is(err, io.EOF) {
		l.close(number, codes.OK, true, nil, peer)
		return
	}
	found := reasons(err)
	l.close(number, status.Code(err), len(found) > 0, found, peer)
}

// log records one line of a replica's log.
func (l *ledger) log(replica *replica, line []byte) {
	if !bytes.Contains(line, []byte(`"target":"access"`)) {
		return
	}
	number := -1
	id, code := textField(line, "request_id"), textField(line, "grpc_code")
	_, _ = fmt.Sscanf(id, idPrefix+"%d", &number)
	l.lock.Lock()
	defer l.lock.Unlock()
	replica.lines[methodCode{textField(line, "grpc_method"), code}]++
	if _, twice := l.logged[number]; twice || number < 0 || number >= len(l.entries) {
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

// balance compares the calls and watches at their callers with the replicas' logs. One that its caller abandoned, or whose connection was
// dropped or ended with its replica, may have any code in the log or no line; every other one must have the same code in both. The line of
// a reply may be lost if its replica is killed at that moment.
func (l *ledger) balance(results *results, deaths []replicaDeath) {
	var differ, lost, undocumented []string
	abandoned, cutOff, died := 0, 0, 0
	count, seen := map[string]int{}, map[string]int{}
	for number, entry := range l.entries {
		code := entry.code.String()
		logged := l.logged[number]
		text := fmt.Sprintf("%s of %s at %s: %s at the caller, %q in the log, reasons %v, from %s to %s", requestID(number), entry.method, entry.peer, code, logged,
			entry.reasons, entry.begun.Format(time.StampMilli), entry.ended.Format(time.StampMilli))
		count[entry.method]++
		if entry.ended.IsZero() {
			lost = append(lost, text+", still open")
			continue
		}
		switch {
		case entry.fromServer && logged == code:
		case entry.fromServer && logged == "" && slices.ContainsFunc(deaths, func(death replicaDeath) bool {
			return death.address == entry.peer && entry.ended.After(death.from.Add(-loggedWithin)) && entry.begun.Before(death.until)
		}):
			died++
		case entry.fromServer:
			differ = append(differ, text)
		case entry.impatient && (entry.code == codes.Canceled || entry.code == codes.DeadlineExceeded):
			abandoned++
		case entry.cutOff(deaths):
			cutOff++
		default:
			lost = append(lost, text)
		}
		if !entry.fromServer {
			continue
		}
		seen[strings.TrimSpace(code+" "+strings.Join(entry.reasons, " "))]++
		if entry.code != codes.OK && !entry.documented() || entry.code == codes.OK && len(entry.reasons) > 0 {
			undocumented = append(undocumented, text)
		}
	}
	results.check(len(differ) == 0 && len(lost) == 0 && len(l.odd) == 0,
		"%v: %d logged with another code or not at all, %d failed without a reply of a server, %d unexpected access lines; "+
			"%d abandoned by callers, %d cut off with their connection or replica, %d lines lost with their replica%s",
		count, len(differ), len(lost), len(l.odd), abandoned, cutOff, died, evidence(differ, lost, l.odd))
	results.check(len(undocumented) == 0 && len(seen) >= 8, "every reply has a documented status, with at least 8 different ones: %v%s", seen, evidence(undocumented))
}

func (e entry) documented() bool {
	if len(e.reasons) != 1 {
		return false
	}
	code, known := documented[e.reasons[0]]
	if !known && e.method == watchMethod {
		code, known = documentedWatchEnds[e.reasons[0]]
	}
	return known && code == e.code
}

// cutOff reports whether the call was in flight when its connection was dropped or its replica was killed.
func (e entry) cutOff(deaths []replicaDeath) bool {
	if e.code != codes.Unavailable {
		return false
	}
	return slices.ContainsFunc(e.line.drops, func(drop connectionDrop) bool {
		return (e.peer == "" || e.peer == drop.address) && drop.at.Add(noticedWithin).After(e.begun) && drop.at.Before(e.ended)
	}) || slices.ContainsFunc(deaths, func(death replicaDeath) bool {
		return (e.peer == "" || e.peer == death.address) && e.begun.Before(death.until) && e.ended.After(death.from)
	})
}

// evidence is the first example of each list.
func evidence(lists ...[]string) string {
	text := ""
	for _, list := range lists {
		if len(list) > 0 {
			text += "; " + list[0]
		}
	}
	return text
}

// methodCode is a key of access lines and of grpc_server_handled_total.
type methodCode struct{ method, code string }

// balanceReplica compares the access lines of a replica with its metrics.
func (l *ledger) balanceReplica(results *results, replica *replica, metrics series) {
	l.lock.Lock()
	defer l.lock.Unlock()
	total := replica.count()
	var differ []string
	for _, key := range slices.SortedFunc(maps.Keys(replica.lines), func(a, b methodCode) int { return strings.Compare(a.method+a.code, b.method+b.code) }) {
		count := replica.lines[key]
		counted := int(metrics.sum("grpc_server_handled_total", fmt.Sprintf(`grpc_method=%q`, shortName(key.method)), fmt.Sprintf(`grpc_code=%q`, key.code)))
		if counted != count {
			differ = append(differ, fmt.Sprintf("%s %s: %d access lines, %d in the metrics", key.method, key.code, count, counted))
		}
	}
	started, handled := int(metrics.sum("grpc_server_started_total")), int(metrics.sum("grpc_server_handled_total"))
	results.check(started == total && handled == total && len(differ) == 0, "%s: %d calls and watches started, %d handled, %d access lines%s",
		replica.name, started, handled, total, evidence(differ))
	requireNoAlarm(results, replica.name, metrics)
}

func requireNoAlarm(results *results, name string, metrics series) {
	for _, metric := range []string{"log_lines_dropped_total", "panics_total", "background_task_restarts_total"} {
		if count := metrics.sum(metric); count != 0 {
			results.check(false, "%s: %s %.0f", name, metric, count)
		}
	}
}

func shortName(method string) string { return method[strings.LastIndexByte(method, '/')+1:] }
