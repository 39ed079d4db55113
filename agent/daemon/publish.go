package daemon

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

const (
	configMap = "connected-registry-node"
	// maxError bounds AnnotationError, in bytes.
	maxError = 1024
)

// fault is something that is wrong, or that an operator should know.
type fault struct {
	about   object
	reason  string // of the Event; empty: none is raised
	message string
	note    bool // nothing failed: it is not in the Lease
}

// The parts of the agent that can be at fault, as the metric names them.
const (
	partConfiguration = "configuration"
	partSecret        = "secret"
	partNode          = "node"
	partCache         = "cache"
	partState         = "state"
	partRuntime       = "runtime"
)

// acknowledgement is what the node has been brought to.
type acknowledgement struct {
	configuration string // digest
	fingerprints  string
}

// publish tells Lease, Events, metrics and probes what has become of it all.
func (d *Daemon) publish(n news) {
	faults := d.findFaults(n)
	for key, f := range faults {
		if d.faults[key] == f {
			continue
		}
		d.log.Warn(f.message, "part", key)
		if f.reason != "" {
			d.recorder.warn(occurrence{f.about, f.reason, f.message})
		}
	}
	for key := range d.faults {
		if _, still := faults[key]; !still {
			d.log.Info("in order again", "part", key)
		}
	}
	d.faults = faults
	d.acknowledge()
	d.metrics.faultsAre(faults)
	d.metrics.nodeIs(d.report, d.acked)
	missing := d.notReady()
	d.health.stepped(missing)
	if missing == "" {
		d.isConfigured()
	}
	d.lease.set(d.annotations())
}

// findFaults returns them by part, and object where a part has several.
func (d *Daemon) findFaults(n news) map[string]fault {
	all := make(map[string]fault)
	pod := object{kind: "Pod", name: d.cfg.Pod}
	put := func(key string, about object, reason string, err error) {
		if err != nil {
			all[key] = fault{about: about, reason: reason, message: oneLine(err.Error())}
		}
	}
	if d.leave.wanted {
		put(partNode, pod, "CleanupFailed", d.leave.err)
		return all
	}
	put(partConfiguration, object{kind: "ConfigMap", name: configMap}, "InvalidConfiguration", d.configurationFault())
	for name, s := range d.sources {
		about := object{"Secret", name, s.uid}
		if s.fault != "" && d.isNamed(name) {
			f := fault{about: about, message: "Secret " + name + " " + s.fault}
			switch {
			case s.refused:
				f.reason = "InvalidCertificates"
			case !s.bundle.Empty() || s.lapsed: // otherwise it is only on its way
				f.reason = "SecretMissing"
			}
			all[partSecret+"/"+name] = f
		}
		if err := n.unreachable[name]; err != nil {
			// The API server cannot be told either.
			all[partSecret+"/"+name+"/watch"] = fault{about: about, message: oneLine(fmt.Sprintf("Secret %s cannot be watched: %v", name, err))}
		}
		if len(s.notes) > 0 {
			all[partSecret+"/"+name+"/note"] = fault{about: about, reason: "CertificatesNoted", message: "Secret " + name + ": " + strings.Join(s.notes, "; "), note: true}
		}
	}
	if d.config != nil {
		if notes := d.config.gather(d.bundles()).notes; len(notes) > 0 {
			all[partSecret+"/conflict"] = fault{about: pod, reason: "ConflictingCertificates", message: strings.Join(notes, "; "), note: true}
		}
	}
	put(partState, pod, "NotKept", d.keepErr)
	put(partNode, pod, "NodeNotConfigured", d.nodeFault())
	put(partCache, pod, "CacheNotServing", d.cacheFault())
	if n.hangs {
		all[partNode+"/registry"] = fault{about: pod, reason: "RegistryHangs", message: "the registry takes connections and does not answer: until it does, images of other registries are pulled past it", note: true}
	}
	put(partRuntime, pod, "RuntimeNotConfigured", d.runtimeFault())
	return all
}

