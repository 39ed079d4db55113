package membucket_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/storage/bucket/buckettest"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) { buckettest.Run(t, new(membucket.Bucket)) }
