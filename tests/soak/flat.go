package main

import (
	"context"
	"time"
)

// sample is the program's resources and gauges at one moment.
type sample struct {
	resources
	connections, inFlight, upstream float64
}

// watch takes up to 400 samples of a run, at least 250 ms apart.
func watch(ctx context.Context, facade *facade, duration time.Duration) []sample {
	var samples []sample
	every := time.NewTicker(max(duration/400, 250*time.Millisecond))
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
		metrics, err := facade.scrape()
		if err != nil {
			return samples
		}
		samples = append(samples, sample{
			resources:   used,
			connections: metrics.sum("grpc_server_connections"),
			inFlight:    metrics.sum("grpc_server_started_total") - metrics.sum("grpc_server_handled_total"),
			upstream:    metrics.sum("rds_upstream_in_flight"),
		})
	}
}

// flat checks that the means of the last quarter of the samples exceed those of the second by the allowed growth at most. The
// first quarter is the warm-up.
func flat(results *results, samples []sample) {
	if len(samples) < 40 {
		results.check(false, "%d samples; at least 40 are needed", len(samples))
		return
	}
	quarter := len(samples) / 4
	second, last := samples[quarter:2*quarter], samples[len(samples)-quarter:]
	measures := []struct {
		name   string
		of     func(sample) float64
		growth float64
	}{
		{"resident memory, MiB", func(s sample) float64 { return mebibytes(s.resident) }, mebibytes(growthResident)},
		{"descriptors", func(s sample) float64 { return float64(s.descriptors) }, growthDescriptors},
		{"threads", func(s sample) float64 { return float64(s.threads) }, growthThreads},
		{"connections", func(s sample) float64 { return s.connections }, growthGauges},
		{"calls in flight", func(s sample) float64 { return s.inFlight }, growthGauges},
		{"upstream requests in flight", func(s sample) float64 { return s.upstream }, growthGauges},
	}
	for _, measure := range measures {
		before, after := mean(second, measure.of), mean(last, measure.of)
		results.check(after <= before+measure.growth, "%s: mean %.1f in the second quarter, %.1f in the last (at most %.0f more)",
			measure.name, before, after, measure.growth)
	}
}

func mean(samples []sample, of func(sample) float64) float64 {
	sum := 0.0
	for _, sample := range samples {
		sum += of(sample)
	}
	return sum / float64(len(samples))
}
