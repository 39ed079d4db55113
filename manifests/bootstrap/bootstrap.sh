#!/bin/sh
# Configures a node from files alone, before its first pull: no cluster is
# needed yet. May be run again at any time; the DaemonSet's agent goes on from
# what it left.
#
#   /usr/local/bin/connected-registry       the program
#   /etc/connected-registry/node.yaml       what the node is told
#   /etc/connected-registry/*.crt           the registry's CA certificates
#
# NODE_ROOT is where the node's file system is, if not at /.
set -eu
root=${NODE_ROOT:-}
set -- agent --once --node-root "$root/" --config "$root/etc/connected-registry/node.yaml"
for ca in "$root"/etc/connected-registry/*.crt; do
	[ ! -e "$ca" ] || set -- "$@" --ca "$ca"
done
exec "$root/usr/local/bin/connected-registry" "$@"
