package storage

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(crashRootEnv); root != "" {
		pushUntilKilled(root)
		return
	}
	goleak.VerifyTestMain(m)
}
