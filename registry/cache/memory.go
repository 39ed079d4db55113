package cache

import (
	"os"
	"runtime/debug"
)

const (
	// gcPercent lets garbage grow to so many percent of what is live. That is
	// little, and the requests are many: collecting at the usual 100 takes a
	// sixth of the requests per second and lengthens the slowest of them.
	gcPercent = 400
	// memoryLimit, in bytes, has it collected sooner when more is live.
	memoryLimit = 40 << 20
)

// TuneMemory sets the garbage collector of this process up for a cache that is
// the most of what it does. GOGC and GOMEMLIMIT in the environment prevail.
func TuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}
