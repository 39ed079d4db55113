package registry

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/storage"
)

// metrics are a replica's. Labels take few values: an endpoint, a method and a
// status, never a repository or a client.
type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	sent     *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, store *storage.Store) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "connected_registry_requests_total",
			Help: "Requests answered, by endpoint, method and status.",
		}, []string{"endpoint", "method", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "connected_registry_request_duration_seconds",
			Help:    "Time from the request's header to the last byte of the answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .1, .5, 2, 10, 60, 300},
		}, []string{"endpoint"}),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "connected_registry_sent_bytes_total",
			Help: "Bytes of answers sent, without headers, by endpoint.",
		}, []string{"endpoint"}),
	}
	if reg == nil {
		return m, nil
	}
	rehashed := prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "connected_registry_storage_rehashed_total",
		Help: "Blobs that had lost their seal, were hashed again and found right.",
	}, func() float64 { return float64(store.Stats().Rehashed) })
	quarantined := prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "connected_registry_storage_quarantined_total",
		Help: "Blobs found corrupt and set aside.",
	}, func() float64 { return float64(store.Stats().Quarantined) })
	for _, c := range []prometheus.Collector{m.requests, m.seconds, m.sent, rehashed, quarantined} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) observe(end endpoint, method string, status int, bytes int64, took time.Duration) {
	switch method {
	case "GET", "HEAD", "PUT", "POST", "PATCH", "DELETE":
	default:
		method = "other" // what a client may invent is no label
	}
	m.requests.WithLabelValues(end.String(), method, strconv.Itoa(status)).Inc()
	m.seconds.WithLabelValues(end.String()).Observe(took.Seconds())
	m.sent.WithLabelValues(end.String()).Add(float64(bytes))
}
