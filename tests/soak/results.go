package main

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// results counts and prints checks and sets the exit code.
type results struct {
	lock           sync.Mutex
	passed, failed int
}

func (r *results) check(holds bool, format string, arguments ...any) {
	r.lock.Lock()
	defer r.lock.Unlock()
	word := "ok   "
	if holds {
		r.passed++
	} else {
		r.failed++
		word = "FAIL "
	}
	fmt.Println(word, fmt.Sprintf(format, arguments...))
}

func (r *results) finish() {
	fmt.Printf("%d passed, %d failed\n", r.passed, r.failed)
	if r.failed > 0 || r.passed == 0 {
		os.Exit(1)
	}
}

// latencies collects the latencies of calls from many goroutines.
type latencies struct {
	lock sync.Mutex
	all  []time.Duration
}

func (l *latencies) add(took time.Duration) {
	l.lock.Lock()
	l.all = append(l.all, took)
	l.lock.Unlock()
}

func (l *latencies) count() int {
	l.lock.Lock()
	defer l.lock.Unlock()
	return len(l.all)
}

// percentile returns zero if there were no calls.
func (l *latencies) percentile(percent int) time.Duration {
	l.lock.Lock()
	defer l.lock.Unlock()
	if len(l.all) == 0 {
		return 0
	}
	slices.Sort(l.all)
	return l.all[(len(l.all)-1)*percent/100].Round(10 * time.Microsecond)
}

func mebibytes(bytes int64) float64 { return float64(bytes) / (1 << 20) }
