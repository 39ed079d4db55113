package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// probeInterval is between two looks at a registry that the cache has doubts
	// about.
	probeInterval = 15 * time.Second
	// probeTime is what an answer may take. A registry that takes a connection
	// and then says nothing costs containerd's own requests ten seconds and more,
	// one after the other.
	probeTime = 3 * time.Second
	// enoughHangs in a row are no accident.
	enoughHangs = 2
)

// prober finds out whether the registry leaves its callers waiting, so that
// nodes can pass it over. Nobody is asked while the cache gets its answers.
type prober struct {
	suspect func() bool
	tell    func(hangs bool)
	every   time.Duration

	mu  sync.Mutex // guards url
	url string
}

// target says whom to ask from now on.
func (p *prober) target(registry string, plainHTTP bool) {
	scheme := "https://"
	if plainHTTP {
		scheme = "http://"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.url = scheme + registry + "/v2/"
}

func (p *prober) run(ctx context.Context) {
	hung := 0
	for sleep(ctx, jitter(p.every)) {
		p.mu.Lock()
		url := p.url
		p.mu.Unlock()
		if url == "" || !p.suspect() || !hangs(ctx, url) {
			hung = 0
		} else {
			hung++
		}
		p.tell(hung >= enoughHangs)
	}
}

// hangs reports whether a server gives no answer in time, not even a bad one.
func hangs(ctx context.Context, url string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		// Only whether there is an answer counts, and nothing of it is believed.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodHead, url, nil)
	if err != nil {
		return false
	}
	response, err := transport.RoundTrip(request)
	if err == nil {
		response.Body.Close()
		return false
	}
	var slow net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &slow) && slow.Timeout()
}
