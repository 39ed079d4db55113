package trust

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// systemNode is a root with a system trust store of the Debian family, in which
// there is one certificate already, and a program that rebuilds it: this
// machine's own if it has one, and else one that does as much as is needed.
type systemNode struct {
	root string
	runs [][]string
	fail error
}

const (
	debianBundle = "/etc/ssl/certs/ca-certificates.crt"
	debianLocal  = "/usr/local/share/ca-certificates"
)

func newSystemNode(t *testing.T) *systemNode {
	t.Helper()
	n := &systemNode{root: t.TempDir()}
	writeTree(t, n.root, map[string]string{
		"usr/sbin/update-ca-certificates":          "#!/bin/sh\n",
		"usr/share/ca-certificates/distro/one.crt": string(newCA(t, "distribution").pem()),
		"etc/ca-certificates.conf":                 "distro/one.crt\n",
		debianLocal + "/operator.crt":              string(newCA(t, "operator").pem()),
		"etc/ca-certificates/update.d/.keep":       "",
		"etc/ssl/certs/.keep":                      "",
	})
	if out, err := n.rebuild(t.Context(), n.root, []string{"/usr/sbin/update-ca-certificates"}); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.runs = nil
	return n
}

func (n *systemNode) rebuild(ctx context.Context, root string, argv []string) (string, error) {
	n.runs = append(n.runs, argv)
	if n.fail != nil {
		return "some output\nits last line\n", n.fail
	}
	if _, err := os.Stat(argv[0]); err != nil || argv[0] != "/usr/sbin/update-ca-certificates" {
		return concatenate(root)
	}
	args := append(slices.Clone(argv[1:]),
		"--certsconf", filepath.Join(root, "etc/ca-certificates.conf"),
		"--certsdir", filepath.Join(root, "usr/share/ca-certificates"),
		"--localcertsdir", filepath.Join(root, debianLocal),
		"--etccertsdir", filepath.Join(root, "etc/ssl/certs"),
		"--hooksdir", filepath.Join(root, "etc/ca-certificates/update.d"))
	out, err := exec.CommandContext(ctx, argv[0], args...).CombinedOutput()
	return string(out), err
}

// concatenate is all that a bundle is.
func concatenate(root string) (string, error) {
	var bundle []byte
	for _, pattern := range []string{"usr/share/ca-certificates/distro/*.crt", debianLocal + "/*.crt", "etc/pki/ca-trust/source/anchors/*"} {
		names, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return "", err
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				return "", err
			}
			bundle = append(bundle, data...)
		}
	}
	for _, name := range []string{debianBundle, "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"} {
		if err := os.WriteFile(filepath.Join(root, name), bundle, 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
	}
	return "", nil
}

func (n *systemNode) store(t *testing.T) *Store {
	s := newStore(t, n.root)
	s.rebuild = n.rebuild
	return s
}

func (n *systemNode) apply(t *testing.T, cas Bundle) Result {
	t.Helper()
	result, err := n.store(t).Apply(t.Context(), State{SystemTrust: true, SystemCAs: cas})
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// trusted are the names in the bundle.
func (n *systemNode) trusted(t *testing.T, bundle string) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.root, bundle))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, []byte("PRIVATE")) {
		t.Error("a key is in the bundle")
	}
	var names []string
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		b, _, err := ParseBundle(pem.EncodeToMemory(block), testNow)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, b.certs[0].Subject.CommonName)
	}
	slices.Sort(names)
	return names
}

func TestSystemTrust(t *testing.T) {
	n := newSystemNode(t)
	pristine := readTree(t, n.root)
	a, b := newCA(t, "a"), newCA(t, "b")
	steps := []struct {
		cas  Bundle
		want []string
		runs [][]string
	}{
		{a.bundle(), []string{"a", "distribution", "operator"}, [][]string{{"/usr/sbin/update-ca-certificates"}}},
		{a.bundle(), []string{"a", "distribution", "operator"}, nil},
		{a.bundle().Union(b.bundle()), []string{"a", "b", "distribution", "operator"}, [][]string{{"/usr/sbin/update-ca-certificates"}}},
		{b.bundle(), []string{"b", "distribution", "operator"}, [][]string{{"/usr/sbin/update-ca-certificates", "--fresh"}}},
	}
	for i, s := range steps {
		n.runs = nil
		n.apply(t, s.cas)
		if diff := cmp.Diff(s.want, n.trusted(t, debianBundle)); diff != "" {
			t.Errorf("step %d: %s", i, diff)
		}
		if diff := cmp.Diff(s.runs, n.runs); diff != "" {
			t.Errorf("step %d: %s", i, diff)
		}
		files, _ := filepath.Glob(filepath.Join(n.root, debianLocal, foreignPrefix+"*.crt"))
		if len(files) != s.cas.Len() {
			t.Errorf("step %d: files %v", i, files)
		}
	}
	// Somebody else's run went wrong: ours is missing from the bundle.
	n.runs = nil
	writeTree(t, n.root, map[string]string{debianBundle: ""})
	n.apply(t, b.bundle())
	if len(n.runs) != 1 {
		t.Errorf("runs = %v", n.runs)
	}
	if _, err := n.store(t).Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(pristine, readTree(t, n.root)); diff != "" {
		t.Error(diff)
	}
}

