// Package layouts holds the test in which the product, installed by its chart,
// looks after nodes laid out as K3s, kind, AKS and plain containerd lay them
// out, with containerd 1.7 and 2: kubelets pull by the parent's name while the
// parent is gone, before and after a restart of the runtime and of the whole
// node, and an uninstallation leaves what was there, to the byte.
//
// Real containerds without a Kubernetes are in test/nodes, with more layouts and
// versions.
package layouts
