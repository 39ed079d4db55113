package syncer

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/storage"
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

// maintainMetrics are those of looking after the store.
type maintainMetrics struct {
	runs                                                *prometheus.CounterVec
	lastSuccess, duration, waiting, skipped, stored     prometheus.Gauge
	manifests, layers, blobs, freed, uploads, temporary prometheus.Counter
	scrubbedBlobs, scrubbedBytes, corrupt               prometheus.Counter
	damaged                                             prometheus.Gauge
}

// newMaintainMetrics registers them, with registerer nil nowhere.
func newMaintainMetrics(registerer prometheus.Registerer) (*maintainMetrics, error) {
	var all []prometheus.Collector
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "connected_registry_" + name, Help: help})
		all = append(all, c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "connected_registry_" + name, Help: help})
		all = append(all, g)
		return g
	}
	m := &maintainMetrics{
		runs:          prometheus.NewCounterVec(prometheus.CounterOpts{Name: "connected_registry_gc_runs_total", Help: "Garbage collections that ended, by their outcome."}, []string{"state"}),
		lastSuccess:   gauge("gc_last_success_timestamp_seconds", "End of the last garbage collection that came to its end."),
		duration:      gauge("gc_last_duration_seconds", "Duration of the last garbage collection, with scrubbing."),
		manifests:     counter("gc_removed_manifests_total", "Manifests taken out of repositories."),
		layers:        counter("gc_removed_layers_total", "Layers taken out of repositories."),
		blobs:         counter("gc_removed_blobs_total", "Blobs deleted."),
		freed:         counter("gc_freed_bytes_total", "Bytes of blobs deleted."),
		uploads:       counter("gc_removed_uploads_total", "Uploads deleted that nobody went on with."),
		temporary:     counter("gc_removed_files_total", "Temporary files deleted that crashes had left, and old files in quarantine."),
		waiting:       gauge("gc_waiting", "Links and blobs that are to go and wait for their grace time."),
		skipped:       gauge("gc_skipped_repositories", "Repositories left alone because what is tagged there cannot be read."),
		stored:        gauge("gc_stored_bytes", "Bytes of all distinct content, as counted last."),
		scrubbedBlobs: counter("scrub_blobs_total", "Blobs read again and compared with their digest."),
		scrubbedBytes: counter("scrub_bytes_total", "Bytes read for that."),
		corrupt:       counter("scrub_corrupt_total", "Blobs found corrupt by that and set aside."),
		damaged:       gauge("scrub_damaged", "Blobs that were found corrupt, by whomever, and have not come back."),
	}
	// They are there before anything happened, so that alerts can look at them.
	m.runs.WithLabelValues(stateSucceeded)
	m.runs.WithLabelValues(stateFailed)
	if registerer == nil {
		return m, nil
	}
	for _, c := range append(all, m.runs) {
		if err := registerer.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// The outcomes of looking after the store.
const (
	stateSucceeded = "Succeeded"
	stateFailed    = "Failed"
)

// ended notes how looking after the store ended, and after how long.
func (m *maintainMetrics) ended(took time.Duration, err error) {
	m.duration.Set(took.Seconds())
	if err != nil {
		m.runs.WithLabelValues(stateFailed).Inc()
		return
	}
	m.runs.WithLabelValues(stateSucceeded).Inc()
	m.lastSuccess.SetToCurrentTime()
}

// observe adds what was done, which may have been broken off.
func (m *maintainMetrics) observe(did storage.Maintained, finished bool) {
	m.manifests.Add(float64(did.Collected.Manifests))
	m.layers.Add(float64(did.Collected.Layers))
	m.blobs.Add(float64(did.Collected.Blobs))
	m.freed.Add(float64(did.Collected.Bytes))
	m.uploads.Add(float64(did.Swept.Uploads))
	m.temporary.Add(float64(did.Swept.Temporary))
	m.scrubbedBlobs.Add(float64(did.Scrubbed.Blobs))
	m.scrubbedBytes.Add(float64(did.Scrubbed.Bytes))
	m.corrupt.Add(float64(did.Scrubbed.Corrupt))
	if finished {
		m.waiting.Set(float64(did.Collected.Waiting))
		m.skipped.Set(float64(len(did.Collected.Skipped)))
		m.stored.Set(float64(did.Usage.Total))
		m.damaged.Set(float64(len(did.Damaged)))
	}
}
