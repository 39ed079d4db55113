package trust

import (
	"flag"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// hop is what containerd makes of one host.
type hop struct {
	URL  string
	Can  string
	CAs  []string // names of the roots besides the system's
	Skip bool
}

// containerdReads has containerd's own parser find and read the directory of a
// registry.
func containerdReads(t testing.TB, certsDir, registry string) []hop {
	t.Helper()
	hosts, err := containerdTries(t, certsDir, registry)
	if err != nil {
		t.Fatalf("containerd fails every pull from %s: %v", registry, err)
	}
	return hosts
}

func containerdTries(t testing.TB, certsDir, registry string) ([]hop, error) {
	t.Helper()
	hosts, err := config.ConfigureHosts(t.Context(), config.HostOptions{
		HostDir: config.HostDirFromRoot(certsDir),
	})(registry)
	if err != nil {
		return nil, err
	}
	system := systemSubjects()
	var out []hop
	for _, h := range hosts {
		o := hop{URL: h.Scheme + "://" + h.Host + h.Path, Can: capabilities(h.Capabilities)}
		if tr, ok := h.Client.Transport.(*http.Transport); ok && tr.TLSClientConfig != nil {
			o.Skip = tr.TLSClientConfig.InsecureSkipVerify
			if pool := tr.TLSClientConfig.RootCAs; pool != nil {
				for _, raw := range pool.Subjects() { //nolint:staticcheck // not the system's own pool
					if name := string(raw); !system[name] {
						o.CAs = append(o.CAs, commonName(t, raw))
					}
				}
				slices.Sort(o.CAs)
			}
		}
		out = append(out, o)
	}
	return out, nil
}

func capabilities(c docker.HostCapabilities) string {
	var out []string
	for _, one := range []struct {
		bit  docker.HostCapabilities
		name string
	}{{docker.HostCapabilityPull, "pull"}, {docker.HostCapabilityResolve, "resolve"}, {docker.HostCapabilityPush, "push"}, {docker.HostCapabilityReferrers, "referrers"}} {
		if c.Has(one.bit) {
			out = append(out, one.name)
		}
	}
	return strings.Join(out, " ")
}

const everything = "pull resolve push referrers"

// shapes are the files that the agent asks for.
func shapes() map[string]Hosts {
	cache := Hop{URL: "http://127.0.0.1:5050", Capabilities: []string{Pull, Resolve}, DialTimeout: time.Second}
	registry := Hop{URL: "https://10.0.0.10:5000", CA: "ca.crt", Capabilities: []string{Pull, Resolve}, DialTimeout: time.Second}
	all := registry
	all.Capabilities = nil
	v6 := registry
	v6.URL = "https://[fd00::10]:5000"
	byDigest := func(h Hop) Hop { h.Capabilities = []string{Pull}; return h }
	return map[string]Hosts{
		"own":              {Registry: "10.0.0.10:5000", Hops: []Hop{cache}, Server: registry, Role: ServerOwn},
		"own-readwrite":    {Registry: "10.0.0.10:5000", Hops: []Hop{cache}, Server: all, Role: ServerOwn},
		"own-no-cache":     {Registry: "10.0.0.10:5000", Server: registry, Role: ServerOwn},
		"own-ipv6":         {Registry: "[fd00::10]:5000", Hops: []Hop{cache}, Server: v6, Role: ServerOwn},
		"mirror":           {Registry: "docker.io", Hops: []Hop{cache, registry}},
		"mirror-no-tags":   {Registry: "ghcr.io", Hops: []Hop{byDigest(cache), byDigest(registry)}},
		"mirror-upstream":  {Registry: "127.0.0.1:5000", Hops: []Hop{cache, registry}, Server: Hop{URL: "http://127.0.0.1:5000"}},
		"mirror-server-ca": {Registry: "registry.example", Hops: []Hop{registry}, Server: Hop{URL: "https://origin.example/base", CA: "server-ca.crt"}},
		"mirror-only-ca":   {Registry: "registry.example", Hops: []Hop{registry}, Server: Hop{CA: "server-ca.crt"}},
		"mirror-isolated":  {Registry: "quay.io", Hops: []Hop{cache}, Server: registry, Role: ServerOnly},
		"default":          {Registry: DefaultHost, Hops: []Hop{cache, registry}},
	}
}

func TestRender(t *testing.T) {
	const pull = "pull resolve"
	cache := hop{URL: "http://127.0.0.1:5050/v2", Can: pull}
	ours := hop{URL: "https://10.0.0.10:5000/v2", Can: pull, CAs: []string{"our ca"}}
	can := func(h hop, can string) hop { h.Can = can; return h }
	v6 := ours
	v6.URL = "https://[fd00::10]:5000/v2"
	want := map[string][]hop{
		"own":              {cache, ours},
		"own-readwrite":    {cache, can(ours, everything)},
		"own-no-cache":     {ours},
		"own-ipv6":         {cache, v6},
		"mirror":           {cache, ours, {URL: "https://registry-1.docker.io/v2", Can: everything}},
		"mirror-no-tags":   {can(cache, "pull"), can(ours, "pull"), {URL: "https://ghcr.io/v2", Can: everything}},
		"mirror-upstream":  {cache, ours, {URL: "http://127.0.0.1:5000/v2", Can: everything}},
		"mirror-server-ca": {ours, {URL: "https://origin.example/base/v2", Can: everything, CAs: []string{"server ca"}}},
		"mirror-only-ca":   {ours, {URL: "https://registry.example/v2", Can: everything, CAs: []string{"server ca"}}},
		"mirror-isolated":  {cache, ours},
		"default":          {cache, ours, {URL: "https://anything.example/v2", Can: everything}},
	}
	for name, h := range shapes() {
		t.Run(name, func(t *testing.T) {
			text, err := h.Render()
			if err != nil {
				t.Fatal(err)
			}
			golden(t, filepath.Join("testdata", "hosts", name+".toml"), text)
			certs := t.TempDir()
			for _, dir := range DirectoryNames(h.Registry) {
				writeTree(t, certs, map[string]string{
					dir + "/hosts.toml":    string(text),
					dir + "/ca.crt":        string(newCA(t, "our ca").pem()),
					dir + "/server-ca.crt": string(newCA(t, "server ca").pem()),
				})
			}
			registry := h.Registry
			if registry == DefaultHost {
				registry = "anything.example"
			}
			if diff := cmp.Diff(want[name], containerdReads(t, certs, registry)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestRenderedTextIsPlain guards what containerd 1.7 trips over: see Render.
func TestRenderedTextIsPlain(t *testing.T) {
	for name, h := range shapes() {
		text, err := h.Render()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "\n[host") {
			t.Errorf("%s: no host table", name)
		}
		if strings.Contains(string(text), "referrers") || strings.Contains(string(text), "skip_verify") {
			t.Errorf("%s: %s", name, text)
		}
		if !bearsMarker(text) || unmerge(text) != nil {
			t.Errorf("%s: not recognised as wholly ours", name)
		}
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (run the test with -update to accept):\n%s", name, diff)
	}
}

func TestRenderRefuses(t *testing.T) {
	good := Hop{URL: "https://a.example"}
	tests := map[string]struct {
		hosts Hosts
		want  string
	}{
		"no registry":       {Hosts{Server: good}, "registry host"},
		"path as registry":  {Hosts{Registry: "../../etc", Server: good}, "registry host"},
		"no scheme":         {Hosts{Registry: "a", Hops: []Hop{{URL: "a.example"}}}, "http"},
		"quote":             {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example\"]\nx=\"1"}}}, "does not parse"},
		"user":              {Hosts{Registry: "a", Hops: []Hop{{URL: "https://u:secret@a.example"}}}, "without user"},
		"query":             {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example?x"}}}, "without user"},
		"trailing slash":    {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example/"}}}, "path"},
		"dots":              {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example/../b"}}}, "path"},
		"escapes":           {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example/%41"}}}, "plainly"},
		"upper-case scheme": {Hosts{Registry: "a", Hops: []Hop{{URL: "HTTPS://a.example"}}}, "plainly"},
		"twice":             {Hosts{Registry: "a", Hops: []Hop{good, good}}, "twice"},
		"capability":        {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example", Capabilities: []string{"referrers"}}}}, "capability"},
		"CA over http":      {Hosts{Registry: "a", Hops: []Hop{{URL: "http://a.example", CA: "ca.crt"}}}, "https first"},
		"CA elsewhere":      {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example", CA: "../ca.crt"}}}, "plain file name"},
		"CA is a key":       {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example", CA: "ca.key"}}}, "plain file name"},
		"server":            {Hosts{Registry: "a", Server: Hop{URL: "x"}}, "server"},
		"server's CA":       {Hosts{Registry: "a", Server: Hop{CA: "/ca.crt"}}, "plain file name"},
		"server without":    {Hosts{Registry: "a", Server: Hop{Capabilities: []string{Pull}}}, "need a URL"},
		"negative timeout":  {Hosts{Registry: "a", Hops: []Hop{{URL: "https://a.example", DialTimeout: -1}}}, "negative"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := tt.hosts.Render()
			mustContain(t, err, tt.want)
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the error repeats a password: %v", err)
			}
		})
	}
}

func TestParseHost(t *testing.T) {
	for in, want := range map[string][2]string{
		"docker.io":         {"docker.io", ""},
		"localhost":         {"localhost", ""},
		"127.0.0.1:5000":    {"127.0.0.1", "5000"},
		"Reg-1.Example:443": {"Reg-1.Example", "443"},
		"[::1]:65535":       {"::1", "65535"},
		"[fd00::10]":        {"fd00::10", ""},
		"a:1":               {"a", "1"},
		"xn--bcher-kva.ch":  {"xn--bcher-kva.ch", ""},
	} {
		host, port, err := ParseHost(in)
		if err != nil || [2]string{host, port} != want {
			t.Errorf("ParseHost(%q) = %q, %q, %v", in, host, port, err)
		}
	}
	for _, in := range []string{
		"", ".", "..", "../../etc", "a/b", "a\\b", "/etc", "a..b", ".a", "a.", "-a", "a-", "a_b", "_default",
		"a b", "a\n", "a\x00", "a\x1b[31m", "ä.example", "%2e%2e", "https://a", "user@a", "a?b", "a#b", "*", "*.a",
		":5000", "a:", "a:0", "a:65536", "a:-1", "a:+1", "a:05", "a:5000:6000", "a:b", "a: 1",
		"::1", "fd00::10:5000", "[::1", "[::1]x", "[::1]:", "[::1]:0", "[]", "[]:1", "[127.0.0.1]:1", "[fe80::1%eth0]:1", "[a]:1", "[[::1]]", "]:1", "[::1]:5]",
		strings.Repeat("a", 64) + ".b", strings.Repeat("a.", 127) + "aa",
	} {
		if host, port, err := ParseHost(in); err == nil {
			t.Errorf("ParseHost(%q) = %q, %q, and no error", in, host, port)
		} else if strings.ContainsAny(err.Error(), "\n\x1b\x00") {
			t.Errorf("ParseHost(%q): the error repeats control characters", in)
		}
	}
}

// TestDirectoryNames asks containerd: each name alone, and the first of both,
// must be the one that it finds.
func TestDirectoryNames(t *testing.T) {
	for _, registry := range []string{"docker.io", "a:5000", "127.0.0.1:5000", "[fd00::10]:5000", "[fd00::10]"} {
		names := DirectoryNames(registry)
		for first := range names {
			certs := t.TempDir()
			for _, name := range names[first:] {
				if err := os.Mkdir(filepath.Join(certs, name), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			got, err := config.HostDirFromRoot(certs)(registry)
			if want := filepath.Join(certs, names[first]); err != nil || got != want {
				t.Errorf("%s: containerd reads %s, %v; want %s", registry, got, err, want)
			}
		}
	}
}

func FuzzParseHost(f *testing.F) {
	for _, s := range []string{"docker.io", "a:5000", "[::1]:5000", "../x", "a\x00b", "_default", "a_5000_"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, port, err := ParseHost(s)
		if err != nil {
			return
		}
		if host == "" || strings.ContainsAny(s, "/\\\x00\n%_ ") || strings.Contains(s, "..") || len(s) > 270 {
			t.Errorf("%q was taken", s)
		}
		if port != "" && !strings.HasSuffix(s, ":"+port) {
			t.Errorf("%q has the port %q", s, port)
		}
		text, err := Hosts{Registry: s, Server: Hop{URL: HTTPS(s)}}.Render()
		if err != nil {
			t.Fatalf("%q cannot be rendered: %v", s, err)
		}
		certs := t.TempDir()
		for _, dir := range DirectoryNames(s) {
			if filepath.Base(dir) != dir || !filepath.IsLocal(dir) {
				t.Fatalf("%q has the directory %q", s, dir)
			}
			writeTree(t, certs, map[string]string{dir + "/hosts.toml": string(text)})
		}
		if got := containerdReads(t, certs, s); len(got) != 1 || got[0].URL != "https://"+s+"/v2" {
			t.Errorf("containerd reads %v", got)
		}
	})
}
