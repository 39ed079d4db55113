package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

const (
	waveClients = 16
	// waveRate is what the link to the registry carries, in bytes per second. It
	// is one that all clients, each of which hashes and writes what it gets, keep
	// up with on one machine of two processors: were they on nodes of their own,
	// they would have to keep up with it each by itself.
	waveRate = 24 << 20
	mostWave = 1.2
)

// wave has 16 clients pull the image at the same time through an empty cache,
// from a registry behind a link of a fixed rate: without one, all that is
// measured is how many processors there are. It compares the last of them with
// one client alone.
func (b *benchmark) wave() ([]line, error) {
	made, err := b.seedPull()
	if err != nil {
		return nil, err
	}
	link, err := startLink("https://"+b.standalone.addr, &http.Transport{TLSClientConfig: b.tls})
	if err != nil {
		return nil, err
	}
	defer link.stop()
	b.upstream = "http://" + link.addr
	defer func() { b.upstream = "" }()
	var took samples
	enough := func() bool { return took.decided(mostWave) }
	err = turnsUntil(b.rounds+1, 2*b.rounds, enough, func(ours bool) error {
		if err := b.restartCache(func() error { return os.RemoveAll(b.cacheDir) }); err != nil {
			return err
		}
		link.forget()
		clients := 1
		if ours {
			clients = waveClients
		}
		last, err := b.pullAtOnce(clients, made.size)
		if err != nil {
			return err
		}
		took.add(ours, last.Seconds())
		return link.once(append(made.layers, made.config, made.manifest))
	})
	if err != nil {
		return nil, err
	}
	if err := b.restartCache(nil); err != nil { // back to the registry itself
		return nil, err
	}
	return []line{took.line("s", bound{most: mostWave})}, nil
}

// link passes requests on to a registry, at a fixed rate for all together.
type link struct {
	addr   string
	server *http.Server
	limit  *rate.Limiter

	mu    sync.Mutex // guards asked
	asked map[string]int
}

func startLink(to string, transport *http.Transport) (*link, error) {
	u, err := url.Parse(to)
	if err != nil {
		return nil, err
	}
	l := &link{limit: rate.NewLimiter(waveRate, 1<<20), asked: map[string]int{}}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u) },
		Transport: transport,
		ModifyResponse: func(r *http.Response) error {
			if r.Request.Method == http.MethodGet {
				l.mu.Lock()
				l.asked[r.Request.URL.Path]++
				l.mu.Unlock()
			}
			r.Body = &limited{r.Body, r.Request.Context(), l.limit}
			return nil
		},
		BufferPool: chunks{},
	}
	if l.addr, err = freeAddress(); err != nil {
		return nil, err
	}
	l.server = &http.Server{Addr: l.addr, Handler: proxy}
	listening := make(chan error, 1)
	go func() { listening <- l.server.ListenAndServe() }()
	for range 100 {
		select {
		case err := <-listening:
			return nil, err
		case <-time.After(10 * time.Millisecond):
		}
		if answer, err := http.Head("http://" + l.addr + "/v2/"); err == nil {
			answer.Body.Close()
			return l, nil
		}
	}
	return nil, errors.New("the link does not listen")
}

func (l *link) stop() { _ = l.server.Close() }

func (l *link) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.asked)
}

// once reports what was not fetched exactly once.
func (l *link) once(want []digest.Digest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range want {
		n := 0
		for path, times := range l.asked {
			if strings.HasSuffix(path, "/"+d.String()) {
				n += times
			}
		}
		if n != 1 {
			all, _ := json.Marshal(l.asked)
			return fmt.Errorf("%s was fetched %d times: %s", d, n, all)
		}
	}
	return nil
}

type limited struct {
	io.ReadCloser
	ctx   context.Context
	limit *rate.Limiter
}

func (r *limited) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p[:min(len(p), 1<<20)])
	if e := r.limit.WaitN(r.ctx, n); e != nil && err == nil {
		err = e
	}
	return n, err
}

// chunks are the proxy's buffers.
type chunks struct{}

func (chunks) Get() []byte { return make([]byte, 256<<10) }
func (chunks) Put([]byte)  {}
