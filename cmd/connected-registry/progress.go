package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/connected-registry/connected-registry/syncer"
)

// progress shows what a synchronisation does: on a terminal a bar for each image
// under way and one for all, with lines above for what is done; elsewhere the
// lines alone. close may be called twice.
type progress struct {
	event func(syncer.Event)
	close func()
}

func newProgress(w io.Writer) progress {
	if !isTerminal(w) {
		return progress{event: progressLines(w), close: func() {}}
	}
	b := newBars(w)
	return progress{event: b.event, close: sync.OnceFunc(b.close)}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd())) //nolint:gosec // file descriptors are small
}

// bars are the live display.
type bars struct {
	screen *mpb.Progress
	lines  func(syncer.Event)

	mu     sync.Mutex
	all    *mpb.Bar
	total  int64              // bytes of all blobs that were or are to come
	blobs  map[string]int64   // sizes, of those whose size is in total
	got    map[string]int64   // bytes that have come, by blob
	images map[string]*imgBar // by digest
}

type imgBar struct {
	*mpb.Bar
	missing map[string]bool
}

func newBars(w io.Writer) *bars {
	screen := mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithAutoRefresh())
	return &bars{
		screen: screen,
		lines:  progressLines(screen), // which prints above the bars
		blobs:  make(map[string]int64),
		got:    make(map[string]int64),
		images: make(map[string]*imgBar),
		all:    addBar(screen, "all", 0, mpb.BarPriority(1<<30)),
	}
}

// addBar adds a bar in bytes, with speed and time left.
func addBar(screen *mpb.Progress, name string, total int64, options ...mpb.BarOption) *mpb.Bar {
	return screen.AddBar(total, append(options,
		mpb.PrependDecorators(
			decor.Name(name, decor.WC{C: decor.DindentRight | decor.DextraSpace}),
			decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncSpace),
		),
		mpb.AppendDecorators(
			decor.AverageSpeed(decor.SizeB1024(0), "% .1f", decor.WCSyncSpace),
			decor.Name(" "),
			decor.AverageETA(decor.ET_STYLE_GO, decor.WCSyncSpace),
		),
	)...)
}

func (b *bars) event(e syncer.Event) {
	b.lines(e)
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e.Kind {
	case syncer.EventStarted:
		b.started(e)
	case syncer.EventFetched:
		b.add(e.Digest, e.Bytes)
	case syncer.EventBlob:
		// Linked blobs and resumed ones come without all of their bytes.
		b.add(e.Digest, b.blobs[e.Digest]-b.got[e.Digest])
	case syncer.EventTagged, syncer.EventFailed:
		b.done(e.Repository + ":" + e.Tag)
	}
}

func (b *bars) started(e syncer.Event) {
	img := &imgBar{missing: make(map[string]bool)}
	var size, got int64
	for _, blob := range e.Missing {
		img.missing[blob.Digest] = true
		size += blob.Size
		got += b.got[blob.Digest]
		if _, ok := b.blobs[blob.Digest]; !ok {
			b.blobs[blob.Digest] = blob.Size
			b.total += blob.Size
		}
	}
	b.all.SetTotal(b.total, false)
	if size == 0 {
		return
	}
	name := e.Repository + ":" + e.Tag
	img.Bar = addBar(b.screen, name, size, mpb.BarRemoveOnComplete())
	img.SetCurrent(got)
	b.images[name] = img
}

func (b *bars) add(digest string, n int64) {
	if n = min(n, b.blobs[digest]-b.got[digest]); n <= 0 {
		return // fetched once more, after a fault
	}
	b.got[digest] += n
	b.all.IncrInt64(n)
	for _, img := range b.images {
		if img.missing[digest] {
			img.IncrInt64(n)
		}
	}
}

func (b *bars) done(name string) {
	if img := b.images[name]; img != nil {
		img.Abort(true)
		delete(b.images, name)
	}
}

func (b *bars) close() {
	b.mu.Lock()
	for name := range b.images {
		b.done(name)
	}
	b.all.Abort(b.total == 0)
	b.mu.Unlock()
	b.screen.Wait()
}

// byteBar shows on a terminal how much of an archive is written.
type byteBar struct {
	set   func(done, total int64)
	close func()
}

func newByteBar(w io.Writer, name string) byteBar {
	if !isTerminal(w) {
		return byteBar{set: func(int64, int64) {}, close: func() {}}
	}
	screen := mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithAutoRefresh(), mpb.WithRefreshRate(200*time.Millisecond))
	bar := addBar(screen, name, 0)
	return byteBar{
		set: func(done, total int64) {
			bar.SetTotal(total, false)
			bar.SetCurrent(done)
		},
		close: func() {
			bar.Abort(false)
			screen.Wait()
		},
	}
}

// progressLines prints a line for each tag that is brought, removed or cannot
// be. A single Fprintf is a single write, so lines of several goroutines stay
// whole.
func progressLines(w io.Writer) func(syncer.Event) {
	return func(e syncer.Event) {
		switch e.Kind {
		case syncer.EventTagged:
			fmt.Fprintf(w, "%s:%s %s\n", e.Repository, e.Tag, e.Digest)
		case syncer.EventRemoved:
			fmt.Fprintf(w, "%s:%s removed\n", e.Repository, e.Tag)
		case syncer.EventFailed:
			name := e.Repository
			if e.Tag != "" {
				name += ":" + e.Tag
			}
			fmt.Fprintf(w, "%s: %v\n", name, e.Err)
		}
	}
}
