package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Watched tasks change this often, and each of their states is this long, so that a watcher that does not read fills its window.
const (
	watchedPrefix = "watched-"
	stateLasts    = 300 * time.Millisecond
	stateSize     = 8 << 10
)

// Shares of the requests that get a random fault, and that throttle their token.
const (
	faultyReplies    = 0.1
	throttledReplies = 0.003
	slowReplies      = 0.3
	slowestReply     = 150 * time.Millisecond
	// Above --attempt-timeout.
	stalledReply = 1500 * time.Millisecond
)

// randomReplies are the faults of single requests.
var randomReplies = []http.HandlerFunc{
	resetConnection,
	respondRaw(""),
	neverRespond,
	func(reply http.ResponseWriter, request *http.Request) {
		time.Sleep(rand.N(stalledReply))
		respond(http.StatusOK, `{"job_id":"late"`)(reply, request)
	},
	respondRaw("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"job_id\":\"j\",\"job_"),
	respondRaw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{\"job_id\":\"j\""),
	respondRaw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n"),
	respondRaw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
	respondRaw("\x16\x03\x01 garbage \x00\xff\r\n\r\n"),
	respondRaw(headWith(manyHeaders(150))),
	respond(http.StatusOK, "<html>a page</html>"),
	respond(http.StatusOK, `{"job_id":`),
	respond(http.StatusOK, strings.Repeat("x", 2<<20)),
	respond(http.StatusOK, gatewayError("DBS.200001", "internal")),
	respond(http.StatusOK, "not compressed", "Content-Encoding", "gzip"),
	respond(http.StatusTemporaryRedirect, "", "Location", "http://127.0.0.1:1/"),
	respond(http.StatusBadRequest, gatewayError("DBS.280001", "invalid")),
	respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: decrypt token fail")),
	respond(http.StatusForbidden, gatewayError("DBS.200011", "no permission")),
	respond(http.StatusNotFound, gatewayError("DBS.200543", "no such task")),
	respond(http.StatusNotFound, "<html>a page</html>"),
	respond(http.StatusConflict, gatewayError("DBS.200019", "busy")),
	respond(http.StatusInternalServerError, ""),
	respond(http.StatusBadGateway, "<html>a page</html>"),
	respond(http.StatusServiceUnavailable, ""),
	respond(http.StatusGatewayTimeout, ""),
}

// faultyUpstream replies to a share of all requests with random faults, and disappears at times. Its watched tasks run for some seconds.
type faultyUpstream struct {
	address string
	lock    sync.Mutex
	server  *http.Server
	random  *rand.Rand
	calm    bool
	// When each request arrived, by token.
	arrivals map[string][]time.Time
	tasks    map[string]*watchedRun
}

// watchedRun is a task that changes until it is over.
type watchedRun struct {
	begun time.Time
	lasts time.Duration
}

func startFaultyUpstream(seed uint64) (*faultyUpstream, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	upstream := &faultyUpstream{address: address, random: rand.New(rand.NewPCG(seed, 1)), arrivals: map[string][]time.Time{}, tasks: map[string]*watchedRun{}}
	return upstream, upstream.serve()
}

func (u *faultyUpstream) serve() error {
	listener, err := net.Listen("tcp", u.address)
	if err != nil {
		return err
	}
	u.lock.Lock()
	defer u.lock.Unlock()
	u.server = &http.Server{Handler: u}
	go func(server *http.Server) { _ = server.Serve(listener) }(u.server)
	return nil
}

// close closes the listener and all connections.
func (u *faultyUpstream) close() {
	u.lock.Lock()
	defer u.lock.Unlock()
	_ = u.server.Close()
}

// disappear closes all connections and refuses others for that long.
func (u *faultyUpstream) disappear(duration time.Duration) error {
	u.close()
	time.Sleep(duration)
	return u.serve()
}

// setCalm ends the random faults and lets all watched tasks end, or resumes the faults.
func (u *faultyUpstream) setCalm(calm bool) {
	u.lock.Lock()
	defer u.lock.Unlock()
	u.calm = calm
	for _, run := range u.tasks {
		if elapsed := time.Since(run.begun); calm && elapsed < run.lasts {
			run.lasts = elapsed
		}
	}
}

func (u *faultyUpstream) ServeHTTP(reply http.ResponseWriter, request *http.Request) {
	token := request.Header.Get("X-Auth-Token")
	u.lock.Lock()
	u.arrivals[token] = append(u.arrivals[token], time.Now())
	var fault http.HandlerFunc
	delay := time.Duration(0)
	switch share := u.random.Float64(); {
	case u.calm:
	case share < throttledReplies:
		fault = tooManyRequests("1")
	case share < throttledReplies+faultyReplies:
		fault = randomReplies[u.random.IntN(len(randomReplies))]
	case share < slowReplies:
		delay = time.Duration(u.random.Int64N(int64(slowestReply)))
	}
	u.lock.Unlock()
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return
	}
	if fault != nil {
		fault(reply, request)
		return
	}
	time.Sleep(delay)
	asked := parseUpstreamRequest(request, body)
	task := map[string]string{"instance_id": asked.instance, "instance_name": "instance", "job_id": asked.workflow, "job_name": asked.name, "status": "Running"}
	if strings.HasPrefix(asked.workflow, watchedPrefix) {
		state, over := u.look(asked.workflow)
		task["job_name"], task["instance_name"] = fmt.Sprint(state), strings.Repeat("x", stateSize)
		if over {
			task["status"] = "Completed"
		}
	}
	reply.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(reply).Encode(task)
}

// look returns the state of a watched task, which begins at the first look, and whether the task is over.
func (u *faultyUpstream) look(workflow string) (state int, over bool) {
	u.lock.Lock()
	defer u.lock.Unlock()
	run := u.tasks[workflow]
	if run == nil {
		run = &watchedRun{time.Now(), 2*time.Second + time.Duration(u.random.Int64N(int64(6*time.Second)))}
		if u.calm {
			run.lasts = 0
		}
		u.tasks[workflow] = run
	}
	elapsed := time.Since(run.begun)
	return int(min(elapsed, run.lasts)/stateLasts) + 1, elapsed >= run.lasts
}

// last returns the number of a task's final state.
func (u *faultyUpstream) last(workflow string) int {
	u.lock.Lock()
	defer u.lock.Unlock()
	if run := u.tasks[workflow]; run != nil {
		return int(run.lasts/stateLasts) + 1
	}
	return -1
}

// received returns the number of requests that arrived within a period.
func (u *faultyUpstream) received(from, to time.Time) int {
	u.lock.Lock()
	defer u.lock.Unlock()
	count := 0
	for _, times := range u.arrivals {
		for _, at := range times {
			if !at.Before(from) && !at.After(to) {
				count++
			}
		}
	}
	return count
}
