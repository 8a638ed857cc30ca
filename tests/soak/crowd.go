package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// Honest callers. Each has its own token and connection and calls about all honestInstances in turn. Where the program uses
// the server's credential, the connection is the caller.
const (
	honestCallers   = 8
	honestInstances = 4
	honestInterval  = 100 * time.Millisecond // Between the starts of one caller's calls.
	honestDeadline  = 3 * time.Second
	// Honest callers call again after the fault has begun. Less than the second for which the program counts them as active.
	honestPause = 300 * time.Millisecond
)

// The rogue caller, whose calls cause the fault.
const (
	rogueToken        = "rogue"
	rogueInstance     = "rogue"
	rogueWorkflowName = "rogue"
	rogueWorkers      = 4
	roguePause        = 5 * time.Millisecond
	rogueDeadline     = 10 * time.Second
	foreignProjectID  = "feedfacefeedfacefeedfacefeedface"
	serverToken       = "server-token"
)

// Requirements of every fault. The bound on latency is wide, because the machine may be busy; it catches calls that wait for
// the rogue's.
const (
	minHonestSuccess = 0.99
	calmP99Factor    = 10
	calmP99Allowance = time.Second
)

// crowdLanes is the number of faults that run at the same time, each against its own program. Faults that load the machine
// run alone.
const crowdLanes = 4

// crowdFault is one fault next to the honest callers.
type crowdFault struct {
	name string
	// The shared state under attack.
	owner string
	// Value of --credentials; `caller` if empty.
	credentials string
	flags       []string
	// Status with which IAM rejects the second token request, if any.
	iamFailure int
	// Interval between an honest caller's calls; honestInterval if zero.
	interval time.Duration
	// Honest callers repeat a few requests instead of sending a new one each time.
	repeats bool
	// Honest callers watch: a call opens a watch and ends it after a change of the task.
	watches bool
	// Limit of the program's open descriptors, if any.
	descriptors int
	// The program has its own user id, so that its threads can be limited, and looks up the name of its upstream at a nameServer. Needs
	// root.
	isolated bool
	// Allowed delay of a call by the fault itself.
	delays time.Duration
	// Two replicas share a quota store. Honest and rogue callers use both.
	store bool
	// Loads the machine: runs alone.
	alone bool
	// Chooses the upstream's replies; nil if the upstream behaves well.
	script script
	// Causes the fault until the context ends.
	inject injection
}

type injection func(context.Context, *stage) error

// stage is the program and its upstream under one fault.
type stage struct {
	fault *crowdFault
	// The first replica.
	*facade
	replicas []*facade
	upstream *scriptedUpstream
	names    *nameServer
	program  string
	// Both nil without a store.
	store *store
	relay *relay
	// How the replicas were started.
	environment, flags []string
}

// crowdRow is one row of the table.
type crowdRow struct {
	fault   *crowdFault
	honest  *phase
	calmP99 time.Duration
}

// crowd runs honest callers next to one fault at a time, each against a fresh program.
func crowd(results *results, program string, duration time.Duration, only string) error {
	selected, err := selectFaults(only)
	if err != nil {
		return err
	}
	rows := make([]crowdRow, len(selected))
	next := make(chan int, len(selected))
	for index, fault := range selected {
		if !fault.alone {
			next <- index
		}
	}
	close(next)
	run := func(index int) {
		var err error
		rows[index], err = selected[index].run(program, duration)
		rows[index].report(results, err)
	}
	var lanes sync.WaitGroup
	for range crowdLanes {
		lanes.Go(func() {
			for index := range next {
				run(index)
			}
		})
	}
	lanes.Wait()
	for index, fault := range selected {
		if fault.alone {
			run(index)
		}
	}
	printCrowdTable(rows)
	return nil
}

// selectFaults parses a comma-separated list of names; an empty one selects all faults.
func selectFaults(only string) ([]*crowdFault, error) {
	var selected []*crowdFault
	wanted := strings.Split(only, ",")
	known := map[string]bool{}
	for index := range crowdFaults {
		fault := &crowdFaults[index]
		known[fault.name] = true
		if only == "" || slices.Contains(wanted, fault.name) {
			selected = append(selected, fault)
		}
	}
	for _, name := range wanted {
		if only != "" && !known[name] {
			return nil, fmt.Errorf("-faults: %q is not a fault; the faults are: %s", name, strings.Join(crowdFaultNames(), ", "))
		}
	}
	return selected, nil
}

