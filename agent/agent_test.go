package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/trust"
)

func TestMain(m *testing.M) {
	// containerd's parser says a lot about files that are broken on purpose.
	if err := log.SetLevel("fatal"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

var update = flag.Bool("update", false, "write the golden files anew")

const certsDir = "/etc/containerd/certs.d"

func newBundle(t testing.TB, name string) trust.Bundle {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	b, _, err := trust.ParseBundle(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newTestAgent(t testing.TB, cfg Config) *Agent {
	t.Helper()
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func writeTree(t testing.TB, root string, files map[string]string) {
	t.Helper()
	for name, data := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// readTree returns the files below root with mode and content, and the
// directories with mode.
func readTree(t testing.TB, root string) map[string]string {
	t.Helper()
	tree := make(map[string]string)
	err := filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += " " + string(data)
		}
		tree[strings.TrimPrefix(p, root)] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// asked are the URLs that containerd asks, in order, for images of a registry.
func asked(t testing.TB, root, registry string) (urls []string) {
	t.Helper()
	hosts, err := config.ConfigureHosts(t.Context(), config.HostOptions{
		HostDir: config.HostDirFromRoot(filepath.Join(root, certsDir)),
	})(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts {
		urls = append(urls, fmt.Sprintf("%s://%s%s", h.Scheme, h.Host, h.Path))
	}
	return urls
}

// fullConfig has every shape of registry.
func fullConfig(t testing.TB, root string) Config {
	return Config{
		NodeRoot: root,
		Registry: "10.0.0.10:5000",
		CA:       newBundle(t, "registry"),
		CacheURL: "http://127.0.0.1:5050",
		Mirrors: []Mirror{
			{Registry: "docker.io"},
			{Registry: "127.0.0.1:5000", Server: "http://127.0.0.1:5000"},
			{Registry: "ghcr.io", TagsUpstream: true},
			{Registry: "quay.io", NoFallback: true},
			{Registry: "[fd00::1]:5000", ServerCA: newBundle(t, "upstream")},
			{Registry: trust.DefaultHost},
		},
	}
}

// TestGoldenTree compares what lands on a node, file by file.
func TestGoldenTree(t *testing.T) {
	configs := map[string]func(cfg *Config){
		"readonly":  func(*Config) {},
		"readwrite": func(cfg *Config) { cfg.Push = true; cfg.Mirrors = cfg.Mirrors[:1] },
		"no-cache":  func(cfg *Config) { cfg.CacheURL = ""; cfg.Mirrors = cfg.Mirrors[:1] },
		"public-ca": func(cfg *Config) { cfg.CA = trust.Bundle{}; cfg.Mirrors = cfg.Mirrors[:1] },
		"ipv6":      func(cfg *Config) { cfg.Registry = "[fd00::10]:5000"; cfg.Mirrors = nil },
	}
	for name, change := range configs {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			cfg := fullConfig(t, root)
			change(&cfg)
			if _, err := newTestAgent(t, cfg).Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			tree := readTree(t, filepath.Join(root, certsDir))
			for _, p := range slices.Sorted(func(yield func(string) bool) {
				for p := range tree {
					if !yield(p) {
						return
					}
				}
			}) {
				text := tree[p]
				// Certificates are new in every run.
				if i := strings.Index(text, "-----BEGIN"); i >= 0 {
					text = text[:i] + fmt.Sprintf("%d certificate(s)\n", strings.Count(text, "-----BEGIN CERTIFICATE"))
				}
				fmt.Fprintf(&got, "== %s %s\n", p, strings.TrimSpace(text))
			}
			golden := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("run with -update to accept: %s", diff)
			}
		})
	}
}

func TestContainerdAsks(t *testing.T) {
	root := t.TempDir()
	if _, err := newTestAgent(t, fullConfig(t, root)).Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	const cache, ours = "http://127.0.0.1:5050/v2", "https://10.0.0.10:5000/v2"
	for registry, want := range map[string][]string{
		"10.0.0.10:5000":    {cache, ours},
		"docker.io":         {cache, ours, "https://registry-1.docker.io/v2"},
		"127.0.0.1:5000":    {cache, ours, "http://127.0.0.1:5000/v2"},
		"ghcr.io":           {cache, ours, "https://ghcr.io/v2"},
		"quay.io":           {cache, ours},
		"[fd00::1]:5000":    {cache, ours, "https://[fd00::1]:5000/v2"},
		"anything.else:123": {cache, ours, "https://anything.else:123/v2"},
	} {
		if diff := cmp.Diff(want, asked(t, root, registry)); diff != "" {
			t.Errorf("%s: %s", registry, diff)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	bundle := newBundle(t, "a")
	tests := map[string]struct {
		cfg  Config
		want string
	}{
		"no registry":         {Config{}, "registry host"},
		"URL as registry":     {Config{Registry: "https://a"}, "without scheme"},
		"bad cache":           {Config{Registry: "a", CacheURL: "127.0.0.1:5050"}, "cache"},
		"bad mirror":          {Config{Registry: "a", Mirrors: []Mirror{{Registry: "../../etc"}}}, "../../etc"},
		"no mirror":           {Config{Registry: "a", Mirrors: []Mirror{{}}}, "registry host"},
		"mirror of oneself":   {Config{Registry: "a", Mirrors: []Mirror{{Registry: "a"}}}, "itself"},
		"mirror twice":        {Config{Registry: "a", Mirrors: []Mirror{{Registry: "b"}, {Registry: "b"}}}, "twice"},
		"bad server":          {Config{Registry: "a", Mirrors: []Mirror{{Registry: "b", Server: "b"}}}, "http"},
		"server, no use":      {Config{Registry: "a", Mirrors: []Mirror{{Registry: "b", Server: "https://b", NoFallback: true}}}, "forbids"},
		"tags from nowhere":   {Config{Registry: "a", Mirrors: []Mirror{{Registry: "b", TagsUpstream: true, NoFallback: true}}}, "forbids"},
		"CA over http":        {Config{Registry: "a", Mirrors: []Mirror{{Registry: "b", Server: "http://b", ServerCA: bundle}}}, "over http"},
		"system trust alone":  {Config{Registry: "a", SystemTrust: true}, "no CA"},
		"bad hosts directory": {Config{Registry: "a", CertsDir: "../x"}, "hosts directory"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := New(tt.cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("err = %v, want one line with %q", err, tt.want)
			}
		})
	}
}

func TestApplyReportsWhatChanged(t *testing.T) {
	root := t.TempDir()
	cfg := fullConfig(t, root)
	cfg.Mirrors = cfg.Mirrors[:1]
	a := newTestAgent(t, cfg)
	changed, err := a.Apply(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		certsDir + "/10.0.0.10:5000/ca.crt", certsDir + "/10.0.0.10:5000/hosts.toml",
		certsDir + "/docker.io/ca.crt", certsDir + "/docker.io/hosts.toml",
	}
	if diff := cmp.Diff(want, changed); diff != "" {
		t.Error(diff)
	}
	if changed, err = a.Apply(t.Context()); err != nil || len(changed) != 0 {
		t.Errorf("a second Apply changed %v, %v", changed, err)
	}
}

func TestNodeRootThatCannotBeWritten(t *testing.T) {
	root := filepath.Join(t.TempDir(), "missing")
	err := newTestAgent(t, Config{NodeRoot: root, Registry: "a"}).Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), root) || !strings.Contains(err.Error(), "--node-root") || strings.Contains(err.Error(), "\n") {
		t.Errorf("err = %v", err)
	}
}

// running starts Run and returns a function that ends it.
func running(t *testing.T, a *Agent) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// within waits until check holds, and returns how long that took. The limit is
// for a machine whose disk is busy with other things.
func within(t *testing.T, what string, check func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !check() {
		if time.Since(start) > 30*time.Second {
			t.Fatalf("%s: not within 30 seconds", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return time.Since(start)
}

func TestRunHealsDrift(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{
		certsDir + "/docker.io/hosts.toml": "[host.\"https://theirs.example\"]\n",
		"etc/other":                        "",
	})
	pristine := readTree(t, root)
	var said lockedBuffer
	cfg := fullConfig(t, root)
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	stop := running(t, newTestAgent(t, cfg))
	certs := filepath.Join(root, certsDir)
	complete := func() bool {
		for _, name := range []string{"10.0.0.10:5000", "docker.io", "quay.io"} {
			if _, err := os.Stat(filepath.Join(certs, name, "hosts.toml")); err != nil {
				return false
			}
		}
		_, err := os.Stat(filepath.Join(root, trust.RecordPath))
		return err == nil
	}
	within(t, "start", func() bool { return strings.Contains(said.String(), "changed files") })
	want := readTree(t, root)
	isWhole := func() bool { return complete() && cmp.Equal(want, readTree(t, root)) }

	fastest := time.Hour
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"file deleted", func() error { return os.Remove(filepath.Join(certs, "quay.io/hosts.toml")) }},
		{"file changed", func() error {
			return os.WriteFile(filepath.Join(certs, "quay.io/hosts.toml"), []byte(trust.Marker+"\nx"), 0o644)
		}},
		{"CA truncated", func() error { return os.Truncate(filepath.Join(certs, "10.0.0.10:5000/ca.crt"), 10) }},
		{"directory deleted", func() error { return vanish(t, filepath.Join(certs, "10.0.0.10:5000")) }},
		{"and another", func() error { return vanish(t, filepath.Join(certs, "ghcr.io")) }},
		{"mode changed", func() error { return os.Chmod(filepath.Join(certs, "quay.io/hosts.toml"), 0o600) }},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		fastest = min(fastest, within(t, step.what, isWhole))
	}
	// A check every ten seconds could heal all of them, but none as soon.
	if fastest > 2*time.Second {
		t.Errorf("drift lasted for %v at least", fastest)
	}

	// A foreign change is respected: theirs is taken in.
	writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": "[host.\"https://newer.example\"]\n"})
	within(t, "operator's change", func() bool {
		got := asked(t, root, "docker.io")
		return len(got) == 4 && got[0] == "http://127.0.0.1:5050/v2" && got[2] == "https://newer.example/v2"
	})
	writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": "[host.\"https://theirs.example\"]\n"})
	within(t, "operator's change of mind", isWhole)

	// All of it, down to what holds it.
	if err := vanish(t, filepath.Join(root, "etc/containerd")); err != nil {
		t.Fatal(err)
	}
	within(t, "everything deleted", func() bool { return complete() && len(asked(t, root, "docker.io")) == 4 })

	stop()
	if err := Cleanup(t.Context(), CleanupConfig{NodeRoot: root}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(pristine, readTree(t, root)); diff != "" {
		t.Errorf("cleanup left: %s", diff)
	}
}

// vanish removes a directory at once, so that nobody can fill it meanwhile.
func vanish(t *testing.T, dir string) error {
	return os.Rename(dir, filepath.Join(t.TempDir(), "gone"))
}

// TestRunWithoutWatch: a node that has no inotify instance left.
func TestRunWithoutWatch(t *testing.T) {
	root := t.TempDir()
	a := newTestAgent(t, fullConfig(t, root))
	k := &keeper{Agent: a, once: onceLog{log: a.log}, fights: make(map[string]*fight)}
	if err := k.apply(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := k.pause(time.Now()); got != blindInterval || got > 2*time.Second {
		t.Errorf("pause without a watch is %v", got)
	}
	k.watch()
	defer k.unwatch()
	if got := k.pause(time.Now()); got != checkInterval {
		t.Errorf("pause with a watch is %v", got)
	}
}

// TestRunOutlivesFaults: the file system refuses for a while, as when a disk is
// full; that is retried, and said once.
func TestRunOutlivesFaults(t *testing.T) {
	root := t.TempDir()
	var said lockedBuffer
	cfg := fullConfig(t, root)
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	a := newTestAgent(t, cfg)
	k := &keeper{Agent: a, once: onceLog{log: a.log}, fights: make(map[string]*fight)}
	if err := k.apply(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	// A file where the record's directory was: nothing can be recorded.
	dir := filepath.Dir(filepath.Join(root, trust.RecordPath))
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	writeTree(t, root, map[string]string{filepath.Dir(trust.RecordPath): ""})
	var pauses []time.Duration
	for range 12 {
		if err := k.apply(t.Context(), time.Now()); err == nil {
			t.Fatal("no error")
		}
		pauses = append(pauses, k.pause(time.Now())/(100*time.Millisecond))
	}
	if diff := cmp.Diff([]time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600}, pauses); diff != "" {
		t.Error(diff)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	if err := k.apply(t.Context(), time.Now()); err != nil || k.failures != 0 {
		t.Errorf("after the fault: %v", err)
	}
}

// TestRunKeepsTheOthers: one registry's directory cannot be used.
func TestRunKeepsTheOthers(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{certsDir + "/docker.io": "a file"})
	var said lockedBuffer
	cfg := fullConfig(t, root)
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	running(t, newTestAgent(t, cfg))
	quay := filepath.Join(root, certsDir, "quay.io/hosts.toml")
	exists := func() bool { _, err := os.Stat(quay); return err == nil }
	within(t, "start", exists)
	for range 3 {
		if err := os.Remove(quay); err != nil {
			t.Fatal(err)
		}
		within(t, "drift", exists)
	}
	within(t, "log", func() bool { return strings.Contains(said.String(), "docker.io is not a directory") })
	if n := strings.Count(said.String(), "docker.io is not a directory"); n != 1 {
		t.Errorf("said %d times:\n%s", n, said.String())
	}
}

// TestRunBacksOffFromAFight: another program rewrites a file whenever we do.
func TestRunBacksOffFromAFight(t *testing.T) {
	root := t.TempDir()
	var said lockedBuffer
	cfg := fullConfig(t, root)
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	running(t, newTestAgent(t, cfg))
	fought := filepath.Join(root, certsDir, "quay.io/hosts.toml")
	within(t, "start", func() bool { _, err := os.Stat(fought); return err == nil })
	limit := time.Now().Add(30 * time.Second)
	for !strings.Contains(said.String(), "another program keeps changing") {
		if err := os.Remove(fought); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		if time.Now().After(limit) {
			t.Fatalf("fought on:\n%s", said.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
	if n := strings.Count(said.String(), "changed files of the node"); n > 2*fightLimit {
		t.Errorf("%d rewrites before a truce", n)
	}
	// The others are kept as ever.
	other := filepath.Join(root, certsDir, "docker.io/hosts.toml")
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	within(t, "another registry", func() bool { _, err := os.Stat(other); return err == nil })
}

func TestFight(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var f fight
	// An edit now and then is none.
	for i := range 100 {
		if truce := f.rewritten(start.Add(time.Duration(i) * fightWindow / 4)); truce != 0 {
			t.Fatalf("truce at edit %d", i)
		}
	}
	now := start.Add(time.Hour * 10)
	var truces []time.Duration
	for range 200 {
		if truce := f.rewritten(now); truce > 0 {
			truces = append(truces, truce/time.Second)
			if !f.resting(now.Add(truce-1)) || f.resting(now.Add(truce)) {
				t.Error("a truce is not as long as it says")
			}
			now = now.Add(truce)
		}
		if len(truces) == 8 {
			break
		}
	}
	if diff := cmp.Diff([]time.Duration{5, 10, 20, 40, 80, 160, 300, 300}, truces); diff != "" {
		t.Error(diff)
	}
	if truce := f.rewritten(now.Add(3 * longTruce)); truce != 0 {
		t.Error("a long peace is not remembered")
	}
}

// TestKilledAtEveryStep kills Apply and Cleanup ahead of each change on disk:
// containerd reads every directory, the next Apply ends where the first would
// have, and Cleanup where all began.
func TestKilledAtEveryStep(t *testing.T) {
	type killed struct{}
	attempt := func(step int, do func(beforeStep func(string)) error) (dead bool) {
		defer func() {
			if r := recover(); r != nil {
				if _, dead = r.(killed); !dead {
					panic(r)
				}
			}
		}()
		err := do(func(string) {
			if step == 0 {
				panic(killed{})
			}
			step--
		})
		if err != nil {
			t.Fatal(err)
		}
		return false
	}
	cfg := fullConfig(t, "")
	cfg.Mirrors = []Mirror{{Registry: "docker.io"}, {Registry: "quay.io", NoFallback: true}}
	applyTo := func(root string) func(func(string)) error {
		return func(before func(string)) error {
			cfg := cfg
			cfg.NodeRoot = root
			a, err := newAgent(cfg, trust.StoreConfig{Grace: -1, BeforeStep: before})
			if err != nil {
				return err
			}
			_, err = a.Apply(t.Context())
			return err
		}
	}
	cleanUp := func(root string) func(func(string)) error {
		return func(before func(string)) error {
			return cleanup(t.Context(), CleanupConfig{NodeRoot: root}, trust.StoreConfig{Grace: -1, BeforeStep: before})
		}
	}
	const never = 1 << 30
	const theirs = "[host.\"https://theirs.example\"]\n"
	for _, whom := range []string{"apply", "cleanup"} {
		for step := 0; ; step++ {
			root := t.TempDir()
			writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": theirs})
			pristine := readTree(t, root)
			var dead bool
			if whom == "apply" {
				dead = attempt(step, applyTo(root))
			} else {
				attempt(never, applyTo(root))
				dead = attempt(step, cleanUp(root))
			}
			for _, registry := range []string{"10.0.0.10:5000", "docker.io", "quay.io", "unknown.example"} {
				if urls := asked(t, root, registry); len(urls) == 0 {
					t.Fatalf("%s killed at step %d: nobody is asked for %s", whom, step, registry)
				}
			}
			if got := asked(t, root, "docker.io"); !slices.Contains(got, "https://theirs.example/v2") {
				t.Fatalf("%s killed at step %d: the operator's host is not asked: %v", whom, step, got)
			}
			attempt(never, applyTo(root))
			if got := asked(t, root, "docker.io"); len(got) != 4 {
				t.Fatalf("%s killed at step %d, then applied: %v", whom, step, got)
			}
			attempt(never, cleanUp(root))
			if diff := cmp.Diff(pristine, readTree(t, root)); diff != "" {
				t.Fatalf("%s killed at step %d, then cleaned up: %s", whom, step, diff)
			}
			if !dead {
				break
			}
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newTestAgent(t, fullConfig(t, t.TempDir())).Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestRunWritesNothingWithoutNeed: what is none of our business makes it look,
// and no more than that.
func TestRunWritesNothingWithoutNeed(t *testing.T) {
	root := t.TempDir()
	var said lockedBuffer
	cfg := fullConfig(t, root)
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	running(t, newTestAgent(t, cfg))
	within(t, "start", func() bool { return strings.Contains(said.String(), "changed files") })
	names := []string{filepath.Join(root, trust.RecordPath), filepath.Join(root, certsDir, "docker.io/hosts.toml")}
	before := []uint64{inode(t, names[0]), inode(t, names[1])}
	writeTree(t, root, map[string]string{certsDir + "/others.example/hosts.toml": "server = \"https://x.example\"\n"})
	healed := filepath.Join(root, certsDir, "quay.io/hosts.toml")
	if err := os.Remove(healed); err != nil {
		t.Fatal(err)
	}
	within(t, "drift", func() bool { _, err := os.Stat(healed); return err == nil })
	if diff := cmp.Diff(before, []uint64{inode(t, names[0]), inode(t, names[1])}); diff != "" {
		t.Errorf("written again: %s", diff)
	}
	if n := strings.Count(said.String(), "docker.io/hosts.toml"); n != 1 {
		t.Errorf("log:\n%s", said.String())
	}
}

func inode(t *testing.T, name string) uint64 {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
