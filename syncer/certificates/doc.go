// Package certificates sees to it, in the leader, that the registry has a
// serving certificate and that every node trusts it: it makes or fetches the
// certificate, publishes the CA certificates that nodes are to trust, and takes
// a change of CA through every node and every replica before the old one goes.
//
// Nothing that replicas may serve is ever ahead of what nodes trust, because
// replicas mount a Secret of ours. Wherever a certificate comes from, it is
// written there only once every node has acknowledged the CA behind it.
//
//	connected-registry-root     the CA: made here, or by cert-manager
//	connected-registry-issued   what cert-manager issues; nobody mounts it
//	connected-registry-tls      what replicas serve, with its CA under ca.crt
//	connected-registry-ca       what nodes trust: certificates only
//
// An operator's own Secret is copied to connected-registry-tls likewise. Only
// one that has that very name is served at once, since replicas mount it
// directly.
//
// The state of a rotation is derived from these Secrets at every call; the
// status adds only since when a phase lasts. So a leader may end anywhere.
//
// The package imports api/v1alpha1 and trust, nothing else of this module.
package certificates
