package standalone

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	parentregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

const readWriteToken = `  clientTokens:
    - name: child
      secretRef: {name: client}
      scopeMap: [{repositories: ["**"], actions: [content/read, content/write, content/delete, metadata/read, metadata/write]}]
`

// level is one of several registries, each the parent of the next.
type level struct {
	*Standalone
	data string
	stop func()
}

// startLevel starts a registry under a parent. With ca, the parent wants the
// child's credentials.
func startLevel(t *testing.T, name, parent, ca, more string) *level {
	t.Helper()
	l := &level{data: t.TempDir()}
	secrets := filepath.Join(l.data, "secrets")
	writeSecret(t, secrets, "client", "password1", "hunter2")
	writeSecret(t, secrets, "hook", "authorization", "Bearer abc\n")
	credentials := "insecure: true"
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			t.Fatal(err)
		}
		writeSecret(t, secrets, "parent-ca", "ca.crt", string(pem))
		writeSecret(t, secrets, "parent", "username", "child")
		writeSecret(t, secrets, "parent", "password", "hunter2")
		credentials = "credentialsSecretRef: {name: parent}, caSecretRef: {name: parent-ca}"
	}
	resource := load(t, fmt.Sprintf("  parent: {endpoint: %q, %s}\n  repositories: [{name: \"**\"}]\n", parent, credentials)+readWriteToken+more)
	resource.Name = name
	var err error
	l.Standalone, err = Open(t.Context(), Config{Resource: resource, Data: l.data, Listen: "127.0.0.1:0", Version: "v-test", Logger: slog.New(slog.NewTextHandler(t.Output(), nil)).With("level", name)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	// Not the syncer's schedule: the test says when.
	syncer := l.Syncer
	l.Syncer = nil
	go func() { done <- l.Run(ctx) }()
	l.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		l.Close()
	})
	t.Cleanup(l.stop)
	return &level{Standalone: &Standalone{Syncer: syncer, LoginServer: l.LoginServer, store: l.store, duties: l.duties}, data: l.data, stop: l.stop}
}

func (l *level) ca() string { return filepath.Join(l.data, "ca", "ca.crt") }

func (l *level) sync(t *testing.T) {
	t.Helper()
	if _, err := l.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual); err != nil {
		t.Fatal(err)
	}
}

// TestLevels stacks connected registries three deep: content comes down, and each
// knows its child.
func TestLevels(t *testing.T) {
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "http://")
	push(t, host+"/team/app:v1")
	levels := []*level{startLevel(t, "region", host, "", "")}
	for _, name := range []string{"site", "line"} {
		above := levels[len(levels)-1]
		levels = append(levels, startLevel(t, name, above.LoginServer, above.ca(), ""))
	}
	for _, l := range levels {
		l.sync(t)
	}
	want := tagsIn(t, levels[0].data)
	if len(want) != 1 {
		t.Fatalf("at the top: %v", want)
	}
	for i, l := range levels {
		if diff := cmp.Diff(want, tagsIn(t, l.data)); diff != "" {
			t.Errorf("level %d, -want +got:\n%s", i, diff)
		}
		var status v1alpha1.Status
		l.duties.Status(t.Context(), &status)
		var children []string
		for _, c := range status.Children {
			children = append(children, fmt.Sprintf("%s %s %s %s %s", c.Name, c.ClientToken, c.Mode, c.LoginServer, c.Version))
			if age := time.Since(c.LastActivityTime.Time); age < -time.Second || age > 10*time.Minute {
				t.Errorf("level %d: heard of %s %s ago", i, c.Name, age)
			}
		}
		var below []string
		if i+1 < len(levels) {
			child := levels[i+1]
			below = []string{[]string{"region", "site", "line"}[i+1] + " child ReadOnly " + child.LoginServer + " v-test"}
		}
		if diff := cmp.Diff(below, children); diff != "" {
			t.Errorf("children of level %d, -want +got:\n%s", i, diff)
		}
	}
}

// TestPushedUp pushes an image at the lowest of two levels: it arrives at the
// other, and a receiver of notifications hears of it.
func TestPushedUp(t *testing.T) {
	events := make(chan string, 10)
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var e struct{ Type, Subject string }
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil || r.Header.Get("Authorization") != "Bearer abc" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		events <- e.Type + " " + e.Subject
	}))
	defer hook.Close()
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	defer parent.Close()
	upper := startLevel(t, "region", strings.TrimPrefix(parent.URL, "http://"), "", "  mode: ReadWrite\n")
	lower := startLevel(t, "site", upper.LoginServer, upper.ca(), fmt.Sprintf(
		"  mode: ReadWrite\n  notifications: [{events: [\"team/*:push\"], url: %q, secretRef: {name: hook}}]\n", hook.URL))

	img, err := random.Image(200_000, 2)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(lower.LoginServer + "/team/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	transport := trusting(t, lower.ca())
	defer transport.CloseIdleConnections()
	if err := remote.Write(ref, img, remote.WithTransport(transport), remote.WithAuth(&authn.Basic{Username: "child", Password: "hunter2"})); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-events:
		if want := "io.connectedregistry.push team/app:v1@" + digest.String(); got != want {
			t.Errorf("event %q, want %q", got, want)
		}
	case <-time.After(time.Minute):
		t.Error("no event")
	}
	// On to the level above, and from there to the parent of all.
	pulled, err := name.ParseReference(strings.TrimPrefix(parent.URL, "http://")+"/team/app:v1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		desc, err := remote.Head(pulled)
		if err == nil && desc.Digest == digest {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("what was pushed has not arrived at the top: %v", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	remote.DefaultTransport.(*http.Transport).CloseIdleConnections()
	var status v1alpha1.Status
	lower.duties.Status(t.Context(), &status)
	if status.Changes == nil || status.Changes.Conflicts != 0 || status.Changes.Dropped != 0 || status.Notifications == nil || status.Notifications.DeadLetters != 0 {
		t.Errorf("changes %+v, notifications %+v", status.Changes, status.Notifications)
	}
}

func trusting(t *testing.T, ca string) *http.Transport {
	t.Helper()
	pem, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	bundle, _, err := trust.ParseBundle(pem, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: bundle.Pool(), MinVersion: tls.VersionTLS12}
	return transport
}
