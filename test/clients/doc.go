// Package clients uses the registry, over TLS with its own CA and with client
// tokens, by the clients that people have: crane, skopeo, podman, oras, helm and
// containerd, none of them changed. What one of them cannot do, the registry
// cannot do, whatever the specification says.
//
// skopeo and podman are the system's (packages skopeo, podman and crun), crane
// is built from its module, and the others are called as libraries. The tests
// run as root, for podman's sake.
//
// It may import standalone and api/v1alpha1, to run the registry.
package clients
