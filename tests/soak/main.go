// Command soak runs the finished program over loopback for a long time under faults, overload, restarts and attacks.
//
//	soak faults   [-duration 30m] PROGRAM      three replicas, calls and watches under random faults on all sides: nothing grows, nothing is lost
//	soak overload [-window 60s] PROGRAM        1, 2, 5 and 10 times the load that the limit allows
//	soak restarts [-count 200] PROGRAM         random signals under load
//	soak attacks  [-calls 100000] PROGRAM      hostile peers next to an honest caller; one line of figures each
//	soak crowd    [-duration 3s] PROGRAM       one fault at a time next to a crowd of honest callers; a table
//	soak watches  [-duration 2m] PROGRAM       what watches cost, and what their callers see
//	soak fleet    [-duration 2m] PROGRAM       three replicas with one quota store: their upstream calls, and faults of the store
//
// The upstream is the program's own `sandbox` in a separate process; for faults, crowd, watches and fleet, a scripted one in this process. CI runs each
// subcommand for some seconds. The source of each states its requirements.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"syscall"
	"time"
)

func main() {
	flags := flag.NewFlagSet("soak", flag.ExitOnError)
	duration := flags.Duration("duration", 0, "faults: length of the run (default 30m); crowd: length of each fault (default 3s); watches, fleet: length of an observation (default 2m)")
	window := flags.Duration("window", time.Minute, "overload: length of each load level")
	count := flags.Int("count", 200, "restarts: number of restarts")
	calls := flags.Int("calls", 100_000, "attacks: number of calls with new names")
	only := flags.String("only", "", "attacks, watches, fleet: name of the only one to run")
	crowdList := flags.String("faults", "", "crowd: comma-separated names of the faults to run (default all)")
	seed := flags.Uint64("seed", uint64(time.Now().UnixNano()), "seed of all random choices")
	if len(os.Args) < 3 {
		usage()
	}
	_ = flags.Parse(os.Args[2:])
	if flags.NArg() != 1 {
		usage()
	}
	// A killed program leaves no core file.
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
	fmt.Printf("seed %d\n", *seed)

	program, results := flags.Arg(0), &results{}
	maxFiles, err := raiseDescriptors()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
	switch os.Args[1] {
	case "faults":
		err = faults(results, program, cmp.Or(*duration, 30*time.Minute), *seed)
	case "overload":
		err = overload(results, program, *window)
	case "restarts":
		err = restarts(results, program, *count, *seed)
	case "attacks":
		if maxFiles < attackDescriptors {
			fmt.Fprintf(os.Stderr, "soak: attacks needs %d open files; the hard limit (ulimit -Hn) is %d\n", attackDescriptors, maxFiles)
			os.Exit(1)
		}
		err = attacks(results, program, *calls, *only)
	case "crowd":
		err = crowd(results, program, cmp.Or(*duration, 3*time.Second), *crowdList)
	case "watches":
		watches(results, program, cmp.Or(*duration, 2*time.Minute), *only)
	case "fleet":
		fleetRun(results, program, cmp.Or(*duration, 2*time.Minute), *only)
	default:
		usage()
	}
	if err != nil {
		results.check(false, "%s: %v", os.Args[1], err)
	}
	results.finish()
}

// raiseDescriptors raises the soft limit of open files to the hard one, which it returns. Go does that for itself only;
// started programs inherit a limit that is set here.
func raiseDescriptors() (uint64, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	limit.Cur = limit.Max
	return limit.Max, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: soak faults|overload|restarts|attacks|crowd|watches|fleet "+
		"[-duration D] [-window D] [-count N] [-calls N] [-only NAME] [-faults NAME,...] [-seed N] PROGRAM")
	os.Exit(2)
}