func (d *Daemon) isNamed(secret string) bool {
	if d.config == nil {
		return false
	}
	for _, s := range d.config.CASecrets {
		if s.Name == secret {
			return true
		}
	}
	return false
}

func (d *Daemon) configurationFault() error {
	switch {
	case d.badFile == nil:
		return nil
	case d.config == nil:
		return d.badFile
	default:
		return fmt.Errorf("%w; the last good configuration stays in effect", d.badFile)
	}
}

func (d *Daemon) nodeFault() error {
	switch {
	case d.setErr != nil:
		return d.setErr
	case d.report != nil && d.report.Err != nil:
		return d.report.Err
	case d.report != nil && len(d.report.Held) > 0:
		return fmt.Errorf("another program keeps changing the files of %s, which are left to it for a while: take them out of its configuration, or out of ours", strings.Join(d.report.Held, ", "))
	}
	return nil
}

func (d *Daemon) cacheFault() error {
	if d.cacheErr != nil || d.cfg.Cache == nil {
		return d.cacheErr
	}
	return d.cfg.Cache.Fault()
}

// acknowledge draws from the agent's last report what may be counted on. What
// is in doubt is not acknowledged: a rotation waits rather than break pulls.
func (d *Daemon) acknowledge() {
	r := d.report
	if r == nil || d.leave.wanted {
		d.acked = acknowledgement{}
		return
	}
	faults := trust.OwnerErrors(r.Err)
	if r.Err != nil && faults == nil {
		d.acked.fingerprints = ""
		return
	}
	d.acked.configuration = r.Config.Tag
	d.acked.fingerprints = fingerprints(r.Config.CA)
	if d.keepErr != nil || doubtful(r.Config, faults, r.Held) {
		d.acked.fingerprints = ""
	}
}

// doubtful reports whether one of the registry's own names is not in order.
func doubtful(cfg agent.Config, faults []*trust.OwnerError, held []string) bool {
	own := func(name string) bool { return slices.Contains(cfg.Names, name) }
	return slices.ContainsFunc(held, own) ||
		slices.ContainsFunc(faults, func(f *trust.OwnerError) bool { return own(f.Owner) })
}

func (d *Daemon) annotations() map[string]string {
	out := map[string]string{AnnotationVersion: d.cfg.Version}
	put := func(key, value string) {
		if value != "" {
			out[key] = value
		}
	}
	put(AnnotationConfiguration, d.acked.configuration)
	put(AnnotationFingerprints, d.acked.fingerprints)
	put(AnnotationRuntime, d.found.Report)
	if d.config != nil && d.config.NodeCache.Peers && !d.leave.wanted {
		put(v1alpha1.AnnotationPeerAddress, d.cfg.PeerAddress)
	}
	var wrong []string
	for _, key := range slices.Sorted(maps.Keys(d.faults)) {
		if f := d.faults[key]; !f.note {
			wrong = append(wrong, f.message)
		}
	}
	message := strings.Join(wrong, "; ")
	if len(message) > maxError {
		message = strings.ToValidUTF8(message[:maxError-3], "") + "…"
	}
	put(AnnotationError, message)
	if d.leave.done {
		out[AnnotationCleaned] = "true"
	}
	return out
}

// notReady says what is missing before the node can be counted on. Empty:
// nothing.
func (d *Daemon) notReady() string {
	switch {
	case d.leave.wanted:
		return "the node is being left"
	case d.config == nil:
		return "waiting for the configuration: " + text(d.badFile)
	}
	if waits := d.waitsFor(d.config.gather(d.bundles())); waits != "" {
		return "waiting for " + waits
	}
	switch {
	case d.acked.configuration == "":
		return "the configuration is not applied: " + text(d.nodeFault())
	case d.config.wantsCA() && d.acked.fingerprints == "":
		return "the registry's CA is not applied: " + text(d.nodeFault())
	}
	return ""
}
