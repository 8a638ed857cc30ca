package main

import (
	"context"
	"time"
)

// Allowed growth from the second to the last quarter of a run. An allocator keeps some memory after a burst, and the number of connections to
// the upstream depends on how slow it is.
const (
	growthResident    = 4 << 20
	growthDescriptors = 32
	growthThreads     = 1
)

// watch takes up to 400 samples of a program's resources, at least 200 ms apart.
func watch(ctx context.Context, facade *facade, duration time.Duration) []resources {
	var samples []resources
	every := time.NewTicker(max(duration/400, 200*time.Millisecond))
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return samples
		case <-every.C:
		}
		used, err := facade.resources()
		if err != nil {
			return samples
		}
		samples = append(samples, used)
	}
}

// flat checks that the means of the last quarter of the samples exceed those of the second by the allowed growth at most. The
// first quarter is the warm-up.
func flat(results *results, samples []resources) {
	if len(samples) < 20 {
		results.check(false, "%d samples; at least 20 are needed", len(samples))
		return
	}
	quarter := len(samples) / 4
	second, last := samples[quarter:2*quarter], samples[len(samples)-quarter:]
	measures := []struct {
		name   string
		of     func(resources) float64
		growth float64
	}{
		{"resident memory, MiB", func(s resources) float64 { return mebibytes(s.resident) }, mebibytes(growthResident)},
		{"descriptors", func(s resources) float64 { return float64(s.descriptors) }, growthDescriptors},
		{"threads", func(s resources) float64 { return float64(s.threads) }, growthThreads},
	}
	for _, measure := range measures {
		before, after := mean(second, measure.of), mean(last, measure.of)
		results.check(after <= before+measure.growth, "%s: mean %.1f in the second quarter, %.1f in the last (at most %.0f more)",
			measure.name, before, after, measure.growth)
	}
}

func mean(samples []resources, of func(resources) float64) float64 {
	sum := 0.0
	for _, sample := range samples {
		sum += of(sample)
	}
	return sum / float64(len(samples))
}
