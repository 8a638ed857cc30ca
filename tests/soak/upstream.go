package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// upstreamDelay is how long a well-behaved reply takes: long enough for identical calls to be coalesced.
const upstreamDelay = 5 * time.Millisecond

// clockTolerance is how far a signature's time may be off the gateway's clock.
const clockTolerance = 15 * time.Minute

const sdkDate = "20060102T150405Z"

// upstreamRequest is what a scripted reply may depend on.
type upstreamRequest struct {
	taskRequest
	token string
}

// script chooses the reply to a request; nil means the ordinary reply.
type script func(*scriptedUpstream, upstreamRequest) http.HandlerFunc

// scriptedUpstream imitates RDS and IAM. It replies to every request with a task or a token, unless the script replaces the reply.
type scriptedUpstream struct {
	url    string
	server *http.Server
	script script
	// HTTP status of the second token request; the others succeed. Zero if that succeeds, too.
	iamFailure    int
	tokenRequests atomic.Int64
	// Scripted replies.
	misbehaved atomic.Int64
	// Connections opened so far.
	connections atomic.Int64
	// Requests with the rogue's token, and whether they used up the quota of the facade's address.
	rogueRequests   atomic.Int64
	addressExceeded atomic.Bool
	// Refused signatures of replicas with a wrong secret key.
	badSignatures atomic.Int64
	// Task names that were requested before.
	requested sync.Map
}

func startScriptedUpstream(script script, iamFailure int) (*scriptedUpstream, error) {
	upstream := &scriptedUpstream{script: script, iamFailure: iamFailure}
	upstream.server = &http.Server{Handler: upstream, ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			upstream.connections.Add(1)
		}
	}}
	var err error
	upstream.url, err = serveHTTP(upstream.server)
	return upstream, err
}

// serveHTTP serves on a free port of loopback and returns the base URL.
func serveHTTP(server *http.Server) (string, error) {
	listener, err := net.Listen("tcp", anyPort)
	if err != nil {
		return "", err
	}
	go func() { _ = server.Serve(listener) }()
	return "http://" + listener.Addr().String(), nil
}

func (u *scriptedUpstream) close() { _ = u.server.Close() }

func (u *scriptedUpstream) ServeHTTP(reply http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return
	}
	if request.URL.Path == "/v3/auth/tokens" {
		u.issueToken(reply)
		return
	}
	if signed := request.Header.Get("X-Sdk-Date"); signed != "" {
		at, err := time.Parse(sdkDate, signed)
		if err != nil || time.Since(at).Abs() > clockTolerance {
			respond(http.StatusUnauthorized, signatureExpired(signed, time.Now()))(reply, request)
			return
		}
	}
	parsed := parseUpstreamRequest(request, body)
	if u.script != nil {
		if scripted := u.script(u, parsed); scripted != nil {
			u.misbehaved.Add(1)
			scripted(reply, request)
			return
		}
	}
	time.Sleep(upstreamDelay)
	reply.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(reply).Encode(map[string]string{
		"instance_id": parsed.instance, "instance_name": "instance", "job_id": parsed.workflow, "job_name": parsed.name,
		// So that a watched task changes with every poll.
		"status": "Running", "update_at": time.Now().Format(time.RFC3339Nano),
	})
}

// parseUpstreamRequest reads the path /v3/{project}/instances/{instance}/task-center-detail and the body.
func parseUpstreamRequest(request *http.Request, body []byte) upstreamRequest {
	parsed := upstreamRequest{token: request.Header.Get("X-Auth-Token")}
	if parts := strings.Split(request.URL.Path, "/"); len(parts) == 6 {
		parsed.project, parsed.instance = parts[2], parts[4]
	}
	var task struct {
		WorkflowID   string `json:"workflow_id"`
		WorkflowName string `json:"workflow_name"`
	}
	// A body that cannot be parsed leaves the fields empty, which no script matches.
	_ = json.Unmarshal(body, &task)
	parsed.workflow, parsed.name = task.WorkflowID, task.WorkflowName
	return parsed
}

func (u *scriptedUpstream) issueToken(reply http.ResponseWriter) {
	number := u.tokenRequests.Add(1)
	if number == 2 && u.iamFailure != 0 {
		reply.Header().Set("Retry-After", "60")
		reply.WriteHeader(u.iamFailure)
		_, _ = io.WriteString(reply, `{"error":{"code":`+strconv.Itoa(u.iamFailure)+`,"message":"try later"}}`)
		return
	}
	reply.Header().Set("X-Subject-Token", fmt.Sprint("iam-token-", number))
	reply.WriteHeader(http.StatusCreated)
	now := time.Now().UTC()
	_, _ = fmt.Fprintf(reply, `{"token":{"issued_at":%q,"expires_at":%q}}`,
		now.Format(time.RFC3339), now.Add(24*time.Hour).Format(time.RFC3339))
}

// firstRequestFor reports whether no earlier request had the name.
func (u *scriptedUpstream) firstRequestFor(name string) bool {
	_, seen := u.requested.LoadOrStore(name, true)
	return !seen
}

// ---- Scripts: which requests get a scripted reply ----

// rogueInstances scripts the reply for each instance whose id begins with "rogue".
func rogueInstances(handler http.HandlerFunc) script {
	return func(_ *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
		if strings.HasPrefix(request.instance, rogueInstance) {
			return handler
		}
		return nil
	}
}

