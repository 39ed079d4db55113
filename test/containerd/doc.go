// Package containerd holds the tests in which a real containerd daemon pulls
// images through the host configuration that this project writes: by the
// node's cache, by the central registry over TLS, by the image's own registry,
// and by none of them.
//
// It is a module of its own, so that what the daemon is built from never
// reaches the product's go.mod. It holds tests only, may import every package
// of the project, and is imported by none.
package containerd
