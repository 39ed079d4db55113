package nodes

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// The registry that nodes pull from by name, which is nowhere: only the mirror
// has its images.
const (
	upstream   = "registry.test"
	repository = "team/app"
)

// mirror is a registry on loopback that counts what it is asked in the name of
// upstream.
type mirror struct {
	url   string
	asked atomic.Int64
}

func startMirror(t *testing.T, tags ...string) *mirror {
	t.Helper()
	m := &mirror{}
	backend := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("ns") == upstream {
			m.asked.Add(1)
		}
		// All of a blob is all of it.
		if r.Header.Get("Range") == "bytes=0-" {
			r.Header.Del("Range")
		}
		backend.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	m.url = server.URL
	for _, tag := range tags {
		image, err := random.Image(1000, 2)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/" + repository + ":" + tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, image); err != nil {
			t.Fatal(err)
		}
	}
	return m
}
