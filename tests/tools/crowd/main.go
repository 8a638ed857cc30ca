// Command crowd sends the calls of many callers to one facade, whose upstream is a server in this process that counts its
// requests.
//
//	crowd polling  [-callers 1000] [-seconds 60] PROGRAM   many callers poll ten tasks once a second, with --cache-ttl 2s
//	crowd distinct [-keys 1000000] PROGRAM                 each call has its own token and task
//
// polling fails above five upstream calls a second; distinct fails if the program grows by 64 MiB or more.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	method      = "/huaweicloud.rds.task.v1.TaskService/GetTaskDetail"
	connections = 20
	pollEvery   = time.Second
	tasks       = 10
	// With a cache of 2 s, each of the ten tasks is requested at most every other second.
	upstreamCallsPerSecond = 5
	maxGrowth              = 64 << 20
)

func main() {
	flags := flag.NewFlagSet("crowd", flag.ExitOnError)
	callers := flags.Int("callers", 1000, "polling: number of callers")
	seconds := flags.Int("seconds", 60, "polling: length of the run in seconds")
	keys := flags.Int("keys", 1_000_000, "distinct: number of calls, each with its own token and task")
	if len(os.Args) < 3 {
		usage()
	}
	_ = flags.Parse(os.Args[2:])
	if flags.NArg() != 1 {
		usage()
	}
	var err error
	switch os.Args[1] {
	case "polling":
		err = polling(flags.Arg(0), *callers, *seconds)
	case "distinct":
		err = distinct(flags.Arg(0), *keys)
	default:
		usage()
	}
	if err != nil {
		fmt.Println("FAIL ", err)
		fmt.Println("0 passed, 1 failed")
		os.Exit(1)
	}
	fmt.Println("1 passed, 0 failed")
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: crowd polling|distinct [-callers N] [-seconds N] [-keys N] PROGRAM")
	os.Exit(2)
}

func polling(program string, callers, seconds int) error {
	upstream, err := startUpstream()
	if err != nil {
		return err
	}
	facade, err := start(program, upstream.url, "--cache-ttl", "2s")
	if err != nil {
		return err
	}
	defer facade.kill()

	end := time.Now().Add(time.Duration(seconds) * time.Second)
	latencies := make([][]time.Duration, callers)
	failures := make([]error, callers)
	var running sync.WaitGroup
	for caller := range callers {
		running.Go(func() {
			// Spread over the second, as independent callers are.
			next := time.Now().Add(pollEvery * time.Duration(caller) / time.Duration(callers))
			for ; next.Before(end); next = next.Add(pollEvery) {
				time.Sleep(time.Until(next))
				begun := time.Now()
				err := facade.call(caller, "one-token", fmt.Sprintf("task-%d", caller%tasks))
				latencies[caller] = append(latencies[caller], time.Since(begun))
				if err != nil {
					failures[caller] = err
				}
			}
		})
	}
	running.Wait()

	if err := errors.Join(failures...); err != nil {
		return err
	}
	all := slices.Concat(latencies...)
	slices.Sort(all)
	calls, allowed := upstream.calls.Load(), int64(upstreamCallsPerSecond*seconds)
	fmt.Printf("ok    %d callers, %d s: %d calls, %d upstream calls (at most %d), p50 %v, p99 %v\n", callers, seconds,
		len(all), calls, allowed, all[len(all)/2].Round(10*time.Microsecond), all[len(all)*99/100].Round(10*time.Microsecond))
	if calls > allowed {
		return fmt.Errorf("%d upstream calls; at most %d are allowed", calls, allowed)
	}
	return nil
}

// distinct makes each call with a new token and about a new task. Some tokens are throttled, so that all caches of the program
// fill.
func distinct(program string, keys int) error {
	upstream, err := startUpstream()
	if err != nil {
		return err
	}
	facade, err := start(program, upstream.url, "--cache-ttl", "1h", "--upstream-rate", "60/1m")
	if err != nil {
		return err
	}
	defer facade.kill()

	// The memory of the connections themselves does not count as growth.
	const warmUp = 2000
	if err := facade.callAll(0, warmUp); err != nil {
		return err
	}
	before, err := facade.resident()
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := facade.callAll(warmUp, warmUp+keys); err != nil {
		return err
	}
	took := time.Since(begun)
	after, err := facade.resident()
	if err != nil {
		return err
	}
	growth := after - before
	fmt.Printf("ok    %d keys in %.0f s, %d upstream calls: resident memory %.1f MiB, then %.1f MiB; growth %.1f MiB\n",
		keys, took.Seconds(), upstream.calls.Load(), mebibytes(before), mebibytes(after), mebibytes(growth))
	if growth >= maxGrowth {
		return fmt.Errorf("the program grew by %.1f MiB", mebibytes(growth))
	}
	return nil
}

