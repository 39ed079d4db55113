package trust

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const operatorFile = `# Mirrors of the data centre. Ask Ada before you change them.
server = "https://registry-1.docker.io"

# first the near one
[host."https://near.example:5000"]
  capabilities = ["pull", "resolve"] # never push here
  [host."https://near.example:5000".header]
    x-team = ["platform"]

[host."http://far.example"]
  capabilities = ["pull"]
`

// mergeText merges as the store does, with no file beside the hosts.toml.
func mergeText(ours Hosts, theirs string) (merged []byte, notes []string, err error) {
	f, err := parseForeign([]byte(theirs))
	if err != nil {
		notes = []string{unreadable(err)}
		f = foreign{text: []byte(theirs)}
	} else if !f.insertable {
		f.hops = slices.DeleteFunc(f.hops, func(h foreignHop) bool { return h.fields.CA != nil || h.fields.Client != nil })
	}
	merged, more, err := ours.merge(f)
	return merged, append(notes, more...), err
}

func TestMerge(t *testing.T) {
	all := shapes()
	const pull = "pull resolve"
	cache := hop{URL: "http://127.0.0.1:5050/v2", Can: pull}
	ours := hop{URL: "https://10.0.0.10:5000/v2", Can: pull, CAs: []string{"our ca"}}
	upstream := hop{URL: "https://registry-1.docker.io/v2", Can: everything}
	tests := map[string]struct {
		ours   Hosts
		theirs string
		want   []hop
		notes  int
	}{
		"operator": {all["mirror"], operatorFile,
			[]hop{cache, ours, {URL: "https://near.example:5000/v2", Can: pull}, {URL: "http://far.example/v2", Can: "pull"}, upstream}, 0},
		"comment at once": {all["mirror"], "# theirs\n[host.\"https://a.example\"]\n",
			[]hop{cache, ours, {URL: "https://a.example/v2", Can: everything}, upstream}, 0},
		"top level only": {all["mirror"], "server = \"https://b.example\"\ncapabilities = [\"pull\"]\n",
			[]hop{cache, ours, {URL: "https://b.example/v2", Can: "pull"}}, 0},
		"no end of line": {all["mirror"], "server = \"https://b.example\"",
			[]hop{cache, ours, {URL: "https://b.example/v2", Can: everything}}, 0},
		"CRLF": {all["mirror"], strings.ReplaceAll(operatorFile, "\n", "\r\n"),
			[]hop{cache, ours, {URL: "https://near.example:5000/v2", Can: pull}, {URL: "http://far.example/v2", Can: "pull"}, upstream}, 0},
		"comments only": {all["mirror"], "# nothing here\n", []hop{cache, ours, upstream}, 0},
		"our cache is theirs too": {all["mirror"], "[host.\"http://127.0.0.1:5050\"]\n[host.\"https://a.example\"]\n",
			[]hop{cache, ours, {URL: "http://127.0.0.1:5050/v2", Can: everything}, {URL: "https://a.example/v2", Can: everything}, upstream}, 0},
		"our cache in both spellings": {all["mirror"], "[host.\"http://127.0.0.1:5050\"]\n[host.\"http://127.0.0.1:5050/v2\"]\n",
			[]hop{ours, {URL: "http://127.0.0.1:5050/v2", Can: everything}, {URL: "http://127.0.0.1:5050/v2", Can: everything}, upstream}, 0},
		"our own host, by hand": {all["own"], "server = \"https://10.0.0.10:5000\"\nskip_verify = true\n",
			[]hop{cache, ours, {URL: "https://10.0.0.10:5000/v2", Can: everything, Skip: true}}, 0},
		"our own host, as a host": {all["own"], "[host.\"https://10.0.0.10:5000\"]\n  skip_verify = true\n",
			[]hop{cache, {URL: "https://10.0.0.10:5000/v2", Can: everything, Skip: true}, ours}, 0},
		"own server and theirs": {all["mirror-server-ca"], "server = \"https://b.example\"\n",
			[]hop{ours, {URL: "https://b.example/v2", Can: everything}}, 1},
		"own server and none": {all["mirror-server-ca"], "[host.\"https://a.example\"]\n",
			[]hop{ours, {URL: "https://a.example/v2", Can: everything}, {URL: "https://origin.example/base/v2", Can: everything, CAs: []string{"server ca"}}}, 0},
		"no fallback": {all["mirror-isolated"], operatorFile,
			[]hop{cache, {URL: "https://near.example:5000/v2", Can: pull}, {URL: "http://far.example/v2", Can: "pull"}, ours}, 1},
		"no fallback, many lines": {all["mirror-isolated"], "server = \"https://b.example\"\ncapabilities = [\n  \"pull\",\n]\n",
			[]hop{cache, ours}, 1},
		"no fallback, header": {all["mirror-isolated"], "server = \"https://b.example\"\n[header]\n  x = \"y\"\n",
			[]hop{cache, ours}, 1},
		"header of the server": {all["mirror"], "server = \"https://b.example\"\n[header]\n  x = \"y\"\n",
			[]hop{cache, ours, {URL: "https://b.example/v2", Can: everything}}, 0},
		"inline": {all["mirror"], "server = \"https://b.example\"\nhost = {\"https://z.example\" = {capabilities = [\"pull\"], header = {\"x\" = \"y\"}}, \"https://a.example\" = {}}\n",
			[]hop{cache, ours, {URL: "https://z.example/v2", Can: "pull"}, {URL: "https://a.example/v2", Can: everything}, {URL: "https://b.example/v2", Can: everything}}, 0},
		"dotted": {all["mirror"], "host.\"https://z.example\".capabilities = [\"pull\"]\nhost.\"https://a.example\".dial_timeout = \"3s\"\n",
			[]hop{cache, ours, {URL: "https://z.example/v2", Can: "pull"}, {URL: "https://a.example/v2", Can: everything}, upstream}, 0},
		"broken TOML":        {all["mirror"], "server = \n[host\x01", []hop{cache, ours, upstream}, 1},
		"unknown capability": {all["mirror"], "[host.\"https://a.example\"]\ncapabilities = [\"fly\"]\n", []hop{cache, ours, upstream}, 1},
		"wrong type of ca":   {all["mirror"], "ca = 3\n", []hop{cache, ours, upstream}, 1},
		"unknown tables": {all["mirror"], "[plugin]\nx = 1\n[host.\"https://a.example\"]\n",
			[]hop{cache, ours, {URL: "https://a.example/v2", Can: everything}, upstream}, 0},
		"nested host table": {all["mirror"], "[host]\n  [host.\"https://a.example\"]\n",
			[]hop{cache, ours, {URL: "https://a.example/v2", Can: everything}, upstream}, 0},
		"server in capitals": {all["mirror-upstream"], "Server = \"https://b.example\"\n",
			[]hop{cache, ours, {URL: "https://b.example/v2", Can: everything}}, 1},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			merged, notes, err := mergeText(tt.ours, tt.theirs)
			if err != nil {
				t.Fatal(err)
			}
			if len(notes) != tt.notes {
				t.Errorf("notes = %q, want %d", notes, tt.notes)
			}
			golden(t, filepath.Join("testdata", "merge", strings.NewReplacer(",", "", " ", "-").Replace(name)+".toml"), merged)
			registry := tt.ours.Registry
			certs := t.TempDir()
			writeTree(t, certs, map[string]string{
				registry + "/hosts.toml":    string(merged),
				registry + "/ca.crt":        string(newCA(t, "our ca").pem()),
				registry + "/server-ca.crt": string(newCA(t, "server ca").pem()),
			})
			want := tt.want
			if last := &want[len(want)-1]; last.URL == upstream.URL && registry != "docker.io" {
				last.URL = "https://" + registry + "/v2"
			}
			if diff := cmp.Diff(want, containerdReads(t, certs, registry)); diff != "" {
				t.Error(diff)
			}
			if got := unmerge(merged); string(got) != tt.theirs && !strings.ContainsAny(tt.theirs, "\x01\r") && strings.HasSuffix(tt.theirs, "\n") {
				t.Errorf("what was merged is taken apart as:\n%s\nwant:\n%s", got, tt.theirs)
			}
		})
	}
}

