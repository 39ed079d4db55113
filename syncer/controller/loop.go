package controller

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/syncer"
	"github.com/connected-registry/connected-registry/syncer/certificates"
)

const (
	// resyncInterval is how often everything is looked at though nothing
	// changed.
	resyncInterval = 5 * time.Minute
	// settle is how long changes are gathered before they are looked at.
	settle = 200 * time.Millisecond
	// A reconciliation that failed is repeated after minRetry; it doubles up to
	// maxRetry.
	minRetry = time.Second
	maxRetry = time.Minute
)

// loop is the leader at work.
type loop struct {
	config   Config
	log      *slog.Logger
	recorder *recorder
	woken    chan struct{}
	engine   *engine
	tokens   *clienttoken.Renderer
	good     *v1alpha1.ConnectedRegistry // the last one that was valid; nil: none known
	source   *syncer.Source              // of the last job
	job      *job                        // the last one that could be made
	problem  string                      // the last that was logged
	fleet    fleet

	mu    sync.Mutex
	found *findings // nil until the first reconciliation ended
}

func newLoop(c Config, r *recorder) *loop {
	return &loop{config: c, log: c.Logger, recorder: r, woken: make(chan struct{}, 1), tokens: clienttoken.NewRenderer()}
}

func (l *loop) wake() {
	select {
	case l.woken <- struct{}{}:
	default:
	}
}

// run works until ctx ends, and returns when all has ended that it started. Its
// last act is to make the status say so, unless the lease is lost.
func (l *loop) run(ctx context.Context) error {
	cr := l.first(ctx)
	l.engine = newEngine(l.openStore, cr.Status, l.log, l.config.Metrics)
	w := &watches{client: l.config.Metadata, namespace: l.config.Namespace, wake: l.wake, running: make(map[subject]context.CancelFunc)}
	var group sync.WaitGroup
	group.Go(func() { l.engine.run(ctx) })
	p := &publisher{loop: l, before: cr.Status}
	group.Go(func() { p.run(ctx) })
	l.reconcileAll(ctx, w)
	w.close()
	group.Wait()
	if !errors.Is(context.Cause(ctx), ErrLost) {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime/3)
		defer cancel()
		_ = p.publish(last) // the next leader corrects what it finds
	}
	return nil
}

func (l *loop) openStore(ctx context.Context) (*storage.Store, error) {
	return storage.Open(ctx, storage.Config{Root: filepath.Join(l.config.Data, "registry"), Bucket: l.config.Bucket, Logger: l.log})
}

// first reads the resource, and waits for it. It is empty when ctx ended.
func (l *loop) first(ctx context.Context) *v1alpha1.ConnectedRegistry {
	for said := ""; ; {
		cr, err := l.read(ctx)
		if err == nil {
			return cr
		}
		if err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			l.log.Warn("waiting for the resource", "error", err)
		}
		select {
		case <-ctx.Done():
			return &v1alpha1.ConnectedRegistry{}
		case <-time.After(minRetry):
		}
	}
}

// read asks the API server for the resource.
func (l *loop) read(ctx context.Context) (*v1alpha1.ConnectedRegistry, error) {
	object, err := withRequestTime(ctx, func(ctx context.Context) (*unstructured.Unstructured, error) {
		return l.config.Dynamic.Resource(registries).Namespace(l.config.Namespace).Get(ctx, l.config.Name, metav1.GetOptions{})
	})
	if err != nil {
		return nil, fmt.Errorf("reading ConnectedRegistry %s/%s: %w", l.config.Namespace, l.config.Name, err)
	}
	cr := new(v1alpha1.ConnectedRegistry)
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, cr); err != nil {
		return nil, fmt.Errorf("reading ConnectedRegistry %s/%s: %w", l.config.Namespace, l.config.Name, err)
	}
	return cr, nil
}

// reconcileAll reconciles when woken and when it is time, until ctx ends.
func (l *loop) reconcileAll(ctx context.Context, w *watches) {
	retry := minRetry
	for ctx.Err() == nil {
		again, err := l.reconcile(ctx, w)
		if err != nil && ctx.Err() == nil {
			l.log.Error("the resource cannot be looked after for now", "error", err, "retry", retry)
			again, retry = retry, min(2*retry, maxRetry)
		} else {
			retry = minRetry
		}
		select {
		case <-ctx.Done():
		case <-time.After(again):
		case <-l.woken:
			select {
			case <-ctx.Done():
			case <-time.After(settle):
			}
		}
	}
}

// findings are what a reconciliation found out, as far as the status is
// concerned.
type findings struct {
	cr          *v1alpha1.ConnectedRegistry // the spec in force
	asked       *v1alpha1.ConnectedRegistry // as the operator has it
	invalid     error                       // why that one is not in force
	rendering   error                       // why replicas and nodes are not told all of it
	parent      error                       // why the parent cannot be asked as it says
	source      *syncer.Source              // nil: no parent
	active      bool                        // there is something to synchronise with, and leave to
	loginServer string
	trust       certificates.Result
	// certificates is why trust is not known; then the last known stays.
	certificates error
}

