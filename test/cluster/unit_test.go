package cluster

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRoutes(t *testing.T) {
	table := "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n" +
		"eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" + // default
		"eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n" +
		"crtest200\t0010C80A\t0100C80A\t0003\t0\t0\t0\t00F0FFFF\t0\t0\t0\n" +
		"cut\tshort\n"
	want := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("10.200.16.0/20")}
	if diff := cmp.Diff(want, routes([]byte(table)), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFreeNetwork(t *testing.T) {
	for _, test := range []struct {
		name string
		used []netip.Prefix
		want byte
	}{
		{"nothing in the way", nil, firstBlock},
		{"a route within the first block", []netip.Prefix{netip.MustParsePrefix("10.200.16.0/20")}, firstBlock + 1},
		{"a network around the first 56", []netip.Prefix{netip.MustParsePrefix("10.192.0.0/11")}, 224},
		{"everything in the way", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := freeNetwork(test.used)
			if got.block != test.want || (err != nil) != (test.want == 0) {
				t.Errorf("got block %d, %v, want %d", got.block, err, test.want)
			}
		})
	}
}

// TestNetworkParts checks that the parts of a block are apart.
func TestNetworkParts(t *testing.T) {
	n := network{firstBlock}
	parts := []netip.Prefix{n.machines(), n.services(), n.pods()}
	for i, a := range parts {
		if !n.all().Contains(a.Addr()) {
			t.Errorf("%s is outside %s", a, n.all())
		}
		for _, b := range parts[i+1:] {
			if a.Overlaps(b) {
				t.Errorf("%s and %s overlap", a, b)
			}
		}
	}
	for number := 1; number <= maxNodes; number++ {
		if !n.pods().Overlaps(n.nodePods(number)) || !n.machines().Contains(n.node(number)) || n.node(number) == n.host() {
			t.Errorf("node %d has %s and pods in %s", number, n.node(number), n.nodePods(number))
		}
	}
}

func TestParseStat(t *testing.T) {
	const rest = " 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 1"
	for _, test := range []struct {
		name, stat string
		running    bool
		fails      bool
	}{
		{"running", "42 (sh) S" + rest, true, false},
		{"zombie", "42 (sh) Z" + rest, false, false},
		{"a name made to mislead", "42 (a) R 1 (b)) S" + rest, true, false},
		{"cut short", "42 (sh) S 1", false, true},
		{"empty", "", false, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			start, running, err := parseStat(test.stat)
			if (err != nil) != test.fails || running != test.running || (!test.fails && start != 4711) {
				t.Errorf("got %d, %v, %v", start, running, err)
			}
		})
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("42 (sh) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 1")
	f.Add(")")
	f.Fuzz(func(_ *testing.T, stat string) { parseStat(stat) })
}

func TestHierarchies(t *testing.T) {
	for _, test := range []struct {
		name, info string
		want       []hierarchy
	}{
		{
			"version 2",
			"30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n" +
				"31 24 0:27 / /sys/fs/bpf rw - bpf bpf rw\n",
			[]hierarchy{{"/sys/fs/cgroup", true}},
		},
		{
			"version 1 beside an empty version 2",
			"29 24 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n" +
				"31 29 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" +
				"30 29 0:26 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n" +
				"32 29 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			[]hierarchy{{"/sys/fs/cgroup/cpu", false}, {"/sys/fs/cgroup/memory", false}, {"/sys/fs/cgroup/unified", true}},
		},
		{"none", "1 1 0:1 / / rw - ext4 /dev/vda rw\nnonsense\n", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, hierarchies([]byte(test.info)), cmp.AllowUnexported(hierarchy{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestRequired(t *testing.T) {
	mod := []byte("module m\n\nrequire example.com/one v1.2.3\n\nrequire (\n\texample.com/two/v2 v2.0.0-rc.1 // indirect\n)\n")
	for path, want := range map[string]string{
		"example.com/one":    "v1.2.3",
		"example.com/two/v2": "v2.0.0-rc.1",
		"example.com/tw":     "",
	} {
		got, err := required(mod, path)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%s: got %q, %v, want %q", path, got, err, want)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for name, config := range map[string]Config{
		"a name that is a path": {Name: "../x", Dir: t.TempDir()},
		"a name too long":       {Name: "a23456789012345678901", Dir: t.TempDir()},
		"too many nodes":        {Nodes: maxNodes + 1, Dir: t.TempDir()},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := config.withDefaults(); err == nil {
				t.Error("was accepted")
			}
		})
	}
}

// TestLayouts checks what a node has at its first start, and at the next.
func TestLayouts(t *testing.T) {
	if _, err := (Config{Layouts: []Layout{K3s, "K4s"}}).withDefaults(); err == nil {
		t.Error("a layout that nobody knows was taken")
	}
	sets := map[string]bool{}
	for _, set := range toolsets() {
		sets[set.name] = true
	}
	for name, l := range layouts {
		dir := t.TempDir()
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		if !sets[l.toolset] {
			t.Errorf("%q: no programs %s", name, l.toolset)
		}
		if err := l.write(root); err != nil {
			t.Fatal(err)
		}
		config := filepath.Join(dir, l.config)
		if got, err := os.ReadFile(config); err != nil || string(got) != l.text {
			t.Errorf("%q: %s: %v\n%s", name, l.config, err, got)
		}
		// What the operator writes stays, and what the platform generates does not.
		if err := os.WriteFile(config, []byte("# changed"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := l.write(root); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(config); err != nil || (string(got) == l.text) != l.generated {
			t.Errorf("%q at the next start: %v\n%s", name, err, got)
		}
	}
}
