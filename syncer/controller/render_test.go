package controller

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/syncer"
)

const fullSpec = `
  mode: ReadWrite
  loginServer: registry.site.example
  parent: {endpoint: registry.example.com, credentialsSecretRef: {name: parent}}
  repositories: [{name: team/app, tags: {include: ["1.*"]}}]
  clientTokens:
  - {name: ci, secretRef: {name: ci}, scopeMap: [{repositories: ["**"], actions: [content/read]}]}
  trustDistribution: {caSecrets: [{name: site-ca, hosts: ["harbor.site.example:8443"]}]}
  nodeCache: {maxSize: 20Gi}
`

func testService() service {
	return service{
		name: "connected-registry", namespace: "site", port: 443, portName: "https",
		clusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.50"), netip.MustParseAddr("fd00::50")},
		endpoints:  []string{"10.1.0.7:8443", "10.1.1.3:8443"},
	}
}

func TestNodeConfiguration(t *testing.T) {
	full := load(t, fullSpec)
	source, err := syncer.Resolve(t.Context(), full.Spec.Parent, secretMap{"parent/username": "robot", "parent/password": "hunter2"})
	if err != nil {
		t.Fatal(err)
	}
	odd := testService()
	odd.port = 8080
	for _, test := range []struct {
		name    string
		cr      *v1alpha1.ConnectedRegistry
		service service
		source  *syncer.Source
	}{
		{"node-full.yaml", full, testService(), source},
		{"node-least.yaml", load(t, "  {}\n"), testService(), nil},
		{"node-plain-http.yaml", load(t, "  tls: {disabled: true}\n  trustDistribution: {disabled: true}\n"), odd, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := nodeConfiguration(&test.cr.Spec, test.service, test.source, &fleet{})
			if err != nil {
				t.Fatal(err)
			}
			data, err := yaml.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(data), "hunter2") {
				t.Error("the parent's password is told to nodes")
			}
			if _, err := v1alpha1.LoadNodeConfiguration("node.yaml", data); err != nil {
				t.Errorf("nodes cannot read it: %v", err)
			}
			golden(t, test.name, string(data))
		})
	}
	headless := testService()
	headless.clusterIPs = nil
	if _, err := nodeConfiguration(&full.Spec, headless, source, &fleet{}); err == nil || !strings.Contains(err.Error(), "no cluster IP") {
		t.Errorf("without a cluster IP: %v", err)
	}
}

func TestReplicaData(t *testing.T) {
	cr := load(t, fullSpec)
	secrets := secretMap{"ci/password1": "correct horse\n", "parent/username": "robot", "parent/password": "hunter2"}
	tokens := clienttoken.NewRenderer()
	names := testService().names(cr.Spec.LoginServer, false)
	first, err := replicaData(t.Context(), cr, names, nil, nil, secrets, tokens)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "replica-resource.yaml", string(first[keyResource]))
	golden(t, "replica-names", string(first[keyNames]))
	loaded, err := v1alpha1.Load(keyResource, first[keyResource])
	if err != nil {
		t.Fatalf("replicas cannot read it: %v", err)
	}
	if diff := cmp.Diff(cr.Spec, loaded.Spec); diff != "" {
		t.Errorf("what replicas read: %s", diff)
	}
	if len(first[keySecret]) != 64 {
		t.Errorf("%d digits to sign with", len(first[keySecret]))
	}

	again, err := replicaData(t.Context(), cr, names, nil, first, secrets, clienttoken.NewRenderer())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again); diff != "" {
		t.Errorf("another leader renders the same differently: %s", diff)
	}

	// A Secret that is gone takes no client's access away.
	gone, err := replicaData(t.Context(), cr, names, nil, first, secretMap{}, tokens)
	if err == nil || !strings.Contains(err.Error(), "spec.clientTokens[0]: Secret ci") {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff(first, gone); diff != "" {
		t.Errorf("a Secret that is gone: %s", diff)
	}
	fresh, err := replicaData(t.Context(), cr, names, nil, nil, secretMap{}, tokens)
	if err == nil || fresh["ci.json"] != nil || fresh[keyResource] == nil {
		t.Errorf("a Secret that was never there: %v, error %v", fresh, err)
	}

	secrets["ci/password2"] = "battery staple"
	second, err := replicaData(t.Context(), cr, names, nil, first, secrets, tokens)
	if err != nil {
		t.Fatal(err)
	}
	var was, now clienttoken.File
	if err := json.Unmarshal(first["ci.json"], &was); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(second["ci.json"], &now); err != nil {
		t.Fatal(err)
	}
	if len(now.Passwords) != 2 || now.Passwords[0] != was.Passwords[0] {
		t.Errorf("the first password has another hash: %v, %v", was, now)
	}
	cr.Spec.ClientTokens = nil
	if none, err := replicaData(t.Context(), cr, names, nil, second, secrets, tokens); err != nil || none["ci.json"] != nil {
		t.Errorf("a token that is gone: %v, error %v", none, err)
	}
}

func TestSigningSecret(t *testing.T) {
	given := strings.Repeat("ab", 32)
	for _, test := range []struct {
		name, given, now string
		want             string // empty: a new one
		refused          bool
	}{
		{name: "none"},
		{name: "what there is", now: given, want: given},
		{name: "the operator's", given: given + "\n", now: strings.Repeat("cd", 32), want: given},
		{name: "the operator's as a text", given: "sixteen letters and more", want: "7369787465656e206c65747465727320616e64206d6f7265"},
		{name: "the operator's too short", given: "tiny", refused: true},
		{name: "what there is, broken", now: "nonsense"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := signingSecret([]byte(test.given), []byte(test.now))
			if test.refused {
				if err == nil || strings.Contains(err.Error(), test.given) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if test.want != "" && string(got) != test.want || len(got) < 32 {
				t.Errorf("%q", got)
			}
		})
	}
}

func TestEndpoints(t *testing.T) {
	slice := func(port int32, name string, endpoints ...discoveryv1.Endpoint) discoveryv1.EndpointSlice {
		return discoveryv1.EndpointSlice{Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}, Endpoints: endpoints}
	}
	ready := func(ready bool, addresses ...string) discoveryv1.Endpoint {
		return discoveryv1.Endpoint{Addresses: addresses, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
	}
	got := endpoints([]discoveryv1.EndpointSlice{
		slice(8443, "https", ready(true, "10.1.0.9"), ready(false, "10.1.0.8"), ready(true, "10.1.0.7")),
		slice(8443, "https", ready(true, "fd00::7"), ready(true, "10.1.0.7")),
		slice(8081, "health", ready(true, "10.1.0.7")),
	}, "https")
	want := []string{"10.1.0.7:8443", "10.1.0.9:8443", "[fd00::7]:8443"}
	if !slices.Equal(got, want) {
		t.Errorf("%v, expected %v", got, want)
	}
}

func TestOwn(t *testing.T) {
	cr := &v1alpha1.ConnectedRegistry{ObjectMeta: metav1.ObjectMeta{Name: "connected-registry", UID: "u-2"}}
	o := metav1.ObjectMeta{Labels: map[string]string{"theirs": "stays"}, OwnerReferences: []metav1.OwnerReference{{UID: "u-1", Kind: v1alpha1.Kind}}}
	if !own(&o, cr) || o.Labels["theirs"] != "stays" || o.Labels[managedByLabel] != managedBy || len(o.OwnerReferences) != 1 || o.OwnerReferences[0].UID != "u-2" {
		t.Errorf("%+v", o)
	}
	if own(&o, cr) {
		t.Error("changed again")
	}
}
