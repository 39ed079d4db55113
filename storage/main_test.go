package storage

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// crashJobs are what the test binary does until it is killed.
var crashJobs = map[string]func(root string){
	"":        pushUntilKilled,
	"record":  recordUntilKilled,
	"collect": collectUntilKilled,
	"fill":    pushUntilFull,
}

func TestMain(m *testing.M) {
	if root := os.Getenv(crashRootEnv); root != "" {
		crashJobs[os.Getenv(crashJobEnv)](root)
		return
	}
	// A real object store keeps connections for longer than the tests run.
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}
