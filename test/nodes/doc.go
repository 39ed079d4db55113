// Package nodes holds the tests in which real container runtimes, containerd
// 1.7 and 2, run on nodes laid out as distributions of Kubernetes lay them out:
// their paths and configuration files, in a root directory of their own. What is
// verified is that the configuration is understood as containerd understands
// it, that what is planned makes pulls reach the mirror, that a restart changes
// nothing of that, and that a cleanup leaves no byte behind.
//
// The runtimes are built from their modules: 1.7 and 2.2 by the modules below
// this one, the newest by test/containerd's.
package nodes
