// Package syncer brings the content that a ConnectedRegistry selects from its
// parent registry into this registry's storage: what is wanted against what is
// here gives a plan, and the plan is carried out so that nobody ever sees an
// image that is not whole, whatever the parent does and whenever the process
// dies.
//
// It may import api/v1alpha1, trust and storage; never registry or agent.
package syncer
