package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	// A child is killed with the thread that started it, see start. This one
	// stays as long as the program.
	runtime.LockOSThread()
	if len(os.Args) > 1 && slices.Contains([]string{roleRegistry, roleCache, roleParent, roleSync, rolePull}, os.Args[1]) {
		exitOn(serveRole(os.Args[1], os.Args[2:]))
		return
	}
	// Half of the processors for the clients: were they to take turns with the
	// servers on all of them, the tails would show the kernel's time slices.
	runtime.GOMAXPROCS(max(1, runtime.NumCPU()/2))
	var o options
	flag.DurationVar(&o.round, "round", 1500*time.Millisecond, "how long each side is asked at a stretch")
	flag.IntVar(&o.rounds, "rounds", 5, "how many turns each side has; the median of their ratios counts")
	flag.IntVar(&o.push, "push", 5, "size of the layer that is pushed in chunks, in GiB")
	flag.StringVar(&o.dir, "dir", "", "where the temporary files go (default the system's place for them)")
	run := flag.String("run", "", "regular expression for the names of the cases to run")
	profile := flag.String("profile", "", "directory for CPU profiles of the registry without TLS and of the cache, one for each start")
	check := flag.Bool("check", false, "exit with status 1 when a bound was missed")
	flag.Parse()
	only, err := regexp.Compile(*run)
	exitOn(err)
	if *profile != "" {
		dir, err := filepath.Abs(*profile)
		exitOn(err)
		os.Setenv(profileVariable, dir)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	missed, err := bench(ctx, o, only)
	stop()
	exitOn(err)
	if *check && missed > 0 {
		exitOn(fmt.Errorf("%d bounds were missed", missed))
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	round  time.Duration
	rounds int
	push   int // GiB
	dir    string
}

// bench runs the cases and returns how many bounds were missed.
func bench(ctx context.Context, o options, only *regexp.Regexp) (missed int, err error) {
	dir, err := os.MkdirTemp(o.dir, "connected-registry-bench-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	// nginx's workers have a user of their own.
	if err := os.Chmod(dir, 0o755); err != nil {
		return 0, err
	}
	fmt.Printf("%d processors; %d turns of %v for each side\n", runtime.NumCPU(), o.rounds, o.round)
	begun := time.Now()
	b := &benchmark{options: o, dir: dir}
	defer b.stop()
	if err := b.prepare(ctx); err != nil {
		return 0, err
	}
	fmt.Printf("programs built, files written in %.0f s\n", time.Since(begun).Seconds())
	begun = time.Now()
	for _, group := range b.groups() {
		fmt.Printf("\n%-34s %-8s %12s %12s %8s   %s\n", group.title, "", "ours", group.theirs, "ratio", "bound")
		for _, c := range group.cases {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			if !only.MatchString(c.name) {
				continue
			}
			lines, err := c.measure()
			if err != nil {
				return 0, fmt.Errorf("%s: %w", c.name, err)
			}
			missed += printLines(c.name, lines)
		}
	}
	fmt.Printf("\n%d bounds missed; measured in %.0f s\n", missed, time.Since(begun).Seconds())
	return missed, nil
}

// group is a part of the table.
type group struct {
	title, theirs string
	cases         []benchCase
}

type benchCase struct {
	name    string
	measure func() ([]line, error)
}

// line is one result.
type line struct {
	unit         string
	ours, theirs float64
	ratio        float64 // of ours to theirs; 0: there is nothing to compare with
	low, high    float64 // what the ratio is between, as sure as 95 of 100; 0: not known
	turns        int     // of either side
	bound        bound
}

// bound is what a line must reach. The zero bound is none.
type bound struct {
	least, most float64 // of the ratio; 0: no bound
	mostOurs    float64 // of ours; 0: no bound
}

func (b bound) String() string {
	switch {
	case b.least > 0:
		return fmt.Sprintf("ratio at least %.4g", b.least)
	case b.most > 0:
		return fmt.Sprintf("ratio at most %.4g", b.most)
	case b.mostOurs > 0:
		return fmt.Sprintf("at most %.4g", b.mostOurs)
	}
	return ""
}

func (l line) kept() bool {
	b := l.bound
	return (b.least == 0 || l.ratio >= b.least) && (b.most == 0 || l.ratio <= b.most) && (b.mostOurs == 0 || l.ours <= b.mostOurs)
}

func printLines(name string, lines []line) (missed int) {
	for _, l := range lines {
		theirs, ratio, verdict := "", "", l.bound.String()
		if l.ratio > 0 {
			theirs, ratio = fmt.Sprintf("%.4g", l.theirs), fmt.Sprintf("%.2f", l.ratio)
		}
		if !l.kept() {
			verdict += ": MISSED"
			missed++
		}
		if l.high > 0 {
			verdict = strings.TrimLeft(fmt.Sprintf("%s; %.2f to %.2f by %d turns", verdict, l.low, l.high, l.turns), "; ")
		}
		fmt.Printf("%-34s %-8s %12s %12s %8s   %s\n", name, l.unit, fmt.Sprintf("%.5g", l.ours), theirs, ratio, verdict)
		name = ""
	}
	return missed
}
