package daemon

import (
	"context"
	"log/slog"
	"time"

	"github.com/connected-registry/connected-registry/agent"
)

const (
	// The agent gives up only before its first success; then it is begun anew
	// after a wait that doubles between these.
	firstNodeRetry = time.Second
	longNodeRetry  = time.Minute
)

// keeper runs the agent that keeps the node's files.
type keeper struct {
	agent  *agent.Agent
	cancel context.CancelFunc
	done   chan struct{}
}

// startNode returns nil if cfg is not acceptable.
func startNode(ctx context.Context, cfg agent.Config) (*keeper, error) {
	a, err := agent.New(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	k := &keeper{agent: a, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(k.done)
		retry := firstNodeRetry
		for a.Run(ctx) != nil { // it has reported the error
			if !sleep(ctx, retry) {
				return
			}
			retry = min(2*retry, longNodeRetry)
		}
	}()
	return k, nil
}

func (k *keeper) stop() {
	k.cancel()
	<-k.done
}

// leaving is how far the undoing of everything has come.
type leaving struct {
	wanted bool
	done   bool
	err    error
}

// want takes what the control Secret says.
func (l *leaving) want(wanted bool, log *slog.Logger) {
	switch {
	case wanted && !l.wanted:
		log.Info("told to leave: undoing everything that was done to the node")
	case !wanted && l.wanted:
		log.Info("told to stay: configuring the node again")
	case wanted == l.wanted:
		return
	}
	*l = leaving{wanted: wanted}
}

// cleanUp puts the node back, once. The cache goes on serving, so that a pull
// under way ends well.
func (d *Daemon) cleanUp(ctx context.Context) {
	if d.leave.done {
		return
	}
	d.stopNode()
	d.applied, d.restored, d.acked = "", false, acknowledgement{}
	d.in.forgetReport()
	d.leave.err = d.keep.cleanUp(ctx, agent.CleanupConfig{NodeRoot: d.cfg.NodeRoot, Logger: d.log})
	if d.leave.err == nil {
		d.leave.done = true
		d.log.Info("the node is as it was before")
	}
}

// Left reports, after Run, whether the node was put back as it was, so that the
// cache's directory is of no use any more.
func (d *Daemon) Left() bool { return d.leave.done }
