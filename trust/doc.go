// Package trust is what a node must hold so that containerd trusts and uses the
// connected registry: sets of CA certificates, the built-in certificate
// authority, containerd's hosts.toml files, the system trust store, and the
// record from which all of it can be undone.
//
// Everything that decides is pure ([ParseBundle], [Hosts.Render]);
// [Store] carries decisions out, durably and inside one directory tree.
//
// It imports nothing else of this module.
package trust
