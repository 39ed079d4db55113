package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// apiPatience is how long an answer of the API server may take, for commands
// that people wait for.
const apiPatience = 10 * time.Second

// kubeConfig is what $KUBECONFIG says, or else what a pod is given.
func kubeConfig() (*rest.Config, error) {
	const variable = clientcmd.RecommendedConfigPathEnvVar
	if path := os.Getenv(variable); path != "" {
		config, err := clientcmd.BuildConfigFromFlags("", path)
		if clientcmd.IsEmptyConfig(err) {
			return nil, fmt.Errorf("$%s: %s names no cluster: give the kubeconfig of one", variable, path)
		}
		if err != nil {
			return nil, fmt.Errorf("reading $%s: %w: give the kubeconfig of a cluster", variable, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, fmt.Errorf("no cluster is named: run in a pod with a service account, or set $%s", variable)
	}
	if err != nil {
		return nil, fmt.Errorf("reaching the API server: %w: run in a pod with a service account, or set $%s", err, variable)
	}
	return config, nil
}

// kubeConfigOnce is kubeConfig for a command that people wait for.
func kubeConfigOnce() (*rest.Config, error) {
	config, err := kubeConfig()
	if err != nil {
		return nil, err
	}
	config.Timeout = apiPatience
	return config, nil
}

// explainAPI adds to what the API server at host did not do what there is to do
// about it. A nil error stays nil.
func explainAPI(doing, host string, err error) error {
	var (
		request   *url.Error
		unknownCA x509.UnknownAuthorityError
		answer    apierrors.APIStatus
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknownCA):
		return fmt.Errorf("%s: the API server %s has a certificate from a CA that is not trusted: put that CA into certificate-authority-data of the kubeconfig", doing, host)
	case errors.As(err, &request) && (request.Timeout() || errors.Is(err, context.DeadlineExceeded)):
		return fmt.Errorf("%s: the API server %s does not answer: check the network between, or name another in $KUBECONFIG", doing, host)
	case errors.As(err, &request):
		return fmt.Errorf("%s: the API server %s cannot be asked: %w: see that it runs, or name another in $KUBECONFIG", doing, host, request.Err)
	case apierrors.IsUnauthorized(err), apierrors.IsForbidden(err):
		return fmt.Errorf("%s: %w: name a user that may do so in $KUBECONFIG", doing, err)
	case apierrors.IsNotFound(err) && !apierrors.IsUnexpectedServerError(err):
		return fmt.Errorf("%s: %w: correct the namespace and the name that are given", doing, err)
	case errors.As(err, &answer):
		return fmt.Errorf("%s: %w: is the API server %s the one where connected-registry is installed?", doing, err, host)
	}
	return fmt.Errorf("%s: %w: is %s the API server of the cluster?", doing, err, host)
}
