// Package auth decides who may do what at the registry.
//
// A client token is a name with up to two passwords and a scope map: which
// actions on which repositories. The tokens are files, one for each, in a
// directory that is read again when it changes; a replica needs nobody else to
// decide. Clients show a password with each request (Basic), or exchange it at
// the token endpoint for a bearer token that is valid for some minutes at every
// replica (https://distribution.github.io/distribution/spec/auth/token/ and
// .../oauth/).
//
// A bearer token says no more than who asked and for what: what that client may
// do is looked up when the token is used, so that a change of its scope map, its
// rotation or its deletion takes effect at once.
//
// It may import api of this module.
package auth
