package bucket

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// pipes makes a transport whose connections lead to a server in the same bubble.
func pipes(t *testing.T, serve func(server net.Conn, r *http.Request)) transport {
	t.Helper()
	tr, err := newTransport("")
	if err != nil {
		t.Fatal(err)
	}
	for p := range tr {
		tr[p].Proxy = nil
		tr[p].DialContext = func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				r, err := http.ReadRequest(bufio.NewReader(server))
				if err == nil {
					serve(server, r)
				}
			}()
			return &conn{client, readPatience(p)}, nil
		}
	}
	return tr
}

func send(ctx context.Context, tr transport, body io.Reader, size int64) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://objects.example/object", body)
	if err != nil {
		return nil, err
	}
	r.ContentLength = size
	return tr.RoundTrip(r)
}

// TestSilence asks who never answers.
func TestSilence(t *testing.T) {
	for _, p := range []pace{quick, steady, lengthy} {
		synctest.Test(t, func(t *testing.T) {
			tr := pipes(t, func(server net.Conn, _ *http.Request) { io.Copy(io.Discard, server) })
			start := time.Now()
			_, err := send(at(t.Context(), p), tr, http.NoBody, 0) //nolint:bodyclose // there is none
			if f := network(errOr(err)); f.kind != silent || !f.again || time.Since(start) != time.Duration(p) {
				t.Errorf("after %v: %v, %+v", time.Since(start), err, f)
			}
		})
	}
}

func errOr(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// TestStall breaks off what stops in the midst, on both ways, and nothing that
// only is slow.
func TestStall(t *testing.T) {
	t.Run("Download", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tr := pipes(t, func(server net.Conn, _ *http.Request) {
				io.WriteString(server, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
				for range 10 {
					time.Sleep(stall - time.Second)
					io.WriteString(server, "x")
				}
				io.Copy(io.Discard, server)
			})
			r, err := send(t.Context(), tr, http.NoBody, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			start := time.Now()
			n, err := io.Copy(io.Discard, r.Body)
			if f := network(errOr(err)); n != 10 || f.kind != silent || time.Since(start) != 10*(stall-time.Second)+readPatience(quick) {
				t.Errorf("%d bytes in %v: %v, %+v", n, time.Since(start), err, f)
			}
		})
	})
	t.Run("SlowReader", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tr := pipes(t, func(server net.Conn, _ *http.Request) {
				io.WriteString(server, "HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n"+strings.Repeat("x", 200_000))
			})
			r, err := send(t.Context(), tr, http.NoBody, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			for range 4 {
				time.Sleep(10 * stall)
				if _, err := io.CopyN(io.Discard, r.Body, 50_000); err != nil {
					t.Fatal(err)
				}
			}
		})
	})
	t.Run("Upload", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tr := pipes(t, func(server net.Conn, r *http.Request) { time.Sleep(time.Hour) })
			start := time.Now()
			_, err := send(t.Context(), tr, strings.NewReader(strings.Repeat("x", 1<<20)), 1<<20) //nolint:bodyclose // there is none
			if f := network(errOr(err)); f.kind != silent || time.Since(start) != stall {
				t.Errorf("after %v: %v, %+v", time.Since(start), err, f)
			}
			time.Sleep(2 * time.Hour) // until the server is done too
		})
	})
	t.Run("SlowUpload", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tr := pipes(t, func(server net.Conn, r *http.Request) {
				for range 10 {
					time.Sleep(stall - time.Second)
					io.CopyN(io.Discard, r.Body, 100<<10)
				}
				io.Copy(io.Discard, r.Body)
				io.WriteString(server, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			})
			r, err := send(t.Context(), tr, strings.NewReader(strings.Repeat("x", 1<<20)), 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			r.Body.Close()
			tr[quick].CloseIdleConnections()
		})
	})
}

// TestTry counts, and measures, by a clock that only seems to pass.
func TestTry(t *testing.T) {
	fails := errors.New("fails")
	for name, test := range map[string]struct {
		fault fault
		takes time.Duration // of each try
		times int           // that it fails
		want  int           // tries
		least time.Duration
		most  time.Duration
	}{
		"succeeds":         {fault{again: true}, 0, 0, 1, 0, 0},
		"is pointless":     {fault{}, 0, 100, 1, 0, 0},
		"helps":            {fault{again: true}, 0, 3, 4, 0, 3 * time.Second},
		"is bounded":       {fault{again: true}, 0, 100, tries, 3 * time.Second, 12 * time.Second},
		"is told to wait":  {fault{again: true, after: 2 * time.Second}, 0, 3, 4, 6 * time.Second, 8 * time.Second},
		"takes long":       {fault{again: true}, 10 * time.Second, 100, 2, 20 * time.Second, 21 * time.Second},
		"takes far longer": {fault{again: true}, time.Minute, 100, 1, time.Minute, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, start := 0, time.Now()
				err := try(t.Context(), func(error) fault { return test.fault }, func() error {
					time.Sleep(test.takes)
					if n++; n <= test.times {
						return fails
					}
					return nil
				})
				if n != test.want || (err == nil) != (test.times < n) {
					t.Errorf("%d tries, %v; want %d", n, err, test.want)
				}
				if took := time.Since(start); took < test.least || took > test.most {
					t.Errorf("it took %v, want %v to %v", took, test.least, test.most)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		start := time.Now()
		if err := try(ctx, func(error) fault { return fault{again: true} }, func() error { return fails }); err == nil || time.Since(start) != 50*time.Millisecond {
			t.Errorf("after %v, with the context over: %v", time.Since(start), err)
		}
	})
}

// TestDescribeOther says what to do also about what is known of no object store,
// such as the answer of a server of TLS that is spoken to in plain HTTP.
func TestDescribeOther(t *testing.T) {
	got := remedies{endpoint: "http://objects.example"}.describe(byStatus(http.StatusBadRequest, nil))
	if want := "400 Bad Request: the log of http://objects.example may say more; correct the endpoint, its http:// or https:// too, if no object store answers there"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
