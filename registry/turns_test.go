package registry

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// sending is a request whose body the test sends piece by piece.
type sending struct {
	t      *testing.T
	pieces chan []byte
	done   chan struct{}
	status int // to be read when done is closed; 0: the connection broke
}

func (c *client) send(method, path string) *sending {
	s := &sending{c.t, make(chan []byte, 8), make(chan struct{}), 0}
	body, w := io.Pipe()
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.base+path, body)
	if err != nil {
		c.t.Fatal(err)
	}
	go func() {
		for p := range s.pieces {
			_, _ = w.Write(p) // the server need not take it
		}
		w.Close()
	}()
	go func() {
		defer close(s.done)
		defer body.Close()
		resp, err := c.http.Do(req)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		s.status = resp.StatusCode
	}()
	return s
}

func (s *sending) end() int {
	s.t.Helper()
	close(s.pieces)
	return s.wait()
}

func (s *sending) wait() int {
	s.t.Helper()
	select {
	case <-s.done:
		return s.status
	case <-time.After(time.Minute):
		s.t.Fatal("no answer")
		return 0
	}
}

// untilReceived waits until an upload's data has so many bytes, or the request that
// brings them is answered.
func (s *sending) untilReceived(root, at string, size int64) {
	t := s.t
	t.Helper()
	file := filepath.Join(root, "docker/registry/v2/repositories/up/_uploads", filepath.Base(at), "data")
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		fi, err := os.Stat(file)
		if err == nil && fi.Size() >= size {
			return
		}
		select {
		case <-s.done:
			return
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v, %v", file, fi, err)
		}
	}
}

// TestTwoWritersPoisonNothing sends the bytes of a digest on one connection, and on
// another, to the same replica or to one beside it, others to where they go.
func TestTwoWritersPoisonNothing(t *testing.T) {
	const begin, size = 64 << 10, 256 << 10
	for _, here := range []bool{true, false} {
		for _, method := range []string{"PUT", "PATCH"} {
			t.Run(fmt.Sprint(method, here), func(t *testing.T) {
				t.Parallel()
				store := openStore(t)
				good := serveHandler(t, newServer(t, Config{Store: store}))
				bad := good
				if !here {
					bad = serveHandler(t, newServer(t, Config{Store: openSame(t, store)}))
				}
				content := randomBytes(size)
				d := digest.FromBytes(content)
				at := good.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
				target := at
				if method == "PUT" {
					target += "?digest=" + d.String()
				}
				first := good.send(method, target)
				first.pieces <- content[:begin]
				first.untilReceived(store.Root(), at, begin)
				second := bad.send("PATCH", at)
				second.pieces <- randomBytes(begin)
				if here {
					second.untilReceived(store.Root(), at, 2*begin)
				} else {
					time.Sleep(100 * time.Millisecond) // for it to write, if it could
				}
				first.pieces <- content[begin : size-1]
				first.untilReceived(store.Root(), at, size-8192) // the rest may be in a buffer
				second.pieces <- randomBytes(size - 2*begin - 1)
				gotSecond := second.end()
				first.pieces <- content[size-1:]
				gotFirst := first.end()
				if here && (gotFirst == 201 || gotFirst == 202 || gotSecond != 202) {
					t.Errorf("got %d and %d, want the second to take the turn", gotFirst, gotSecond)
				}
				if !here && (gotFirst != 201 && gotFirst != 202 || gotSecond == 202) {
					t.Errorf("got %d and %d, want the second to be refused", gotFirst, gotSecond)
				}
				if method == "PATCH" {
					a := good.do("PUT", at+"?digest="+d.String(), nil)
					if a.status == 201 == here {
						t.Errorf("the upload was committed: %d", a.status)
					}
				}
				if a := good.do("GET", "/v2/up/blobs/"+d.String(), nil); a.status == 200 && !bytes.Equal(a.body, content) {
					t.Errorf("served %d bytes that are not those of the digest", len(a.body))
				}
				good.pushBlob("up", content)
				if a := good.do("GET", "/v2/up/blobs/"+d.String(), nil); !bytes.Equal(a.body, content) {
					t.Errorf("then served %d bytes", len(a.body))
				}
			})
		}
	}
}

// A client whose connection hangs comes back on another, and need not wait for the
// replica to notice.
func TestTurnIsTakenFromWhatHangs(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	content := randomBytes(200_000)
	d := digest.FromBytes(content)
	at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
	hangs := c.send("PATCH", at)
	hangs.pieces <- content[:100_000]
	hangs.untilReceived(store.Root(), at, 100_000)
	// Whoever only looks disturbs nobody.
	if got := c.want(c.do("GET", at, nil), 204, "").header.Get("Range"); got != "0-99999" {
		t.Errorf("Range %s", got)
	}
	hangs.pieces <- content[100_000:150_000]
	hangs.untilReceived(store.Root(), at, 150_000)
	c.want(c.do("PATCH", at, content[150_000:180_000], "Content-Range", "150000-179999"), 202, "")
	if got := hangs.wait(); got != 503 && got != 0 {
		t.Errorf("the older request got %d", got)
	}
	close(hangs.pieces)
	c.want(c.do("PUT", at+"?digest="+d.String(), content[180_000:], "Content-Range", "180000-199999"), 201, "")
	if a := c.do("GET", "/v2/up/blobs/"+d.String(), nil); !bytes.Equal(a.body, content) {
		t.Errorf("served %d bytes", len(a.body))
	}
	noUploads(t, store.Root(), "up")
}

// TestCancelTakesTheTurn throws an upload away that is being written to, here and at
// another replica.
func TestCancelTakesTheTurn(t *testing.T) {
	for _, here := range []bool{true, false} {
		store := openStore(t)
		c := serveHandler(t, newServer(t, Config{Store: store}))
		other := c
		if !here {
			other = serveHandler(t, newServer(t, Config{Store: openSame(t, store)}))
		}
		content := randomBytes(100_000)
		d := digest.FromBytes(content)
		at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
		put := c.send("PUT", at+"?digest="+d.String())
		put.pieces <- content[:50_000]
		put.untilReceived(store.Root(), at, 50_000)
		other.want(other.do("DELETE", at, nil), 204, "")
		put.pieces <- content[50_000:]
		if got := put.end(); got == 201 {
			t.Error("what was cancelled was made a blob")
		}
		c.want(c.do("GET", at, nil), 404, "BLOB_UPLOAD_UNKNOWN")
		c.want(c.do("PATCH", at, content), 404, "BLOB_UPLOAD_UNKNOWN")
		c.pushBlob("up", content)
		noUploads(t, store.Root(), "up")
	}
}
