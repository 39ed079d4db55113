package trust

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const certsDir = "/etc/containerd/certs.d"

func newStore(t testing.TB, root string) *Store {
	t.Helper()
	s, err := NewStore(StoreConfig{NodeRoot: root, Grace: -1})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func apply(t testing.TB, root string, want State) Result {
	t.Helper()
	result, err := newStore(t, root).Apply(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func cleanUp(t testing.TB, root string) Result {
	t.Helper()
	result, err := newStore(t, root).Cleanup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// testState asks for the registry itself and for mirrors of others.
func testState(ca testCert, mirrors ...string) State {
	cache := Hop{URL: "http://127.0.0.1:5050", Capabilities: []string{Pull, Resolve}, DialTimeout: time.Second}
	registry := Hop{URL: "https://10.0.0.10:5000", CA: "ca.crt", Capabilities: []string{Pull, Resolve}, DialTimeout: time.Second}
	cas := map[string]Bundle{"ca.crt": ca.bundle()}
	state := State{Registries: []Registry{{
		Hosts: Hosts{Registry: "10.0.0.10:5000", Hops: []Hop{cache}, Server: registry, Role: ServerOwn},
		CAs:   cas,
	}}}
	for _, m := range mirrors {
		state.Registries = append(state.Registries, Registry{
			Hosts: Hosts{Registry: m, Hops: []Hop{cache, registry}},
			CAs:   cas,
		})
	}
	return state
}

// node is a root directory as an operator may have left it.
func node(t testing.TB) (root string) {
	t.Helper()
	root = t.TempDir()
	writeTree(t, root, map[string]string{
		"etc/containerd/config.toml":                 "version = 3\n",
		certsDir + "/docker.io/hosts.toml":           operatorFile,
		certsDir + "/_default/hosts.toml":            "server = \"https://everything.example\"\n[host.\"https://default.example\"]\n  ca = \"corp.crt\"\n[host.\"https://second.example\"]\n  ca = [\"/etc/ssl/absolute.pem\"]\n",
		certsDir + "/_default/corp.crt":              "# corp\n" + string(newCA(t, "corp").pem()),
		certsDir + "/quay.io_443_/hosts.toml":        "# underscores\n[host.\"https://quay-one.example\"]\n",
		certsDir + "/quay.io:443/hosts.toml":         "# colon\n[host.\"https://quay-two.example\"]\n",
		certsDir + "/gcr.io/x.crt":                   string(newCA(t, "gcr").pem()),
		certsDir + "/linked.example/hosts.toml.real": "[host.\"https://linked-to.example\"]\n",
		certsDir + "/broken.example/hosts.toml":      "server = [\n",
		certsDir + "/untouched.example/hosts.toml":   "server = \"https://untouched.example\"\n",
		"etc/ssl/absolute.pem":                       string(newCA(t, "absolute").pem()),
		"var/lib/other/file":                         "",
	})
	certs := filepath.Join(root, certsDir)
	for _, err := range []error{
		os.Chmod(filepath.Join(certs, "docker.io/hosts.toml"), 0o600),
		os.Symlink("hosts.toml.real", filepath.Join(certs, "linked.example/hosts.toml")),
		os.Mkdir(filepath.Join(certs, "empty.example"), 0o750),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// nodeMirrors are all that node has something of, and one that it has not.
var nodeMirrors = []string{"docker.io", "quay.io:443", "gcr.io", "linked.example", "broken.example", "empty.example", "ghcr.io"}

// views is what containerd makes of every registry of a node.
func views(t testing.TB, root string) map[string][]hop {
	t.Helper()
	out := make(map[string][]hop)
	for _, registry := range append(slices.Clone(nodeMirrors), "10.0.0.10:5000", "untouched.example", "unknown.example") {
		// An absolute path in a file means the node's, not this machine's.
		if registry == "unknown.example" || registry == "ghcr.io" || registry == "10.0.0.10:5000" {
			if _, err := os.Stat(filepath.Join(root, certsDir, registry)); err != nil {
				out[registry] = []hop{{URL: "as _default"}}
				continue
			}
		}
		out[registry] = containerdReads(t, filepath.Join(root, certsDir), registry)
	}
	return out
}

func TestApply(t *testing.T) {
	root := node(t)
	before := readTree(t, root)
	want := testState(newCA(t, "our ca"), nodeMirrors...)
	result := apply(t, root, want)
	if len(result.Changed) == 0 || result.CertsDir != certsDir {
		t.Errorf("result = %+v", result)
	}

	const pull = "pull resolve"
	cache := hop{URL: "http://127.0.0.1:5050/v2", Can: pull}
	ours := hop{URL: "https://10.0.0.10:5000/v2", Can: pull, CAs: []string{"our ca"}}
	other := func(host string, cas ...string) hop {
		return hop{URL: "https://" + host + "/v2", Can: everything, CAs: cas}
	}
	carried := []hop{other("default.example", "corp"), other("second.example", "absolute")}
	wantViews := map[string][]hop{
		"docker.io":         {cache, ours, {URL: "https://near.example:5000/v2", Can: pull}, {URL: "http://far.example/v2", Can: "pull"}, other("registry-1.docker.io")},
		"quay.io:443":       {cache, ours, other("quay-one.example"), other("quay.io:443")},
		"gcr.io":            {cache, ours, other("gcr.io", "gcr")},
		"linked.example":    {cache, ours, other("linked-to.example"), other("linked.example")},
		"broken.example":    {cache, ours, other("broken.example")},
		"empty.example":     {cache, ours, other("empty.example")},
		"ghcr.io":           slices.Concat([]hop{cache, ours}, carried, []hop{other("everything.example")}),
		"10.0.0.10:5000":    slices.Concat([]hop{cache, ours}, carried, []hop{other("everything.example")}),
		"untouched.example": {other("untouched.example")},
		"unknown.example":   {{URL: "as _default"}},
	}
	if diff := cmp.Diff(wantViews, views(t, root)); diff != "" {
		t.Error(diff)
	}
	if got := mode(t, filepath.Join(root, certsDir, "docker.io/hosts.toml")); got != 0o600 {
		t.Errorf("a file that only root could read is %v", got)
	}
	if got := mode(t, filepath.Join(root, RecordPath)); got != 0o600 {
		t.Errorf("the record, which may hold credentials, is %v", got)
	}

	applied := readTree(t, root)
	if again := apply(t, root, want); len(again.Changed) != 0 {
		t.Errorf("a second Apply changed %v", again.Changed)
	}
	if diff := cmp.Diff(applied, readTree(t, root)); diff != "" {
		t.Error(diff)
	}
	cleanUp(t, root)
	if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
		t.Errorf("cleanup left: %s", diff)
	}
	if again := cleanUp(t, root); len(again.Changed)+len(again.Notes) != 0 {
		t.Errorf("a second cleanup did %+v", again)
	}
}

func TestApplyToAnEmptyRoot(t *testing.T) {
	root := t.TempDir()
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	apply(t, root, testState(newCA(t, "our ca"), "docker.io", DefaultHost))
	if got := mode(t, filepath.Join(root, certsDir, "docker.io")); got != os.ModeDir|0o755 {
		t.Errorf("mode of a new directory is %v", got)
	}
	if got := containerdReads(t, filepath.Join(root, certsDir), "anything.example"); len(got) != 3 {
		t.Errorf("_default: %v", got)
	}
	// _default is ours: what is in it is not carried over twice.
	if got := containerdReads(t, filepath.Join(root, certsDir), "docker.io"); len(got) != 3 {
		t.Errorf("docker.io: %v", got)
	}
	cleanUp(t, root)
	if got := readTree(t, root); len(got) != 0 {
		t.Errorf("cleanup left %v", got)
	}
}

// changes are transitions during which a process is killed.
func changes(t testing.TB) map[string]struct{ from, to *State } {
	a, b := newCA(t, "our ca"), newCA(t, "next ca")
	full := testState(a, nodeMirrors...)
	fewer := testState(a, "docker.io")
	both := testState(a, nodeMirrors...)
	for i := range both.Registries {
		both.Registries[i].CAs = map[string]Bundle{"ca.crt": a.bundle().Union(b.bundle())}
	}
	return map[string]struct{ from, to *State }{
		"install":       {nil, &full},
		"cleanup":       {&full, nil},
		"fewer mirrors": {&full, &fewer},
		"more mirrors":  {&fewer, &full},
		"rotation":      {&full, &both},
	}
}

// killed says in a panic that the process would be dead.
type killed struct{}

// doState goes to a state, or cleans up for nil, and is killed ahead of a step:
// at once, with nothing tidied up. It reports whether it came to that.
func doState(t testing.TB, root string, want *State, step int) (wasKilled bool) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			if _, wasKilled = r.(killed); !wasKilled {
				panic(r)
			}
		}
	}()
	s, err := NewStore(StoreConfig{NodeRoot: root, Grace: -1, BeforeStep: func(string) {
		if step == 0 {
			panic(killed{})
		}
		step--
	}})
	if err != nil {
		t.Fatal(err)
	}
	if want != nil {
		_, err = s.Apply(t.Context(), *want)
	} else {
		_, err = s.Cleanup(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return false
}

const never = 1 << 30

// TestCrash kills the process ahead of every single change on disk, in every
// transition. Whatever the moment: containerd sees each registry either as
// before or as after, applying again leads to where no crash would have led,
// and cleaning up to what was there at the very beginning.
func TestCrash(t *testing.T) {
	template := node(t)
	pristine := readTree(t, template)
	copyNode := func() string {
		root := t.TempDir()
		if err := os.CopyFS(root, os.DirFS(template)); err != nil {
			t.Fatal(err)
		}
		for name, mode := range map[string]os.FileMode{"/docker.io/hosts.toml": 0o600, "/empty.example": 0o750} {
			if err := os.Chmod(filepath.Join(root, certsDir, name), mode); err != nil {
				t.Fatal(err)
			}
		}
		return root
	}
	for name, change := range changes(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := func() string {
				root := copyNode()
				if change.from != nil {
					doState(t, root, change.from, never)
				}
				return root
			}
			whole := start()
			before := views(t, whole)
			doState(t, whole, change.to, never)
			after, wanted := views(t, whole), readTree(t, whole)

			step := 0
			for ; ; step++ {
				root := start()
				if !doState(t, root, change.to, step) {
					break
				}
				for registry, got := range views(t, root) {
					if !cmp.Equal(got, before[registry]) && !cmp.Equal(got, after[registry]) {
						t.Fatalf("killed at step %d: containerd sees %s as %v, neither as before (%v) nor as after (%v)", step, registry, got, before[registry], after[registry])
					}
				}
				if step%2 == 0 || change.to == nil {
					doState(t, root, change.to, never)
					if diff := cmp.Diff(wanted, readTree(t, root)); diff != "" {
						t.Fatalf("killed at step %d, then done again: %s", step, diff)
					}
				}
				doState(t, root, nil, never)
				if diff := cmp.Diff(pristine, readTree(t, root)); diff != "" {
					t.Fatalf("killed at step %d, then cleaned up: %s", step, diff)
				}
			}
			if step < 10 {
				t.Errorf("there were %d steps only", step)
			}
		})
	}
}

// TestCrashTwice is killed again while it recovers.
func TestCrashTwice(t *testing.T) {
	want := testState(newCA(t, "our ca"), "docker.io")
	for first := 0; first < 40; first += 3 {
		for second := 0; second < 40; second += 5 {
			root := t.TempDir()
			writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": operatorFile})
			pristine := readTree(t, root)
			doState(t, root, &want, first)
			doState(t, root, &want, second)
			doState(t, root, nil, second)
			doState(t, root, nil, never)
			if diff := cmp.Diff(pristine, readTree(t, root)); diff != "" {
				t.Fatalf("killed at steps %d and %d: %s", first, second, diff)
			}
		}
	}
}

// TestKillMinusNine does with real processes what TestCrash does with panics:
// no more than the kernel closes their files and gives back their locks.
func TestKillMinusNine(t *testing.T) {
	dir := t.TempDir()
	ca := newCA(t, "our ca")
	writeTree(t, dir, map[string]string{"ca.pem": string(ca.pem())})
	root := filepath.Join(dir, "root")
	for step := 0; ; step += 3 {
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
		writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": operatorFile})
		pristine := readTree(t, root)
		dead := crash(t, "apply", dir, step)
		if step%2 == 0 {
			apply(t, root, testState(ca, "docker.io"))
			if got := containerdReads(t, filepath.Join(root, certsDir), "docker.io"); len(got) != 5 {
				t.Fatalf("killed at step %d, then applied: %v", step, got)
			}
		}
		cleanUp(t, root)
		if diff := cmp.Diff(pristine, readTree(t, root)); diff != "" {
			t.Fatalf("killed at step %d, then cleaned up: %s", step, diff)
		}
		if !dead {
			return
		}
	}
}

// TestContainerdNeverFails reads as containerd does while a node is configured,
// changed and cleaned up, over and over: no pull may fail, at no moment.
func TestContainerdNeverFails(t *testing.T) {
	root := t.TempDir()
	certs := filepath.Join(root, certsDir)
	writeTree(t, certs, map[string]string{
		"gcr.io/x.crt":         string(newCA(t, "gcr").pem()),
		"quay.io/hosts.toml":   operatorFile,
		"others.io/hosts.toml": "",
	})
	a, b := newCA(t, "a"), newCA(t, "b")
	states := []*State{new(testState(a, "docker.io", "gcr.io", "quay.io")), new(testState(b, "docker.io", "gcr.io")), nil, new(testState(b, "quay.io")), nil}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, registry := range []string{"10.0.0.10:5000", "docker.io", "gcr.io", "quay.io"} {
		wg.Go(func() {
			for {
				if _, err := containerdTries(t, certs, registry); err != nil {
					t.Errorf("%s: %v", registry, err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	s, err := NewStore(StoreConfig{NodeRoot: root})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 15 {
		if want := states[i%len(states)]; want != nil {
			_, err = s.Apply(t.Context(), *want)
		} else {
			_, err = s.Cleanup(t.Context())
		}
		if err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

func TestDrift(t *testing.T) {
	ca := newCA(t, "our ca")
	want := testState(ca, nodeMirrors...)
	hosts := certsDir + "/ghcr.io/hosts.toml"
	theirs := "[host.\"https://new.example\"]\n"
	tests := map[string]struct {
		change func(t *testing.T, root string)
		// differs are beginnings of paths that are not as before the change after the next
		// Apply; none: all is healed.
		differs []string
		// left are paths that a cleanup leaves although they were not there.
		left map[string]string
	}{
		"hosts.toml changed":  {change: func(t *testing.T, root string) { appendTo(t, root+hosts, "# mine\n") }},
		"hosts.toml deleted":  {change: func(t *testing.T, root string) { remove(t, root, hosts) }},
		"hosts.toml emptied":  {change: func(t *testing.T, root string) { put(t, root, hosts, nil) }},
		"mode changed":        {change: func(t *testing.T, root string) { _ = os.Chmod(root+hosts, 0o640) }},
		"CA changed":          {change: func(t *testing.T, root string) { put(t, root, certsDir+"/ghcr.io/ca.crt", []byte("x")) }},
		"CA deleted":          {change: func(t *testing.T, root string) { remove(t, root, certsDir+"/ghcr.io/ca.crt") }},
		"CA a link":           {change: func(t *testing.T, root string) { link(t, root, "/etc/passwd", certsDir+"/ghcr.io/ca.crt") }},
		"merged file changed": {change: func(t *testing.T, root string) { appendTo(t, root+certsDir+"/docker.io/hosts.toml", "# x\n") }},
		"merged file deleted": {change: func(t *testing.T, root string) { remove(t, root, certsDir+"/docker.io/hosts.toml") }},
		"directory deleted":   {change: func(t *testing.T, root string) { removeAll(t, root+certsDir+"/ghcr.io") }},
		"directory emptied": {change: func(t *testing.T, root string) {
			removeAll(t, root+certsDir+"/ghcr.io")
			mkdir(t, root, certsDir+"/ghcr.io")
		}},
		"half-made files": {change: func(t *testing.T, root string) {
			put(t, root, certsDir+"/ghcr.io/"+tempPrefix+"X", []byte("x"))
			mkdir(t, root, certsDir+"/"+tempPrefix+"Y")
			put(t, root, filepath.Dir(RecordPath)+"/"+tempPrefix+"Z", nil)
		}},
		"replaced by somebody": {
			change:  func(t *testing.T, root string) { put(t, root, hosts, []byte(theirs)) },
			differs: []string{hosts, certsDir + "/ghcr.io/" + keptPrefix, RecordPath},
			left:    map[string]string{certsDir + "/ghcr.io": "drwxr-xr-x", hosts: "-rw-r--r-- " + theirs},
		},
		"their file in our directory": {
			change:  func(t *testing.T, root string) { put(t, root, certsDir+"/ghcr.io/theirs.txt", []byte("x")) },
			differs: []string{certsDir + "/ghcr.io/theirs.txt"},
			left:    map[string]string{certsDir + "/ghcr.io": "drwxr-xr-x", certsDir + "/ghcr.io/theirs.txt": "-rw------- x"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root := node(t)
			pristine := readTree(t, root)
			apply(t, root, want)
			applied := readTree(t, root)
			tt.change(t, root)
			apply(t, root, want)
			for registry, got := range views(t, root) {
				if slices.Contains(nodeMirrors, registry) && got[1].URL != "https://10.0.0.10:5000/v2" {
					t.Errorf("%s: %v", registry, got)
				}
			}
			healed := readTree(t, root)
			for _, tree := range []map[string]string{healed, applied} {
				maps.DeleteFunc(tree, func(name, _ string) bool {
					return slices.ContainsFunc(tt.differs, func(d string) bool { return strings.HasPrefix(name, d) })
				})
			}
			if diff := cmp.Diff(applied, healed); diff != "" {
				t.Errorf("not healed: %s", diff)
			}
			cleanUp(t, root)
			maps.Copy(pristine, tt.left)
			if diff := cmp.Diff(pristine, readTree(t, root), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("cleanup left: %s", diff)
			}
		})
	}
}

// TestReplacedByAnOperator follows edits of an operator who knows nothing of
// us: theirs is taken in, and is what comes back.
func TestReplacedByAnOperator(t *testing.T) {
	root := node(t)
	want := testState(newCA(t, "our ca"), "docker.io")
	apply(t, root, want)
	name := certsDir + "/docker.io/hosts.toml"
	for _, text := range []string{"[host.\"https://one.example\"]\n", "[host.\"https://two.example\"]\n", operatorFile} {
		put(t, root, name, []byte(text))
		apply(t, root, want)
		got := containerdReads(t, filepath.Join(root, certsDir), "docker.io")
		theirs, err := parseForeign([]byte(text))
		if err != nil || len(got) < 3 || got[2].URL != theirs.hops[0].url+"/v2" || got[0].URL != "http://127.0.0.1:5050/v2" {
			t.Fatalf("containerd reads %v", got)
		}
	}
	put(t, root, name, []byte("[host.\"https://three.example\"]\n"))
	// The agent is gone by now: what stands there is the operator's.
	result := cleanUp(t, root)
	if !slices.ContainsFunc(result.Notes, func(n string) bool { return strings.Contains(n, "replaced by somebody") }) {
		t.Errorf("notes = %q", result.Notes)
	}
	if got := readTree(t, root)[name]; !strings.Contains(got, "three.example") {
		t.Errorf("an operator's file is now %q", got)
	}
}

// TestOperatorNamesOurCA: a file that somebody's hosts.toml names is never
// taken away from under it.
func TestOperatorNamesOurCA(t *testing.T) {
	root := t.TempDir()
	apply(t, root, testState(newCA(t, "our ca"), "docker.io"))
	put(t, root, certsDir+"/docker.io/hosts.toml", []byte("[host.\"https://a.example\"]\nca = \"ca.crt\"\n"))
	cleanUp(t, root)
	if got := containerdReads(t, filepath.Join(root, certsDir), "docker.io"); len(got) != 2 || len(got[0].CAs) != 1 {
		t.Errorf("containerd reads %v", got)
	}
}

func TestDirectoryAppearsBesideOurs(t *testing.T) {
	root := t.TempDir()
	want := testState(newCA(t, "our ca"), "quay.io:443")
	apply(t, root, want)
	writeTree(t, root, map[string]string{certsDir + "/quay.io_443_/hosts.toml": "[host.\"https://theirs.example\"]\n"})
	apply(t, root, want)
	got := containerdReads(t, filepath.Join(root, certsDir), "quay.io:443")
	if len(got) != 4 || got[2].URL != "https://theirs.example/v2" {
		t.Errorf("containerd reads %v", got)
	}
	if _, err := os.Stat(filepath.Join(root, certsDir, "quay.io:443")); err == nil {
		t.Error("our directory is still there, though nobody reads it")
	}
}

func TestDefaultChanges(t *testing.T) {
	root := t.TempDir()
	want := testState(newCA(t, "our ca"), "docker.io")
	apply(t, root, want)
	certs := filepath.Join(root, certsDir)
	steps := []struct {
		files map[string]string
		want  []string // after our own
		notes int
	}{
		{map[string]string{"hosts.toml": "[host.\"https://a.example\"]\n"}, []string{"https://a.example/v2", "https://registry-1.docker.io/v2"}, 0},
		{map[string]string{"hosts.toml": "[host.\"https://a.example\"]\nca = \"missing.crt\"\n[host.\"https://b.example\"]\n"}, []string{"https://b.example/v2", "https://registry-1.docker.io/v2"}, 2},
		{map[string]string{"missing.crt": string(newCA(t, "found").pem())}, []string{"https://a.example/v2", "https://b.example/v2", "https://registry-1.docker.io/v2"}, 0},
		{map[string]string{"hosts.toml": "broken = ["}, []string{"https://registry-1.docker.io/v2"}, 0},
	}
	for i, s := range steps {
		writeTree(t, certs+"/_default", s.files)
		result := apply(t, root, want)
		var got []string
		for _, h := range containerdReads(t, certs, "docker.io")[2:] {
			got = append(got, h.URL)
		}
		if diff := cmp.Diff(s.want, got); diff != "" {
			t.Errorf("step %d: %s", i, diff)
		}
		if len(result.Notes) != s.notes {
			t.Errorf("step %d: notes = %q", i, result.Notes)
		}
	}
	removeAll(t, certs+"/_default")
	apply(t, root, want)
	if names, _ := filepath.Glob(certs + "/docker.io/*"); len(names) != 2 {
		t.Errorf("copies are left: %v", names)
	}
}

func TestClientCertificatesOfADirectory(t *testing.T) {
	root := t.TempDir()
	client := newCA(t, "client")
	dir := filepath.Join(root, certsDir, "docker.io")
	writeTree(t, dir, map[string]string{
		"ca.crt":      string(newCA(t, "theirs").pem()),
		"client.cert": string(client.pem()),
		"client.key":  string(keyPEM(t, client.key)),
		"other.cert":  "no certificate",
	})
	before := readTree(t, root)
	result := apply(t, root, testState(newCA(t, "our ca"), "docker.io"))
	if len(result.Notes) != 1 {
		t.Errorf("notes = %q", result.Notes)
	}
	remove(t, dir, "other.cert")
	apply(t, root, testState(newCA(t, "our ca"), "docker.io"))
	got := containerdReads(t, filepath.Join(root, certsDir), "docker.io")
	if len(got) != 3 || !cmp.Equal(got[2].CAs, []string{"theirs"}) {
		t.Errorf("containerd reads %v", got)
	}
	// A CA that vanishes must not fail a single pull.
	remove(t, dir, "ca.crt")
	if _, err := containerdTries(t, filepath.Join(root, certsDir), "docker.io"); err != nil {
		t.Error(err)
	}
	put(t, dir, "ca.crt", []byte("theirs again"))
	apply(t, root, testState(newCA(t, "our ca"), "docker.io"))
	cleanUp(t, root)
	after := readTree(t, root)
	for _, name := range []string{"/client.cert", "/client.key"} {
		if p := certsDir + "/docker.io" + name; after[p] != before[p] {
			t.Errorf("%s is %q", p, after[p])
		}
	}
	if after[certsDir+"/docker.io/ca.crt"] != "-rw------- theirs again" && after[certsDir+"/docker.io/ca.crt"] != "-rw-r--r-- theirs again" {
		t.Errorf("ca.crt is %q", after[certsDir+"/docker.io/ca.crt"])
	}
}

func TestRecordLost(t *testing.T) {
	root := node(t)
	pristine := readTree(t, root)
	want := testState(newCA(t, "our ca"), nodeMirrors...)
	apply(t, root, want)
	seen := views(t, root)
	remove(t, root, RecordPath)
	apply(t, root, want)
	if diff := cmp.Diff(seen, views(t, root)); diff != "" {
		t.Error(diff)
	}
	cleanUp(t, root)
	after := readTree(t, root)
	// That the link was one, a mode, and our record's directory are lost.
	for _, name := range []string{certsDir + "/linked.example/hosts.toml", filepath.Dir(RecordPath)} {
		delete(pristine, name)
		delete(after, name)
	}
	if diff := cmp.Diff(pristine, after); diff != "" {
		t.Error(diff)
	}
}

func TestRecordDamaged(t *testing.T) {
	for name, data := range map[string]string{
		"not JSON":   "{",
		"newer":      `{"version": 2}`,
		"escapes":    `{"version": 1, "files": [{"path": "../../etc/passwd"}]}`,
		"absolute":   `{"version": 1, "files": [{"path": "/etc/passwd"}]}`,
		"null":       `{"version": 1, "files": [null]}`,
		"directory":  `{"version": 1, "directories": ["../x"]}`,
		"empty file": "",
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			writeTree(t, root, map[string]string{RecordPath: data})
			before := readTree(t, root)
			_, err := newStore(t, root).Apply(t.Context(), testState(newCA(t, "our ca")))
			mustContain(t, err, RecordPath)
			_, err = newStore(t, root).Cleanup(t.Context())
			mustContain(t, err, RecordPath)
			if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSymbolicLinks(t *testing.T) {
	want := testState(newCA(t, "our ca"), "docker.io")
	t.Run("certs.d inside", func(t *testing.T) {
		for _, target := range []string{"../../opt/certs", "/opt/certs"} {
			root := t.TempDir()
			writeTree(t, root, map[string]string{"opt/certs/docker.io/hosts.toml": operatorFile})
			mkdir(t, root, "etc/containerd")
			link(t, root, target, certsDir)
			before := readTree(t, root)
			if result := apply(t, root, want); result.CertsDir != "/opt/certs" {
				t.Errorf("hosts directory %q", result.CertsDir)
			}
			if got := containerdReads(t, filepath.Join(root, "opt/certs"), "docker.io"); len(got) != 5 {
				t.Errorf("containerd reads %v", got)
			}
			cleanUp(t, root)
			if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("certs.d outside", func(t *testing.T) {
		outside := t.TempDir()
		for _, target := range []string{outside, "../../../../../../../../.." + outside} {
			root := t.TempDir()
			mkdir(t, root, "etc/containerd")
			link(t, root, target, certsDir)
			_, err := newStore(t, root).Apply(t.Context(), want)
			mustContain(t, err, certsDir, "node root")
			if got := readTree(t, outside); len(got) != 0 {
				t.Errorf("outside there is %v", got)
			}
		}
	})
	t.Run("directory of a registry", func(t *testing.T) {
		root := t.TempDir()
		writeTree(t, root, map[string]string{certsDir + "/shared/hosts.toml": operatorFile})
		link(t, root, "shared", certsDir+"/docker.io")
		before := readTree(t, root)
		_, err := newStore(t, root).Apply(t.Context(), want)
		mustContain(t, err, "docker.io", "symbolic link")
		if faults := OwnerErrors(err); len(faults) != 1 || faults[0].Owner != "docker.io" {
			t.Errorf("faults = %v", faults)
		}
		if got := containerdReads(t, filepath.Join(root, certsDir), "10.0.0.10:5000"); len(got) != 2 {
			t.Errorf("the others are not done: %v", got)
		}
		cleanUp(t, root)
		if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("record", func(t *testing.T) {
		root := t.TempDir()
		mkdir(t, root, "var/lib")
		link(t, root, t.TempDir(), filepath.Dir(RecordPath))
		_, err := newStore(t, root).Apply(t.Context(), want)
		mustContain(t, err, "node root")
	})
}

func TestObstacles(t *testing.T) {
	ca := newCA(t, "our ca")
	want := testState(ca, "docker.io", "ghcr.io")
	tests := map[string]struct {
		prepare func(t *testing.T, root string)
		want    []string
		partial bool
	}{
		"certs.d is a file":      {func(t *testing.T, root string) { writeTree(t, root, map[string]string{certsDir: ""}) }, []string{certsDir, "not a directory"}, false},
		"directory is a file":    {func(t *testing.T, root string) { writeTree(t, root, map[string]string{certsDir + "/docker.io": ""}) }, []string{"docker.io", "not a directory"}, true},
		"hosts.toml a directory": {func(t *testing.T, root string) { mkdir(t, root, certsDir+"/docker.io/hosts.toml") }, []string{"docker.io/hosts.toml", "not a file"}, true},
		"hosts.toml a pipe": {func(t *testing.T, root string) {
			mkdir(t, root, certsDir+"/docker.io")
			if err := syscall.Mkfifo(filepath.Join(root, certsDir, "docker.io/hosts.toml"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"docker.io/hosts.toml", "not a file"}, true},
		"hosts.toml too large": {func(t *testing.T, root string) {
			writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": ""})
			if err := os.Truncate(filepath.Join(root, certsDir, "docker.io/hosts.toml"), maxFileBytes+1); err != nil {
				t.Fatal(err)
			}
		}, []string{"docker.io/hosts.toml", "larger"}, true},
		"record's directory a file": {func(t *testing.T, root string) {
			writeTree(t, root, map[string]string{"var/lib/connected-registry": ""})
		}, []string{"/var/lib/connected-registry", "not a directory"}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			tt.prepare(t, root)
			before := readTree(t, root)
			_, err := newStore(t, root).Apply(t.Context(), want)
			mustContain(t, err, append(tt.want, "node root "+root)...)
			if partial := OwnerErrors(err) != nil; partial != tt.partial {
				t.Errorf("the rest of the work done: %v", partial)
			}
			if tt.partial {
				cleanUp(t, root)
			}
			if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
				t.Error(diff)
			}
		})
	}
	_, err := newStore(t, filepath.Join(t.TempDir(), "missing")).Apply(t.Context(), want)
	mustContain(t, err, "missing", "--node-root")
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	old, next := newCA(t, "our ca"), newCA(t, "next ca")
	root := filepath.Join(dir, "root")
	writeTree(t, root, map[string]string{certsDir + "/docker.io/hosts.toml": operatorFile})
	pristine := readTree(t, root)
	apply(t, root, testState(old, "docker.io"))
	working := readTree(t, root)
	writeTree(t, dir, map[string]string{"ca.pem": string(next.pem())})
	crash(t, "full", dir, never)
	if diff := cmp.Diff(working, readTree(t, root)); diff != "" {
		t.Errorf("what worked was changed: %s", diff)
	}
	cleanUp(t, root)
	if diff := cmp.Diff(pristine, readTree(t, root)); diff != "" {
		t.Error(diff)
	}
}

func TestExplain(t *testing.T) {
	s := newStore(t, "/node")
	for want, err := range map[string]error{
		"run as root":  &os.PathError{Op: "openat", Path: "x", Err: syscall.EACCES},
		"read-only":    fmt.Errorf("writing x: %w", syscall.EROFS),
		"free some":    &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC},
		"something or": errors.New("something or other"),
	} {
		mustContain(t, s.explain(err), "node root /node", want)
	}
}

func TestCheckState(t *testing.T) {
	ca := newCA(t, "ca")
	hosts := Hosts{Registry: "a.example", Server: Hop{URL: "https://b.example", CA: "ca.crt"}}
	tests := map[string]struct {
		state State
		want  string
	}{
		"twice":        {State{Registries: []Registry{{Hosts: Hosts{Registry: "a"}}, {Hosts: Hosts{Registry: "a"}}}}, "twice"},
		"bad host":     {State{Registries: []Registry{{Hosts: Hosts{Registry: "../../etc"}}}}, "registry host"},
		"CA missing":   {State{Registries: []Registry{{Hosts: hosts}}}, "not given"},
		"CA empty":     {State{Registries: []Registry{{Hosts: hosts, CAs: map[string]Bundle{"ca.crt": {}}}}}, "would be empty"},
		"CA elsewhere": {State{Registries: []Registry{{Hosts: hosts, CAs: map[string]Bundle{"../ca.crt": ca.bundle()}}}}, "plain file name"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { mustContain(t, CheckState(tt.state), tt.want) })
	}
	for _, dir := range []string{"../x", "/", "a/../../b", "a\x00b"} {
		if _, err := NewStore(StoreConfig{CertsDir: dir}); err == nil {
			t.Errorf("hosts directory %q was taken", dir)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	root := node(t)
	before := readTree(t, root)
	want := testState(newCA(t, "our ca"), nodeMirrors...)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s := newStore(t, root)
			var err error
			if i%4 == 3 {
				_, err = s.Cleanup(t.Context())
			} else {
				_, err = s.Apply(t.Context(), want)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	apply(t, root, want)
	cleanUp(t, root)
	if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
		t.Error(diff)
	}
}

func TestApplyEndsWithItsContext(t *testing.T) {
	root := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := newStore(t, root).Apply(ctx, testState(newCA(t, "our ca")))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
	cleanUp(t, root)
	if got := readTree(t, root); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

func appendTo(t *testing.T, name, text string) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err == nil {
		err = os.WriteFile(name, append(data, text...), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// link puts a symbolic link in place of whatever is there.
func link(t *testing.T, root, target, name string) {
	t.Helper()
	name = filepath.Join(root, name)
	_ = os.Remove(name)
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

func removeAll(t *testing.T, name string) {
	t.Helper()
	if err := os.RemoveAll(name); err != nil {
		t.Fatal(err)
	}
}
