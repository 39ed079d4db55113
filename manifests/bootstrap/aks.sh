#!/bin/sh
# For a node of AKS. AKS has no supported hook ahead of the kubelet's first pull:
# its own images come from mcr.microsoft.com, which on network-isolated clusters
# it configures itself, and which is left alone then. So run this on the node as
# root as early as your way in allows (an image of your own, a script extension,
# "az vmss run-command"), and keep workloads off until it has run:
#
#   az aks nodepool add … --node-init-taints connectedregistry.io/not-ready=:NoSchedule
#
# FILES is a directory with the program, node.yaml, ca.crt and bootstrap.sh; the
# registry's address is of AKS's service range, 10.0.0.0/16 unless told otherwise.
set -eu
root=${NODE_ROOT:-}
install -D -m 755 "$FILES/connected-registry" "$root/usr/local/bin/connected-registry"
install -D -m 755 "$FILES/bootstrap.sh" "$root/usr/local/bin/connected-registry-bootstrap"
install -D -m 644 "$FILES/node.yaml" "$root/etc/connected-registry/node.yaml"
install -D -m 644 "$FILES/ca.crt" "$root/etc/connected-registry/ca.crt"
"$root/usr/local/bin/connected-registry-bootstrap"