func TestSystemTrustTurnedOff(t *testing.T) {
	n := newSystemNode(t)
	n.apply(t, newCA(t, "a").bundle())
	if _, err := n.store(t).Apply(t.Context(), State{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"distribution", "operator"}, n.trusted(t, debianBundle)); diff != "" {
		t.Error(diff)
	}
}

func TestSystemTrustFails(t *testing.T) {
	n := newSystemNode(t)
	ca := newCA(t, "a")
	n.fail = errors.New("exit status 1")
	state := testState(ca, "docker.io")
	state.SystemTrust, state.SystemCAs = true, ca.bundle()
	_, err := n.store(t).Apply(t.Context(), state)
	mustContain(t, err, SystemTrustOwner, "update-ca-certificates", "exit status 1", "its last line")
	if faults := OwnerErrors(err); len(faults) != 1 || faults[0].Owner != SystemTrustOwner {
		t.Errorf("faults = %v", faults)
	}
	if got := containerdReads(t, filepath.Join(n.root, certsDir), "docker.io"); len(got) != 3 {
		t.Errorf("pulls suffer: %v", got)
	}
	held := state
	held.HoldSystemTrust = true
	n.runs = nil
	if _, err := n.store(t).Apply(t.Context(), held); err != nil || n.runs != nil {
		t.Errorf("on hold: %v, runs %v", err, n.runs)
	}
	n.fail = nil
	if _, err := n.store(t).Apply(t.Context(), state); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(n.trusted(t, debianBundle), "a") {
		t.Error("the run that failed was not made up for")
	}
}

func TestSystemTrustNotRun(t *testing.T) {
	n := newSystemNode(t)
	n.fail = errNotRun
	result := n.apply(t, newCA(t, "a").bundle())
	if len(result.Notes) != 1 || !strings.Contains(result.Notes[0], "was not run") {
		t.Errorf("notes = %q", result.Notes)
	}
	n.fail = nil
	n.apply(t, newCA(t, "a").bundle())
	if len(n.runs) != 2 {
		t.Errorf("runs = %v", n.runs)
	}
}

// TestSystemTrustUnchecked: a program that ends well but does nothing.
func TestSystemTrustUnchecked(t *testing.T) {
	n := newSystemNode(t)
	s := newStore(t, n.root)
	s.rebuild = func(context.Context, string, []string) (string, error) { return "0 added", nil }
	_, err := s.Apply(t.Context(), State{SystemTrust: true, SystemCAs: newCA(t, "a").bundle()})
	mustContain(t, err, debianBundle, "lacks", "0 added")
}

func TestSystemTrustUnknown(t *testing.T) {
	root := t.TempDir()
	result, err := newStore(t, root).Apply(t.Context(), State{SystemTrust: true, SystemCAs: newCA(t, "a").bundle()})
	if err != nil || len(result.Notes) != 1 || !strings.Contains(result.Notes[0], "no known system trust store") {
		t.Errorf("%v, notes = %q", err, result.Notes)
	}
}

func TestSystemTrustRedHat(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{"usr/bin/update-ca-trust": "#!/bin/sh\n", "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem": ""})
	n := &systemNode{root: root}
	n.apply(t, newCA(t, "a").bundle())
	if diff := cmp.Diff([][]string{{"/usr/bin/update-ca-trust", "extract"}}, n.runs); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"a"}, n.trusted(t, "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem")); diff != "" {
		t.Error(diff)
	}
	if _, err := n.store(t).Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "etc/pki/ca-trust/source")); err == nil {
		t.Error("a directory of ours is left")
	}
}

