// Package v1alpha1 is the ConnectedRegistry resource,
// connectedregistry.io/v1alpha1: what an operator asks for (spec), what is
// there (status), the defaults, the validation, and the strict reader of the
// same document from a file. Small pure helpers that give the fields their
// meaning live here too (globs, schedules, durations, connection strings), so
// that whoever reads a field and whoever validates it cannot disagree.
//
// Only fields that are implemented exist; everything else is an error, so that
// nothing an operator writes is silently ignored.
//
// It may import k8s.io/apimachinery and parsers, and nothing of this module.
//
// +kubebuilder:object:generate=true
// +groupName=connectedregistry.io
package v1alpha1
