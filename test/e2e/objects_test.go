package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/connected-registry/connected-registry/test/cluster"
	"github.com/connected-registry/connected-registry/test/objects"
)

const (
	objectHost     = "objects.example.com"
	objectPort     = "9000"
	writerName     = "writer"
	writerPassword = "a writer's password"
	// kept is how many images are kept in the object store.
	kept = 12
)

// testObjects has two replicas and the syncer on a bucket of a real object store,
// and no volume at all.
func (w *world) testObjects(t *testing.T) {
	for i := range kept {
		w.parent.push(t, fmt.Sprint("o", i))
	}
	store, file := w.objectStore(t)
	w.with(t, func(t *testing.T) {
		if claims := kubectl(t, w.c, "get", "persistentvolumeclaims", "-A", "-o", "name"); claims != "" {
			t.Errorf("there are volumes: %s", claims)
		}
		w.pulls(t)
		t.Run("parent stopped", w.testObjectsParentStopped)
		t.Run("two replicas", w.testTwoReplicas)
		t.Run("carried to a volume and back", w.testCarried)
		t.Run("object store away", func(t *testing.T) { w.testStoreAway(t, store) })
	}, noManager, fmt.Sprintf(`
mode: ReadWrite
registry: {replicas: 2}
repositories: [{name: hello-world, tags: {include: [latest, "o*"]}}]
storage:
  s3: {bucket: images, prefix: edge, endpoint: %q, pathStyle: true}
  credentialsSecret: minio
  caSecret: minio-ca
clientTokens:
- name: %s
  secretRef: {name: reader}
  scopeMap: [{repositories: ["**"], actions: [content/read, metadata/read]}]
- name: %s
  secretRef: {name: writer}
  scopeMap: [{repositories: ["pushed/**"], actions: [content/read, content/write, metadata/read]}]
`, "https://"+net.JoinHostPort(objectHost, objectPort), readerName, writerName))
	w.exports(t, file)
}

