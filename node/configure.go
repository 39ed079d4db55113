package node

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/trust"
)

var (
	// pendingFile names the file with which the runtime has not been restarted
	// yet; it survives whoever was to do it.
	pendingFile = path.Join(path.Dir(trust.RecordPath), "restart-pending")
	// failedFile holds the digest of what the runtime did not come back with,
	// so that it is not tried again and again.
	failedFile = path.Join(path.Dir(trust.RecordPath), "configuration-failed")
)

// Locker lets one node at a time restart its runtime.
type Locker interface {
	// Lock waits for this node's turn until ctx ends. The turn lasts until
	// unlock is called.
	Lock(ctx context.Context) (unlock func(), err error)
}

// Config says how a node's runtime is to be configured.
type Config struct {
	// NodeRoot is the directory in which the node's file system is found.
	// Empty: "/".
	NodeRoot string
	// Allowed lets the configuration be changed and the runtime restarted.
	// False: what is to be done is only reported.
	Allowed bool
	// Restarter restarts the runtime. Nil: the node's init system does.
	Restarter Restarter
	// Locker is held from the change until the runtime has come back. Nil:
	// nobody waits for anybody.
	Locker Locker
	// CheckImage is pulled before and after. Empty: the runtime only has to
	// answer.
	CheckImage string
	// Patience is how long the runtime may take to come back. Zero: 2 min.
	Patience time.Duration
	// Logger receives what is done. Nil: nothing is logged.
	Logger *slog.Logger
}

// Configure makes a node's runtime read the hosts directory, if it does not and
// that is allowed, and returns what was found in the end. Steps of the plan that
// are left are for a person.
//
// If the runtime does not come back, or a pull fails that worked before, the
// configuration is put back and the runtime restarted once more; the error says
// so.
func Configure(ctx context.Context, cfg Config) (Detection, Plan, error) {
	c := &configurer{Config: cfg}
	if c.NodeRoot == "" {
		c.NodeRoot = "/"
	}
	if c.Patience == 0 {
		c.Patience = 2 * time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	var err error
	if c.store, err = trust.NewStore(trust.StoreConfig{NodeRoot: c.NodeRoot}); err != nil {
		return Detection{}, Plan{}, err
	}
	d, p, err := c.look(ctx)
	if err != nil || !c.Allowed || p.File == "" && c.note(pendingFile) == "" {
		return d, p, err
	}
	if p.File != "" && c.note(failedFile) == digest(p.Data) {
		return d, p, fmt.Errorf("the runtime did not work with this change to %s before: it is not tried again until %s is removed", p.File, failedFile)
	}
	if err := c.change(ctx); err != nil {
		d, p, _ = c.look(context.WithoutCancel(ctx))
		return d, p, err
	}
	return c.look(ctx)
}

type configurer struct {
	Config
	store *trust.Store
}

func (c *configurer) look(ctx context.Context) (Detection, Plan, error) {
	d, err := Detect(ctx, c.NodeRoot)
	if err != nil {
		return d, Plan{}, err
	}
	p, err := NewPlan(ctx, c.NodeRoot, d)
	return d, p, err
}

// note returns what one of our own files on the node says, empty if it is not
// there.
func (c *configurer) note(name string) string {
	root, err := os.OpenRoot(c.NodeRoot)
	if err != nil {
		return ""
	}
	defer root.Close()
	data, _ := rootFiles{root}.read(name)
	return strings.TrimSpace(string(data))
}

func digest(data []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(data)) }

// change does the work when it is this node's turn.
func (c *configurer) change(ctx context.Context) error {
	if c.Locker != nil {
		unlock, err := c.Locker.Lock(ctx)
		if err != nil {
			return fmt.Errorf("waiting for this node's turn to restart its runtime: %w", err)
		}
		defer unlock()
	}
	// While this node waited, somebody else may have done it.
	d, p, err := c.look(ctx)
	if err != nil || p.File == "" && c.note(pendingFile) == "" {
		return err
	}
	if c.Restarter == nil {
		if c.Restarter, err = NewRestarter(c.NodeRoot, d); err != nil {
			return withSteps(err, p)
		}
	}
	rt, err := c.connect(d)
	if err != nil {
		return err
	}
	defer rt.Close()
	worked := c.CheckImage != "" && rt.Pull(ctx, c.CheckImage) == nil
	file, err := c.write(ctx, p)
	if err != nil {
		return err
	}
	// From here on, what was begun is ended, whatever happens to ctx.
	ctx = context.WithoutCancel(ctx)
	if err := c.restart(ctx, rt, worked); err != nil {
		return c.rollBack(ctx, rt, file, err)
	}
	_, err = c.store.Undo(ctx, pendingFile)
	return err
}

