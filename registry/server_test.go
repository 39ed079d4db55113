package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

func TestNewRefuses(t *testing.T) {
	store := openStore(t)
	certFile, keyFile := tlsFiles(t)
	if err := os.WriteFile(certFile, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	twice := prometheus.NewRegistry()
	if _, err := New(Config{Store: store, Metrics: twice}); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]Config{
		"no store":        {},
		"half a pair":     {Store: store, CertFile: certFile},
		"absent key":      {Store: store, CertFile: certFile, KeyFile: keyFile},
		"metrics clash":   {Store: store, Metrics: twice},
		"bad certificate": {Store: store, CertFile: certFile, KeyFile: certFile},
	} {
		if _, err := New(cfg); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	s, err := New(Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil {
		t.Error("Run without a listener")
	}
}

func TestRunReportsALostListener(t *testing.T) {
	l := listen(t)
	l.Close()
	if err := newServer(t, Config{Listener: l}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("Run: %v", err)
	}
}

// A pull in flight when the replica is told to end is finished.
func TestRunDrains(t *testing.T) {
	l := listen(t)
	store := openStore(t)
	s := newServer(t, Config{Store: store, Listener: l})
	layer := randomBytes(8 << 20)
	serveHandler(t, s).pushImage("a", "t", layer)
	stop := start(t, s)
	resp, err := http.Get("http://" + l.Addr().String() + "/v2/a/blobs/" + digest.FromBytes(layer).String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	stopped := make(chan error)
	go func() { stopped <- stop() }()
	for { // until it takes no more
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{})
		if errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		if err == nil {
			c.Close()
		}
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(got, layer) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// One that does not finish is cut off, in less than five seconds.
func TestRunEndsInTime(t *testing.T) {
	l := listen(t)
	s := newServer(t, Config{Listener: l})
	layer := randomBytes(32 << 20)
	serveHandler(t, s).pushImage("a", "t", layer)
	stop := start(t, s)
	resp, err := http.Get("http://" + l.Addr().String() + "/v2/a/blobs/" + digest.FromBytes(layer).String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	began := time.Now()
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestTLS(t *testing.T) {
	authority := newCA(t)
	certFile, keyFile := tlsFiles(t)
	authority.issue(t, 7, certFile, keyFile)
	l := listen(t)
	start(t, newServer(t, Config{Listener: l, CertFile: certFile, KeyFile: keyFile}))
	for version, ok := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: authority.pool(), MinVersion: tls.VersionTLS10, MaxVersion: version})
		if (err == nil) != ok {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		if err == nil {
			c.Close()
		}
	}
	resp, err := tlsClient(t, authority).Get("https://" + l.Addr().String() + "/v2/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ProtoMajor != 2 {
		t.Errorf("protocol %s, want HTTP/2", resp.Proto)
	}
}

// TestKeyPairMistakes wants to be told what is wrong with the files, and what to
// do; an expired certificate is served, since somebody may take it, and told of.
func TestKeyPairMistakes(t *testing.T) {
	authority := newCA(t)
	certFile, keyFile := tlsFiles(t)
	authority.issue(t, 1, certFile, keyFile)
	otherCert, otherKey := tlsFiles(t)
	authority.issue(t, 2, otherCert, otherKey)
	absent := filepath.Join(t.TempDir(), "absent")
	for _, test := range []struct{ cert, key, want string }{
		{absent, keyFile, "absent: no such file or directory: put both there, or give the directory that holds tls.crt and tls.key"},
		{certFile, absent, "absent: no such file or directory: put both there, or give the directory that holds tls.crt and tls.key"},
		{certFile, otherKey, "private key does not match public key: put the key there that the certificate was made for"},
		{keyFile, certFile, "may have been switched: put a certificate in PEM and its key, without a passphrase, there"},
		{certFile, os.DevNull, "failed to find any PEM data in key input: put a certificate in PEM and its key, without a passphrase, there"},
	} {
		_, err := newKeyPair(test.cert, test.key, slog.New(slog.DiscardHandler))
		if err == nil || !strings.HasSuffix(err.Error(), test.want) {
			t.Errorf("%s with %s: %v, want %q", test.cert, test.key, err, test.want)
		}
	}
	synctest.Test(t, func(t *testing.T) { // whose clock begins in 2000
		var log bytes.Buffer
		for _, expired := range []bool{false, true} {
			if expired {
				time.Sleep(time.Until(time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)))
			}
			if _, err := newKeyPair(certFile, keyFile, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(log.String(), "the serving certificate has expired, and clients refuse it: renew it"); got != expired {
				t.Errorf("expired %t: the log is %q", expired, &log)
			}
		}
	})
}

func TestKeyPairFollowsItsFiles(t *testing.T) {
	authority := newCA(t)
	certFile, keyFile := tlsFiles(t)
	authority.issue(t, 10, certFile, keyFile)
	old := time.Now().Add(-time.Minute)
	for _, file := range []string{certFile, keyFile} {
		if err := os.Chtimes(file, old, old); err != nil {
			t.Fatal(err)
		}
	}
	k, err := newKeyPair(certFile, keyFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	wantSerial := func(step string, want int64) {
		t.Helper()
		cert, err := k.get(nil)
		if err != nil || cert.Leaf.SerialNumber.Int64() != want {
			t.Errorf("%s: serial %v, %v; want %d", step, cert.Leaf.SerialNumber, err, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			k.watch(t.Context())
		}()
		t.Cleanup(func() { <-watched })
		pass := func() { time.Sleep(keyPollInterval); synctest.Wait() }

		pass()
		wantSerial("unchanged", 10)
		otherCert, otherKey := tlsFiles(t)
		authority.issue(t, 11, otherCert, otherKey)
		move(t, otherCert, certFile)
		pass()
		wantSerial("half way through a renewal", 10)
		move(t, otherKey, keyFile)
		pass()
		wantSerial("renewed", 11)
		if err := os.Remove(certFile); err != nil {
			t.Fatal(err)
		}
		pass()
		wantSerial("certificate gone", 11)
		authority.issue(t, 12, certFile, keyFile)
		pass()
		wantSerial("certificate back", 12)
	})
}

func move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestPanicBecomes500(t *testing.T) {
	var log written
	s := newServer(t, Config{
		Logger:   slog.New(slog.NewTextHandler(&log, nil)),
		ReadOnly: func() bool { panic("no mode") },
	})
	c := serveHandler(t, s)
	c.want(c.do("DELETE", "/v2/a/manifests/t", nil), 500, "UNKNOWN")
	if !strings.Contains(log.String(), "no mode") || !strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("log: %s", log.String())
	}
	c.want(c.do("GET", "/v2/", nil), 200, "")
}

// written is what was written, for example to a log, while it goes on.
type written struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *written) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// A fault of the storage is a 500 that tells the client nothing of paths, and a
// log line that tells the operator all.
func TestFaultsAreLoggedNotTold(t *testing.T) {
	var log written
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store, Logger: slog.New(slog.NewTextHandler(&log, nil))}))
	tags := store.Root() + "/docker/registry/v2/repositories/a/_manifests"
	if err := os.MkdirAll(tags, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tags+"/tags", nil, 0o644); err != nil { // not a directory
		t.Fatal(err)
	}
	a := c.want(c.do("GET", "/v2/a/tags/list", nil), 500, "UNKNOWN")
	if strings.Contains(string(a.body), store.Root()) {
		t.Errorf("the client was told %s", a.body)
	}
	if !strings.Contains(log.String(), "not a directory") {
		t.Errorf("log: %s", log.String())
	}
}

