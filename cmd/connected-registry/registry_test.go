package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// mount exchanges a mounted Secret as the kubelet does: a new directory, and a
// symbolic link that is replaced.
func mount(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	version, err := os.MkdirTemp(dir, "..")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(version, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Base(version), filepath.Join(dir, "..data_tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
}

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// replicaFiles are what a replica is told. The client is ci, with password pw.
func replicaFiles(t *testing.T, mode v1alpha1.Mode) map[string]string {
	t.Helper()
	token, err := clienttoken.NewRenderer().Render([]string{"pw"}, []v1alpha1.Scope{{
		Repositories: []string{"**"},
		Actions:      []v1alpha1.Action{v1alpha1.ActionContentRead, v1alpha1.ActionContentWrite, v1alpha1.ActionMetadataRead},
	}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		"resource.yaml": fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: connected-registry}\nspec: {mode: %s}\n", v1alpha1.APIVersion, v1alpha1.Kind, mode),
		"secret":        strings.Repeat("ab", 32),
		"names":         "10.96.0.50\n",
		"ci.json":       string(token),
	}
}

// waitFor waits for a condition.
func waitFor(t *testing.T, what string, log *lines, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s\n%s", what, log)
		}
	}
}

// reply is what was answered; zero: nothing.
type reply struct {
	status   int
	location string
	body     []byte
}

// TestReplica runs one replica from mounted files: it follows them, and ends
// without breaking off what is in flight.
func TestReplica(t *testing.T) {
	settings, log := t.TempDir(), new(lines)
	files := replicaFiles(t, v1alpha1.ModeReadOnly)
	mount(t, settings, files)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{
			"registry", "--replica", settings, "--data", t.TempDir(), "--plain-http", "--listen", "127.0.0.1:0",
			"--health-listen", "127.0.0.1:0", "--drain-delay", "2s", "--drain-timeout", "2m",
		}, io.Discard, log)
	}()
	address := regexp.MustCompile(`msg=serving registry=(\S+) health=(\S+)`)
	waitFor(t, "serving", log, func() bool { return address.MatchString(log.String()) })
	found := address.FindStringSubmatch(log.String())
	registry, health := "http://"+found[1], "http://"+found[2]
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	do := func(method, url string, body io.Reader) (a reply) {
		req, err := http.NewRequestWithContext(t.Context(), method, url, body)
		if err != nil {
			t.Error(err)
			return a
		}
		req.SetBasicAuth("ci", "pw")
		resp, err := client.Do(req)
		if err != nil {
			return a
		}
		defer resp.Body.Close()
		a = reply{status: resp.StatusCode, location: resp.Header.Get("Location")}
		if a.body, err = io.ReadAll(resp.Body); err != nil {
			t.Error(err)
		}
		return a
	}
	status := func(method, url string) int { return do(method, url, nil).status }
	waitFor(t, "ready", log, func() bool { return status(http.MethodGet, health+"/readyz") == http.StatusOK })
	if got := do(http.MethodGet, health+"/metrics", nil); !bytes.Contains(got.body, []byte("connected_registry_")) {
		t.Error("there are no metrics of the registry")
	}

	uploads := registry + "/v2/team/app/blobs/uploads/"
	refused := do(http.MethodPost, uploads, nil)
	var answer struct {
		Errors []struct{ Code string }
	}
	if err := json.Unmarshal(refused.body, &answer); err != nil || refused.status/100 != 4 || answer.Errors[0].Code == "UNAUTHORIZED" {
		t.Fatalf("a push in mode ReadOnly: %d %v, %v", refused.status, answer, err)
	}
	files["resource.yaml"] = "nonsense"
	mount(t, settings, files)
	waitFor(t, "nonsense is told of", log, func() bool { return strings.Contains(log.String(), "the last ones stay in force") })
	if got := status(http.MethodGet, registry+"/v2/"); got != http.StatusOK {
		t.Errorf("with settings that cannot be used: %d", got)
	}
	mount(t, settings, replicaFiles(t, v1alpha1.ModeReadWrite))
	var begun reply
	waitFor(t, "pushes are taken", log, func() bool {
		begun = do(http.MethodPost, uploads, nil)
		return begun.status == http.StatusAccepted
	})

	// A transfer is under way when the end comes.
	location := begun.location
	if strings.HasPrefix(location, "/") {
		location = registry + location
	}
	body, sending := io.Pipe()
	uploaded := make(chan int, 1)
	go func() {
		uploaded <- do(http.MethodPatch, location, body).status
	}()
	fmt.Fprint(sending, "the first half,")
	stop()
	waitFor(t, "not ready any more", log, func() bool { return status(http.MethodGet, health+"/readyz") == http.StatusServiceUnavailable })
	waitFor(t, "no new connections", log, func() bool { return status(http.MethodGet, registry+"/v2/") == 0 })
	select {
	case err := <-ended:
		t.Fatalf("ended in the midst of a transfer: %v\n%s", err, log)
	default:
	}
	fmt.Fprint(sending, " and the second")
	sending.Close()
	if got := <-uploaded; got != http.StatusAccepted {
		t.Errorf("the transfer in flight: %d\n%s", got, log)
	}
	if err := <-ended; err != nil {
		t.Errorf("ended with %v", err)
	}
}

// TestReplicaMistakes says what is missing.
func TestReplicaMistakes(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(map[string]string)
		want   string
	}{
		{"no secret", func(f map[string]string) { delete(f, "secret") }, "what replicas sign with: .*: mount the Secret connected-registry-replica, or name its directory with --replica$"},
		{"a short secret", func(f map[string]string) { f["secret"] = "abcd" }, "does not hold 16 bytes or more in hex: make them with `openssl rand -hex 32`$"},
		{"no resource", func(f map[string]string) { delete(f, "resource.yaml") }, "the resource in force: .*: mount the Secret connected-registry-replica, or name its directory with --replica$"},
		{"a wrong resource", func(f map[string]string) { f["resource.yaml"] = "a: [" }, "resource.yaml:2: is not YAML: "},
		{"no certificate", func(map[string]string) {}, "loading serving certificate .*: put both there, or give the directory that holds tls.crt and tls.key$"},
	} {
		t.Run(test.name, func(t *testing.T) {
			settings := t.TempDir()
			files := replicaFiles(t, v1alpha1.ModeReadOnly)
			test.change(files)
			mount(t, settings, files)
			var log lines
			err := run(t.Context(), []string{
				"registry", "--replica", settings, "--tls", t.TempDir(), "--data", t.TempDir(), "--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0",
			}, io.Discard, &log)
			if err == nil || !regexp.MustCompile(test.want).MatchString(err.Error()) || strings.Contains(log.String(), "level=ERROR") {
				t.Errorf("error %v, expected one with %q, and that alone; the log is %q", err, test.want, &log)
			}
		})
	}
}