func crowdFaultNames() []string {
	var names []string
	for _, fault := range crowdFaults {
		names = append(names, fault.name)
	}
	return names
}

// run measures the honest callers without the fault and then next to it.
func (f *crowdFault) run(program string, duration time.Duration) (crowdRow, error) {
	row := crowdRow{fault: f, honest: &phase{}}
	upstream, err := startScriptedUpstream(f.script, f.iamFailure)
	if err != nil {
		return row, err
	}
	defer upstream.close()
	folder, err := os.MkdirTemp("", "soak-crowd-")
	if err != nil {
		return row, err
	}
	defer os.RemoveAll(folder)
	names, err := startNameServer()
	if err != nil {
		return row, err
	}
	defer names.close()
	url := upstream.url
	if f.isolated {
		url = strings.Replace(url, "127.0.0.1", upstreamName, 1)
	}
	environment, flags, err := f.configuration(url, folder)
	if err != nil {
		return row, err
	}
	limited, err := f.limited(program, folder, names)
	if err != nil {
		return row, err
	}
	stage := &stage{fault: f, upstream: upstream, names: names, program: program, environment: environment, flags: flags}
	defer stage.close()
	if err := stage.start(limited, url); err != nil {
		return row, err
	}
	fleet, err := startFleet(f, stage.replicas)
	if err != nil {
		return row, err
	}
	defer fleet.close()

	calm := fleet.measure(max(duration/3, time.Second))
	if calm.success() < minHonestSuccess {
		return row, fmt.Errorf("%d of %d honest calls failed before the fault; the first: %s", calm.failed, calm.calls(), calm.first)
	}
	before := upstream.misbehaved.Load()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	injected := make(chan error, 1)
	go func() { injected <- f.inject(ctx, stage) }()
	time.Sleep(honestPause)
	row.honest = fleet.measure(duration)
	stop()
	row.calmP99 = calm.succeeded.percentile(99)
	if err := <-injected; err != nil {
		return row, err
	}
	if f.script != nil && upstream.misbehaved.Load() == before {
		return row, errors.New("the upstream got no request that causes the fault")
	}
	if row.honest.success() < minHonestSuccess {
		return row, fmt.Errorf("%d honest calls failed; the first: %s", row.honest.failed, row.honest.first)
	}
	if p99, limit := row.honest.succeeded.percentile(99), row.limit(); p99 > limit {
		return row, fmt.Errorf("honest p99 above %v", limit)
	}
	return row, nil
}

// start starts the program, or two replicas with a store.
func (s *stage) start(program, upstream string) error {
	replicas := 1
	if s.fault.store {
		replicas = 2
		var err error
		if s.store, err = startStore(); err != nil {
			return err
		}
		if s.relay, err = startRelay(s.store.address); err != nil {
			return err
		}
		flags, err := s.store.flags(s.relay.address)
		if err != nil {
			return err
		}
		s.flags = append(s.flags, flags...)
	}
	for range replicas {
		replica, err := startFacadeIn(s.environment, program, upstream, nil, s.flags...)
		if err != nil {
			return err
		}
		s.replicas = append(s.replicas, replica)
	}
	s.facade = s.replicas[0]
	if !s.fault.store {
		return nil
	}
	return eventually(func() bool {
		seen, err := s.sum("quota_store_replicas")
		return err == nil && seen == float64(replicas*replicas)
	})
}

func (s *stage) close() {
	for _, replica := range s.replicas {
		replica.kill()
	}
	if s.relay != nil {
		s.relay.close()
	}
	if s.store != nil {
		s.store.close()
	}
}

// sum adds up a metric of all replicas.
func (s *stage) sum(name string, labels ...string) (float64, error) {
	total := 0.0
	for _, replica := range s.replicas {
		metrics, err := replica.scrape()
		if err != nil {
			return 0, err
		}
		total += metrics.sum(name, labels...)
	}
	return total, nil
}

