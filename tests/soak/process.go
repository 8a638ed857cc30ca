package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	startLimit = 15 * time.Second
	stopLimit  = 30 * time.Second
	anyPort    = "127.0.0.1:0"
)

// Both log formats name the bound addresses in the first line.
var (
	listenField  = regexp.MustCompile(`\blisten"?[:=]"?([0-9.:]+)`)
	metricsField = regexp.MustCompile(`\bmetrics_listen"?[:=]"?([0-9.:]+)`)
)

// process is one run of the program.
type process struct {
	command *exec.Cmd
	// The first line of its log.
	first []byte
	// Closed when the process has ended and its log was read completely.
	exited chan struct{}
}

// start starts the program and waits for the first line of its log. One goroutine passes the later lines to onLine.
func start(environment []string, program string, onLine func(line []byte), arguments ...string) (*process, error) {
	process := &process{command: exec.Command(program, arguments...), exited: make(chan struct{})}
	// A nil slice would pass on this program's own environment.
	process.command.Env = append([]string{}, environment...)
	// The program ends with this one, even if this one is killed. The kernel watches the thread that started the program; Go
	// keeps its threads as long as no goroutine is locked to one.
	process.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	process.command.Stderr = os.Stderr
	output, err := process.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := process.command.Start(); err != nil {
		return nil, err
	}
	started := make(chan []byte, 1)
	go func() {
		lines := bufio.NewReaderSize(output, 1<<16)
		first, _ := lines.ReadBytes('\n')
		started <- first
		for {
			line, err := lines.ReadBytes('\n')
			if len(line) > 0 && onLine != nil {
				onLine(bytes.TrimSuffix(line, []byte("\n")))
			}
			if err != nil {
				break
			}
		}
		_ = process.command.Wait()
		close(process.exited)
	}()
	select {
	case process.first = <-started:
		if !listenField.Match(process.first) {
			process.kill()
			return nil, fmt.Errorf("the first log line has no address: %q", process.first)
		}
		return process, nil
	case <-time.After(startLimit):
		process.kill()
		return nil, errors.New("the program logged nothing after the start")
	}
}

func (p *process) signal(signal syscall.Signal) { _ = p.command.Process.Signal(signal) }

// wait waits for the end of the process and returns its exit state.
func (p *process) wait() (*os.ProcessState, error) {
	select {
	case <-p.exited:
		return p.command.ProcessState, nil
	case <-time.After(stopLimit):
		return nil, fmt.Errorf("still running after %v", stopLimit)
	}
}

func (p *process) kill() {
	_ = p.command.Process.Kill()
	<-p.exited
}

// sandbox is a running `sandbox`, which simulates the upstream.
type sandbox struct {
	*process
	address string
}

func startSandbox(program, listen string) (*sandbox, error) {
	process, err := start(nil, program, nil, "sandbox", "--listen", listen)
	if err != nil {
		return nil, err
	}
	return &sandbox{process, string(listenField.FindSubmatch(process.first)[1])}, nil
}

func (s *sandbox) url() string { return "http://" + s.address }

// facade is a running `serve`.
type facade struct {
	*process
	address, metrics string
}

func startFacade(program, upstream string, onLine func(line []byte), arguments ...string) (*facade, error) {
	return startFacadeIn(nil, program, upstream, onLine, arguments...)
}

func startFacadeIn(environment []string, program, upstream string, onLine func(line []byte), arguments ...string) (*facade, error) {
	defaults := []string{"serve", "--listen", anyPort, "--metrics-listen", anyPort, "--log-format", "json",
		"--endpoint", upstream, "--credentials", "caller"}
	process, err := start(environment, program, onLine, overridden(defaults, arguments)...)
	if err != nil {
		return nil, err
	}
	facade := &facade{process, string(listenField.FindSubmatch(process.first)[1]), string(metricsField.FindSubmatch(process.first)[1])}
	for deadline := time.Now().Add(startLimit); ; time.Sleep(5 * time.Millisecond) {
		if reply, err := metricsClient.Get("http://" + facade.metrics + "/readyz"); err == nil {
			reply.Body.Close()
			if reply.StatusCode == http.StatusOK {
				return facade, nil
			}
		}
		if time.Now().After(deadline) {
			facade.kill()
			return nil, fmt.Errorf("not ready within %v", startLimit)
		}
	}
}

// overridden returns the defaults and then more, without the default flags that more sets.
func overridden(defaults, more []string) []string {
	result := []string{defaults[0]}
	for pair := 1; pair < len(defaults); pair += 2 {
		if !slices.Contains(more, defaults[pair]) {
			result = append(result, defaults[pair], defaults[pair+1])
		}
	}
	return append(result, more...)
}

// resources are the memory, threads, descriptors and CPU time of a process.
type resources struct {
	resident, peak       int64 // Bytes.
	threads, descriptors int
	cpu                  time.Duration
}

func (p *process) resources() (resources, error) {
	folder := fmt.Sprintf("/proc/%d/", p.command.Process.Pid)
	status, err := os.ReadFile(folder + "status")
	if err != nil {
		return resources{}, err
	}
	descriptors, err := os.ReadDir(folder + "fd")
	if err != nil {
		return resources{}, err
	}
	stat, err := os.ReadFile(folder + "stat")
	if err != nil {
		return resources{}, err
	}
	// Fields 14 and 15 are ticks of user and system time; the name of the program, in brackets, may contain blanks.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	ticks := number(fields[11]) + number(fields[12])
	const ticksPerSecond = 100 // USER_HZ of all Linux targets of Go and Rust.
	return resources{
		resident:    number(statusField(status, "VmRSS")) << 10,
		peak:        number(statusField(status, "VmHWM")) << 10,
		threads:     int(number(statusField(status, "Threads"))),
		descriptors: len(descriptors),
		cpu:         time.Duration(ticks) * time.Second / ticksPerSecond,
	}, nil
}

func statusField(status []byte, name string) string {
	_, rest, _ := strings.Cut(string(status), name+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Fields(line + " 0")[0]
}

func number(text string) int64 {
	value, _ := strconv.ParseInt(text, 10, 64)
	return value
}

// series maps the name of a metric with its labels, as written in /metrics, to its value.
type series map[string]float64

// metricsClient gives up when a program does not reply.
var metricsClient = http.Client{Timeout: 5 * time.Second}

func (f *facade) scrape() (series, error) {
	reply, err := metricsClient.Get("http://" + f.metrics + "/metrics")
	if err != nil {
		return nil, err
	}
	defer reply.Body.Close()
	text, err := io.ReadAll(reply.Body)
	if err != nil {
		return nil, err
	}
	all := series{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if at := strings.LastIndexByte(line, ' '); at > 0 && line[0] != '#' {
			all[line[:at]], _ = strconv.ParseFloat(line[at+1:], 64)
		}
	}
	return all, nil
}

// sum adds up the series of one name that have all the given labels, such as `grpc_code="OK"`.
func (s series) sum(name string, labels ...string) float64 {
	total := 0.0
next:
	for key, value := range s {
		if key != name && !strings.HasPrefix(key, name+"{") {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(key, label) {
				continue next
			}
		}
		total += value
	}
	return total
}
