package e2e

import (
	"strconv"
	"strings"
	"testing"

	"github.com/connected-registry/connected-registry/test/cluster"
)

// sum is a metric of a node's cache; one with labels has to be given with all of
// them.
func (c *caches) sum(t *testing.T, n *cluster.Node, metric string) float64 {
	t.Helper()
	out, err := n.Run(t.Context(), "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8082/metrics")
	if err != nil {
		t.Logf("metrics of %s: %v", n.Name(), err) // its agent begins
		return 0
	}
	return metricOf(out, "connected_registry_cache_"+metric)
}

// registrySum is a metric of all replicas together.
func (c *caches) registrySum(t *testing.T, metric string) (sum float64) {
	t.Helper()
	for _, name := range strings.Fields(kubectl(t, c.c, "get", "pods", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry", "-o", "jsonpath={.items[*].metadata.name}")) {
		sum += metricOf([]byte(kubectl(t, c.c, "get", "--raw", "/api/v1/namespaces/"+Namespace+"/pods/"+name+":8081/proxy/metrics")), "connected_registry_"+metric)
	}
	return sum
}

func metricOf(text []byte, metric string) float64 {
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, metric+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err == nil {
				return n
			}
		}
	}
	return 0
}
