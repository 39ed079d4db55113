package objects

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// program compiles the product, as people run it.
func program(t *testing.T) string {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	out := filepath.Join(t.TempDir(), "connected-registry")
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, "./cmd/connected-registry")
	cmd.Dir = filepath.Join(filepath.Dir(file), "..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the product: %v\n%s", err, output)
	}
	return out
}

// runs runs the product and returns what it said at its end, without the log.
func runs(ctx context.Context, program string, args ...string) (stdout, complaint string, err error) {
	var out, log bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = &out, &log
	err = cmd.Run()
	_, complaint, _ = strings.Cut(log.String(), "connected-registry: ")
	return out.String(), complaint, err
}

// storageFile is what --storage takes.
func storageFile(t *testing.T, format string, args ...any) string {
	t.Helper()
	return filepath.Join(directory(t, map[string]string{"storage.yaml": fmt.Sprintf(format, args...)}), "storage.yaml")
}

// TestCarry carries images into a bucket, from there onto a disk, and back into
// another, and compares what archives of all of them hold.
func TestCarry(t *testing.T) {
	s := startMinIO(t, MinIO{Buckets: []string{"images"}})
	connectedRegistry := program(t)
	keys := directory(t, map[string]string{"accessKeyID": AccessKeyID, "secretAccessKey": SecretAccessKey})
	bucketOf := func(prefix string) string {
		return "--storage=" + storageFile(t, "s3: {bucket: images, endpoint: %q, pathStyle: true, prefix: %s}\ncredentials: %s", s.URL, prefix, keys)
	}
	run := func(args ...string) string {
		t.Helper()
		out, complaint, err := runs(t.Context(), connectedRegistry, args...)
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, complaint)
		}
		return out
	}
	const images = 3
	one, other, disk := bucketOf("one"), bucketOf("other"), "--data="+t.TempDir()
	scratch := func() string { return "--data=" + t.TempDir() }
	run("import", layout(t, images), one, scratch())
	tar := filepath.Join(t.TempDir(), "edge.tar")
	if out := run("export", tar, one, scratch()); !strings.Contains(out, fmt.Sprintf(": %d tags,", images)) {
		t.Errorf("the bucket holds %s", out)
	}
	want := contents(t, tar)
	for _, to := range [][]string{{disk}, {other, scratch()}} {
		run(append([]string{"import", tar}, to...)...)
		tar = filepath.Join(t.TempDir(), "edge.tar")
		run(append([]string{"export", tar}, to...)...)
		if diff := cmp.Diff(want, contents(t, tar)); diff != "" {
			t.Errorf("%v (-before +after):\n%s", to, diff)
		}
	}
	if out := run("import", tar, other, scratch()); !strings.Contains(out, " 0 blobs, ") {
		t.Errorf("importing once more: %s", out)
	}
}

