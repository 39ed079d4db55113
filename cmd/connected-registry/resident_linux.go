package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// The first time is when everything has started.
	firstRelease    = 30 * time.Second
	releaseInterval = 10 * time.Minute
)

// keepSmall lets go of the parts of the program's file that are in memory, now
// and then until ctx ends. Starting touches most of the program, which is for
// more than the node agent; what is still needed comes back from the system's
// page cache by itself, and the rest does not count as an idle agent's memory
// and is first to go when the node runs short.
func keepSmall(ctx context.Context) {
	wait := firstRelease
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		release()
		wait = releaseInterval
	}
}

// release gives back the mappings of the program's file that cannot be written
// to, and so lose nothing.
func release() {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var start, end uintptr
		var access string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &start, &end, &access); err != nil {
			return
		}
		if strings.HasSuffix(lines.Text(), " "+program) && !strings.Contains(access, "w") {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED) // advice
		}
	}
}