func mebibytes(bytes int64) float64 { return float64(bytes) / (1 << 20) }

// upstream replies to every request; it throttles every fourth token.
type upstream struct {
	url   string
	calls atomic.Int64
}

func startUpstream() (*upstream, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	upstream := &upstream{url: "http://" + listener.Addr().String()}
	go func() { _ = http.Serve(listener, upstream) }()
	return upstream, nil
}

func (u *upstream) ServeHTTP(answer http.ResponseWriter, request *http.Request) {
	u.calls.Add(1)
	_, _ = io.Copy(io.Discard, request.Body)
	if number, err := strconv.Atoi(strings.TrimPrefix(request.Header.Get("X-Auth-Token"), "token-")); err == nil && number%4 == 0 {
		answer.Header().Set("Retry-After", "300")
		answer.WriteHeader(http.StatusTooManyRequests)
		return
	}
	answer.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(answer, `{"instance_id":"i","instance_name":"n","job_id":"j","job_name":"a"}`)
}

// facade is the running program and connections to it.
type facade struct {
	command     *exec.Cmd
	connections []*grpc.ClientConn
}

func start(program, endpoint string, arguments ...string) (*facade, error) {
	arguments = append([]string{"serve", "--listen", "127.0.0.1:0", "--metrics-listen", "off", "--log-format", "json",
		"--endpoint", endpoint, "--credentials", "caller"}, arguments...)
	facade := &facade{command: exec.Command(program, arguments...)}
	output, err := facade.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	facade.command.Stderr = os.Stderr
	if err := facade.command.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewReader(output)
	line, err := lines.ReadBytes('\n')
	var first struct{ Listen string }
	if err == nil {
		err = json.Unmarshal(line, &first)
	}
	if err != nil {
		facade.kill()
		return nil, fmt.Errorf("the first line of the log: %w", err)
	}
	go func() { _, _ = io.Copy(io.Discard, lines) }()
	for range connections {
		connection, err := grpc.NewClient(first.Listen, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			facade.kill()
			return nil, err
		}
		facade.connections = append(facade.connections, connection)
	}
	return facade, nil
}

func (f *facade) kill() {
	_ = f.command.Process.Kill()
	_ = f.command.Wait()
}

// callAll makes one call for each number, with its own token and task.
func (f *facade) callAll(from, to int) error {
	const workers = 100
	var next atomic.Int64
	next.Store(int64(from))
	failures := make([]error, workers)
	var running sync.WaitGroup
	for worker := range workers {
		running.Go(func() {
			for number := int(next.Add(1) - 1); number < to; number = int(next.Add(1) - 1) {
				err := f.call(worker, fmt.Sprintf("token-%d", number), fmt.Sprintf("task-%d", number))
				if number%4 == 0 && status.Code(err) == codes.ResourceExhausted {
					err = nil
				}
				if err != nil {
					failures[worker] = err
					return
				}
			}
		})
	}
	running.Wait()
	return errors.Join(failures...)
}

func (f *facade) call(caller int, token, workflowID string) error {
	var message, reply []byte
	for number, text := range []string{"project", "instance", workflowID} {
		message = protowire.AppendTag(message, protowire.Number(number+1), protowire.BytesType)
		message = protowire.AppendString(message, text)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "x-auth-token", token)
	connection := f.connections[caller%len(f.connections)]
	return connection.Invoke(ctx, method, &message, &reply, grpc.ForceCodec(rawCodec{}))
}

// resident returns the program's resident memory in bytes.
func (f *facade) resident() (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", f.command.Process.Pid))
	if err != nil {
		return 0, err
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// rawCodec passes encoded messages through, so that no generated code is needed.
type rawCodec struct{}

func (rawCodec) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }

func (rawCodec) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = append([]byte(nil), data...)
	return nil
}

func (rawCodec) Name() string { return "proto" }
