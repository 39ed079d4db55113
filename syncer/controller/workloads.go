package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	// maxPrefetched bounds the images that are brought for workloads, and
	// maxPrefetchText what is said about them, in bytes, since nodes are told by
	// a ConfigMap, which holds 1 MiB.
	maxPrefetched   = 500
	maxPrefetchText = 512 << 10
)

type workloadKind struct {
	resource schema.GroupVersionResource
	pod      []string // where the pods are
}

// workloadKinds are the kinds that are asked about.
var workloadKinds = []workloadKind{
	{schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}, []string{"spec", "template", "spec"}},
	{schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "statefulsets"}, []string{"spec", "template", "spec"}},
	{schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"}, []string{"spec", "template", "spec"}},
	{schema.GroupVersionResource{Group: "batch", Version: "v1", Resource: "jobs"}, []string{"spec", "template", "spec"}},
	{schema.GroupVersionResource{Group: "batch", Version: "v1", Resource: "cronjobs"}, []string{"spec", "jobTemplate", "spec", "template", "spec"}},
}

// workload is one whose images are to be there before its pods.
type workload struct {
	made   metav1.Time
	name   string // kind, namespace and name
	images []image
	where  placement
	on     choice // the nodes that where comes to
}

// image is an image as the cache knows it, and its registry.
type image struct{ name, host string }

// listWorkloads asks for those that bear the label, the oldest first. The API
// server leaves out all others.
func (l *loop) listWorkloads(ctx context.Context) ([]workload, error) {
	var all []workload
	for _, kind := range workloadKinds {
		found, err := withRequestTime(ctx, func(ctx context.Context) (*unstructured.UnstructuredList, error) {
			return l.config.Dynamic.Resource(kind.resource).List(ctx, metav1.ListOptions{
				LabelSelector: v1alpha1.LabelPrefetch + "=true", ResourceVersion: "0", // answers from its cache will do
			})
		})
		if apierrors.IsForbidden(err) {
			return nil, fmt.Errorf("listing the %s whose images are to be prefetched: %w: let the syncer list them, with the chart's value nodeCache.prefetchWorkloads or kubectl apply -f manifests/prefetch-workloads.yaml", kind.resource.Resource, err)
		}
		if err != nil {
			return nil, fmt.Errorf("listing the %s whose images are to be prefetched: %w", kind.resource.Resource, err)
		}
		for _, object := range found.Items {
			w, err := workloadOf(object, kind)
			if err != nil {
				return nil, fmt.Errorf("reading %s %s/%s: %w", kind.resource.Resource, object.GetNamespace(), object.GetName(), err)
			}
			w.name = kind.resource.Resource + " " + w.name
			all = append(all, w)
		}
	}
	slices.SortFunc(all, func(a, b workload) int {
		return cmp.Or(a.made.Compare(b.made.Time), strings.Compare(a.name, b.name))
	})
	return all, nil
}

func workloadOf(object unstructured.Unstructured, kind workloadKind) (workload, error) {
	fields, _, err := unstructured.NestedMap(object.Object, kind.pod...)
	if err != nil {
		return workload{}, err
	}
	var pod corev1.PodSpec
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(fields, &pod); err != nil {
		return workload{}, err
	}
	w := workload{made: object.GetCreationTimestamp(), name: object.GetNamespace() + "/" + object.GetName()}
	if w.where, err = placementOf(&pod, kind.resource.Resource == "daemonsets"); err != nil {
		return workload{}, err
	}
	more := strings.Split(object.GetAnnotations()[v1alpha1.AnnotationPrefetch], ",")
	for _, name := range append(imagesOf(&pod), more...) {
		// One too many is enough to know that there is no room for it.
		if i, err := parseImage(strings.TrimSpace(name)); err == nil && !slices.Contains(w.images, i) && len(w.images) <= maxPrefetched {
			w.images = append(w.images, i)
		}
	}
	return w, nil
}

// imagesOf are the images that a pod needs, as it names them.
func imagesOf(pod *corev1.PodSpec) (images []string) {
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		images = append(images, c.Image)
	}
	for _, v := range pod.Volumes {
		if v.Image != nil {
			images = append(images, v.Image.Reference)
		}
	}
	return images
}

