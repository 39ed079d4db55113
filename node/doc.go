// Package node finds out what a node is: which container runtime pulls its
// images, by which configuration, and whether that makes the runtime read the
// host configuration that the agent writes. Where it does not, it plans the
// smallest change that makes it so, and carries it out if it is let.
//
// Detection only reads. All that is known of containerd's configuration files
// is derived from its sources, versions 1.7 to 2.4, and compared with those
// very programs in the tests.
//
// It imports trust and nothing else of this module.
package node
