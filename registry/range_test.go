package registry

import "testing"

func TestRangeEnd(t *testing.T) {
	for header, want := range map[string]int64{
		"bytes=0-499":                  500,
		"bytes=500-500":                501,
		"bytes= 7 - 8 ":                9,
		"":                             0,
		"bytes=500-":                   0,
		"bytes=-500":                   0, // the last 500
		"bytes=0-1,5-6":                0,
		"lines=0-5":                    0,
		"bytes=0-x":                    0,
		"bytes=0--5":                   0,
		"bytes=0-99999999999999999999": 0,
	} {
		if end, ok := rangeEnd(header); ok != (want > 0) || ok && end != want {
			t.Errorf("%q: %d, %v, want %d", header, end, ok, want)
		}
	}
}
