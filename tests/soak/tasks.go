package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// taskUpstream is an upstream whose tasks change: each reply is a new state until the changes are stopped.
type taskUpstream struct {
	url    string
	server *http.Server
	lock   sync.Mutex
	// When each request arrived.
	arrivals []time.Time
	byToken  map[string]int
	// When each state was sent first; a state's number is its index.
	states []time.Time
	fixed  bool
	over   bool
	// A text that makes each state longer.
	padding string
}

func startTaskUpstream() (*taskUpstream, error) {
	upstream := &taskUpstream{byToken: map[string]int{}}
	upstream.server = &http.Server{Handler: upstream}
	var err error
	upstream.url, err = serveHTTP(upstream.server)
	return upstream, err
}

func (u *taskUpstream) close() { _ = u.server.Close() }

func (u *taskUpstream) ServeHTTP(reply http.ResponseWriter, request *http.Request) {
	_, _ = io.Copy(io.Discard, request.Body)
	token := request.Header.Get("X-Auth-Token")
	if strings.HasPrefix(token, inventedName) {
		respond(http.StatusUnauthorized, gatewayError("APIGW.0301", "Incorrect IAM authentication information: decrypt token fail"))(reply, request)
		return
	}
	u.lock.Lock()
	now := time.Now()
	u.arrivals = append(u.arrivals, now)
	u.byToken[token]++
	if !u.fixed || len(u.states) == 0 {
		u.states = append(u.states, now)
	}
	state, status := len(u.states)-1, "Running"
	if u.over {
		status = "Completed"
	}
	padding := u.padding
	u.lock.Unlock()
	reply.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(reply, `{"instance_id":"i","instance_name":%q,"job_id":"j","job_name":"%d","status":%q,"process":"%d%%"}`,
		padding, state, status, state%100)
}

// stopChanges repeats the newest state from now on.
func (u *taskUpstream) stopChanges() {
	u.lock.Lock()
	u.fixed = true
	u.lock.Unlock()
}

// complete ends all tasks: one more state, which is repeated.
func (u *taskUpstream) complete() {
	u.lock.Lock()
	u.over = true
	u.states = append(u.states, time.Now())
	u.fixed = true
	u.lock.Unlock()
}

// sentAt returns when a state was sent first.
func (u *taskUpstream) sentAt(state int) time.Time {
	u.lock.Lock()
	defer u.lock.Unlock()
	return u.states[state]
}

// newest returns the number of the newest state, -1 before the first one.
func (u *taskUpstream) newest() int {
	u.lock.Lock()
	defer u.lock.Unlock()
	return len(u.states) - 1
}

// lengthen makes each state longer by that many bytes.
func (u *taskUpstream) lengthen(bytes int) {
	u.lock.Lock()
	u.padding = strings.Repeat("x", bytes)
	u.lock.Unlock()
}

func (u *taskUpstream) requestsOf(token string) int {
	u.lock.Lock()
	defer u.lock.Unlock()
	return u.byToken[token]
}

func (u *taskUpstream) requests() int {
	u.lock.Lock()
	defer u.lock.Unlock()
	return len(u.arrivals)
}

// busiest is that of busiestOf.
func (u *taskUpstream) busiest(period time.Duration) int {
	u.lock.Lock()
	defer u.lock.Unlock()
	return busiestOf(u.arrivals, period)
}

// busiestOf returns the largest number of requests that arrived within the period. Requests that start a period apart may
// arrive closer together, so the period is shortened by a twentieth.
func busiestOf(arrivals []time.Time, period time.Duration) int {
	period -= period / 20
	most, first := 0, 0
	for last := range arrivals {
		for arrivals[last].Sub(arrivals[first]) >= period {
			first++
		}
		most = max(most, last-first+1)
	}
	return most
}