// configuration returns the environment and the flags of the program. Files go to the folder.
func (f *crowdFault) configuration(upstream, folder string) (environment, flags []string, err error) {
	credentials := cmp.Or(f.credentials, "caller")
	flags = append([]string{"--credentials", credentials}, f.flags...)
	if f.isolated {
		flags = append(flags, "--allow-insecure-upstream")
	}
	switch credentials {
	case "token":
		environment = []string{"RDS_TASK_FACADE_TOKEN=" + serverToken}
	case "env":
		environment = []string{"HUAWEICLOUD_SDK_AK=CROWDACCESSKEY", "HUAWEICLOUD_SDK_SK=crowd-secret-key"}
	case "iam":
		password := filepath.Join(folder, "password")
		err = os.WriteFile(password, []byte("crowd-password"), 0o600)
		flags = append(flags, "--iam-endpoint", upstream, "--iam-user", "crowd", "--iam-domain", "crowd",
			"--iam-password-file", password, "--iam-project", projectID)
	}
	return environment, flags, err
}

// limited returns the program, or a script in the folder that limits itself and then becomes the program.
func (f *crowdFault) limited(program, folder string, names *nameServer) (string, error) {
	if f.descriptors == 0 && !f.isolated {
		return program, nil
	}
	program, err := filepath.Abs(program)
	if err != nil {
		return "", err
	}
	script := filepath.Join(folder, "limited")
	text := fmt.Sprintf("#!/bin/sh\nulimit -n %d\nexec '%s' \"$@\"\n", f.descriptors, program)
	if f.isolated {
		id := 100_000 + rand.IntN(1_000_000)
		if err := names.writeConfiguration(folder); err != nil {
			return "", err
		}
		if err := chown(folder, id); err != nil {
			return "", err
		}
		text = fmt.Sprintf(isolation, program, folder, id)
	}
	// A child that another goroutine forks while the file is open would keep it open, and a file that is open for writing cannot be run.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return script, os.WriteFile(script, []byte(text), 0o700)
}

// isolation is a script that becomes the program, mounted in the folder because its own path may be closed to the user id.
const isolation = `#!/bin/sh
exec unshare --mount sh -e -c '
program=$1 folder=$2 id=$3
shift 3
touch "$folder/program"
mount --bind "$program" "$folder/program"
mount --bind "$folder/resolv.conf" /etc/resolv.conf
exec setpriv --reuid="$id" --clear-groups --pdeathsig=KILL "$folder/program" "$@"
' sh '%s' '%s' %d "$@"
`

// chown gives a folder and the files in it to a user id.
func chown(folder string, id int) error {
	return filepath.Walk(folder, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Chown(path, id, -1))
	})
}

// limit is the bound on the honest p99.
func (r *crowdRow) limit() time.Duration {
	return calmP99Factor*r.calmP99 + calmP99Allowance + r.fault.delays
}

func (r *crowdRow) report(results *results, err error) {
	text := fmt.Sprintf("%s: %d honest calls, %.1f %% succeeded, p99 %v, calm p99 %v", r.fault.name, r.honest.calls(),
		100*r.honest.success(), r.honest.succeeded.percentile(99), r.calmP99)
	if err != nil {
		text += fmt.Sprintf("; %v", err)
	}
	results.check(err == nil, "%s", text)
}

// printCrowdTable prints Markdown.
func printCrowdTable(rows []crowdRow) {
	fmt.Println("\n| fault | shared state | honest calls | honest success | honest p99 | calm p99 |")
	fmt.Println("| --- | --- | --- | --- | --- | --- |")
	for _, row := range rows {
		fmt.Printf("| %s | %s | %d | %.1f %% | %s | %s |\n", row.fault.name, row.fault.owner, row.honest.calls(),
			100*row.honest.success(), milliseconds(row.honest.succeeded.percentile(99)), milliseconds(row.calmP99))
	}
	fmt.Println()
}

func milliseconds(duration time.Duration) string {
	return fmt.Sprintf("%d ms", duration.Milliseconds())
}

// phase counts the ends of the honest calls of one period.
type phase struct {
	succeeded latencies
	lock      sync.Mutex
	failed    int
	first     string // Failure.
}

func (p *phase) add(result callResult, err error) {
	if err == nil {
		p.succeeded.add(result.took)
		return
	}
	p.lock.Lock()
	defer p.lock.Unlock()
	if p.failed++; p.failed == 1 {
		p.first = err.Error()
	}
}

func (p *phase) calls() int { return p.succeeded.count() + p.failed }

