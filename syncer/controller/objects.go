package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	serviceLabel   = discoveryv1.LabelServiceName
	managedByLabel = "app.kubernetes.io/managed-by"
	managedBy      = "connected-registry"
)

// service reads the replicas' Service and which of them are ready.
func (l *loop) service(ctx context.Context) (service, error) {
	object, err := withRequestTime(ctx, func(ctx context.Context) (*corev1.Service, error) {
		return l.config.Client.CoreV1().Services(l.config.Namespace).Get(ctx, l.config.Service, metav1.GetOptions{})
	})
	if err != nil {
		return service{}, fmt.Errorf("reading Service %s: %w", l.config.Service, err)
	}
	s, err := serviceOf(object)
	if err != nil {
		return service{}, err
	}
	slices, err := withRequestTime(ctx, func(ctx context.Context) (*discoveryv1.EndpointSliceList, error) {
		return l.config.Client.DiscoveryV1().EndpointSlices(l.config.Namespace).List(ctx, metav1.ListOptions{
			LabelSelector: serviceLabel + "=" + l.config.Service,
		})
	})
	if err != nil {
		return service{}, fmt.Errorf("reading the endpoints of Service %s: %w", l.config.Service, err)
	}
	s.endpoints = endpoints(slices.Items, s.portName)
	return s, nil
}

func clusterIPs(s *corev1.Service) []netip.Addr {
	texts := s.Spec.ClusterIPs
	if len(texts) == 0 {
		texts = []string{s.Spec.ClusterIP}
	}
	var all []netip.Addr
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil { // "None" is none
			all = append(all, ip)
		}
	}
	return all
}

