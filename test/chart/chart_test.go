package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
)

var update = flag.Bool("update", false, "write the golden files anew")

const connection = "connectionString=ConnectedRegistryName=edge;SyncTokenName=edge-sync;SyncTokenPassword=secret;" +
	"ParentGatewayEndpoint=contoso.eastus.data.azurecr.io;ParentEndpointProtocol=https"

func repository(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestMain(m *testing.M) {
	flag.Parse()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err == nil {
		err = deps(context.Background(), root)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// template renders the chart, with --set for each of sets.
func template(t *testing.T, sets ...string) (string, error) {
	t.Helper()
	args := []string{"template", "edge", chartDir, "--namespace=connected-registry", "--kube-version=" + kubeVersion}
	for _, set := range sets {
		args = append(args, "--set="+set)
	}
	out, err := helm(t.Context(), repository(t), args...)
	return string(out), err
}

var (
	certificate = base64.StdEncoding.EncodeToString([]byte("-----BEGIN CERTIFICATE-----\n"))
	key         = base64.StdEncoding.EncodeToString([]byte("-----BEGIN PRIVATE KEY-----\n"))
	noManager   = []string{"cert-manager.enabled=false", "cert-manager.install=false"}
)

// TestGolden compares what the chart renders, cert-manager's part aside. The
// first case is Azure's quickstart; the following are its tutorial's.
// The last are the object stores, with all that one can be told and as their
// platforms give an identity.
func TestGolden(t *testing.T) {
	cases := map[string][]string{
		"quickstart":     {connection, "service.clusterIP=192.100.100.1", "pvc.storageClassName=azurefile-csi-premium", "registry.replicas=3"},
		"own-manager":    {connection, "service.clusterIP=192.100.100.1", "cert-manager.install=false"},
		"own-pair":       append([]string{connection, "service.clusterIP=192.100.100.1", "tls.crt=" + certificate, "tls.key=" + key, "tls.cacrt=" + certificate}, noManager...),
		"own-secret":     append([]string{connection, "service.clusterIP=192.100.100.1", "tls.secret=k8secret"}, noManager...),
		"no-trust":       append([]string{connection, "service.clusterIP=192.100.100.1", "trustDistribution.enabled=false"}, noManager...),
		"plain-http":     append([]string{connection, "service.clusterIP=192.100.100.1", "httpEnabled=true", "trustDistribution.enabled=false"}, noManager...),
		"every-value":    append([]string{"@testdata/every-value.yaml"}, noManager...),
		"least-of-nodes": append([]string{"trustDistribution.systemTrust=false", "trustDistribution.useNodeSelector=true", "agent.containerdPath=/var/lib/rancher/k3s/agent/etc/containerd"}, noManager...),
		"s3": append([]string{connection, "networkPolicy.enabled=true", "storage.s3.bucket=images", "storage.s3.region=eu-central-1", "storage.s3.endpoint=https://minio.example.com:9000",
			"storage.s3.prefix=edge", "storage.s3.pathStyle=true", "storage.credentialsSecret=minio", "storage.caSecret=minio-ca", "storage.scratchSize=8Gi", "registry.podAnnotations.a=b"}, noManager...),
		"azure": append([]string{connection, "@testdata/azure.yaml"}, noManager...),
		"gcs":   append([]string{connection, "storage.gcs.bucket=images", `registry.serviceAccountAnnotations.iam\.gke\.io/gcp-service-account=edge@shop.example`}, noManager...),
	}
	for name, sets := range cases {
		t.Run(name, func(t *testing.T) {
			args := []string{"template", "edge", chartDir, "--namespace=connected-registry", "--kube-version=" + kubeVersion}
			for _, set := range sets {
				if file, ok := strings.CutPrefix(set, "@"); ok {
					args = append(args, "--values="+filepath.Join("test/chart", file))
				} else {
					args = append(args, "--set="+set)
				}
			}
			out, err := helm(t.Context(), repository(t), args...)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for _, doc := range documents(out) {
				if strings.Contains(doc, "app.kubernetes.io/part-of: connected-registry") {
					got.WriteString("---\n" + doc)
				}
			}
			golden(t, name+".golden.yaml", got.String())
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (run with -update to accept):\n%s", name, diff)
	}
}

// TestRefusals says what is wrong in words that name the value and the remedy.
func TestRefusals(t *testing.T) {
	const base = "ConnectedRegistryName=edge;SyncTokenName=s;SyncTokenPassword=p;ParentGatewayEndpoint=e;ParentEndpointProtocol="
	cases := map[string]struct {
		sets []string
		want string
	}{
		"no address":           {[]string{"service.clusterIP=10.0.0.256"}, `service.clusterIP "10.0.0.256" is neither an IPv4 nor an IPv6 address`},
		"a network":            {[]string{"service.clusterIP=10.0.0.0/16"}, `neither an IPv4 nor an IPv6 address`},
		"no IPv6":              {[]string{"service.clusterIP=fd00::1::2"}, `neither an IPv4 nor an IPv6 address`},
		"no replica":           {[]string{"registry.replicas=0"}, `at '/registry/replicas': minimum: got 0, want 1`},
		"replicas in words":    {[]string{"registry.replicas=three"}, `at '/registry/replicas': got string, want integer`},
		"two certificates":     {append([]string{"tls.secret=k8secret", "tls.crt=" + certificate, "tls.key=" + key}, noManager...), `tls.secret and tls.crt, tls.key or tls.cacrt are both set`},
		"no key":               {append([]string{"tls.crt=" + certificate}, noManager...), `tls.crt is set without tls.key`},
		"no certificate":       {append([]string{"tls.key=" + key}, noManager...), `tls.key is set without tls.crt`},
		"a CA alone":           {append([]string{"tls.cacrt=" + certificate}, noManager...), `tls.cacrt is set without`},
		"not base64":           {append([]string{"tls.crt=-----BEGIN CERTIFICATE-----", "tls.key=" + key}, noManager...), `at '/tls/crt'`},
		"key for certificate":  {append([]string{"tls.crt=" + key, "tls.key=" + key}, noManager...), `tls.crt is not PEM in base64`},
		"pair and manager":     {[]string{"tls.secret=k8secret"}, `add cert-manager.enabled=false and cert-manager.install=false`},
		"unused manager":       {[]string{"cert-manager.enabled=false"}, `add cert-manager.install=false`},
		"trust over HTTP":      {append([]string{"httpEnabled=true"}, noManager...), `add trustDistribution.enabled=false`},
		"manager for HTTP":     {[]string{"httpEnabled=true", "trustDistribution.enabled=false"}, `add cert-manager.enabled=false and cert-manager.install=false`},
		"pair for HTTP":        {append([]string{"httpEnabled=true", "trustDistribution.enabled=false", "tls.secret=a"}, noManager...), `choose one`},
		"half a string":        {[]string{"connectionString=ConnectedRegistryName=edge"}, `connectionString: ParentGatewayEndpoint is missing`},
		"no string":            {[]string{"connectionString=secret"}, `connectionString: part 1 is not one of`},
		"no password":          {[]string{"connectionString=ConnectedRegistryName=edge;SyncTokenName=s;ParentGatewayEndpoint=e;ParentEndpointProtocol=https"}, `SyncTokenPassword is missing`},
		"other protocol":       {[]string{"connectionString=" + base + "ftp"}, `ParentEndpointProtocol is neither http nor https`},
		"identity and token":   {[]string{"connectionString=" + base + "https;ManagedIdentityClientId=i"}, `both ManagedIdentityClientId and a sync token`},
		"twice":                {[]string{"connectionString=" + base + "https;SyncTokenName=s"}, `SyncTokenName occurs twice`},
		"two parents":          {[]string{connection, "parent.endpoint=example.com"}, `connectionString and parent both name a parent`},
		"unknown key":          {[]string{"replicas=3"}, `additional properties 'replicas' not allowed`},
		"unknown key of spec":  {[]string{"sync.shedule=daily"}, `at '/sync': additional properties 'shedule' not allowed`},
		"unknown key in list":  {[]string{"repositories[0].nam=a"}, `additional properties 'nam' not allowed`},
		"mode":                 {[]string{"mode=readonly"}, `at '/mode': value must be one of 'ReadOnly', 'ReadWrite'`},
		"size":                 {[]string{"pvc.storageRequest=500 GB"}, `at '/pvc/storageRequest'`},
		"volume of one":        {[]string{"pvc.accessModes={ReadWriteOnce}"}, `pvc.accessModes lacks ReadWriteMany`},
		"no bucket":            {[]string{"storage.s3.region=eu-central-1"}, `storage.s3.bucket is missing: give the bucket that content is to be kept in`},
		"no container":         {[]string{"storage.azure.account=images"}, `storage.azure.container is missing: give the container`},
		"no account":           {[]string{"storage.azure.container=edge"}, `storage.azure.account is missing: give the storage account`},
		"two object stores":    {[]string{"storage.s3.bucket=a", "storage.gcs.bucket=a"}, `storage.gcs and storage.s3 are given: content is kept in one object store, so leave the others out`},
		"a claim and a bucket": {[]string{"storage.s3.bucket=a", "pvc.existingClaim=content"}, `storage.s3 keeps content in an object store, and pvc.existingClaim names a volume: leave one of them out`},
		"for no object store":  {[]string{"storage.credentialsSecret=a"}, `storage.credentialsSecret is set without an object store: add storage.s3, storage.azure or storage.gcs`},
		"a CA for HTTP":        {[]string{"storage.s3.bucket=a", "storage.caSecret=ca", "storage.s3.endpoint=http://minio:9000"}, `storage.s3.endpoint is plain HTTP: write https://`},
		"endpoint without URL": {[]string{"storage.s3.bucket=a", "storage.s3.endpoint=minio:9000"}, `at '/storage/s3/endpoint'`},
		"key of another store": {[]string{"storage.s3.bucket=a", "storage.s3.account=a"}, `at '/storage/s3': additional properties 'account' not allowed`},
		"cert-manager's value": {[]string{"certmanager.shedule=daily"}, `shedule`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := template(t, c.sets...)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v\nwant: %s", err, c.want)
			}
			if err != nil && strings.Contains(c.sets[0], "SyncTokenPassword=secret") && strings.Contains(strings.SplitN(err.Error(), "\n", 2)[1], "=secret") {
				t.Errorf("the message quotes the password: %v", err)
			}
		})
	}
}

// TestAddresses accepts every form of address.
func TestAddresses(t *testing.T) {
	for _, addr := range []string{"192.100.100.1", "0.0.0.0", "fd00::1", "::1", "fd00:10:96::a:50", "2001:db8:0:0:0:0:0:1", "fe80::"} {
		out, err := template(t, append([]string{"service.clusterIP=" + addr}, noManager...)...)
		if err != nil || !strings.Contains(out, `clusterIP: "`+addr+`"`) {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

// TestCertManager installs cert-manager with its definitions unless told not to,
// and none of its objects of ours, which the first install could not hold.
func TestCertManager(t *testing.T) {
	with, err := template(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`name: "certificates.cert-manager.io"`, "name: edge-cert-manager-webhook", "quay.io/jetstack/cert-manager-controller:v", "name: certmanager-webhook"} {
		if !strings.Contains(with, want) {
			t.Errorf("no %s", want)
		}
	}
	without, err := template(t, "cert-manager.install=false")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(without, "jetstack") {
		t.Error("cert-manager is there though it is not to be installed")
	}
	for _, doc := range documents([]byte(with)) {
		var object struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if strings.HasPrefix(doc, "apiVersion: cert-manager.io/") || strings.Contains(doc, "\napiVersion: cert-manager.io/") {
			t.Errorf("an object of cert-manager's kinds:\n%s", doc)
		}
	}
}

func TestLint(t *testing.T) {
	for _, sets := range [][]string{nil, append([]string{connection}, noManager...)} {
		args := []string{"lint", chartDir, "--strict", "--quiet", "--kube-version=" + kubeVersion}
		for _, set := range sets {
			args = append(args, "--set="+set)
		}
		if out, err := helm(t.Context(), repository(t), args...); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// TestInStep: what follows from the chart has been made from it as it is.
func TestInStep(t *testing.T) {
	root := repository(t)
	crd, err := os.ReadFile(filepath.Join(root, "manifests", crdFile))
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile("values.schema.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want, err := plain(t.Context(), root, crd)
	if err != nil {
		t.Fatal(err)
	}
	want[chartDir+"/crds/"+crdFile] = crd
	if want[chartDir+"/values.schema.json"], err = valuesSchema(base, crd); err != nil {
		t.Fatal(err)
	}
	for name, data := range want {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || !bytes.Equal(data, got) {
			t.Errorf("%s is out of step (%v): run make manifests", name, err)
		}
	}
}

// TestPrefetchManifest: what prefetching for workloads needs besides install.yaml
// is the right to list them, in objects of its own, so that applying either file
// again takes nothing from the other.
func TestPrefetchManifest(t *testing.T) {
	type object struct {
		Kind     string
		Metadata struct{ Name string }
		Rules    []struct{ Verbs []string }
	}
	read := func(file string) (all []object) {
		data, err := os.ReadFile(filepath.Join(repository(t), "manifests", file))
		if err != nil {
			t.Fatal(err)
		}
		for _, doc := range documents(data) {
			var o object
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				t.Fatalf("%v in\n%s", err, doc)
			}
			all = append(all, o)
		}
		return all
	}
	installed := make(map[string]bool)
	for _, o := range read("install.yaml") {
		installed[o.Kind+" "+o.Metadata.Name] = true
	}
	var kinds []string
	for _, o := range read("prefetch-workloads.yaml") {
		kinds = append(kinds, o.Kind)
		if name := o.Kind + " " + o.Metadata.Name; installed[name] {
			t.Errorf("%s is in install.yaml too", name)
		}
		for _, rule := range o.Rules {
			if diff := cmp.Diff([]string{"list"}, rule.Verbs); diff != "" {
				t.Errorf("%s (-want +got):\n%s", o.Metadata.Name, diff)
			}
		}
	}
	if diff := cmp.Diff([]string{"ClusterRole", "ClusterRoleBinding"}, kinds); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestSchemaKnowsEveryValue: nothing in values.yaml is unchecked, and no schema
// is for a value that does not exist.
func TestSchemaKnowsEveryValue(t *testing.T) {
	var values, schema struct {
		Properties map[string]any `yaml:",inline"`
	}
	for file, into := range map[string]any{filepath.Join(repository(t), chartDir, "values.yaml"): &values, "values.schema.yaml": &schema} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(data, into); err != nil {
			t.Fatal(err)
		}
	}
	properties := schema.Properties["properties"].(map[string]any)
	for name := range values.Properties {
		if properties[name] == nil {
			t.Errorf("values.schema.yaml lacks %s", name)
		}
	}
	for name := range properties {
		if _, ok := values.Properties[name]; !ok && name != "global" {
			t.Errorf("values.yaml lacks %s", name)
		}
	}
}
