// Package clienttoken is the form in which client tokens are handed to the
// registry: a file for each, with hashed passwords and a scope map. The side
// that renders tokens from Secrets and the side that checks logins both use it,
// and share nothing else.
//
// It may import api/v1alpha1.
package clienttoken
