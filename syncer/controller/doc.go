// Package controller makes a ConnectedRegistry in a cluster come true: while it
// leads, it watches the resource and what that names, renders what replicas and
// nodes are told, sees to certificates, runs the synchronisation, and says in
// the resource's status how things stand.
//
// Everything is level-triggered: watches only wake it, each reconciliation reads
// what is there and goes on from that, whoever led before. An invalid resource
// changes nothing of what works. Whoever loses the lease stops writing before
// another can have it.
//
// It may import api/v1alpha1, clienttoken, trust, storage, syncer and
// syncer/certificates.
package controller