// A full disk refuses the push with a reason, keeps what is stored, and takes
// pushes again once there is room.
func TestFullDisk(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	kept, _ := c.pushImage("a", "t", []byte("stored before"))
	large := randomBytes(33 << 20)
	d := digest.FromBytes(large)
	at := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location")

	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	full := limit
	full.Cur = 32 << 20
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	c.want(c.do("PUT", at+"?digest="+d.String(), large), 507, "UNAVAILABLE")
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	noUploads(t, store.Root(), "a")
	c.want(c.do("GET", "/v2/a/manifests/"+kept.String(), nil), 200, "")
	c.pushBlob("a", large)
}

// A client that stops sending does not hold its connection for ever, and finds
// what it has sent when it comes back.
func TestStalledUploadIsBrokenOff(t *testing.T) {
	s := newServer(t, Config{})
	s.stall = 50 * time.Millisecond
	c := serveHandler(t, s)
	at := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location")
	body, client := io.Pipe()
	defer client.Close()
	go client.Write([]byte("some of it"))
	c.want(c.do("PATCH", at, body), 400, "SIZE_INVALID")
	if got := c.want(c.do("GET", at, nil), 204, "").header.Get("Range"); got != "0-9" {
		t.Errorf("kept %s, want 0-9", got)
	}
	// One that is slow goes on.
	s.stall = 5 * time.Second
	slow, client := io.Pipe()
	go func() {
		for _, part := range []string{" and", " the", " rest"} {
			client.Write([]byte(part))
		}
		client.Close()
	}()
	c.want(c.do("PATCH", at, slow), 202, "")
	c.want(c.do("PUT", at+"?digest="+digest.FromString("some of it and the rest").String(), nil), 201, "")
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := serveHandler(t, newServer(t, Config{Metrics: reg}))
	c.do("GET", "/v2/a/manifests/t", nil)
	c.do("BREW", "/v2/", nil)
	c.pushBlob("a", []byte("twelve bytes"))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	received := 0.0
	for _, f := range families {
		if f.GetName() == "connected_registry_received_bytes_total" {
			for _, m := range f.Metric {
				received += m.GetCounter().GetValue()
			}
		}
		for _, m := range f.Metric {
			labels := f.GetName()
			for _, l := range m.Label {
				labels += " " + l.GetValue()
			}
			found[labels] = true
		}
	}
	for _, want := range []string{
		"connected_registry_requests_total manifest GET 404",
		"connected_registry_requests_total base other 405",
		"connected_registry_request_duration_seconds manifest",
		"connected_registry_sent_bytes_total manifest",
		"connected_registry_uploads_in_flight",
		"connected_registry_storage_quarantined_total",
		"connected_registry_storage_rehashed_total",
	} {
		if !found[want] {
			t.Errorf("no metric %q in %v", want, found)
		}
	}
	if received != 12 {
		t.Errorf("%v bytes were received, not 12", received)
	}
}

// TestSilentConnectionsDoNotHoldUpTheEnd opens a connection and says nothing.
func TestSilentConnectionsDoNotHoldUpTheEnd(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Store: openStore(t), Listener: l})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// A request on another connection: the server accepts in order, so the
	// silent one has been accepted too.
	resp, err := http.Get("http://" + l.Addr().String() + "/v2/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()

	start := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > drainTime-time.Second {
		t.Errorf("the end took %s", took)
	}
}
