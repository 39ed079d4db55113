// Package daemon is the node agent of a cluster: it joins the configuration
// that is mounted into its pod, the CA Secrets that this names, the files of
// the node (package agent) and the node's cache, and says in its Lease what the
// node trusts.
//
// It needs the API server for news alone. Whatever was good last is kept on
// the node, and is what it works by while the API server, the ConfigMap or a
// Secret is missing or makes no sense.
//
// It may import agent, trust and api/v1alpha1.
package daemon
