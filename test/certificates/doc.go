// Package certificates takes syncer/certificates through its life on a real
// API server with the real cert-manager, its webhook included. The agents and
// the replicas are the test's own: goroutines that watch the Secrets, write
// Leases, and serve TLS on an address that the cluster reaches. It needs root,
// for the cluster's sake: see test/cluster.
package certificates
