package syncer

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the syncer's, nil when none are kept.
type metrics struct {
	runs        *prometheus.CounterVec
	bytes       prometheus.Counter
	fetched     prometheus.Counter
	linked      prometheus.Counter
	tags        prometheus.Counter
	removed     prometheus.Counter
	lastSuccess prometheus.Gauge
	duration    prometheus.Gauge
	incomplete  prometheus.Gauge
	bytesLeft   prometheus.Gauge
}

const metricsPrefix = "connected_registry_sync_"

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	if registerer == nil {
		return nil, nil
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help})
	}
	m := &metrics{
		runs:        prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + "runs_total", Help: "Synchronisations that ended, by their outcome."}, []string{"state"}),
		bytes:       counter("received_bytes_total", "Bytes received from the parent as blobs, manifests and lists."),
		fetched:     counter("blobs_fetched_total", "Blobs fetched from the parent."),
		linked:      counter("blobs_linked_total", "Blobs that another repository here had already."),
		tags:        counter("tags_updated_total", "Tags written."),
		removed:     counter("tags_removed_total", "Tags removed."),
		lastSuccess: gauge("last_success_timestamp_seconds", "End of the last synchronisation that brought everything."),
		duration:    gauge("last_duration_seconds", "Duration of the last synchronisation."),
		incomplete:  gauge("incomplete_repositories", "Repositories that the last synchronisation left incomplete."),
		bytesLeft:   gauge("left_bytes", "Bytes known to be missing after the last synchronisation."),
	}
	for _, c := range []prometheus.Collector{m.runs, m.bytes, m.fetched, m.linked, m.tags, m.removed, m.lastSuccess, m.duration, m.incomplete, m.bytesLeft} {
		if err := registerer.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// observe adds the outcome of a synchronisation.
func (m *metrics) observe(result Result) {
	if m == nil {
		return
	}
	m.runs.WithLabelValues(string(result.State)).Inc()
	m.bytes.Add(float64(result.BytesFetched))
	m.fetched.Add(float64(result.BlobsFetched))
	m.linked.Add(float64(result.BlobsLinked))
	m.tags.Add(float64(result.TagsUpdated))
	m.removed.Add(float64(result.TagsRemoved))
	m.duration.Set(result.End.Sub(result.Start).Seconds())
	incomplete, left := 0, int64(0)
	for _, repo := range result.Repositories {
		left += repo.BytesLeft
		if repo.Err != nil {
			incomplete++
		}
	}
	m.incomplete.Set(float64(incomplete))
	m.bytesLeft.Set(float64(left))
	if incomplete == 0 {
		m.lastSuccess.Set(float64(result.End.UnixNano()) / 1e9)
	}
}

// outboxMetrics are an Outbox's.
type outboxMetrics struct {
	waiting                     prometheus.Gauge
	brought, dropped, conflicts prometheus.Counter
}

func newOutboxMetrics(registerer prometheus.Registerer) (*outboxMetrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "connected_registry_outbox_" + name, Help: help})
	}
	m := &outboxMetrics{
		waiting:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "connected_registry_outbox_waiting", Help: "Changes by clients that the parent has not been told of."}),
		brought:   counter("brought_total", "Changes by clients that were brought to the parent."),
		dropped:   counter("dropped_total", "Changes by clients that the parent has not taken in time."),
		conflicts: counter("conflicts_total", "Changes by clients that contradict one at the parent."),
	}
	if registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.waiting, m.brought, m.dropped, m.conflicts} {
		if err := registerer.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
