// Package objects runs real object stores for tests: MinIO, fake-gcs-server and
// Azurite, on loopback, on free ports, in directories of their own. Its tests
// hold package storage/bucket against them.
//
// It is a module of its own, and so is each server: nothing of them is linked
// into the product.
package objects
