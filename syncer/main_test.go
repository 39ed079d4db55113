package syncer

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(syncChild())
	}
	goleak.VerifyTestMain(m)
}

// childVariable makes this test binary a process that synchronises once: one
// that can be killed, or starved.
const childVariable = "SYNCER_TEST_CHILD"
