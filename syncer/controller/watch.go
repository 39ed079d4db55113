package controller

import (
	"context"
	"maps"
	"sync"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// The kinds that are watched.
var (
	registries     = schema.GroupVersionResource{Group: v1alpha1.Group, Version: v1alpha1.Version, Resource: "connectedregistries"}
	secrets        = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	configMaps     = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	services       = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	endpointSlices = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
)

// subject is what one watch is about: an object by its name, or objects by a
// label.
type subject struct {
	resource    schema.GroupVersionResource
	name, label string
}

// watches wake somebody when one of their subjects changes. They bring metadata
// alone, so no Secret's content is kept.
type watches struct {
	client    metadata.Interface
	namespace string
	wake      func()

	running map[subject]context.CancelFunc
	group   sync.WaitGroup
}

// set starts the watches that are missing, and ends those of other subjects.
func (w *watches) set(ctx context.Context, wanted map[subject]bool) {
	for s, stop := range w.running {
		if !wanted[s] {
			stop()
		}
	}
	maps.DeleteFunc(w.running, func(s subject, _ context.CancelFunc) bool { return !wanted[s] })
	for s := range wanted {
		if w.running[s] != nil {
			continue
		}
		ctx, stop := context.WithCancel(ctx)
		w.running[s] = stop
		w.group.Go(func() { w.watch(ctx, s) })
	}
}

// close ends all watches and waits for them.
func (w *watches) close() {
	for _, stop := range w.running {
		stop()
	}
	w.group.Wait()
}

func (w *watches) watch(ctx context.Context, s subject) {
	objects := w.client.Resource(s.resource).Namespace(w.namespace)
	narrow := func(o *metav1.ListOptions) {
		if s.name != "" {
			o.FieldSelector = "metadata.name=" + s.name
		}
		o.LabelSelector = s.label
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ObjectType: &metav1.PartialObjectMetadata{},
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				narrow(&o)
				return objects.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				narrow(&o)
				return objects.Watch(ctx, o)
			},
		}, w.client),
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { w.wake() },
			DeleteFunc: func(any) { w.wake() },
			UpdateFunc: func(before, after any) {
				if s.changed(before, after) {
					w.wake()
				}
			},
		},
	})
	informer.RunWithContext(ctx)
}

// changed leaves out what a write of the resource's status changes.
func (s subject) changed(before, after any) bool {
	a, ok := before.(*metav1.PartialObjectMetadata)
	b, also := after.(*metav1.PartialObjectMetadata)
	if !ok || !also {
		return true
	}
	if s.resource != registries {
		return a.ResourceVersion != b.ResourceVersion
	}
	return a.Generation != b.Generation || a.UID != b.UID || !equality.Semantic.DeepEqual(a.Annotations, b.Annotations) ||
		!a.DeletionTimestamp.Equal(b.DeletionTimestamp)
}
