package registry

import (
	"io"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are a replica's. Labels take few values: an endpoint, a method and a
// status, never a repository or a client.
type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	sent     *prometheus.CounterVec
	received *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, s *Server) (*metrics, error) {
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
		received: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "connected_registry_received_bytes_total",
			Help: "Bytes of requests received, without headers, by endpoint.",
		}, []string{"endpoint"}),
	}
	if reg == nil {
		return m, nil
	}
	store := s.cfg.Store
	uploads := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "connected_registry_uploads_in_flight",
		Help: "Requests that bring blobs and are served now.",
	}, func() float64 { return float64(len(s.uploads)) })
	rehashed := prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "connected_registry_storage_rehashed_total",
		Help: "Blobs that had lost their seal, were hashed again and found right.",
	}, func() float64 { return float64(store.Stats().Rehashed) })
	quarantined := prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "connected_registry_storage_quarantined_total",
		Help: "Blobs found corrupt and set aside.",
	}, func() float64 { return float64(store.Stats().Quarantined) })
	all := []prometheus.Collector{m.requests, m.seconds, m.sent, m.received, uploads, rehashed, quarantined}
	if s.keys != nil {
		all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "connected_registry_certificate_not_after_timestamp_seconds",
			Help: "When the serving certificate expires.",
		}, func() float64 { return float64(s.keys.current.Load().Leaf.NotAfter.Unix()) }))
	}
	for _, c := range all {
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

// countedBody counts what is read of a request.
type countedBody struct {
	io.ReadCloser
	bytes prometheus.Counter
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.bytes.Add(float64(n))
	return n, err
}
