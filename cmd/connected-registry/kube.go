package main

import (
	"fmt"
	"os"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// kubeConfig is what $KUBECONFIG says, or else what a pod is given.
func kubeConfig() (*rest.Config, error) {
	if path := os.Getenv(clientcmd.RecommendedConfigPathEnvVar); path != "" {
		config, err := clientcmd.BuildConfigFromFlags("", path)
		if err != nil {
			return nil, fmt.Errorf("reading $%s: %w", clientcmd.RecommendedConfigPathEnvVar, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("reaching the API server: %w: run in a pod with a service account, or set $%s", err, clientcmd.RecommendedConfigPathEnvVar)
	}
	return config, nil
}
