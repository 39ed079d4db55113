package v1alpha1

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestLoadEveryField(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "full.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Load("full.yaml", data)
	if err != nil {
		t.Fatal(err)
	}
	maxSize, minFree := resource.MustParse("20Gi"), resource.MustParse("5000000000")
	bandwidth, quota := resource.MustParse("2Mi"), resource.MustParse("1Ti")
	last := metav1.NewTime(time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC).Local())
	want := &ConnectedRegistry{
		TypeMeta:   metav1.TypeMeta{APIVersion: APIVersion, Kind: Kind},
		ObjectMeta: metav1.ObjectMeta{Name: "edge", Namespace: "registry", Labels: map[string]string{"site": "north"}},
		Spec: Spec{
			Mode:        ModeReadWrite,
			LoginServer: "edge.example.com:5000",
			Parent: &Parent{
				Endpoint:             "https://registry.example.com",
				CredentialsSecretRef: &SecretRef{Name: "parent"},
				CASecretRef:          &SecretRef{Name: "parent-ca"},
			},
			Repositories: []Repository{
				{Name: "team/**", Tags: Tags{Include: []string{"1.*", "semver:>=2.1 <3", "stable"}, Exclude: []string{"*-rc?", "regex:.*-(arm|amd)64"}, Newest: 20}, Platforms: []string{"linux/amd64", "linux/arm/v7"}},
				{Name: "base/debian"},
			},
			Sync: Sync{
				Schedule: "*/5 * * * *", Window: "PT3H", Concurrency: 4, ChunkSizeInMb: 64, MaxBandwidth: &bandwidth,
				MaxRequestsPerHour: 300, MessageTTL: "P7D", OnDemand: new(false), Referrers: new(false), MaxRemovals: 20,
			},
			AnonymousPull: true,
			ClientTokens: []ClientToken{{
				Name:      "kubelet",
				SecretRef: SecretRef{Name: "kubelet-token"},
				ScopeMap:  []Scope{{Repositories: []string{"**"}, Actions: []Action{ActionContentRead, ActionMetadataRead}}},
			}},
			Mirrors:   []Mirror{{Registry: "docker.io", ResolveTags: new(false), Fallback: new(true)}},
			NodeCache: NodeCache{MaxSize: &maxSize, MinFreeDisk: &minFree, OfflineAccess: "P7D"},
			Upstreams: []Upstream{{
				Parent:       Parent{Endpoint: "ghcr.io", CredentialsSecretRef: &SecretRef{Name: "ghcr"}},
				Prefix:       "ghcr",
				Repositories: []Repository{{Name: "team/tool"}},
			}},
			TLS: TLS{Source: TLSSourceSecret, SecretName: "edge-tls"},
			TrustDistribution: TrustDistribution{
				CASecrets:   []CASecret{{Name: "site-ca", Hosts: []string{"harbor.site.example:8443"}}},
				SystemTrust: new(false), NodeTimeout: "PT1H", Hold: "PT1S",
			},
			ImmutableTags:     []ImmutableTags{{Repositories: []string{"release/**"}, Tags: []string{"v*"}}},
			Quota:             Quota{Total: &quota},
			GarbageCollection: GarbageCollection{Enabled: new(false), Schedule: "0 4 * * 0", MinAge: "PT48H"},
			Notifications:     []Notification{{Events: []string{"team/*:push"}, URL: "https://hooks.example.com/push", SecretRef: &SecretRef{Name: "hook"}}},
			Suspend:           true,
			LogLevel:          LogLevelDebug,
		},
		Status: Status{
			ConnectionState: ConnectionStateOnline,
			LastSyncTime:    &last,
			Repositories:    []RepositoryStatus{{Name: "base/debian", TagsWanted: 3, TagsPresent: 2, BytesLeft: 1 << 40}},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLoadDefaults(t *testing.T) {
	for name, doc := range map[string]string{
		"yaml":       "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: edge}\nspec:\n  mirrors: [{registry: docker.io}]\n",
		"null spec":  "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata:\n  name: edge\nspec:\n  parent:\n  mirrors:\n  - registry: docker.io\n  sync:\n---\n# nothing more\n",
		"json":       "{\n\t\"apiVersion\": \"connectedregistry.io/v1alpha1\",\n\t\"kind\": \"ConnectedRegistry\",\n\t\"metadata\": {\"name\": \"edge\"},\n\t\"spec\": {\"mirrors\": [{\"registry\": \"docker.io\"}]}\n}\n",
		"with alias": "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: &n edge, labels: {is: *n}}\nspec:\n  mirrors: [{registry: docker.io}]\n",
		"windows":    "\ufeffapiVersion: connectedregistry.io/v1alpha1\r\nkind: ConnectedRegistry\r\nmetadata: {name: edge}\r\nspec:\r\n  mirrors: [{registry: docker.io}]\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Load("f", []byte(doc))
			if err != nil {
				t.Fatal(err)
			}
			want := Spec{
				Mode:     ModeReadOnly,
				LogLevel: LogLevelInformation,
				Sync: Sync{
					Schedule: "* * * * *", Concurrency: 6, ChunkSizeInMb: 16, MessageTTL: "P2D",
					OnDemand: new(true), Referrers: new(true), MaxRemovals: 50,
				},
				Mirrors:           []Mirror{{Registry: "docker.io", ResolveTags: new(true), Fallback: new(true)}},
				TLS:               TLS{Source: TLSSourceBuiltIn},
				TrustDistribution: TrustDistribution{SystemTrust: new(true), NodeTimeout: "PT15M", Hold: "PT5M"},
				GarbageCollection: GarbageCollection{Enabled: new(true), Schedule: "0 3 * * *", MinAge: "PT24H"},
			}
			if diff := cmp.Diff(want, got.Spec); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// head is four lines long.
const head = "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: edge}\nspec:\n"

func TestLoadProblems(t *testing.T) {
	tests := []struct {
		name string
		doc  string
		want []string
	}{
		{"empty", "", []string{`f:1: is empty: write a ConnectedRegistry, beginning with "apiVersion: connectedregistry.io/v1alpha1"`}},
		{"comment", "# nothing\n", []string{`f:1: is empty: write a ConnectedRegistry, beginning with "apiVersion: connectedregistry.io/v1alpha1"`}},
		{"list", "- a\n", []string{`f:1: is not a ConnectedRegistry: it must begin with "apiVersion: connectedregistry.io/v1alpha1"`}},
		{"kind", "apiVersion: v1\nkind: Pod\n", []string{"f:1: apiVersion: must be connectedregistry.io/v1alpha1", "f:2: kind: must be ConnectedRegistry"}},
		{"no kind", "\n\nmetadata: {}\n", []string{
			`f:3: apiVersion: is required: write "apiVersion: connectedregistry.io/v1alpha1"`,
			`f:3: kind: is required: write "kind: ConnectedRegistry"`,
		}},
		{"no name", "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\n", []string{"f:1: metadata.name: is required: give this connected registry a name"}},
		{"two documents", head + "  mode: ReadOnly\n---\nkind: Pod\n", []string{"f:7: has a second document: only one ConnectedRegistry is read"}},
		{"not YAML", head + "  mode: [\n", []string{"f:6: is not YAML: did not find expected node content"}},
		{"undefined alias", head + "  mode: *hunter2\n", []string{"f:5: is not YAML: an alias refers to nothing: put a value that begins with '*' or '&' in quotes"}},
		{"misspelt field", head + "  sync:\n    schedul: \"* * * * *\"\n", []string{"f:6: spec.sync.schedul: unknown field: did you mean schedule?"}},
		{"field elsewhere", head + "  window: PT3H\n", []string{"f:5: spec.window: unknown field: did you mean spec.sync.window?"}},
		{"field in a list elsewhere", head + "  scopeMap: []\n", []string{"f:5: spec.scopeMap: unknown field: did you mean spec.clientTokens[].scopeMap?"}},
		{"field of another program", head + "  nodeCache: {replicas: 3}\n", []string{"f:5: spec.nodeCache.replicas: unknown field: the fields here are maxSize, minFreeDisk, offlineAccess, peers, prefetchBandwidth, prefetchWorkloads"}},
		{"field by another case", head + "  Mode: ReadOnly\n", []string{"f:5: spec.Mode: unknown field: did you mean mode?"}},
		{"odd field", head + "  \"a\\nb\": 1\n", []string{`f:5: spec."a\nb": unknown field: the fields here are anonymousPull, clientTokens, garbageCollection, immutableTags, logLevel, loginServer, mirrors, mode, nodeCache, notifications, parent, quota, repositories, suspend, sync, tls, trustDistribution, upstreams`}},
		{"a field that does not exist", head + "  sync: {zzzz: true}\n", []string{"f:5: spec.sync.zzzz: unknown field: the fields here are chunkSizeInMb, concurrency, deletePropagation, maxBandwidth, maxRemovals, maxRequestsPerHour, messageTTL, onDemand, referrers, schedule, window"}},
		{"TLS Secret without a name", head + "  tls: {source: Secret}\n", []string{"f:5: spec.tls.secretName: is required: name a Secret"}},
		{"TLS Secret that is not used", head + "  tls: {secretName: a}\n", []string{"f:5: spec.tls.secretName: belongs to source Secret alone: leave it out or change the source"}},
		{"nothing to trust", head + "  tls: {disabled: true}\n", []string{"f:5: spec.tls.disabled: leaves nothing to trust: set trustDistribution.disabled as well"}},
		{"CA Secret twice", head + "  trustDistribution:\n    caSecrets:\n    - name: a\n    - name: a\n      hosts: [https://b]\n", []string{
			`f:8: spec.trustDistribution.caSecrets[1].name: "a" is in the list already: give it all its hosts there`,
			"f:9: spec.trustDistribution.caSecrets[1].hosts[0]: is more than a host: leave out the scheme, the path and credentials",
		}},
		{"durations", head + "  trustDistribution: {hold: soon}\n  garbageCollection: {minAge: PT1M}\n  sync: {messageTTL: PT1H}\n", []string{
			`f:5: spec.trustDistribution.hold: "soon" is not an ISO 8601 duration of weeks, days, hours, minutes and seconds: use for example "PT3H"`,
			`f:6: spec.garbageCollection.minAge: "PT1M" is not between PT1H and P365D`,
			`f:7: spec.sync.messageTTL: "PT1H" is not between P1D and P90D`,
		}},
		{"notification", head + "  notifications: [{url: 'ftp://key@a'}]\n", []string{
			`f:5: spec.notifications[0].events: is required: say what of, for example "team/*:push"`,
			`f:5: spec.notifications[0].url: is not a URL to send to: use for example "https://hooks.example.com/push"`,
		}},
		{"upstream without content", head + "  upstreams: [{endpoint: ghcr.io, prefix: /a}]\n", []string{
			`f:5: spec.upstreams[0].prefix: "/a" is not the beginning of a repository name: use for example "mirror/docker.io"`,
			"f:5: spec.upstreams[0].repositories: is required: name what to keep of this registry",
		}},
		{"twice", head + "  mode: ReadOnly\n  mode: ReadWrite\n", []string{"f:6: spec.mode: occurs twice: it is in line 5 already"}},
		{"number for a string", head + "  repositories:\n  - name: team/app\n    tags: {include: [1.10]}\n  parent: {endpoint: a.example}\n", []string{"f:7: spec.repositories[0].tags.include[0]: must be a string: put 1.10 in quotes"}},
		{"string for a bool", head + "  anonymousPull: \"yes\"\n", []string{"f:5: spec.anonymousPull: must be true or false"}},
		{"fraction for a number", head + "  sync:\n    concurrency: 1.5\n", []string{"f:6: spec.sync.concurrency: must be a whole number"}},
		{"mapping for a list", head + "  repositories:\n    name: a\n", []string{`f:6: spec.repositories: must be a list: begin each entry with "- "`}},
		{"scalar for a mapping", head + "  parent:\n    credentialsSecretRef: user:hunter2\n", []string{"f:6: spec.parent.credentialsSecretRef: must be a mapping with the fields name"}},
		{"mapping for a scalar", head + "  mode: {a: b}\n", []string{"f:5: spec.mode: must be a string"}},
		{"empty entry", head + "  repositories:\n  -\n", []string{"f:6: spec.repositories[0]: is empty"}},
		{"quantity", head + "  nodeCache:\n    maxSize: 20 GB\n    minFreeDisk: -1\n", []string{`f:6: spec.nodeCache.maxSize: "20 GB" is not a quantity: use for example "20Gi"`}},
		{"offline for ever", head + "  nodeCache:\n    offlineAccess: P400D\n", []string{`f:6: spec.nodeCache.offlineAccess: "P400D" is not between PT1M and P366D`}},
		{"negative quantity", head + "  nodeCache:\n    minFreeDisk: -1\n", []string{`f:6: spec.nodeCache.minFreeDisk: "-1" is not more than nothing`}},
		{"time", head + "status: {lastSyncTime: yesterday}\n", []string{`f:5: status.lastSyncTime: "yesterday" is not a time: use for example "2026-01-31T12:00:00Z"`}},
		{"merge key", head + "  sync: &s {concurrency: 2}\n  nodeCache:\n    <<: *s\n", []string{"f:7: spec.nodeCache.<<: merge keys are not read: write the fields out"}},
		{"key that is no string", head + "  1: a\n", []string{"f:5: spec: has a key that is not a string: put it in quotes"}},

		{"schedule", head + "  sync:\n    schedule: \"* * *\"\n", []string{`f:6: spec.sync.schedule: "* * *" is not a cron schedule of five fields: use for example "*/5 * * * *"`}},
		{"several", head + "  mode: Both\n  sync:\n    window: 3h\n    schedule: 0 0 31 2 *\n    concurrency: 65\n  logLevel: info\n", []string{
			`f:5: spec.mode: "Both" is not one of ReadOnly, ReadWrite`,
			`f:7: spec.sync.window: "3h" is not an ISO 8601 duration of weeks, days, hours, minutes and seconds: use for example "PT3H"`,
			`f:8: spec.sync.schedule: "0 0 31 2 *" never comes: there is no such day in such a month`,
			`f:9: spec.sync.concurrency: 65 is not between 1 and 64`,
			`f:10: spec.logLevel: "info" is not one of Debug, Information, Warning, Error, None`,
		}},
		{"removals", head + "  mode: ReadWrite\n  sync:\n    deletePropagation: true\n    maxRemovals: 101\n", []string{
			`f:7: spec.sync.deletePropagation: cannot stand beside mode ReadWrite, where it would remove what clients push: leave one of them out`,
			`f:8: spec.sync.maxRemovals: 101 is not a percentage from 1 to 100`,
		}},
		{"window", head + "  sync: {window: P8D}\n", []string{`f:5: spec.sync.window: "P8D" is not between PT1M and P7D`}},
		{"login server", head + "  loginServer: https://edge.example.com\n", []string{"f:5: spec.loginServer: is more than a host: leave out the scheme, the path and credentials"}},
		{"no parent", head + "  repositories:\n  - name: a\n", []string{"f:4: spec.parent: is required: name the registry that the repositories come from"}},
		{"no endpoint", head + "  parent:\n    insecure: true\n", []string{`f:5: spec.parent.endpoint: is required: name the parent, for example "registry.example.com"`}},
		{"endpoint with credentials", head + "  parent:\n    endpoint: https://user:hunter2@registry.example.com\n", []string{"f:6: spec.parent.endpoint: has credentials in it: put them into a Secret and name it in credentialsSecretRef"}},
		{"endpoint with a path", head + "  parent: {endpoint: registry.example.com/team}\n", []string{"f:5: spec.parent.endpoint: has a path in it: name the host here, and put the path into repositories[].name"}},
		{"endpoint with a scheme", head + "  parent: {endpoint: ftp://registry.example.com}\n", []string{"f:5: spec.parent.endpoint: has a scheme that is neither https:// nor http://"}},
		{"endpoint", head + "  parent: {endpoint: \"registry example\"}\n", []string{`f:5: spec.parent.endpoint: is not a host with or without a port: use for example "registry.example.com"`}},
		{"insecure https", head + "  parent: {endpoint: \"https://a.example\", insecure: true}\n", []string{"f:5: spec.parent.insecure: contradicts the https:// of the endpoint: leave one of them out"}},
		{"two credentials", head + "  parent:\n    connectionStringSecretRef: {name: a}\n    credentialsSecretRef: {name: b}\n    endpoint: a.example\n    insecure: true\n", []string{
			"f:7: spec.parent.credentialsSecretRef: cannot stand beside connectionStringSecretRef: leave one of them out",
			"f:8: spec.parent.endpoint: is in the connection string already: leave one of them out",
			"f:9: spec.parent.insecure: is in the connection string already, as ParentEndpointProtocol: leave it out",
		}},
		{"secret for its name", head + "  parent:\n    connectionStringSecretRef:\n      name: ConnectedRegistryName=a;SyncTokenPassword=hunter2\n", []string{"f:7: spec.parent.connectionStringSecretRef.name: is not the name of a Secret: use lower-case letters, digits, '-' and '.'"}},
		{"number for a secret's name", head + "  parent:\n    endpoint: a.example\n    credentialsSecretRef:\n      name: 4711\n", []string{"f:8: spec.parent.credentialsSecretRef.name: must be a string: put it in quotes"}},
		{"secret outside the directory", head + "  parent: {endpoint: a.example, caSecretRef: {name: ../etc}}\n", []string{"f:5: spec.parent.caSecretRef.name: is not the name of a Secret: use lower-case letters, digits, '-' and '.'"}},
		{"repositories", head + `  parent: {endpoint: docker.io}
  repositories:
  - tags: {include: ["a/b", "b**"], exclude: ["-"]}
  - name: nginx
  - name: Team/app
  - name: team/
    platforms: [linux, linux/arm/v7]
  - name: a//b*
  - name: _a
`, []string{
			`f:7: spec.repositories[0].name: is required: name a repository, or "**" for all`,
			`f:7: spec.repositories[0].tags.include[0]: "a/b" has a slash, which no tag has`,
			`f:7: spec.repositories[0].tags.include[1]: "b**" has "**" beside other characters: it must be a whole segment between slashes`,
			`f:7: spec.repositories[0].tags.exclude[0]: "-" is not a tag`,
			`f:8: spec.repositories[1].name: "nginx" is short for library/nginx on Docker Hub: write it in full`,
			`f:9: spec.repositories[2].name: "Team/app" has upper-case letters, which no repository name has`,
			`f:10: spec.repositories[3].name: "team/" has an empty segment: a slash at an end, or two in a row`,
			`f:11: spec.repositories[3].platforms[0]: "linux" is not a platform: use for example "linux/amd64" or "linux/arm/v7"`,
			`f:12: spec.repositories[4].name: "a//b*" has an empty segment: a slash at an end, or two in a row`,
			`f:13: spec.repositories[5].name: "_a" is not a repository name: use for example "team/app"`,
		}},
		{"tags", head + `  parent: {endpoint: a.example}
  repositories:
  - name: app
    tags:
      include:
      - regex:(
      - semver:one
      exclude: ["glob:*"]
      newest: -1
`, []string{
			`f:10: spec.repositories[0].tags.include[0]: "regex:(" is not a regular expression of RE2: missing closing )`,
			`f:11: spec.repositories[0].tags.include[1]: "semver:one" is not a range of versions: use for example "semver:>=1.2 <2"`,
			`f:12: spec.repositories[0].tags.exclude[0]: "glob:*" has a colon: only "regex:" and "semver:" may stand in front`,
			`f:13: spec.repositories[0].tags.newest: -1 is less than nothing: leave it out to keep all tags`,
		}},
		{"tokens", head + `  clientTokens:
  - name: a:b
    secretRef: {}
  - name: a
    secretRef: {name: s}
    scopeMap:
    - repositories: []
    - repositories: ["**"]
      actions: [pull]
  - {name: a, secretRef: {name: s}, scopeMap: [{repositories: [a], actions: [content/read]}]}
`, []string{
			`f:6: spec.clientTokens[0].name: "a:b" is not a name for a token: use letters, digits, '.', '_' and '-'`,
			`f:6: spec.clientTokens[0].scopeMap: is required: say what the token may do`,
			`f:7: spec.clientTokens[0].secretRef.name: is required: name a Secret`,
			`f:11: spec.clientTokens[1].scopeMap[0].repositories: is required: name repositories, or "**" for all`,
			`f:11: spec.clientTokens[1].scopeMap[0].actions: is required: name what is allowed, for example content/read`,
			`f:13: spec.clientTokens[1].scopeMap[1].actions[0]: "pull" is not one of content/read, content/write, content/delete, metadata/read, metadata/write`,
			`f:14: spec.clientTokens[2].name: "a" names another token already`,
		}},
		{"mirrors", head + "  mirrors:\n  - {}\n  - registry: docker.io\n  - registry: docker.io\n  - registry: \"a b\"\n  - registry: \"[::1\"\n  - registry: \"[::1]:5000\"\n  - registry: \"a:0\"\n", []string{
			`f:6: spec.mirrors[0].registry: is required: name a registry as image names do, for example "docker.io"`,
			`f:8: spec.mirrors[2].registry: "docker.io" is in the list already`,
			`f:9: spec.mirrors[3].registry: "a b" is not a host with or without a port: use for example "registry.example.com:5000"`,
			`f:10: spec.mirrors[4].registry: "[::1" is not a host with or without a port: use for example "registry.example.com:5000"`,
			`f:12: spec.mirrors[6].registry: "a:0" is not a host with or without a port: use for example "registry.example.com:5000"`,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load("f", []byte(tt.doc))
			if err == nil {
				t.Fatal("no error")
			}
			if diff := cmp.Diff(tt.want, strings.Split(err.Error(), "\n")); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("the error gives a secret away")
			}
		})
	}
}

func TestLoadBounds(t *testing.T) {
	if _, err := Load("f", make([]byte, maxDocument+1)); err == nil || err.Error() != "f:1: is larger than 1048576 bytes: is this the right file?" {
		t.Errorf("large document: %v", err)
	}
	bomb := head + "  mode: &a0 [x]\n"
	for i := range 20 {
		bomb += fmt.Sprintf("  a%d: &a%d [*a%d, *a%d, *a%d, *a%d]\n", i+1, i+1, i, i, i, i)
	}
	bomb += "  mirrors: *a20\n"
	if _, err := Load("f", []byte(bomb)); err == nil {
		t.Error("a document whose aliases multiply is taken")
	}
	deep := head + "  mirrors: " + strings.Repeat("[", 50_000) + strings.Repeat("]", 50_000)
	if _, err := Load("f", []byte(deep)); err == nil {
		t.Error("a document that is 50,000 levels deep is taken")
	}
	loop := head + "  repositories: &r [{name: a, tags: {include: *r}}]\n  parent: {endpoint: a.example}\n"
	if _, err := Load("f", []byte(loop)); err == nil {
		t.Error("a document that contains itself is taken")
	}
}

func FuzzLoad(f *testing.F) {
	full, err := os.ReadFile(filepath.Join("testdata", "full.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	f.Add([]byte(head))
	f.Add([]byte(head + "  sync: {schedule: \"TZ=0\"}\n  nodeCache: {maxSize: 1e9}\n---\n"))
	f.Add([]byte(head + "  repositories: &r\n  - *r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Load("f", data)
		if err == nil {
			if errs := c.Validate(); len(errs) > 0 {
				t.Errorf("loaded, but not valid: %v", errs)
			}
			return
		}
		for line := range strings.SplitSeq(err.Error(), "\n") {
			if !strings.HasPrefix(line, "f:") {
				t.Errorf("error of several lines, or without a position: %q", err)
			}
		}
	})
}
