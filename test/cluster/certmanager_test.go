package cluster

import (
	"strings"
	"testing"
)

// TestCertManagerChart installs cert-manager as users do, from its own chart,
// and has it refuse and issue.
func TestCertManagerChart(t *testing.T) {
	config := testConfig(t, "chart")
	config.Nodes = 1
	c, err := New(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := c.LoadCertManager(t.Context()); err != nil {
		t.Fatal(err)
	}
	chart, err := c.CertManagerChart(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Helm(t.Context(), "install", "cert-manager", chart, "--namespace=cert-manager", "--create-namespace",
		"--set=crds.enabled=true", "--wait", "--timeout=3m")
	if err != nil {
		pods, _ := c.Kubectl(t.Context(), "describe", "pods", "--namespace=cert-manager")
		logs, _ := c.Kubectl(t.Context(), "logs", "--namespace=cert-manager", "--selector=app.kubernetes.io/instance=cert-manager", "--prefix")
		t.Fatalf("%v\n%s\n%s", err, pods, logs)
	}
	apply(t, c, "certificates.yaml")
	kubectl(t, c, "wait", "--for=condition=Ready", "certificate/root", "certificate/leaf", "--timeout=90s")

	// Both an issuer that signs itself and one with an authority: the schema
	// lets that pass, the webhook does not.
	err = c.Apply(t.Context(), strings.NewReader(`{"apiVersion": "cert-manager.io/v1", "kind": "Issuer",
		"metadata": {"name": "two", "namespace": "default"}, "spec": {"selfSigned": {}, "ca": {"secretName": "root"}}}`))
	if err == nil || !strings.Contains(err.Error(), "webhook.cert-manager.io") {
		t.Errorf("the webhook let an issuer of two kinds pass: %v", err)
	}
}