// foreignProject scripts the reply for the project that the server's credential is not scoped to.
func foreignProject(handler http.HandlerFunc) script {
	return func(_ *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
		if request.project == foreignProjectID {
			return handler
		}
		return nil
	}
}

// rogueName scripts the reply for one workflow name.
func rogueName(handler http.HandlerFunc) script {
	return func(_ *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
		if request.name == rogueWorkflowName {
			return handler
		}
		return nil
	}
}

// rogueTokens scripts the reply for each token that begins with "rogue".
func rogueTokens(handler http.HandlerFunc) script {
	return func(_ *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
		if strings.HasPrefix(request.token, rogueToken) {
			return handler
		}
		return nil
	}
}

// throttledRogue throttles the rogue's token. When the facade ignores that and sends more than addressQuota requests with
// it, the gateway throttles the facade's address, and thereby all callers.
func throttledRogue(handler http.HandlerFunc) script {
	const addressQuota = 50
	return func(upstream *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
		if request.token == rogueToken {
			if upstream.rogueRequests.Add(1) > addressQuota {
				upstream.addressExceeded.Store(true)
			}
			return handler
		}
		if upstream.addressExceeded.Load() {
			return respond(http.StatusTooManyRequests,
				gatewayError("APIGW.0308", "The throttling threshold has been reached: policy ip over ratelimit,limit:50,time:1 minute"))
		}
		return nil
	}
}

// transientErrors replies to every request about the rogue's instance with a 408, and every twentieth of an honest caller's
// requests once: those calls succeed if the retry budget has room for them.
func transientErrors(upstream *scriptedUpstream, request upstreamRequest) http.HandlerFunc {
	const honestShare = 20
	timeout := respond(http.StatusRequestTimeout, "")
	if strings.HasPrefix(request.instance, rogueInstance) {
		return timeout
	}
	if honestNumber(request.name)%honestShare == 0 && upstream.firstRequestFor(request.name) {
		return timeout
	}
	return nil
}

// lockedKey rejects all signatures once replicas with a wrong secret key have made more than five bad ones. Accepted
// signatures of other replicas do not reset the count: which count the vendor keeps is not documented.
func lockedKey(upstream *scriptedUpstream, _ upstreamRequest) http.HandlerFunc {
	const signaturesBeforeLock = 5
	if upstream.badSignatures.Load() > signaturesBeforeLock {
		return respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: AK access failed to reach the limit"))
	}
	return nil
}

// ---- Replies ----

// respond sends a status and a body. Headers come in pairs of name and value; an empty value leaves the header out.
func respond(status int, body string, headers ...string) http.HandlerFunc {
	return func(reply http.ResponseWriter, _ *http.Request) {
		for pair := 0; pair+1 < len(headers); pair += 2 {
			if headers[pair+1] == "" {
				// Keeps net/http from adding its own.
				reply.Header()[headers[pair]] = nil
				continue
			}
			reply.Header().Set(headers[pair], headers[pair+1])
		}
		reply.WriteHeader(status)
		_, _ = io.WriteString(reply, body)
	}
}

// respondRaw sends these bytes as the reply and closes the connection.
func respondRaw(text string) http.HandlerFunc {
	return func(reply http.ResponseWriter, _ *http.Request) {
		socket, _, err := reply.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		_, _ = io.WriteString(socket, text)
		_ = socket.Close()
	}
}

// resetConnection closes the connection with a TCP reset instead of a reply.
func resetConnection(reply http.ResponseWriter, _ *http.Request) {
	socket, _, err := reply.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	_ = socket.(*net.TCPConn).SetLinger(0)
	_ = socket.Close()
}

// neverRespond waits until the client closes the connection.
func neverRespond(_ http.ResponseWriter, request *http.Request) { <-request.Context().Done() }

// otherInstance replies with a task of another instance, as a proxy does that is one reply behind.
var otherInstance = respond(http.StatusOK, `{"instance_id":"another","instance_name":"n","job_id":"j","job_name":"n"}`)

// manyParts is a reply close to the limit of 1 MiB, with as many parts as fit.
var manyParts = respond(http.StatusOK, `{"job_id":"j","sub_task_list":[`+strings.TrimSuffix(strings.Repeat("{},", 349_000), ",")+`]}`)

func gatewayError(code, message string) string {
	return fmt.Sprintf(`{"error_code":%q,"error_msg":%q,"request_id":"7bd6ad1c8e0e4e0c9a5b6f3f3f0a4e11"}`, code, message)
}

// signatureExpired is the gateway's error for a signature whose time is too far from serverTime.
func signatureExpired(signed string, serverTime time.Time) string {
	return gatewayError("APIGW.0301", fmt.Sprintf("Incorrect IAM authentication information: signature expired, signature time:%s,server time:%s",
		signed, serverTime.UTC().Format(sdkDate)))
}

// withClock rejects a signature as expired by a clock that is off by the offset: in the message, or in the Date header.
func withClock(offset time.Duration, inMessage bool) http.HandlerFunc {
	return func(reply http.ResponseWriter, request *http.Request) {
		theirs := time.Now().Add(offset)
		if inMessage {
			respond(http.StatusUnauthorized, signatureExpired(request.Header.Get("X-Sdk-Date"), theirs), "Date", "")(reply, request)
			return
		}
		respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: verify aksk signature fail"), "Date", theirs.UTC().Format(http.TimeFormat))(reply, request)
	}
}
