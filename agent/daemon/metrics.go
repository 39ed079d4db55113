package daemon

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/agent"
)

// metrics are the collectors of one Daemon.
type metrics struct {
	faults       *prometheus.GaugeVec   // part
	secrets      *prometheus.CounterVec // result
	leases       *prometheus.CounterVec // result
	changed      prometheus.Counter
	certificates prometheus.Gauge
	expiry       prometheus.Gauge
	applied      *prometheus.GaugeVec // configuration

	last *agent.Report
}

// newMetrics registers the collectors with reg unless that is nil.
func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	const prefix = "connected_registry_agent_"
	m := &metrics{
		faults: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "faults", Help: "What is wrong at present, by the part of the agent that is concerned.",
		}, []string{"part"}),
		secrets: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "secrets_read_total", Help: "Contents of CA Secrets that were taken, refused, or found missing.",
		}, []string{"result"}),
		leases: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "lease_writes_total", Help: "Writes of the node's Lease, by result.",
		}, []string{"result"}),
		changed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: prefix + "files_changed_total", Help: "Files of the node that were written or removed.",
		}),
		certificates: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: prefix + "ca_certificates", Help: "CA certificates that the node trusts for the registry.",
		}),
		expiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: prefix + "ca_expiry_timestamp_seconds", Help: "When the first of these certificates expires. 0: there are none.",
		}),
		applied: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "configuration_applied", Help: "1 for the digest of the configuration that is in effect.",
		}, []string{"digest"}),
	}
	for _, part := range []string{partConfiguration, partSecret, partNode, partRuntime, partCache, partState} {
		m.faults.WithLabelValues(part).Set(0)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.faults, m.secrets, m.leases, m.changed, m.certificates, m.expiry, m.applied} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) secretSeen(s *source) {
	result := "taken"
	switch {
	case s.refused:
		result = "refused"
	case s.fault != "":
		result = "missing"
	}
	m.secrets.WithLabelValues(result).Inc()
}

func (m *metrics) leaseWritten(err error) {
	result := "written"
	if err != nil {
		result = "failed"
	}
	m.leases.WithLabelValues(result).Inc()
}

func (m *metrics) faultsAre(all map[string]fault) {
	counts := map[string]float64{partConfiguration: 0, partSecret: 0, partNode: 0, partRuntime: 0, partCache: 0, partState: 0}
	for key, f := range all {
		if !f.note {
			part, _, _ := strings.Cut(key, "/")
			counts[part]++
		}
	}
	for part, n := range counts {
		m.faults.WithLabelValues(part).Set(n)
	}
}

func (m *metrics) nodeIs(r *agent.Report, a acknowledgement) {
	if r == m.last {
		return
	}
	m.last = r
	m.applied.Reset()
	if a.configuration != "" {
		m.applied.WithLabelValues(a.configuration).Set(1)
	}
	if r == nil {
		m.certificates.Set(0)
		m.expiry.Set(0)
		return
	}
	m.changed.Add(float64(r.Changed))
	m.certificates.Set(float64(r.Config.CA.Len()))
	m.expiry.Set(0)
	if end := r.Config.CA.NotAfter(); !end.IsZero() {
		m.expiry.Set(float64(end.Unix()))
	}
}
