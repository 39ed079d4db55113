package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster"
)

const (
	// bandwidth is what prefetching may take, in bytes per second, and slowSize
	// what is prefetched while it is measured.
	bandwidth = 2 << 20
	slowSize  = 12 << 20
	// waveLayers are those of the image that all nodes want at a time.
	waveLayers = 4
	waveSize   = 2 << 20
	// lostSize is for what a node fetches from another one that is killed
	// meanwhile, which may take some attempts.
	lostSize     = 96 << 20
	lostAttempts = 3
)

// caches are what the caches of nodes are tested with.
type caches struct {
	*world
	everywhere, one               string // prefetched by the resource, by repository and tag
	workload, other, kept, secret string // and by workloads
}

// testCaches has nodes prefetch, and ask one another.
func (w *world) testCaches(t *testing.T) {
	take := func() string { return "hello-world:" + w.parent.take() }
	c := &caches{w, take(), take(), take(), take(), take(), take()}
	w.parent.pushLayers(t, "slow:1", slowSize)
	w.parent.pushLayers(t, "wave:1", slices.Repeat([]int{waveSize}, waveLayers)...)
	for i := range lostAttempts {
		w.parent.pushLayers(t, fmt.Sprintf("lost:%d", i), lostSize)
	}
	w.with(t, func(t *testing.T) {
		t.Run("prefetch", c.testPrefetch)
		t.Run("private image", c.testPrivate)
		t.Run("peers' certificate changed", c.testPeersRotated)
		t.Run("wave", c.testWave)
		t.Run("peer killed", c.testPeerKilled)
		t.Run("registry stopped", c.testRegistryStopped)
	}, noManager, fmt.Sprintf(`
mirrors:
- registry: %s
  anonymousPull: true
  prefetch:
  - images: [%q]
  - {images: [%q], nodeSelector: {kubernetes.io/hostname: %s}}
nodeCache: {peers: true, prefetchWorkloads: true, prefetchBandwidth: %d}
`, parentHost, c.everywhere, c.one, w.c.Nodes()[0].Name(), bandwidth))
}

