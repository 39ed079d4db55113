package trust

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// crashEnv tells the test binary to do a job in a directory, and to kill itself ahead of a step: "job step dir".
const crashEnv = "TRUST_TEST_CRASH"

// crash runs a job in another process that is killed, as kill -9 does it, ahead
// of the given step, counted from 0. It returns false if the job came to its
// end before.
func crash(t *testing.T, job, dir string, step int) (killed bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s", crashEnv, job, step, dir))
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			return true
		}
	}
	t.Fatalf("%s in %s: %v\n%s", job, dir, err, out)
	return false
}

func crashHere(order string) {
	parts := strings.SplitN(order, " ", 3)
	step, err := strconv.Atoi(parts[1])
	if err != nil {
		panic(err)
	}
	before := func(string) {
		if step == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		step--
	}
	jobs := map[string]func(dir string, before func(string)) error{
		"authority": crashingAuthority,
		"apply":     crashingApply,
		"full":      applyToFullDisk,
	}
	if err := jobs[parts[0]](parts[2], before); err != nil {
		panic(err)
	}
}

func crashingAuthority(dir string, before func(string)) error {
	a, err := loadOrCreateAuthority(dir, testNow, before)
	if err != nil {
		return err
	}
	_, err = a.ensureServing(dir, []string{"a.example"}, testNow, before)
	return err
}

// crashingApply works on dir/root with the CA in dir/ca.pem.
func crashingApply(dir string, before func(string)) error {
	data, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return err
	}
	ca, _, err := ParseBundle(data, testNow)
	if err != nil {
		return err
	}
	s, err := NewStore(StoreConfig{NodeRoot: filepath.Join(dir, "root"), Grace: -1, BeforeStep: before})
	if err != nil {
		return err
	}
	_, err = s.Apply(context.Background(), testState(testCert{cert: ca.certs[0]}, "docker.io"))
	return err
}

// applyToFullDisk limits the size of files to less than the record has: the
// write fails midway, as on a full disk.
func applyToFullDisk(dir string, before func(string)) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	limit.Cur = 700
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	err := crashingApply(dir, before)
	if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "full, free some space") {
		return fmt.Errorf("the error of a full disk is %v", err)
	}
	return nil
}
