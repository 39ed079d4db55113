package cache

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

// samples returns every counter and gauge of reg that is not zero.
func samples(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			name := strings.TrimPrefix(f.GetName(), "connected_registry_cache_")
			if len(labels) > 0 {
				name += fmt.Sprint(labels)
			}
			v := m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			if v != 0 {
				got[name] = v
			}
		}
	}
	return got
}

func TestMetrics(t *testing.T) {
	o := newOrigin(t)
	body := random(1000, 70)
	d := o.blob("app", body)
	md := o.manifest("app", "v1", testManifest(d))
	reg := prometheus.NewRegistry()
	n := start(t, Config{Registries: upstreams(o.URL), Metrics: reg})
	n.get(blobURL("app", d))
	n.settled()
	n.get(blobURL("app", d))
	n.get(manifestURL("app", "v1"))
	n.settled()
	n.get(blobURL("nowhere", md))
	o.setFront(answering(503))
	n.get(manifestURL("app", "v1"))
	n.get(manifestURL("app", "v2"))
	n.get(manifestURL("app", "v2") + "?ns=other.example")
	size := float64(len(testManifest(d)))
	want := map[string]float64{
		"requests_total[kind=blob result=miss]":                           1,
		"requests_total[kind=blob result=hit]":                            1,
		"requests_total[kind=manifest result=miss]":                       1,
		"requests_total[kind=manifest result=stale-tag]":                  1,
		"fallthroughs_total[cause=not-found]":                             1,
		"fallthroughs_total[cause=status]":                                1,
		"fallthroughs_total[cause=namespace]":                             1,
		"served_bytes_total[source=upstream]":                             1000 + size,
		"served_bytes_total[source=store]":                                1000 + size,
		"fetched_bytes_total":                                             1000 + size,
		"upstream_failures_total[cause=status registry=" + testHost + "]": 2,
		"stale_tags_served_total":                                         1,
		"stored_bytes":                                                    1000 + size,
		"stored_blobs":                                                    2,
		"fill_seconds":                                                    1,
	}
	got := samples(t, reg)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := New(Config{Dir: "x", Registries: upstreams(o.URL), Metrics: reg}); err == nil {
		t.Error("registered twice without an error")
	}
}