// TestSystemTrustCrash is killed ahead of each step, and loses no run that is
// due.
func TestSystemTrustCrash(t *testing.T) {
	template := newSystemNode(t)
	pristine := readTree(t, template.root)
	a, b := newCA(t, "a"), newCA(t, "b")
	run := func(n *systemNode, cas *Bundle, step int) (dead bool) {
		defer func() {
			if r := recover(); r != nil {
				if _, dead = r.(killed); !dead {
					panic(r)
				}
			}
		}()
		s := n.store(t)
		s.rebuild = func(_ context.Context, root string, argv []string) (string, error) {
			if step == 0 {
				panic(killed{})
			}
			step--
			n.runs = append(n.runs, argv)
			return concatenate(root)
		}
		s.before = func(string) {
			if step == 0 {
				panic(killed{})
			}
			step--
		}
		var err error
		if cas != nil {
			_, err = s.Apply(t.Context(), State{SystemTrust: true, SystemCAs: *cas})
		} else {
			_, err = s.Cleanup(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		return false
	}
	first, second := a.bundle(), b.bundle()
	for _, to := range []*Bundle{&second, nil} {
		for step := 0; ; step++ {
			n := &systemNode{root: t.TempDir()}
			if err := os.CopyFS(n.root, os.DirFS(template.root)); err != nil {
				t.Fatal(err)
			}
			run(n, &first, never)
			dead := run(n, to, step)
			run(n, &second, never)
			if diff := cmp.Diff([]string{"b", "distribution", "operator"}, n.trusted(t, debianBundle)); diff != "" {
				t.Fatalf("killed at step %d: %s", step, diff)
			}
			run(n, nil, step)
			run(n, nil, never)
			if got := n.trusted(t, debianBundle); !cmp.Equal(got, []string{"distribution", "operator"}) {
				t.Fatalf("killed at step %d of the cleanup: %v", step, got)
			}
			if got := readTree(t, n.root); len(got) != len(pristine) {
				t.Fatalf("killed at step %d: %d paths are left, not %d", step, len(got), len(pristine))
			}
			if !dead {
				break
			}
		}
	}
}

// TestInterruptedRebuild finds what a rebuild that was killed has left, to which
// Debian's program would append a whole bundle.
func TestInterruptedRebuild(t *testing.T) {
	partial := debianBundle + ".new"
	appending := func(n *systemNode) rebuilder {
		return func(ctx context.Context, root string, argv []string) (string, error) {
			out, err := n.rebuild(ctx, root, argv)
			if err != nil {
				return out, err
			}
			whole, err := os.ReadFile(filepath.Join(root, debianBundle))
			if err != nil {
				return "", err
			}
			left, err := os.ReadFile(filepath.Join(root, partial))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return "", err
			}
			_ = os.Remove(filepath.Join(root, partial))
			return out, os.WriteFile(filepath.Join(root, debianBundle), append(left, whole...), 0o644)
		}
	}
	for name, test := range map[string]struct {
		killed bool          // it was ours
		age    time.Duration // of what was left
		again  bool          // the leftover is appended to
	}{
		"ours":                     {killed: true},
		"somebody's, long ago":     {age: 2 * rebuildTime},
		"somebody's, at this time": {again: true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newSystemNode(t)
			state := State{SystemTrust: true, SystemCAs: newCA(t, "ours").bundle()}
			if test.killed {
				n.fail = errors.New("killed")
				if _, err := n.store(t).Apply(t.Context(), state); err == nil {
					t.Fatal("no error")
				}
				n.fail = nil
			}
			left := filepath.Join(n.root, partial)
			if err := os.WriteFile(left, newCA(t, "half").pem(), 0o644); err != nil {
				t.Fatal(err)
			}
			then := time.Now().Add(-test.age)
			if err := os.Chtimes(left, then, then); err != nil {
				t.Fatal(err)
			}
			s := n.store(t)
			s.rebuild = appending(n)
			if _, err := s.Apply(t.Context(), state); err != nil {
				t.Fatal(err)
			}
			if got := slices.Contains(n.trusted(t, debianBundle), "half"); got != test.again {
				t.Errorf("the bundle holds what was left: %t", got)
			}
		})
	}
}

// TestRebuildFinishes ends the context while the node's program runs, which is
// let finish.
func TestRebuildFinishes(t *testing.T) {
	n := newSystemNode(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := n.store(t)
	s.rebuild = func(inner context.Context, root string, argv []string) (string, error) {
		cancel()
		if inner.Err() != nil {
			return "", inner.Err()
		}
		return n.rebuild(inner, root, argv)
	}
	if _, err := s.Apply(ctx, State{SystemTrust: true, SystemCAs: newCA(t, "ours").bundle()}); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(n.trusted(t, debianBundle), "ours") {
		t.Error("the bundle lacks our certificate")
	}
}

func TestRebuildOnNode(t *testing.T) {
	out, err := rebuildOnNode(t.Context(), "/", []string{"/bin/sh", "-c", "echo said; exit 3"})
	if err == nil || !strings.Contains(out, "said") {
		t.Errorf("%q, %v", out, err)
	}
	cause := errors.New("it took too long")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 200*time.Millisecond, cause)
	defer cancel()
	start := time.Now()
	// The child holds the pipe open: only killing the group ends this.
	_, err = rebuildOnNode(ctx, "/", []string{"/bin/sh", "-c", "sleep 60 & sleep 60"})
	if !errors.Is(err, cause) || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	// Nobody but root gets as far as to miss the program.
	_, err = rebuildOnNode(t.Context(), t.TempDir(), []string{"/nothing/here"})
	if err == nil || (os.Geteuid() != 0) != errors.Is(err, errNotRun) {
		t.Errorf("in another root: %v", err)
	}
}

func TestLastLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                 "it said nothing",
		"a\nb\n\n":         "b",
		"a\x1b[31m\r\nred": "red",
		"\x00":             "?",
	} {
		if got := lastLine(in); got != want {
			t.Errorf("lastLine(%q) = %q", in, got)
		}
	}
	if got := lastLine(strings.Repeat("x", 1000)); len(got) > 310 {
		t.Errorf("%d bytes", len(got))
	}
}
