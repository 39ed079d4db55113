package main

import (
	"math/rand/v2"
	"testing"
)

func TestSureOfMedian(t *testing.T) {
	for n, want := range map[int][2]float64{0: {}, 5: {}, 6: {1, 6}, 7: {1, 7}, 9: {2, 8}, 15: {4, 12}, 20: {6, 15}} {
		values := make([]float64, n)
		for i, at := range rand.Perm(n) {
			values[at] = float64(i + 1)
		}
		if low, high := sureOfMedian(values); low != want[0] || high != want[1] {
			t.Errorf("of %d: the median is between %v and %v, want %v", n, low, high, want)
		}
	}
}

func TestDecided(t *testing.T) {
	for name, test := range map[string]struct {
		ours []float64
		want bool
	}{
		"below":       {[]float64{1, 1.01, 0.9, 1.04, 1, 1.02}, true},
		"above":       {[]float64{1.1, 1.2, 1.06, 1.1, 1.3, 1.1}, true},
		"on the way":  {[]float64{1, 1.1, 1.06, 1.01, 1.03, 1.1}, false},
		"few":         {[]float64{1, 1, 1}, false},
		"one outside": {[]float64{1, 1, 1, 1, 2, 1, 1, 1, 1}, true},
	} {
		var s samples
		for _, v := range test.ours {
			s.add(true, v)
			s.add(false, 1)
		}
		if got := s.decided(1.05); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