// endpoints are the addresses of what is ready behind a port, sorted.
func endpoints(all []discoveryv1.EndpointSlice, portName string) []string {
	var found []string
	for _, s := range all {
		for _, p := range s.Ports {
			if p.Port == nil || p.Name != nil && *p.Name != portName {
				continue
			}
			for _, e := range s.Endpoints {
				if e.Conditions.Ready != nil && !*e.Conditions.Ready {
					continue
				}
				for _, address := range e.Addresses {
					found = append(found, net.JoinHostPort(address, strconv.Itoa(int(*p.Port))))
				}
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// own puts our marks on an object; false: it bore them already.
func own(o *metav1.ObjectMeta, cr *v1alpha1.ConnectedRegistry) (changed bool) {
	owner := metav1.OwnerReference{
		APIVersion: v1alpha1.APIVersion, Kind: v1alpha1.Kind, Name: cr.Name, UID: cr.UID,
		Controller: new(true), BlockOwnerDeletion: new(true),
	}
	if o.Labels[managedByLabel] != managedBy {
		o.Labels = maps.Clone(o.Labels)
		if o.Labels == nil {
			o.Labels = make(map[string]string)
		}
		o.Labels[managedByLabel] = managedBy
		changed = true
	}
	if !slices.ContainsFunc(o.OwnerReferences, func(r metav1.OwnerReference) bool { return r.UID == owner.UID }) {
		// Another's, such as that of a resource which is gone, does not stay.
		o.OwnerReferences = []metav1.OwnerReference{owner}
		changed = true
	}
	return changed
}

func (l *loop) renderReplica(ctx context.Context, cr *v1alpha1.ConnectedRegistry, names []string, prefetch *nodeToken, secrets *secretReader) error {
	was, err := secrets.get(ctx, ReplicaSecret)
	if err != nil {
		return err
	}
	upload, err := secrets.get(ctx, UploadSecret)
	if err != nil {
		return err
	}
	var now map[string][]byte
	if was != nil {
		now = was.Data
	}
	var given []byte
	if upload != nil {
		given = upload.Data[keyUploadSecret]
	}
	data, problem := replicaData(ctx, cr, names, given, now, secrets, l.tokens)
	if data == nil {
		return problem
	}
	if err := prefetch.addTo(data, now, l.tokens); err != nil {
		return errors.Join(problem, err)
	}
	l.tokens.Forget()
	return errors.Join(problem, l.writeSecret(ctx, cr, ReplicaSecret, was, data))
}

// forNodes is what nodes are to be told: nil while it is not known. It may be
// known in spite of an error.
func (l *loop) forNodes(ctx context.Context, cr *v1alpha1.ConnectedRegistry, svc service) (*v1alpha1.NodeConfiguration, error) {
	every := resyncInterval
	if needsFleet(&cr.Spec) {
		every = fleetInterval
	}
	fleetErr := l.lookAround(ctx, &cr.Spec, every)
	if fleetErr != nil && l.fleet.at.IsZero() && needsFleet(&cr.Spec) {
		return nil, fleetErr // nodes go on with what they were told before
	}
	c, err := nodeConfiguration(&cr.Spec, svc, l.source, &l.fleet)
	return c, errors.Join(fleetErr, err)
}

func (l *loop) renderNode(ctx context.Context, cr *v1alpha1.ConnectedRegistry, c *v1alpha1.NodeConfiguration) error {
	if c == nil {
		return nil
	}
	data, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	return l.writeConfigMap(ctx, cr, map[string]string{keyNode: string(data)})
}

// writeSecret makes a Secret hold data; was is what there is of it. Equal content
// is not written.
func (l *loop) writeSecret(ctx context.Context, cr *v1alpha1.ConnectedRegistry, name string, was *corev1.Secret, data map[string][]byte) error {
	api := l.config.Client.CoreV1().Secrets(l.config.Namespace)
	if was == nil {
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: l.config.Namespace, Name: name}, Data: data}
		own(&s.ObjectMeta, cr)
		_, err := withRequestTime(ctx, func(ctx context.Context) (*corev1.Secret, error) { return api.Create(ctx, s, metav1.CreateOptions{}) })
		return written("Secret", name, err)
	}
	s := was.DeepCopy()
	if !own(&s.ObjectMeta, cr) && reflect.DeepEqual(s.Data, data) {
		return nil
	}
	s.Data = data
	_, err := withRequestTime(ctx, func(ctx context.Context) (*corev1.Secret, error) { return api.Update(ctx, s, metav1.UpdateOptions{}) })
	return written("Secret", name, err)
}

// removeSecret removes a Secret, unless it is somebody else's; was is what there
// is of it.
func (l *loop) removeSecret(ctx context.Context, name string, was *corev1.Secret) error {
	if was == nil || was.Labels[managedByLabel] != managedBy {
		return nil
	}
	_, err := withRequestTime(ctx, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, l.config.Client.CoreV1().Secrets(l.config.Namespace).Delete(ctx, name, metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{UID: &was.UID},
		})
	})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return written("Secret", name, err)
}

// writeConfigMap makes NodeConfigMap hold data. Equal content is not written.
func (l *loop) writeConfigMap(ctx context.Context, cr *v1alpha1.ConnectedRegistry, data map[string]string) error {
	api := l.config.Client.CoreV1().ConfigMaps(l.config.Namespace)
	c, err := withRequestTime(ctx, func(ctx context.Context) (*corev1.ConfigMap, error) {
		return api.Get(ctx, NodeConfigMap, metav1.GetOptions{})
	})
	if apierrors.IsNotFound(err) {
		c = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: l.config.Namespace, Name: NodeConfigMap}, Data: data}
		own(&c.ObjectMeta, cr)
		_, err = withRequestTime(ctx, func(ctx context.Context) (*corev1.ConfigMap, error) {
			return api.Create(ctx, c, metav1.CreateOptions{})
		})
		return written("ConfigMap", NodeConfigMap, err)
	}
	if err != nil {
		return fmt.Errorf("reading ConfigMap %s: %w", NodeConfigMap, err)
	}
	if !own(&c.ObjectMeta, cr) && maps.Equal(c.Data, data) {
		return nil
	}
	c.Data = data
	_, err = withRequestTime(ctx, func(ctx context.Context) (*corev1.ConfigMap, error) {
		return api.Update(ctx, c, metav1.UpdateOptions{})
	})
	return written("ConfigMap", NodeConfigMap, err)
}

func written(kind, name string, err error) error {
	if err != nil {
		return fmt.Errorf("writing %s %s: %w", kind, name, err)
	}
	return nil
}
