package daemon

import (
	"fmt"
	"net/http"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// client speaks to the API server about the few kinds that are needed here. It
// is not client-go's clientset, which registers every kind that there is and
// takes more memory than all the rest of an idle agent.
type client struct {
	core         rest.Interface
	coordination rest.Interface
	namespace    string
}

// newClient touches no network. Both interfaces share one connection.
func newClient(config *rest.Config, namespace string) (*client, error) {
	codecs := serializer.NewCodecFactory(newScheme())
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("credentials for the API server: %w", err)
	}
	c := &client{namespace: namespace}
	if c.core, err = newRESTClient(config, httpClient, "/api", corev1.SchemeGroupVersion, codecs.WithoutConversion()); err != nil {
		return nil, err
	}
	c.coordination, err = newRESTClient(config, httpClient, "/apis", coordinationv1.SchemeGroupVersion, codecs.WithoutConversion())
	return c, err
}

func newScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	scheme.AddKnownTypes(corev1.SchemeGroupVersion,
		&corev1.Secret{}, &corev1.SecretList{}, &corev1.Event{}, &corev1.Node{}, &corev1.NodeList{})
	scheme.AddKnownTypes(coordinationv1.SchemeGroupVersion, &coordinationv1.Lease{}, &coordinationv1.LeaseList{})
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	metav1.AddToGroupVersion(scheme, coordinationv1.SchemeGroupVersion)
	return scheme
}

func newRESTClient(config *rest.Config, httpClient *http.Client, path string, gv schema.GroupVersion, codecs runtime.NegotiatedSerializer) (rest.Interface, error) {
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = path, &gv
	config.NegotiatedSerializer = codecs
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	if config.UserAgent == "" {
		config.UserAgent = "connected-registry"
	}
	c, err := rest.RESTClientForConfigAndClient(config, httpClient)
	if err != nil {
		return nil, fmt.Errorf("client of the API server: %w", err)
	}
	return c, nil
}
