// Package cluster runs a real Kubernetes cluster on one machine, for tests and
// for people: etcd, the control plane, and nodes with a containerd, a kubelet
// and a kube-proxy each, all compiled from the Go modules pinned under tools.
//
// Every node has its own process ids, network, mounts and root file system: a
// copy-on-write view of the host's, so that what a pod does to /etc through a
// hostPath volume happens on that node alone. The control plane lives in a
// network of its own as well, with the bridge that the nodes are plugged into.
// The host gets one network device and routes over it, and loses them with the
// cluster.
//
// It needs root, Linux with cgroup v1 or v2, and a few Debian packages, which
// it installs when it can. Nothing is fetched from any image registry.
//
// A cluster ends with the process that started it, in whatever way that
// process ends, unless it was told to Detach.
//
// The package imports nothing of the product.
package cluster