// testPrefetch has workloads without a pod want images, and waits until every
// node has those that are meant for it. The second node has a taint, which all
// tolerate but one.
func (c *caches) testPrefetch(t *testing.T) {
	const tolerant = "tolerations: [{key: e2e, operator: Exists}]"
	first, second := c.c.Nodes()[0], c.c.Nodes()[1]
	kubectl(t, c.c, "taint", "node", second.Name(), "e2e=kept:NoSchedule")
	t.Cleanup(func() { // after the workloads are gone
		if out, err := c.c.Kubectl(context.Background(), "taint", "node", second.Name(), "e2e-"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	c.wanted(t, "apps/v1", "Deployment", "everywhere", "{replicas: 0, selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: b}}, spec: %s}}",
		parentHost+"/"+c.workload, tolerant, parentHost+"/slow:1")
	c.wanted(t, "apps/v1", "Deployment", "private", "{replicas: 0, selector: {matchLabels: {c: d}}, template: {metadata: {labels: {c: d}}, spec: %s}}",
		c.host+"/"+c.secret, tolerant, "")
	c.wanted(t, "batch/v1", "CronJob", "second", "{suspend: true, schedule: '0 0 1 1 *', jobTemplate: {spec: {template: {spec: %s}}}}",
		parentHost+"/"+c.other, tolerant+", nodeSelector: {kubernetes.io/hostname: "+second.Name()+"}", "")
	c.wanted(t, "apps/v1", "Deployment", "kept", "{replicas: 0, selector: {matchLabels: {e: f}}, template: {metadata: {labels: {e: f}}, spec: %s}}",
		parentHost+"/"+c.kept, "tolerations: []", "")
	// The next leader looks at once, and the one that is there within a minute.
	kubectl(t, c.c, "delete", "pod", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry-syncer")

	rate := c.prefetchRate(t, second)
	if rate > 1.25*bandwidth {
		t.Errorf("prefetching took %.0f bytes per second, more than %d", rate, bandwidth)
	}
	t.Logf("prefetching took %.2f MiB/s of %.2f", rate/(1<<20), float64(bandwidth)/(1<<20))
	for _, n := range c.c.Nodes() {
		want := 4 // everywhere, the first workload's two, the private one
		if n.Name() == first.Name() || n.Name() == second.Name() {
			want++
		}
		if n.Name() != second.Name() {
			want++ // the intolerant workload's
		}
		eventually(t, func() error {
			present, missing := c.sum(t, n, `prefetch_images{state="present"}`), c.sum(t, n, `prefetch_images{state="missing"}`)
			if present != float64(want) || missing != 0 {
				return fmt.Errorf("%s: %v images are here and %v are missing, want %d", n.Name(), present, missing, want)
			}
			return nil
		})
	}
}

// wanted makes a workload that bears the label. where is of the pods' fields that
// say where they run. more are images that they do not name.
func (c *caches) wanted(t *testing.T, version, kind, name, spec, image, where, more string) {
	t.Helper()
	pod := fmt.Sprintf("{restartPolicy: %s, %s, containers: [{name: main, image: %q}]}",
		map[string]string{"Deployment": "Always", "CronJob": "Never"}[kind], where, image)
	apply(t, c.c, fmt.Sprintf("{apiVersion: %s, kind: %s, metadata: {name: %s, namespace: %s, labels: {connectedregistry.io/prefetch: 'true'}, annotations: {connectedregistry.io/prefetch-images: %q}}, spec: %s}",
		version, kind, name, pullers, more, fmt.Sprintf(spec, pod)))
	t.Cleanup(func() {
		if out, err := c.c.Kubectl(context.Background(), "delete", kind, name, "-n", pullers); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// prefetchRate is how many bytes per second a node takes for the image that takes
// a while.
func (c *caches) prefetchRate(t *testing.T, n *cluster.Node) float64 {
	t.Helper()
	received := func() float64 { return c.sum(t, n, "fetched_bytes_total") + c.sum(t, n, "peer_fetched_bytes_total") }
	var began time.Time
	var first, last float64
	base := received()
	eventually(t, func() error {
		now := time.Now()
		got := received()
		switch {
		case first == 0 && got > base+slowSize/4:
			// The time is that before the question, and that below the one after the
			// answer: a slow machine makes the rate look lower, not higher.
			first, began = got, now
		case first > 0 && got > base+slowSize*3/4:
			last = got
			return nil
		}
		return fmt.Errorf("%s has received %.0f bytes, and %.0f before", n.Name(), got, base)
	})
	return (last - first) / time.Since(began).Seconds()
}

// testPrivate runs pods with an image that not everybody may read: its content is
// on the nodes already, and opens to those alone who have the secret.
func (c *caches) testPrivate(t *testing.T) {
	before := c.registrySum(t, `sent_bytes_total{endpoint="blob"}`)
	var with, without []pod
	for _, n := range c.c.Nodes() {
		with = append(with, pod{"with-" + n.Name(), n.Name(), c.host + "/" + c.secret, "regcred"})
		without = append(without, pod{"without-" + n.Name(), n.Name(), c.host + "/" + c.secret, ""})
	}
	start(t, c.c, append(without, with...)...)
	succeed(t, c.c, with...)
	refused(t, c.c, without...)
	if after := c.registrySum(t, `sent_bytes_total{endpoint="blob"}`); after != before {
		t.Errorf("the registry sent %.0f bytes for what had been prefetched", after-before)
	}
	token := c.prefetchToken(t)
	for repository, want := range map[string]int{"hello-world": http.StatusOK, "wave": http.StatusForbidden} {
		if got := c.ask(t, token, repository); got != want {
			t.Errorf("%s with the nodes' token: %d, want %d", repository, got, want)
		}
	}
	agent := "system:serviceaccount:" + Namespace + ":connected-registry-agent"
	for _, what := range []string{"deployments.apps", "cronjobs.batch", "secrets/connected-registry-prefetch", "secrets/connected-registry-peers"} {
		// "no" comes with an error.
		if out, _ := c.c.Kubectl(t.Context(), "auth", "can-i", "get", what, "--as="+agent, "-n", Namespace); strings.HasPrefix(string(out), "yes") {
			t.Errorf("agents may read %s", what)
		}
	}
}

// prefetchToken is the nodes' user and password, and the registry's CA.
func (c *caches) prefetchToken(t *testing.T) map[string][]byte {
	t.Helper()
	all := c.secretData(t, "connected-registry-prefetch")
	all["ca.crt"] = c.secretData(t, "connected-registry-ca")["ca.crt"]
	return all
}

func (c *caches) secretData(t *testing.T, name string) map[string][]byte {
	t.Helper()
	var s struct{ Data map[string]string }
	if err := json.Unmarshal([]byte(kubectl(t, c.c, "get", "secret", name, "-n", Namespace, "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	data := make(map[string][]byte)
	for key, value := range s.Data {
		raw, err := base64.StdEncoding.DecodeString(value)
		if err != nil {
			t.Fatal(err)
		}
		data[key] = raw
	}
	return data
}

// ask is the registry's answer to a request for the tags of a repository.
func (c *caches) ask(t *testing.T, token map[string][]byte, repository string) int {
	t.Helper()
	n := c.c.Nodes()[0]
	writeNode(t, n, "tmp/e2e", "ca.crt", string(token["ca.crt"]))
	writeNode(t, n, "tmp/e2e", "netrc", fmt.Sprintf("machine %s login %s password %s\n", c.host, token["username"], token["password"]))
	defer removeNode(t, n, "tmp/e2e")
	out, err := n.Run(t.Context(), "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", "/tmp/e2e/ca.crt", "--netrc-file", "/tmp/e2e/netrc",
		"https://"+c.host+"/v2/"+repository+"/tags/list")
	if err != nil {
		t.Fatal(err)
	}
	status, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// testPeersRotated takes the Secret away by which nodes know one another: all of
// them follow to the next one without a new start.
func (c *caches) testPeersRotated(t *testing.T) {
	const secret = "connected-registry-peers"
	before := c.secretData(t, secret)
	for _, n := range c.c.Nodes() {
		if err := c.askPeer(t.Context(), n, before, before); err != nil {
			t.Errorf("before: %v", err)
		}
	}
	kubectl(t, c.c, "delete", "secret", secret, "-n", Namespace)
	var now map[string][]byte
	eventually(t, func() error {
		out, err := c.c.Kubectl(t.Context(), "get", "secret", secret, "-n", Namespace, "-o", "name")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		now = c.secretData(t, secret)
		return nil
	})
	for _, n := range c.c.Nodes() {
		eventually(t, func() error {
			if err := pull(t.Context(), n, parentHost+"/hello-world:"+c.parent.take(), ""); err != nil {
				t.Errorf("while some nodes have the one and some the other: %v", err)
			}
			return c.askPeer(t.Context(), n, now, now)
		})
		if err := c.askPeer(t.Context(), n, before, now); err == nil {
			t.Errorf("%s takes the certificate that was taken away", n.Name())
		}
	}
}

// askPeer asks the cache of a node as another node would: as is the certificate
// to show, and of the one to be shown. The error is nil when it answers.
func (c *caches) askPeer(ctx context.Context, n *cluster.Node, as, of map[string][]byte) error {
	pair, err := tls.X509KeyPair(as["tls.crt"], as["tls.key"])
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(of["ca.crt"])
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: "peers.connected-registry.internal",
	}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("https://%s:5051/v2/", n.IP()), nil)
	if err != nil {
		return err
	}
	answer, err := transport.RoundTrip(r)
	if err != nil {
		return err
	}
	return answer.Body.Close()
}

// testWave has all nodes pull the same image at a time: what the registry sends
// is what fewer nodes than there are would take.
func (c *caches) testWave(t *testing.T) {
	nodes := c.c.Nodes()
	before, fromPeers := c.registrySum(t, `sent_bytes_total{endpoint="blob"}`), c.fromPeers(t)
	reads := c.registrySum(t, `requests_total{endpoint="blob",method="GET",status="200"}`)
	var group sync.WaitGroup
	for _, n := range nodes {
		group.Go(func() {
			if err := pull(t.Context(), n, parentHost+"/wave:1", ""); err != nil {
				t.Errorf("%s: %v", n.Name(), err)
			}
		})
	}
	group.Wait()
	const size = waveLayers * waveSize
	sent := c.registrySum(t, `sent_bytes_total{endpoint="blob"}`) - before
	reads = c.registrySum(t, `requests_total{endpoint="blob",method="GET",status="200"}`) - reads
	got := c.fromPeers(t) - fromPeers
	t.Logf("%d nodes took an image of %d layers and %d bytes: the registry was asked for blobs %.0f times and sent %.2f times the image, nodes sent %.2f times the image",
		len(nodes), waveLayers, size, reads, sent/size, got/size)
	if sent >= 2*size && len(nodes) > 2 || sent >= 1.5*size && len(nodes) == 2 || got < size/2 {
		t.Error("that is too much for the registry")
	}
}

// fromPeers is what all nodes have received from others, in bytes.
func (c *caches) fromPeers(t *testing.T) (sum float64) {
	t.Helper()
	for _, n := range c.c.Nodes() {
		sum += c.sum(t, n, "peer_fetched_bytes_total")
	}
	return sum
}

// testPeerKilled kills the agent of a node while another takes a blob from it:
// the rest comes from elsewhere.
func (c *caches) testPeerKilled(t *testing.T) {
	from, to := c.c.Nodes()[0], c.c.Nodes()[1]
	for i := range lostAttempts {
		ref := fmt.Sprintf("%s/lost:%d", parentHost, i)
		if err := pull(t.Context(), from, ref, ""); err != nil {
			t.Fatal(err)
		}
		before := c.sum(t, to, "peer_fetched_bytes_total")
		pulled := make(chan error, 1)
		go func() { pulled <- pull(t.Context(), to, ref, "") }()
		eventually(t, func() error {
			if len(pulled) == 0 && c.sum(t, to, "peer_fetched_bytes_total") <= before {
				return errors.New("nothing comes from the other node")
			}
			return nil
		})
		c.signal(t, from, "agent", "KILL")
		if err := <-pulled; err != nil {
			t.Fatalf("with the other node gone: %v", err)
		}
		got := c.sum(t, to, "peer_fetched_bytes_total") - before
		c.settled(t, "daemonset/connected-registry-agent")
		if got > 0 && got < lostSize {
			t.Logf("the node went after %.1f MiB of %d", got/(1<<20), lostSize>>20)
			return
		}
		t.Logf("%.1f MiB came from the node: trying again", got/(1<<20))
	}
	t.Error("the node was never killed within a blob")
}

// testRegistryStopped starts pods from what was prefetched alone.
func (c *caches) testRegistryStopped(t *testing.T) {
	c.parent.stop()
	defer c.parent.start(t)
	kubectl(t, c.c, "scale", "deployment/connected-registry", "-n", Namespace, "--replicas=0")
	defer func() {
		kubectl(t, c.c, "scale", "deployment/connected-registry", "-n", Namespace, "--replicas=1")
		c.settled(t, "deployment/connected-registry")
	}()
	kubectl(t, c.c, "wait", "pod", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry", "--for=delete", "--timeout=120s")
	first, second := c.c.Nodes()[0], c.c.Nodes()[1]
	pods := []pod{
		{"one-" + first.Name(), first.Name(), parentHost + "/" + c.one, ""},
		{"second-" + second.Name(), second.Name(), parentHost + "/" + c.other, ""},
	}
	for _, n := range c.c.Nodes() {
		pods = append(pods, pod{"resource-" + n.Name(), n.Name(), parentHost + "/" + c.everywhere, ""})
		pods = append(pods, pod{"workload-" + n.Name(), n.Name(), parentHost + "/" + c.workload, ""})
	}
	start(t, c.c, pods...)
	succeed(t, c.c, pods...)
	for image, n := range map[string]*cluster.Node{c.other: first, c.one: second, c.kept: second} {
		if err := pull(t.Context(), n, parentHost+"/"+image, ""); err == nil {
			t.Errorf("%s has %s, which was not meant for it", n.Name(), image)
		}
	}
}
