package cache

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the collectors of one Cache.
type metrics struct {
	requests     *prometheus.CounterVec // kind, result
	refusals     *prometheus.CounterVec // cause
	served       *prometheus.CounterVec // source
	fetched      prometheus.Counter
	fromPeers    prometheus.Counter
	failures     *prometheus.CounterVec // registry, cause
	inFlight     prometheus.Gauge
	fillSeconds  prometheus.Histogram
	evicted      prometheus.Counter
	evictedBytes prometheus.Counter
	corrupt      *prometheus.CounterVec // source
	staleTags    prometheus.Counter
	hedges       prometheus.Counter
	prefetch     *prometheus.GaugeVec // state
	storedBytes  prometheus.GaugeFunc
	storedBlobs  prometheus.GaugeFunc

	// Of requests and served, what is counted most.
	manifestHits prometheus.Counter
	storeBytes   prometheus.Counter
}

// answered counts a request.
func (m *metrics) answered(k kind, how outcome) {
	if k == kindManifest && how.result == hitStored.result {
		m.manifestHits.Inc()
		return
	}
	m.requests.WithLabelValues(k.String(), how.result).Inc()
}

// sent counts bytes sent to a client.
func (m *metrics) sent(how outcome, n int64) {
	if how.source == fromStore {
		m.storeBytes.Add(float64(n))
		return
	}
	m.served.WithLabelValues(how.source).Add(float64(n))
}

// prefetched says how many of the images that SetPrefetch asked for are here.
func (m *metrics) prefetched(present, missing int) {
	m.prefetch.WithLabelValues("present").Set(float64(present))
	m.prefetch.WithLabelValues("missing").Set(float64(missing))
}

// newMetrics registers the collectors with reg unless that is nil. usage tells
// what the store holds.
func newMetrics(reg prometheus.Registerer, usage func() (bytes int64, blobs int)) (*metrics, error) {
	const prefix = "connected_registry_cache_"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + name, Help: help})
	}
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
	}
	gauge := func(name, help string, value func() float64) prometheus.GaugeFunc {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: prefix + name, Help: help}, value)
	}
	m := &metrics{
		requests:     vec("requests_total", "Requests answered with content, by what was asked for and how it was found.", "kind", "result"),
		refusals:     vec("fallthroughs_total", "Requests refused so that the client asks its next host, by cause.", "cause"),
		served:       vec("served_bytes_total", "Bytes sent to clients, by where they came from.", "source"),
		fetched:      counter("fetched_bytes_total", "Bytes received from upstreams."),
		fromPeers:    counter("peer_fetched_bytes_total", "Bytes received from other nodes."),
		failures:     vec("upstream_failures_total", "Requests to an upstream that gave no usable answer, by registry and cause.", "registry", "cause"),
		evicted:      counter("evictions_total", "Files evicted."),
		evictedBytes: counter("evicted_bytes_total", "Bytes of the files evicted."),
		corrupt:      vec("corrupt_total", "Content that did not match its digest, by where it came from.", "source"),
		hedges:       counter("hedged_requests_total", "Requests made a second time because the first took unusually long."),
		staleTags:    counter("stale_tags_served_total", "Tags answered from memory because no upstream could be reached."),
		storedBytes: gauge("stored_bytes", "Bytes in the store.", func() float64 {
			bytes, _ := usage()
			return float64(bytes)
		}),
		storedBlobs: gauge("stored_blobs", "Blobs in the store.", func() float64 {
			_, blobs := usage()
			return float64(blobs)
		}),
		prefetch: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "prefetch_images", Help: "Images that are wanted here before they are needed, by whether they were complete when last looked at.",
		}, []string{"state"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: prefix + "fills_in_flight", Help: "Blobs being downloaded.",
		}),
		fillSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: prefix + "fill_seconds", Help: "Time to download a blob.",
			Buckets: prometheus.ExponentialBuckets(0.01, 4, 9),
		}),
	}
	m.manifestHits = m.requests.WithLabelValues(kindManifest.String(), hitStored.result)
	m.storeBytes = m.served.WithLabelValues(fromStore)
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.refusals, m.served, m.fetched, m.fromPeers, m.failures, m.inFlight, m.fillSeconds,
		m.evicted, m.evictedBytes, m.corrupt, m.staleTags, m.hedges, m.prefetch, m.storedBytes, m.storedBlobs,
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("cache: registering metrics: %w", err)
		}
	}
	return m, nil
}