// parseImage reads an image as a pod names it, by containerd's rules for what may
// be left out: "nginx" is docker.io/library/nginx:latest.
func parseImage(name string) (image, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return image{}, err
	}
	return image{ref.String(), strings.ToLower(reference.Domain(ref))}, nil
}

// prefetchFor adds the images of workloads to what is brought to nodes: those of
// the registries given, which are what nodes can take from here. The error tells
// what there was no room for.
func (p *prefetchPlan) prefetchFor(workloads []workload, registries map[string]bool) error {
	images, text := 0, 0
	var left []string
	for _, w := range workloads {
		if w.on.nobody {
			continue
		}
		var names []string
		size := p.cost(w.on)
		for _, image := range w.images {
			if registries[image.host] && !p.has(w.on, image.name) {
				names = append(names, image.name)
				size += len(image.name)
			}
		}
		if images+len(names) > maxPrefetched || text+size > maxPrefetchText {
			left = append(left, w.name)
			continue
		}
		if len(names) > 0 {
			p.add(w.on, names...)
			images, text = images+len(names), text+size
		}
	}
	if len(left) == 0 {
		return nil
	}
	return fmt.Errorf("images are prefetched for as many workloads as there is room for, %d images: take the label %s from others to have them for %s and %d more",
		maxPrefetched, v1alpha1.LabelPrefetch, left[0], len(left)-1)
}

// prefetchPlan gathers what to bring to which nodes.
type prefetchPlan struct {
	all []v1alpha1.NodePrefetch
	at  map[string]int // in all, by the nodes
}

// add adds images for nodes.
func (p *prefetchPlan) add(on choice, images ...string) {
	key := on.key()
	i, ok := p.at[key]
	if !ok {
		if p.at == nil {
			p.at = make(map[string]int)
		}
		i = len(p.all)
		p.at[key], p.all = i, append(p.all, v1alpha1.NodePrefetch{Nodes: on.nodes, Except: on.except})
	}
	p.all[i].Images = append(p.all[i].Images, images...)
}

func (p *prefetchPlan) has(on choice, image string) bool {
	i, ok := p.at[on.key()]
	return ok && slices.Contains(p.all[i].Images, image)
}

// cost is how much more there is to say for these nodes, in bytes.
func (p *prefetchPlan) cost(on choice) int {
	key := on.key()
	if _, ok := p.at[key]; ok {
		return 0
	}
	return len(key) + 8*(len(on.nodes)+len(on.except))
}

// planPrefetch says what to bring to which nodes. What no node is chosen for is
// left out, and images for the same nodes stand together. The plan is good in
// spite of an error.
func planPrefetch(c *v1alpha1.NodeConfiguration, spec *v1alpha1.Spec, f *fleet) ([]v1alpha1.NodePrefetch, error) {
	var p prefetchPlan
	for _, m := range spec.Mirrors {
		for _, wanted := range m.Prefetch {
			var nodes []string
			if len(wanted.NodeSelector) > 0 {
				if nodes = f.names(wanted.NodeSelector); len(nodes) == 0 {
					continue
				}
			}
			for _, image := range wanted.Images {
				p.add(choice{nodes: nodes}, m.Registry+"/"+image)
			}
		}
	}
	if !spec.NodeCache.PrefetchWorkloads {
		return p.all, nil
	}
	registries := make(map[string]bool)
	for _, name := range c.Names {
		registries[strings.ToLower(name)] = true
	}
	for _, m := range c.Mirrors {
		registries[strings.ToLower(m.Registry)] = true
	}
	crowded := p.prefetchFor(f.workloads, registries)
	return p.all, errors.Join(f.unlisted, crowded)
}

// ownRepositories are those of the images to prefetch that are named by the
// registry's own names, sorted.
func ownRepositories(c *v1alpha1.NodeConfiguration) (repositories []string) {
	for _, p := range c.Prefetch {
		for _, image := range p.Images {
			ref, err := reference.ParseDockerRef(image)
			if err == nil && slices.ContainsFunc(c.Names, func(name string) bool { return strings.EqualFold(name, reference.Domain(ref)) }) {
				repositories = append(repositories, reference.Path(ref))
			}
		}
	}
	slices.Sort(repositories)
	return slices.Compact(repositories)
}
