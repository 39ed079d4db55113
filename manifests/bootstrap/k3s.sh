#!/bin/sh
# For a node that is about to become one of K3s's or RKE2's: run it beside the
# other files of this directory, then K3s's own installer. K3s does not touch
# what stands in its hosts directory, but for the registries that its
# registries.yaml names; the agent adds to those after K3s has written them.
#
#   CA=/path/to/ca.crt ./k3s.sh && curl -sfL https://get.k3s.io | sh -
#
# Before K3s's first start nothing tells which distribution this is, so its
# directory is made here: RANCHER=rke2 for RKE2.
set -eu
root=${NODE_ROOT:-}
here=$(dirname "$0")
mkdir -p "$root/etc/connected-registry" "$root/var/lib/rancher/${RANCHER:-k3s}/agent/etc/containerd"
cp "${NODE_YAML:-$here/node.yaml}" "$root/etc/connected-registry/node.yaml"
cp "$CA" "$root/etc/connected-registry/ca.crt"
install -D -m 755 "$here/bootstrap.sh" "$root/usr/local/bin/connected-registry-bootstrap"
install -D -m 644 "$here/connected-registry-node.service" "$root/etc/systemd/system/connected-registry-node.service"
systemctl enable --now connected-registry-node.service