// reconcile reads what there is and goes on from that. It says when to look
// again. The error is one of the way to the API server; all others are findings.
func (l *loop) reconcile(ctx context.Context, w *watches) (time.Duration, error) {
	secrets := newSecretReader(l.config.Client, l.config.Namespace)
	asked, err := l.read(ctx)
	if apierrors.IsNotFound(err) {
		l.engine.set(nil, "")
		w.set(ctx, map[subject]bool{{resource: registries, name: l.config.Name}: true})
		return resyncInterval, nil
	}
	if err != nil {
		return 0, err
	}
	f := &findings{asked: asked}
	if f.cr, f.invalid, err = l.inForce(ctx, asked, secrets); err != nil {
		return 0, err
	}
	defer func() { w.set(ctx, l.subjects(secrets)) }()
	if f.cr == nil {
		l.publishFindings(f)
		return resyncInterval, nil
	}
	again, err := l.carryOut(ctx, f, secrets)
	l.publishFindings(f)
	return again, err
}

// inForce is the resource as asked for if it is valid, with its defaults, or
// else the last one that was: this process's, or that which replicas were told
// before. nil: there never was one.
func (l *loop) inForce(ctx context.Context, asked *v1alpha1.ConnectedRegistry, secrets *secretReader) (cr *v1alpha1.ConnectedRegistry, invalid, err error) {
	cr = asked.DeepCopy()
	cr.SetDefaults()
	if errs := cr.Validate(); len(errs) > 0 {
		invalid = errs.ToAggregate()
		if l.good == nil {
			rendered, err := secrets.get(ctx, ReplicaSecret)
			if err != nil {
				return nil, invalid, err
			}
			if rendered != nil {
				l.good, _ = v1alpha1.Load(keyResource, rendered.Data[keyResource]) // nil: no help
			}
		}
		if l.good == nil {
			return nil, invalid, nil
		}
		cr.Spec = *l.good.Spec.DeepCopy()
		return cr, invalid, nil
	}
	l.good = cr
	return cr, nil, nil
}

// carryOut makes the resource in force come true. What cannot be done for one
// part stops no other.
func (l *loop) carryOut(ctx context.Context, f *findings, secrets *secretReader) (time.Duration, error) {
	if l.config.Changed != nil {
		l.config.Changed(&f.cr.Spec)
	}
	svc, err := l.service(ctx)
	if err != nil {
		return 0, err
	}
	again := resyncInterval
	f.trust, f.certificates = l.config.Certificates.Reconcile(ctx, f.cr, certificates.Service{
		Name: svc.name, ClusterIPs: svc.clusterIPs, PortName: svc.portName,
	})
	if f.certificates == nil {
		again = sooner(again, f.trust.RequeueAfter)
	} else if ctx.Err() == nil {
		again = sooner(again, 2*minRetry)
	}
	names := svc.names(f.cr.Spec.LoginServer, f.cr.Spec.TLS.Disabled)
	f.loginServer = names[0]
	l.setJob(ctx, f, secrets)
	f.source = l.source
	f.rendering = l.render(ctx, f.cr, svc, names, secrets)
	if needsFleet(&f.cr.Spec) {
		again = sooner(again, fleetInterval)
	}
	l.logProblem(ctx, f)
	if f.rendering != nil {
		again = sooner(again, maxRetry)
	}
	return again, ctx.Err()
}

// render makes what replicas and nodes are told, as far as it can.
func (l *loop) render(ctx context.Context, cr *v1alpha1.ConnectedRegistry, svc service, names []string, secrets *secretReader) error {
	nodes, incomplete := l.forNodes(ctx, cr, svc)
	token, err := l.nodeToken(ctx, cr, nodes, secrets)
	return errors.Join(incomplete, err,
		l.renderReplica(ctx, cr, names, token, secrets),
		l.renderPeers(ctx, cr, secrets),
		l.renderNode(ctx, cr, nodes))
}

// sooner is the earlier of two times, of which the second may be missing.
func sooner(a, b time.Duration) time.Duration {
	if b <= 0 {
		return a
	}
	return min(a, b)
}

