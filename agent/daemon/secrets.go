package daemon

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	// ControlSecret is the Secret that is always watched: the registry's own
	// CA, which the syncer publishes.
	ControlSecret = "connected-registry-ca"
	// AnnotationUninstall on ControlSecret, with the value "true", makes every
	// agent undo what it did to its node.
	AnnotationUninstall = "connectedregistry.io/uninstall"

	// Watches that fail are begun anew after a wait that doubles between these.
	firstWatchRetry = time.Second
	longWatchRetry  = 30 * time.Second
)

// seen is what matters of a Secret as the API server has it.
type seen struct {
	// present: it exists.
	present bool
	// ca is the content of ca.crt; nil if there is no such key.
	ca []byte
	// uninstall: it bears AnnotationUninstall.
	uninstall bool
	uid       string
}

// secretStore takes what a reflector learns about one Secret, and keeps nothing
// of it: whatever else is in the Secret is gone when these methods return.
type secretStore struct {
	name string
	tell func(name string, s seen)
}

func (s *secretStore) Add(obj any) error    { return s.take(obj) }
func (s *secretStore) Update(obj any) error { return s.take(obj) }

func (s *secretStore) Delete(any) error {
	s.tell(s.name, seen{})
	return nil
}

func (s *secretStore) Replace(list []any, _ string) error {
	if len(list) == 0 {
		return s.Delete(nil)
	}
	return s.take(list[0])
}

func (s *secretStore) Resync() error { return nil }

func (s *secretStore) take(obj any) error {
	secret, ok := obj.(*corev1.Secret)
	if !ok || secret.Name != s.name {
		return nil // the selector lets nothing else through
	}
	s.tell(s.name, seen{
		present:   true,
		ca:        secret.Data[v1alpha1.SecretKeyCA],
		uninstall: secret.Annotations[AnnotationUninstall] == "true",
		uid:       string(secret.UID),
	})
	return nil
}

// watches follows Secrets, each by its name, so that the right to it can be
// given by name.
type watches struct {
	client *client
	tell   func(name string, s seen)
	failed func(name string, err error) // err is nil when it works again

	running map[string]context.CancelFunc
	joined  sync.WaitGroup
}

// follow makes it these Secrets and no others. Only one goroutine may call it.
func (w *watches) follow(ctx context.Context, names map[string]bool) {
	for name, stop := range w.running {
		if !names[name] {
			stop()
			delete(w.running, name)
		}
	}
	for name := range names {
		if w.running[name] != nil {
			continue
		}
		one, stop := context.WithCancel(ctx)
		w.running[name] = stop
		w.joined.Go(func() { w.watch(one, name) })
	}
}

// stop ends all and waits for them.
func (w *watches) stop() {
	w.follow(context.Background(), nil)
	w.joined.Wait()
}

// watch lists and watches one Secret until ctx ends.
func (w *watches) watch(ctx context.Context, name string) {
	tell := func(name string, s seen) {
		w.failed(name, nil)
		if ctx.Err() == nil {
			w.tell(name, s)
		}
	}
	source := cache.NewListWatchFromClient(w.client.core, "secrets", w.client.namespace, fields.OneTermEqualSelector("metadata.name", name))
	quiet := klog.New(nil)
	reflector := cache.NewReflectorWithOptions(source, &corev1.Secret{}, &secretStore{name: name, tell: tell},
		cache.ReflectorOptions{Name: "secret " + name, Logger: &quiet})
	ctx = klog.NewContext(ctx, quiet)
	retry := firstWatchRetry
	for ctx.Err() == nil {
		began := time.Now()
		err := reflector.ListAndWatchWithContext(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			w.failed(name, err)
		}
		if time.Since(began) > longWatchRetry {
			retry = firstWatchRetry
		}
		if !sleep(ctx, jitter(retry)) {
			return
		}
		retry = min(2*retry, longWatchRetry)
	}
}