func (p *phase) success() float64 {
	if p.calls() == 0 {
		return 0
	}
	return float64(p.succeeded.count()) / float64(p.calls())
}

// fleet is the honest callers.
type fleet struct {
	interval    time.Duration
	repeats     bool
	watches     bool
	connections [honestCallers]*grpc.ClientConn
	// Calls of each caller so far.
	numbers [honestCallers]int
}

// startFleet connects the honest callers, in turn to the replicas, and makes one call of each.
func startFleet(fault *crowdFault, replicas []*facade) (*fleet, error) {
	fleet := &fleet{interval: cmp.Or(fault.interval, honestInterval), repeats: fault.repeats || fault.watches, watches: fault.watches}
	for caller := range honestCallers {
		connection, err := dial(replicas[caller%len(replicas)].address)
		if err != nil {
			fleet.close()
			return nil, err
		}
		fleet.connections[caller] = connection
		if _, err := fleet.call(caller, fleet.next(caller)); err != nil {
			fleet.close()
			return nil, fmt.Errorf("the first call of an honest caller: %w", err)
		}
	}
	return fleet, nil
}

func (f *fleet) close() {
	for _, connection := range f.connections {
		if connection != nil {
			connection.Close()
		}
	}
}

// measure starts calls at a fixed rate for the duration, however long each takes, and waits for all of them.
func (f *fleet) measure(duration time.Duration) *phase {
	phase := &phase{}
	begun := time.Now()
	var callers, calls sync.WaitGroup
	for caller := range honestCallers {
		callers.Go(func() {
			// Spread over the interval, as independent callers are.
			start := begun.Add(f.interval * time.Duration(caller) / honestCallers)
			for ; start.Before(begun.Add(duration)); start = start.Add(f.interval) {
				time.Sleep(time.Until(start))
				number := f.next(caller)
				calls.Go(func() { phase.add(f.call(caller, number)) })
			}
		})
	}
	callers.Wait()
	calls.Wait()
	return phase
}

func (f *fleet) next(caller int) int {
	f.numbers[caller]++
	return f.numbers[caller]
}

// call fails unless the reply is about the task of the request.
func (f *fleet) call(caller, number int) (callResult, error) {
	request := honestRequest(caller, number, f.repeats)
	ctx, cancel := context.WithTimeout(context.Background(), honestDeadline)
	defer cancel()
	token := []string{"x-auth-token", fmt.Sprint("honest-", caller)}
	if f.watches {
		return watchChange(ctx, f.connections[caller], request, token)
	}
	result := call(ctx, f.connections[caller], method, request.encoded(), token)
	if result.code != codes.OK {
		return result, errors.New(result.String())
	}
	if !bytes.Contains(result.reply, []byte(request.name)) {
		return result, fmt.Errorf("the reply is not about %q", request.name)
	}
	return result, nil
}

// watchChange opens a watch and ends it when it has got two states of the task.
func watchChange(ctx context.Context, connection *grpc.ClientConn, task taskRequest, pairs []string) (callResult, error) {
	// Ends the watch.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := time.Now()
	watch, err := openWatch(ctx, connection, task, "", pairs)
	for states := 0; err == nil && states < 2; {
		var message watchMessage
		message, err = watch.next()
		if err == nil && message.hasTask {
			states++
			if message.name != task.name {
				err = fmt.Errorf("the message is not about %q", task.name)
			}
		}
	}
	return callResult{took: time.Since(begun)}, err
}

// honestRequest is about one of few instances, which several callers share.
func honestRequest(caller, number int, repeats bool) taskRequest {
	name := fmt.Sprintf("caller %d number %d", caller, number)
	if repeats {
		name = repeatedName(number)
	}
	return taskRequest{projectID, fmt.Sprint("instance-", number%honestInstances), fmt.Sprint("task-", number%honestInstances), name}
}

// repeatedName has the same remainder as the instance, so that a repeated name is a repeated request.
func repeatedName(number int) string { return fmt.Sprint("number ", number%honestInstances) }

// honestNumber is the number in the name of an honest request, or -1.
func honestNumber(name string) int {
	_, text, _ := strings.Cut(name, "number ")
	number, err := strconv.Atoi(text)
	if err != nil {
		return -1
	}
	return number
}
