package storage

import (
	"flag"
	"testing"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/testsuites"
)

// TestDriverSuite runs distribution's tests of a driver, with their smaller
// contents: everything is in memory.
func TestDriverSuite(t *testing.T) {
	t.Parallel() // it sleeps a lot
	short := flag.Lookup("test.short").Value
	before := short.String()
	if err := short.Set("true"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = short.Set(before) }() // it took the same before
	testsuites.Driver(t, func() (storagedriver.StorageDriver, error) {
		return &bucketDriver{bucket: testBucket(t), part: partSize}, nil
	}, false)
}