// FuzzMerge: whatever an operator has written, containerd accepts what comes of
// it, our hosts are first, theirs follow as containerd read them alone.
func FuzzMerge(f *testing.F) {
	for _, s := range []string{
		operatorFile,
		"host = {\"https://a\" = {}}", "[host]\n\"https://a\" = {}\n", "[host.\"a\".header]\nx=1\n[host.\"b\"]\n[host.\"a\"]\n",
		"server = '''\n# x\n'''\n", "ca = [\"a\", \"b\"]\nclient = [[\"a\", \"b\"], \"c\"]\n", "[[host]]\n", "[header]\na=['b']\n",
		"\"host\".\"x\".ca = 'y'\n", "[host.\"https://a\\\"b\"]\n", "x = { host = 1 }\n[a.b.c]\n", "#\n#\n[host.x]",
	} {
		f.Add(s)
	}
	ours := Hosts{Registry: "docker.io", Hops: []Hop{
		{URL: "http://127.0.0.1:5050", Capabilities: []string{Pull, Resolve}, DialTimeout: time.Second},
		{URL: "https://10.0.0.10:5000", Capabilities: []string{Pull, Resolve}},
	}}
	f.Fuzz(func(t *testing.T, theirs string) {
		alone := t.TempDir()
		writeTree(t, alone, map[string]string{"docker.io/hosts.toml": theirs})
		before, err := containerdTries(t, alone, "docker.io")
		if err != nil {
			// They name a CA that is not there: their pulls fail already.
			before = nil
		}
		merged, _, err := mergeText(ours, theirs)
		if err != nil {
			// Refusing is always safe: nothing is written then.
			return
		}
		certs := t.TempDir()
		writeTree(t, certs, map[string]string{"docker.io/hosts.toml": string(merged)})
		after, err := containerdTries(t, certs, "docker.io")
		if before == nil {
			return
		}
		if err != nil {
			t.Fatalf("containerd took theirs but not what came of it: %v\n%s", err, merged)
		}
		if len(after) < 2+len(before) {
			t.Fatalf("containerd reads %v alone and %v merged:\n%s", before, after, merged)
		}
		for i, want := range []string{"http://127.0.0.1:5050/v2", "https://10.0.0.10:5000/v2"} {
			if after[i].URL != want {
				t.Fatalf("host %d is %s:\n%s", i, after[i].URL, merged)
			}
		}
		if diff := cmp.Diff(before[len(before)-1], after[len(after)-1]); diff != "" {
			t.Fatalf("another server: %s\n%s", diff, merged)
		}
		if again, _, err := mergeText(ours, theirs); err != nil || string(again) != string(merged) {
			t.Fatal("merging twice gives two results")
		}
	})
}