// setJob tells the engine what to do. While that cannot be made out, as when a
// Secret is missing, it goes on with what it was told before.
func (l *loop) setJob(ctx context.Context, f *findings, secrets *secretReader) {
	reader := &recordingReader{secrets: secrets, sum: sha256.New()}
	config, source, err := syncer.FromSpec(ctx, &f.cr.Spec, reader)
	f.parent = err
	if err == nil {
		config.Name, config.LoginServer, config.Version = f.cr.Name, f.loginServer, l.config.Version
		j := &job{spec: f.cr.Spec, config: config, secrets: secrets}
		if j.key, err = reader.key(ctx, f.cr.Spec, f.loginServer); err == nil {
			l.job, l.source = j, source
		}
		f.parent = err
	} else if l.job != nil && l.job.spec.Suspend != f.cr.Spec.Suspend {
		// Whether to work at all does not hang on it.
		l.job = new(*l.job)
		l.job.spec.Suspend = f.cr.Spec.Suspend
		l.job.key[0]++
	}
	f.active = l.job.synchronises()
	l.engine.set(l.job, f.asked.Annotations[v1alpha1.AnnotationResync])
}

// subjects are what a reconciliation depends on: the Secrets that it read, among
// others.
func (l *loop) subjects(read *secretReader) map[subject]bool {
	all := map[subject]bool{
		{resource: registries, name: l.config.Name}:                              true,
		{resource: services, name: l.config.Service}:                             true,
		{resource: endpointSlices, label: serviceLabel + "=" + l.config.Service}: true,
		{resource: configMaps, name: NodeConfigMap}:                              true,
		{resource: secrets, name: ReplicaSecret}:                                 true,
		{resource: secrets, name: certificates.RootSecret}:                       true,
		{resource: secrets, name: certificates.IssuedSecret}:                     true,
		{resource: secrets, name: certificates.TLSSecret}:                        true,
		{resource: secrets, name: certificates.CASecret}:                         true,
	}
	for name := range read.read {
		all[subject{resource: secrets, name: name}] = true
	}
	if l.good != nil && l.good.Spec.TLS.SecretName != "" {
		all[subject{resource: secrets, name: l.good.Spec.TLS.SecretName}] = true
	}
	return all
}

// publishFindings gives them to the status, and raises the Events of
// certificates.
func (l *loop) publishFindings(f *findings) {
	l.mu.Lock()
	l.found = f
	l.mu.Unlock()
	for _, e := range f.trust.Events {
		l.recorder.raise(f, event{e.Warning, e.Reason, e.Message})
	}
}

// findings are those of the last reconciliation; nil before the first.
func (l *loop) findings() *findings {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.found
}

// logProblem logs what is wrong when it appears and when it is gone.
func (l *loop) logProblem(ctx context.Context, f *findings) {
	if ctx.Err() != nil {
		return
	}
	problem := ""
	if err := errors.Join(f.invalid, f.rendering, f.parent, f.certificates); err != nil {
		problem = oneLine(err.Error())
	}
	switch problem {
	case l.problem:
	case "":
		l.log.Info("the resource is as it should be again")
	default:
		l.log.Warn("not all of the resource can be made true", "error", problem)
	}
	l.problem = problem
}

// recordingReader digests what it reads.
type recordingReader struct {
	secrets *secretReader
	sum     hash.Hash
}

func (r *recordingReader) Secret(ctx context.Context, name, key string) ([]byte, error) {
	value, err := r.secrets.Secret(ctx, name, key)
	fmt.Fprintf(r.sum, "%q %q %q\n", name, key, value) // a hash takes everything
	return value, err
}

// key digests what was read, with what receivers of notifications are sent, the
// login server, and a spec. What only concerns clients and nodes is left out, so
// that it does not disturb a copy under way.
func (r *recordingReader) key(ctx context.Context, spec v1alpha1.Spec, loginServer string) (key [sha256.Size]byte, err error) {
	for _, n := range spec.Notifications {
		if n.SecretRef != nil {
			// What is missing is reported where it is used.
			_, _ = r.Secret(ctx, n.SecretRef.Name, v1alpha1.SecretKeyAuthorization)
		}
	}
	spec.LoginServer = loginServer
	spec.AnonymousPull, spec.ClientTokens, spec.Mirrors, spec.LogLevel = false, nil, nil, ""
	spec.NodeCache, spec.TLS, spec.TrustDistribution = v1alpha1.NodeCache{}, v1alpha1.TLS{}, v1alpha1.TrustDistribution{}
	spec.ImmutableTags, spec.Quota = nil, v1alpha1.Quota{}
	if err := json.NewEncoder(r.sum).Encode(spec); err != nil {
		return key, err
	}
	r.sum.Sum(key[:0])
	return key, nil
}

// serviceOf says what matters of a Service.
func serviceOf(s *corev1.Service) (service, error) {
	if len(s.Spec.Ports) == 0 {
		return service{}, fmt.Errorf("Service %s has no port", s.Name)
	}
	return service{
		name: s.Name, namespace: s.Namespace,
		clusterIPs: clusterIPs(s),
		port:       s.Spec.Ports[0].Port,
		portName:   s.Spec.Ports[0].Name,
	}, nil
}
