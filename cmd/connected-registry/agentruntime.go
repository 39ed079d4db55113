package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"

	"github.com/connected-registry/connected-registry/agent/daemon"
	"github.com/connected-registry/connected-registry/node"
)

// nodeRuntime is the node's container runtime for the agent.
type nodeRuntime struct {
	nodeRoot string
	// certsDir is where host configuration is written. Empty: where it is read.
	certsDir string
	// checkImage is pulled before and after a change. Empty: none is.
	checkImage string
	log        *slog.Logger
}

// Look implements [daemon.Runtime].
func (r nodeRuntime) Look(ctx context.Context, allowed bool, turn daemon.Turn) (daemon.RuntimeFindings, error) {
	d, plan, err := node.Configure(ctx, node.Config{
		NodeRoot: r.nodeRoot, Allowed: allowed, CheckImage: r.checkImage, Locker: turnLocker(turn), Logger: r.log,
	})
	report, encodeErr := json.Marshal(d)
	findings := daemon.RuntimeFindings{CertsDir: d.CertsDir, Reserved: d.Reserved, Report: string(report)}
	if err == nil && d.Verdict == node.Fault {
		err = errors.New("it does not read what is written for it: " + strings.Join(plan.Steps, "; "))
	}
	if err == nil && r.certsDir != "" && path.Clean(r.certsDir) != path.Clean(d.CertsDir) {
		err = fmt.Errorf("it reads %s, but what is written for it is in %s: set --certs-dir, or the chart's agent.containerdPath", d.CertsDir, r.certsDir)
	}
	return findings, errors.Join(err, encodeErr)
}

type turnLocker daemon.Turn

func (t turnLocker) Lock(ctx context.Context) (unlock func(), err error) { return t(ctx) }

// hostsDirectory is where to write on a node that nobody keeps looking at.
func (f *agentFlags) hostsDirectory(ctx context.Context) (certsDir string, reserved []string, err error) {
	d, err := node.Detect(ctx, f.nodeRoot)
	return cmp.Or(f.certsDir, d.CertsDir), d.Reserved, err
}