// layout makes an image layout of so many images, one layer of which is larger
// than a part of an upload.
func layout(t *testing.T, images int) string {
	t.Helper()
	dir := t.TempDir()
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	add := func(mediaType string, content []byte) map[string]any {
		sum := sha256.Sum256(content)
		name := hex.EncodeToString(sum[:])
		if err := os.WriteFile(filepath.Join(blobs, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + name, "size": len(content)}
	}
	encode := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	const oci = "application/vnd.oci.image."
	var manifests []any
	for i := range images {
		m := add(oci+"manifest.v1+json", encode(map[string]any{
			"schemaVersion": 2, "mediaType": oci + "manifest.v1+json",
			"config": add(oci+"config.v1+json", encode(map[string]any{"os": "linux", "architecture": "amd64", "number": i})),
			"layers": []any{add(oci+"layer.v1.tar", bytes.Repeat([]byte{byte(i)}, 20+i*9<<20))},
		}))
		m["annotations"] = map[string]string{"org.opencontainers.image.ref.name": fmt.Sprintf("team/app:v%d", i)}
		manifests = append(manifests, m)
	}
	for name, content := range map[string]any{
		"oci-layout": map[string]any{"imageLayoutVersion": "1.0.0"},
		"index.json": map[string]any{"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": manifests},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), encode(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// contents are the files in an archive, each with the sum of its content.
func contents(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []string
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, r); err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%s %x", h.Name, sum.Sum(nil)))
	}
	slices.Sort(all)
	return all
}

// TestCommandMistakes wants one line that names the object store and the remedy,
// and no key anywhere.
func TestCommandMistakes(t *testing.T) {
	s := startMinIO(t, MinIO{Buckets: []string{"images"}})
	connectedRegistry := program(t)
	keys := directory(t, map[string]string{"accessKeyID": AccessKeyID, "secretAccessKey": SecretAccessKey})
	wrong := directory(t, map[string]string{"accessKeyID": AccessKeyID, "secretAccessKey": "hunter2-hunter2"})
	for _, test := range []struct{ name, storage, want string }{
		{"no such bucket", fmt.Sprintf("s3: {bucket: absent, endpoint: %q, pathStyle: true}\ncredentials: %s", s.URL, keys), "create it, or correct s3.bucket"},
		{"another's key", fmt.Sprintf("s3: {bucket: images, endpoint: %q, pathStyle: true}\ncredentials: %s", s.URL, wrong), "the credentials are not accepted"},
		{"TLS where there is none", fmt.Sprintf("s3: {bucket: images, endpoint: %q, pathStyle: true}\ncredentials: %s", strings.Replace(s.URL, "http:", "https:", 1), keys), "correct http:// or https:// of the endpoint"},
	} {
		t.Run(test.name, func(t *testing.T) {
			flag := "--storage=" + storageFile(t, "%s", test.storage)
			_, complaint, err := runs(t.Context(), connectedRegistry, "export", filepath.Join(t.TempDir(), "edge.tar"), flag, "--data="+t.TempDir())
			if err == nil || !strings.Contains(complaint, test.want) || !strings.Contains(complaint, "s3://") || strings.Count(complaint, "\n") != 1 {
				t.Errorf("%v: %q, want a line with %q", err, complaint, test.want)
			}
			if strings.Contains(complaint, "hunter2") || strings.Contains(complaint, SecretAccessKey) {
				t.Error("the key is shown")
			}
		})
	}
}

// TestReplicaWaits starts a replica before its object store, as after a power
// failure: it says what it waits for, and goes on by itself.
func TestReplicaWaits(t *testing.T) {
	connectedRegistry := program(t)
	keys := directory(t, map[string]string{"accessKeyID": AccessKeyID, "secretAccessKey": SecretAccessKey})
	settings := directory(t, map[string]string{
		"resource.yaml": "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: connected-registry}\nspec: {anonymousPull: true}",
		"secret":        strings.Repeat("ab", 32),
		"names":         "127.0.0.1",
	})
	var addresses [3]string
	for i := range addresses {
		var err error
		if addresses[i], err = freeAddress(); err != nil {
			t.Fatal(err)
		}
	}
	store, health := addresses[0], "http://"+addresses[1]
	var log bytes.Buffer
	replica := exec.CommandContext(t.Context(), connectedRegistry, "registry", "--replica="+settings, "--data="+t.TempDir(), "--plain-http",
		"--storage="+storageFile(t, "s3: {bucket: images, endpoint: %q, pathStyle: true}\ncredentials: %s", "http://"+store, keys),
		"--listen="+addresses[2], "--health-listen="+addresses[1], "--drain-delay=0s")
	replica.Stdout, replica.Stderr = &log, &log
	if err := replica.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(replica.Process.Signal(os.Interrupt), replica.Wait()); err != nil {
			t.Errorf("%v\n%s", err, log.String())
		}
	}()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answers := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			body, err := get(client, health+"/readyz")
			if err == nil && strings.Contains(body, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%q, %v, want %q\n%s", body, err, want, log.String())
			}
		}
	}
	answers("nobody listens at http://" + store)
	if body, err := get(client, health+"/healthz"); err != nil || body != "ok\n" {
		t.Errorf("a replica that waits is not healthy: %q, %v", body, err)
	}
	startMinIO(t, MinIO{Address: store, Buckets: []string{"images"}})
	answers("ok")
	if _, err := get(client, "http://"+addresses[2]+"/v2/"); err != nil {
		t.Error(err)
	}
}

func get(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}