// withSteps adds to the reason why nothing was changed what a person can do.
func withSteps(err error, p Plan) error {
	if len(p.Steps) == 0 {
		return err
	}
	return fmt.Errorf("%w; nothing was changed, and this is to be done: %s", err, strings.Join(p.Steps, "; "))
}

// connect finds the runtime by which the change can be checked.
func (c *configurer) connect(d Detection) (*Runtime, error) {
	root, err := os.OpenRoot(c.NodeRoot)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	socket, ok := socketPath(c.NodeRoot, rootFiles{root}, d.layout)
	if !ok {
		return nil, fmt.Errorf("the runtime does not run, or its socket %s is out of reach: it is not restarted, since nobody could tell whether it comes back", d.layout.sockets[0])
	}
	return Connect(socket)
}

// write changes the file of the plan, or finds the one that was changed before
// without a restart.
func (c *configurer) write(ctx context.Context, p Plan) (file string, err error) {
	if p.File == "" {
		return c.note(pendingFile), nil
	}
	if _, err := c.store.Put(ctx, pendingFile, []byte(p.File+"\n"), 0o600); err != nil {
		return "", err
	}
	c.Logger.Info("changing the configuration of the container runtime", "path", p.File)
	_, err = c.store.Put(ctx, p.File, p.Data, c.mode(p.File))
	return p.File, err
}

// mode is that of the file that is replaced.
func (c *configurer) mode(name string) os.FileMode {
	root, err := os.OpenRoot(c.NodeRoot)
	if err != nil {
		return 0o644
	}
	defer root.Close()
	if real, err := trust.ResolvePath(root, name); err == nil {
		if info, err := root.Stat(real); err == nil {
			return info.Mode().Perm()
		}
	}
	return 0o644
}

// restart ends when the runtime answers, and still pulls if it did before.
func (c *configurer) restart(ctx context.Context, rt *Runtime, worked bool) error {
	ctx, cancel := context.WithTimeout(ctx, c.Patience)
	defer cancel()
	c.Logger.Info("restarting the container runtime")
	if err := c.Restarter.Restart(ctx); err != nil {
		return fmt.Errorf("restarting the runtime: %w", err)
	}
	if err := rt.Answers(ctx); err != nil {
		return err
	}
	if c.CheckImage == "" {
		return nil
	}
	err := rt.Pull(ctx, c.CheckImage)
	if err != nil && !worked {
		c.Logger.Warn("an image that could not be pulled before still cannot", "error", err)
		return nil
	}
	return err
}

// rollBack puts the configuration back and starts the runtime by it.
func (c *configurer) rollBack(ctx context.Context, rt *Runtime, file string, cause error) error {
	c.Logger.Error("putting the configuration of the container runtime back", "path", file, "error", cause)
	if err := c.putBack(ctx, file); err != nil {
		return fmt.Errorf("%w; putting %s back: %w", cause, file, err)
	}
	if err := c.restart(ctx, rt, false); err != nil {
		return fmt.Errorf("%w; %s was put back, but then: %w", cause, file, err)
	}
	_, err := c.store.Undo(ctx, pendingFile)
	return errors.Join(fmt.Errorf("%w: %s was put back, and the runtime runs as before", cause, file), err)
}

// putBack remembers what did not work.
func (c *configurer) putBack(ctx context.Context, file string) error {
	if _, err := c.store.Undo(ctx, file); err != nil {
		return err
	}
	_, p, err := c.look(ctx)
	if err == nil && p.File != "" {
		_, err = c.store.Put(ctx, failedFile, []byte(digest(p.Data)+"\n"), 0o600)
	}
	return err
}
