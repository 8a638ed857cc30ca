// Long runs of the finished program over loopback: random faults, overload, restarts, attacks. The program's upstream is
// its own `sandbox`, as a process of its own.
//
//	soak faults   [-duration 30m] PROGRAM   half load, faults on both sides: nothing grows, every call is accounted for
//	soak overload [-window 60s] PROGRAM     1, 2, 5 and 10 times what the limit can answer
//	soak restarts [-count 200] PROGRAM      random signals under load
//	soak attacks  [-calls 100000] PROGRAM   hostile peers beside an honest one; one line of figures each
//
// CI runs each for some seconds. What each one demands is said where it stands.
package main

import (
	"flag"
	"fmt"
	"os"
	"syscall"
	"time"
)

func main() {
	flags := flag.NewFlagSet("soak", flag.ExitOnError)
	duration := flags.Duration("duration", 30*time.Minute, "faults: for how long")
	window := flags.Duration("window", time.Minute, "overload: for how long each load")
	count := flags.Int("count", 200, "restarts: how many")
	calls := flags.Int("calls", 100_000, "attacks: how many calls with names of their own")
	only := flags.String("only", "", "attacks: the one with this name")
	seed := flags.Uint64("seed", uint64(time.Now().UnixNano()), "of everything random")
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
	most, err := raiseDescriptors()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
	switch os.Args[1] {
	case "faults":
		err = faults(results, program, *duration, *seed)
	case "overload":
		err = overload(results, program, *window)
	case "restarts":
		err = restarts(results, program, *count, *seed)
	case "attacks":
		if most < attackDescriptors {
			fmt.Fprintf(os.Stderr, "soak: attacks take %d open files, and the hard limit (ulimit -Hn) is %d\n", attackDescriptors, most)
			os.Exit(1)
		}
		err = attacks(results, program, *calls, *only)
	default:
		usage()
	}
	if err != nil {
		results.that(false, "the run: %v", err)
	}
	results.finish()
}

// raiseDescriptors allows as many open files as may be, and says how many. Go raises the limit for itself alone; one that is
// set here is inherited by the programs that are started.
func raiseDescriptors() (uint64, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	limit.Cur = limit.Max
	return limit.Max, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: soak faults|overload|restarts|attacks [-duration D] [-window D] [-count N] [-calls N] [-only NAME] [-seed N] PROGRAM")
	os.Exit(2)
}
