package main

import (
	"math"
	"slices"
	"time"
)

// side is a server with the request that it is asked.
type side struct {
	target
	*process
}

// turns calls measure for either side in turns, each first as often as second.
func turns(rounds int, measure func(ours bool) error) error {
	return turnsUntil(rounds, rounds, nil, measure)
}

// turnsUntil is turns, at least least of them, until enough or most.
func turnsUntil(least, most int, enough func() bool, measure func(ours bool) error) error {
	for i := range most {
		if i >= least && enough() {
			return nil
		}
		first := i%2 == 0
		for _, ours := range []bool{first, !first} {
			if err := measure(ours); err != nil {
				return err
			}
		}
	}
	return nil
}

// samples are a number for each turn of either side.
type samples struct{ ours, theirs []float64 }

func (s *samples) add(ours bool, v float64) {
	if ours {
		s.ours = append(s.ours, v)
	} else {
		s.theirs = append(s.theirs, v)
	}
}

// line makes medians of the samples: of either side, and of the ratios of the
// turns that were next to one another, of which it tells how sure they make it.
func (s *samples) line(unit string, b bound) line {
	ratios := s.ratios()
	l := line{unit: unit, ours: median(s.ours), theirs: median(s.theirs), ratio: median(ratios), bound: b, turns: len(ratios)}
	l.low, l.high = sureOfMedian(ratios)
	return l
}

func (s *samples) ratios() (ratios []float64) {
	for i := range s.ours {
		if i < len(s.theirs) && s.theirs[i] > 0 {
			ratios = append(ratios, s.ours[i]/s.theirs[i])
		}
	}
	return ratios
}

// decided reports whether the samples make sure that the ratio is on one side of
// a bound.
func (s *samples) decided(most float64) bool {
	low, high := sureOfMedian(s.ratios())
	return high > 0 && (high <= most || low > most)
}

// sureOfMedian returns between which two of the values the median of what they
// are samples of lies, in at least 95 of 100 cases: each value is above it or
// below, like a coin's sides. Fewer than 6 tell nothing: zeros.
func sureOfMedian(v []float64) (low, high float64) {
	n := len(v)
	outside, ways, all := 0.0, 1.0, math.Exp2(float64(n)) // ways to choose k of n
	for k := range n/2 + 1 {
		if outside += 2 * ways / all; outside > 0.05 {
			if k == 0 {
				return 0, 0
			}
			v = slices.Sorted(slices.Values(v))
			return v[k-1], v[n-k]
		}
		ways = ways * float64(n-k) / float64(k+1)
	}
	return 0, 0
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

const connections = 16

// requestBounds are the bounds of a comparison by small requests.
type requestBounds struct{ perSecond, p99 bound }

// compareRequests asks both sides for something small.
func (b *benchmark) compareRequests(ours, theirs side, bounds requestBounds) ([]line, error) {
	var rate, p50, p99, cpu samples
	err := turns(b.rounds, func(mine bool) error {
		s := theirs
		if mine {
			s = ours
		}
		before, err := s.cpu()
		if err != nil {
			return err
		}
		got, err := askFor(s.target, connections, b.round)
		if err != nil {
			return err
		}
		after, err := s.cpu()
		if err != nil {
			return err
		}
		rate.add(mine, got.perSecond)
		p50.add(mine, milliseconds(got.p50))
		p99.add(mine, milliseconds(got.p99))
		cpu.add(mine, 1000*milliseconds(after-before)/float64(got.count))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []line{
		rate.line("req/s", bounds.perSecond),
		p50.line("p50 ms", bound{}),
		p99.line("p99 ms", bounds.p99),
		cpu.line("CPU µs", bound{}),
	}, nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// downloadBounds are the bounds of a comparison by large bodies.
type downloadBounds struct{ rate, cpu bound }

// compareDownloads has both sides send something large on 8 connections.
func (b *benchmark) compareDownloads(ours, theirs side, bounds downloadBounds) ([]line, error) {
	var rate, cpu samples
	err := turns(b.rounds, func(mine bool) error {
		s := theirs
		if mine {
			s = ours
		}
		before, err := s.cpu()
		if err != nil {
			return err
		}
		n, took, err := download(s.target, 8, b.round, false)
		if err != nil {
			return err
		}
		after, err := s.cpu()
		if err != nil {
			return err
		}
		rate.add(mine, float64(n)/1e6/took.Seconds())
		cpu.add(mine, (after-before).Seconds()/(float64(n)/1e9))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []line{rate.line("MB/s", bounds.rate), cpu.line("CPU s/GB", bounds.cpu)}, nil
}

// memory runs do and says how much memory the process took meanwhile.
func (p *process) memory(do func() error, b bound) ([]line, error) {
	if err := p.forgetPeak(); err != nil {
		return nil, err
	}
	begun := time.Now()
	if err := do(); err != nil {
		return nil, err
	}
	took := time.Since(begun)
	peak, err := p.peak()
	if err != nil {
		return nil, err
	}
	return []line{
		{unit: "peak MiB", ours: float64(peak) / (1 << 20), bound: b},
		{unit: "s", ours: took.Seconds()},
	}, nil
}
