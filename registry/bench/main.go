// Command bench compares this registry with distribution's own: the same
// version of the same library, on the same files, in the same process, asked in
// turns by the same clients. For each kind of request it prints how many are
// answered in a second by either, how many times as many that is, and the 99th
// percentile of how long an answer takes.
//
// It is a module of its own for the sake of distribution's application, which
// brings dependencies that the registry does without.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/storage"
)

const (
	mediaType = "application/vnd.oci.image.manifest.v1+json"
	image     = "/v2/bench/image"
)

func main() {
	round := flag.Duration("round", time.Second, "how long each registry is asked at a stretch")
	rounds := flag.Int("rounds", 5, "how many turns each registry has")
	clients := flag.Int("clients", 8, "how many clients ask at a time")
	flag.Parse()
	if err := run(*round, *rounds, *clients); err != nil {
		log.SetFlags(0)
		log.Fatal("bench: ", err)
	}
}

func run(round time.Duration, rounds, clients int) error {
	root, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	store, err := storage.Open(context.Background(), storage.Config{Root: root})
	if err != nil {
		return err
	}
	defer store.Close()
	layer := make([]byte, 64<<20)
	rand.Read(layer)
	ours, err := registry.New(registry.Config{Store: store})
	if err != nil {
		return err
	}
	if err := seed(store, ours.Handler(), layer); err != nil {
		return err
	}
	app := distributionApp(root)
	defer app.Shutdown()

	blob := image + "/blobs/" + digest.FromBytes(layer).String()
	fmt.Printf("%d clients, %d processors, %d turns of %v each\n\n", clients, runtime.GOMAXPROCS(0), rounds, round)
	fmt.Printf("%-28s %12s %14s %8s %12s %14s\n", "", "req/s", "distribution", "times", "p99", "distribution")
	for _, test := range []struct {
		name, method, path string
		tls                bool
	}{
		{"manifest GET by tag", "GET", image + "/manifests/latest", false},
		{"manifest GET by tag, TLS", "GET", image + "/manifests/latest", true},
		{"manifest HEAD by tag", "HEAD", image + "/manifests/latest", false},
		{"blob HEAD", "HEAD", blob, false},
		{"blob GET, 64 MiB", "GET", blob, false},
		{"blob GET, 64 MiB, TLS", "GET", blob, true},
	} {
		mine, theirs := contender{handler: ours.Handler()}, contender{handler: app}
		for range rounds {
			for _, c := range []*contender{&mine, &theirs} {
				if err := c.measure(test.method, test.path, test.tls, round, clients); err != nil {
					return fmt.Errorf("%s: %w", test.name, err)
				}
			}
		}
		fmt.Printf("%-28s %12.0f %14.0f %7.1fx %12v %14v\n", test.name,
			mine.perSecond(), theirs.perSecond(), mine.perSecond()/theirs.perSecond(), mine.p99(), theirs.p99())
	}
	return nil
}

// seed stores an image with a manifest as large as a common one's, by way of
// the registry itself for the layer that is pulled.
func seed(store *storage.Store, handler http.Handler, layer []byte) error {
	repo, err := store.Repository("bench/image")
	if err != nil {
		return err
	}
	var layers string
	for i := range 12 {
		layers += fmt.Sprintf(`,{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","size":%d,"digest":%q}`, 1<<20+i, digest.FromString(fmt.Sprint(i)))
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":%q},"layers":[%s]}`,
		mediaType, digest.FromString("{}"), layers[1:])
	if err := repo.PutManifest(context.Background(), digest.FromBytes(manifest), manifest, "latest"); err != nil {
		return err
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("POST", image+"/blobs/uploads/?digest="+digest.FromBytes(layer).String(), bytes.NewReader(layer)))
	if w.Code != http.StatusCreated {
		return fmt.Errorf("pushing the layer: %d %s", w.Code, w.Body)
	}
	return nil
}

// distributionApp is distribution's registry as its example configuration has
// it, with the descriptor cache in memory, and without its log.
func distributionApp(root string) *handlers.App {
	return handlers.NewApp(context.Background(), &configuration.Configuration{
		Storage: configuration.Storage{
			"filesystem":  {"rootdirectory": root},
			"cache":       {"blobdescriptor": "inmemory"},
			"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
		},
		Catalog: configuration.Catalog{MaxEntries: 1000},
	})
}

// contender is a registry and how it has done.
type contender struct {
	handler http.Handler
	took    []time.Duration // of each request
	busy    time.Duration   // in all
}

func (c *contender) perSecond() float64 { return float64(len(c.took)) / c.busy.Seconds() }

func (c *contender) p99() time.Duration {
	slices.Sort(c.took)
	return c.took[len(c.took)*99/100].Round(time.Microsecond)
}

// measure sends requests from several clients, each on a connection of its own,
// for about the given time.
func (c *contender) measure(method, path string, secure bool, during time.Duration, clients int) error {
	srv := httptest.NewUnstartedServer(c.handler)
	if secure {
		srv.TLS = &tls.Config{NextProtos: []string{"http/1.1"}} // all that containerd speaks
		srv.StartTLS()
	} else {
		srv.Start()
	}
	defer srv.Close()
	var mu sync.Mutex
	var failed error
	var wg sync.WaitGroup
	start := time.Now()
	for range clients {
		wg.Go(func() {
			took, err := ask(srv.Listener.Addr().String(), secure, method, path, start.Add(during))
			mu.Lock()
			defer mu.Unlock()
			c.took = append(c.took, took...)
			failed = errors.Join(failed, err)
		})
	}
	wg.Wait()
	c.busy += time.Since(start)
	return failed
}

// ask sends one request after another and reads the answers, as cheaply as that
// can be done: the clients share the processors with the registry, and
// net/http's would take more of them than it does.
func ask(addr string, secure bool, method, path string, until time.Time) (took []time.Duration, err error) {
	conn, err := dial(addr, secure)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	request := fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: %s\r\nAccept: %s\r\nUser-Agent: bench\r\n\r\n", method, path, addr, mediaType)
	r := bufio.NewReaderSize(conn, 64<<10)
	for start := time.Now(); start.Before(until); start = time.Now() {
		if _, err := conn.Write(request); err != nil {
			return took, err
		}
		if err := readAnswer(r, method == http.MethodGet); err != nil {
			return took, fmt.Errorf("%s %s: %w", method, path, err)
		}
		took = append(took, time.Since(start))
	}
	return took, nil
}

func dial(addr string, secure bool) (net.Conn, error) {
	if secure {
		return tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true}) // of no concern here
	}
	return net.Dial("tcp", addr)
}

var contentLength = []byte("Content-Length: ")

// readAnswer reads an answer of status 200 to its end.
func readAnswer(r *bufio.Reader, body bool) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
		return errors.New(string(line))
	}
	length := -1
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		if value, ok := bytes.CutPrefix(line, contentLength); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return err
			}
		}
	}
	if length <= 0 {
		return fmt.Errorf("Content-Length is %d", length)
	}
	if body {
		_, err = r.Discard(length)
	}
	return err
}
