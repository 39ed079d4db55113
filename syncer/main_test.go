package syncer

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if run, ok := children[os.Getenv(childVariable)]; ok {
		os.Exit(run())
	}
	goleak.VerifyTestMain(m)
}

// childVariable makes this test binary run as something else: a process of its
// own, to be killed or starved.
const childVariable = "SYNCER_TEST_CHILD"

var children = map[string]func() int{}