// objectStore starts MinIO with a certificate of a CA that nobody knows, and makes
// what an operator has for it. The file is what --storage takes on this machine.
func (w *world) objectStore(t *testing.T) (store *objects.Server, file string) {
	t.Helper()
	dir := t.TempDir()
	pair := newPair(t, []string{objectHost}, []net.IP{w.c.HostAddr().AsSlice()})
	certificates, credentials := filepath.Join(dir, "certificates"), filepath.Join(dir, "credentials")
	file = filepath.Join(dir, "storage.yaml")
	address := net.JoinHostPort(w.c.HostAddr().String(), objectPort)
	for name, content := range map[string]string{
		filepath.Join(certificates, "public.crt"):     string(pair.cert),
		filepath.Join(certificates, "private.key"):    string(pair.key),
		filepath.Join(credentials, "accessKeyID"):     objects.AccessKeyID,
		filepath.Join(credentials, "secretAccessKey"): objects.SecretAccessKey,
		file: fmt.Sprintf("s3: {bucket: images, prefix: edge, endpoint: %q, pathStyle: true}\ncaFile: %s\ncredentials: %s\n",
			"https://"+address, filepath.Join(certificates, "public.crt"), credentials),
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	store, err := objects.MinIO{
		Address: address, Data: t.TempDir(), Buckets: []string{"images"},
		Certificates: certificates, CA: filepath.Join(certificates, "public.crt"),
	}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := w.c.AddHost(objectHost, w.c.HostAddr()); err != nil {
		t.Fatal(err)
	}
	apply(t, w.c, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: minio, namespace: %[1]s}
stringData: {accessKeyID: %[2]q, secretAccessKey: %[3]q}
---
apiVersion: v1
kind: Secret
metadata: {name: minio-ca, namespace: %[1]s}
stringData: {ca.crt: %[4]q}
---
apiVersion: v1
kind: Secret
metadata: {name: %[5]s, namespace: %[1]s}
stringData: {password1: %[6]q}
`, Namespace, objects.AccessKeyID, objects.SecretAccessKey, pair.cert, writerName, writerPassword))
	return store, file
}

// testObjectsParentStopped pulls what the syncer has brought, while one replica
// is killed.
func (w *world) testObjectsParentStopped(t *testing.T) {
	// Every tag is there before nobody can bring it any more.
	kubectl(t, w.c, "wait", "connectedregistry/connected-registry", "-n", Namespace, "--timeout=180s",
		fmt.Sprintf("--for=jsonpath={.status.repositories[0].tagsPresent}=%d", kept+1))
	w.parent.stop()
	defer w.parent.start(t)
	next := 0
	take := func() string {
		next++
		return fmt.Sprint("o", next-1)
	}
	w.oneEachOf(t, w.host, "regcred", take)
	w.signal(t, w.replicaNode(t), "registry", "KILL")
	w.oneEachOf(t, w.host, "regcred", take)
	w.settled(t, "deployment/connected-registry")
}

// testTwoReplicas: what one has taken, the other has at once.
func (w *world) testTwoReplicas(t *testing.T) {
	one, other := w.eachReplica(t)
	image := func() v1.Image {
		base, err := cluster.Busybox()
		if err != nil {
			t.Fatal(err)
		}
		return unique(t, base)
	}
	ref, err := name.NewTag(w.host + "/pushed/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	auth := remote.WithAuth(&authn.Basic{Username: writerName, Password: writerPassword})
	for i := range 5 { // the tag moves: nobody may remember where it was
		pushed := image()
		if err := remote.Write(ref, pushed, remote.WithTransport(one), auth, remote.WithContext(t.Context())); err != nil {
			t.Fatal(err)
		}
		got, err := remote.Get(ref, remote.WithTransport(other), auth, remote.WithContext(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		want, err := pushed.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if got.Digest != want {
			t.Errorf("push %d: the other replica has %s, want %s", i, got.Digest, want)
		}
		one, other = other, one
	}
	w.uploadByTurns(t, one, other)
}

// uploadByTurns uploads a blob of which each replica gets every other part.
func (w *world) uploadByTurns(t *testing.T, replicas ...*http.Transport) {
	t.Helper()
	base := &url.URL{Scheme: "https", Host: w.host, Path: "/v2/pushed/app/blobs/uploads/"}
	turn := 0
	do := func(method string, to *url.URL, body []byte, want int) *http.Response {
		t.Helper()
		client := &http.Client{Transport: replicas[turn%len(replicas)]}
		turn++
		req, err := http.NewRequestWithContext(t.Context(), method, to.String(), bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(writerName, writerPassword)
		req.Header.Set("Content-Type", "application/octet-stream")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != want {
			t.Fatalf("%s to replica %d: %s: %s", method, turn%len(replicas), resp.Status, answer)
		}
		return resp
	}
	location := func(r *http.Response) *url.URL {
		t.Helper()
		u, err := base.Parse(r.Header.Get("Location"))
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	var all []byte
	at := location(do(http.MethodPost, base, nil, http.StatusAccepted))
	for _, size := range []int{6 << 20, 100, 5 << 20, 7} {
		part := make([]byte, size)
		if _, err := rand.Read(part); err != nil {
			t.Fatal(err)
		}
		at = location(do(http.MethodPatch, at, part, http.StatusAccepted))
		all = append(all, part...)
	}
	sum, _, err := v1.SHA256(bytes.NewReader(all))
	if err != nil {
		t.Fatal(err)
	}
	query := at.Query()
	query.Set("digest", sum.String())
	at.RawQuery = query.Encode()
	do(http.MethodPut, at, nil, http.StatusCreated)
	for range replicas {
		blob := do(http.MethodHead, base.JoinPath("..", sum.String()), nil, http.StatusOK)
		if blob.ContentLength != int64(len(all)) {
			t.Errorf("a replica has %d bytes of the blob, want %d", blob.ContentLength, len(all))
		}
	}
}

// eachReplica returns what reaches one replica alone, by the registry's address.
func (w *world) eachReplica(t *testing.T) (one, other *http.Transport) {
	t.Helper()
	encoded := kubectl(t, w.c, "get", "secret", "connected-registry-ca", "-n", Namespace, "-o", `jsonpath={.data.ca\.crt}`)
	ca, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("Secret connected-registry-ca holds no certificate")
	}
	addrs := strings.Fields(kubectl(t, w.c, "get", "pods", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry",
		"--field-selector=status.phase=Running", "-o", "jsonpath={.items[*].status.podIP}"))
	if len(addrs) != 2 {
		t.Fatalf("replicas: %v, want 2", addrs)
	}
	transport := func(addr string) *http.Transport {
		tr := &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: roots},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(addr, "8443"))
			},
		}
		t.Cleanup(tr.CloseIdleConnections)
		return tr
	}
	return transport(addrs[0]), transport(addrs[1])
}

// testCarried carries what the bucket holds to a volume and back, by the Job that
// the chart's README has for it.
func (w *world) testCarried(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(w.Chart, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, job, _ := strings.Cut(string(readme), "```yaml\napiVersion: batch/v1\n")
	job, _, found := strings.Cut(job, "```")
	if !found {
		t.Fatal("the chart's README has no Job")
	}
	job = "apiVersion: batch/v1\n" + job
	const volume, bucket = "--data=/volume", "--storage=/etc/connected-registry/storage/storage.yaml, --data=/archive/data"
	away := strings.NewReplacer(volume, bucket, bucket, volume, "{name: carry,", "{name: carry-away,").Replace(job)
	apply(t, w.c, fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: connected-registry-storage, namespace: %s}
spec: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}}
`, Namespace))
	defer kubectl(t, w.c, "delete", "persistentvolumeclaim/connected-registry-storage", "-n", Namespace)
	defer kubectl(t, w.c, "delete", "job/carry", "job/carry-away", "-n", Namespace, "--ignore-not-found")
	for _, step := range []struct{ job, name, want string }{
		{away, "carry-away", fmt.Sprintf("hello-world: %d of %[1]d tags present", kept+1)},
		{job, "carry", "Succeeded: 0 blobs"}, // they are all there
	} {
		apply(t, w.c, step.job)
		kubectl(t, w.c, "wait", "job/"+step.name, "-n", Namespace, "--for=condition=Complete", "--timeout=180s")
		if log := kubectl(t, w.c, "logs", "job/"+step.name, "-n", Namespace); !strings.Contains(log, step.want) {
			t.Errorf("%s says %s, want %s", step.name, log, step.want)
		}
	}
}

// testStoreAway has the object store crash and come back: replicas ask for no
// requests meanwhile, and are not started anew.
func (w *world) testStoreAway(t *testing.T, store *objects.Server) {
	state := func() string {
		return kubectl(t, w.c, "get", "pods", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry",
			"-o", "jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}\n{end}")
	}
	before := state()
	store.Kill()
	eventually(t, func() error {
		if now := state(); now != strings.ReplaceAll(before, "true", "false") {
			return errors.New("replicas without an object store: " + now)
		}
		return nil
	})
	if err := store.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if now := state(); now != before {
			return fmt.Errorf("replicas before and after the object store was away:\n%s\n%s", before, now)
		}
		return nil
	})
}

// exports reads from the bucket, by the program itself, what an installation that
// is gone has left there: every image, every byte of it verified.
func (w *world) exports(t *testing.T, file string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "connected-registry")
	if err := goRun(t.Context(), filepath.Join("..", ".."), "build", "-trimpath", "-ldflags=-s -w -X main.version=e2e", "-o", program, "./cmd/connected-registry"); err != nil {
		t.Fatal(err)
	}
	out, err := run(t.Context(), program, "export", "--storage", file, "--data", t.TempDir(), filepath.Join(t.TempDir(), "edge.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf(": %d tags,", kept+2); !strings.Contains(out, want) {
		t.Errorf("the bucket holds %s, want %s", out, want)
	}
}

// run runs a program and returns what it wrote.
func run(ctx context.Context, program string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
