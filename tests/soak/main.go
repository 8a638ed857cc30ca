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
	var err error
	switch os.Args[1] {
	case "faults":
		err = faults(results, program, *duration, *seed)
	case "overload":
		err = overload(results, program, *window)
	case "restarts":
		err = restarts(results, program, *count, *seed)
	case "attacks":
		err = attacks(results, program, *calls, *only)
	default:
		usage()
	}
	if err != nil {
		results.that(false, "the run: %v", err)
	}
	results.finish()
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: soak faults|overload|restarts|attacks [-duration D] [-window D] [-count N] [-calls N] [-only NAME] [-seed N] PROGRAM")
	os.Exit(2)
}
