package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// askInterval is between two looks at the Leases, nodesInterval at the nodes,
// which are larger.
const (
	askInterval   = time.Second
	nodesInterval = 15 * time.Second
)

// UninstallConfig says whose agents are to undo what they did.
type UninstallConfig struct {
	// API is the API server. Required.
	API *rest.Config
	// Namespace is the agents'. Required.
	Namespace string
	// Timeout bounds the wait for nodes. 0: 2 minutes.
	Timeout time.Duration
	// Logger receives what happened. nil: nothing is logged.
	Logger *slog.Logger
}

func (cfg *UninstallConfig) open() (*client, error) {
	if cfg.Timeout == 0 {
		cfg.Timeout = 2 * time.Minute
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Namespace == "" {
		return nil, errors.New("no namespace: give that of the agents")
	}
	return newClient(cfg.API, cfg.Namespace)
}

// Uninstall makes every agent undo what it did, waits until the agents of all
// Ready nodes have said so, and deletes their Leases. It returns the nodes that
// have not: those that are away, and those that took longer than the timeout.
func Uninstall(ctx context.Context, cfg UninstallConfig) (silent []string, err error) {
	c, err := cfg.open()
	if err != nil {
		return nil, err
	}
	created, err := c.annotate(ctx, true)
	if err != nil {
		return nil, err
	}
	if created {
		defer func() { err = errors.Join(err, c.deleteControl(ctx)) }()
	}
	return c.awaitCleaned(ctx, cfg)
}

// awaitCleaned waits for the agents, and deletes their Leases in the end.
func (c *client) awaitCleaned(ctx context.Context, cfg UninstallConfig) (silent []string, err error) {
	deadline := time.Now().Add(cfg.Timeout)
	var ready map[string]bool
	var asked time.Time
	last := -1
	for {
		leases, err := c.agents(ctx)
		if err == nil && time.Since(asked) > nodesInterval {
			if ready, err = c.readyNodes(ctx); err == nil {
				asked = time.Now()
			}
		}
		late := time.Now().After(deadline)
		if err != nil && (ctx.Err() != nil || late) {
			return nil, err
		}
		if err == nil {
			awaited, away := notCleaned(leases, ready, time.Now())
			if len(awaited) == 0 || late {
				silent = slices.Concat(awaited, away)
				slices.Sort(silent)
				return silent, c.deleteLeases(ctx, leases)
			}
			if len(awaited) != last {
				last = len(awaited)
				cfg.Logger.Info("waiting for nodes to be put back", "nodes", last, "first", awaited[0])
			}
		}
		if !sleep(ctx, askInterval) {
			return nil, context.Cause(ctx)
		}
	}
}

// CancelUninstall calls off an Uninstall: agents configure their nodes again.
func CancelUninstall(ctx context.Context, cfg UninstallConfig) error {
	c, err := cfg.open()
	if err != nil {
		return err
	}
	_, err = c.annotate(ctx, false)
	return err
}

// DeleteLease deletes the Lease of one node's agent.
func DeleteLease(ctx context.Context, api *rest.Config, namespace, node string) error {
	c, err := newClient(api, namespace)
	if err != nil {
		return err
	}
	return c.deleteLeases(ctx, []coordinationv1.Lease{{ObjectMeta: metav1.ObjectMeta{Name: LeasePrefix + node}}})
}

// annotate tells the agents by the Secret that every one of them watches. Where
// there is none, since the registry's certificate needs no CA of ours, an empty
// one is created.
func (c *client) annotate(ctx context.Context, leave bool) (created bool, err error) {
	var value any
	if leave {
		value = "true"
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{AnnotationUninstall: value}}})
	if err != nil {
		return false, err
	}
	err = c.core.Patch(types.MergePatchType).Namespace(c.namespace).Resource("secrets").Name(ControlSecret).Body(patch).Do(ctx).Error()
	if apierrors.IsNotFound(err) && leave {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{
			Name: ControlSecret, Namespace: c.namespace,
			Labels:      map[string]string{"app.kubernetes.io/managed-by": "connected-registry"},
			Annotations: map[string]string{AnnotationUninstall: "true"},
		}}
		err = c.core.Post().Namespace(c.namespace).Resource("secrets").Body(secret).Do(ctx).Error()
		created = err == nil
	}
	if err != nil {
		return false, fmt.Errorf("annotating Secret %s/%s: %w", c.namespace, ControlSecret, err)
	}
	return created, nil
}

// deleteControl: an agent that has left does not come back because of it.
func (c *client) deleteControl(ctx context.Context) error {
	if err := c.core.Delete().Namespace(c.namespace).Resource("secrets").Name(ControlSecret).Do(ctx).Error(); err != nil {
		return fmt.Errorf("deleting Secret %s/%s: %w", c.namespace, ControlSecret, err)
	}
	return nil
}

// agents returns the Leases of all agents, from the API server's memory.
func (c *client) agents(ctx context.Context) ([]coordinationv1.Lease, error) {
	list := &coordinationv1.LeaseList{}
	err := c.coordination.Get().Namespace(c.namespace).Resource("leases").Param("resourceVersion", "0").
		Param("labelSelector", LabelComponent+"="+ComponentNodeAgent).Do(ctx).Into(list)
	if err != nil {
		return nil, fmt.Errorf("listing the Leases of agents: %w", err)
	}
	return list.Items, nil
}

// readyNodes returns all nodes, and whether they are Ready.
func (c *client) readyNodes(ctx context.Context) (ready map[string]bool, err error) {
	nodes := &corev1.NodeList{}
	if err := c.core.Get().Resource("nodes").Param("resourceVersion", "0").Do(ctx).Into(nodes); err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	ready = make(map[string]bool)
	for _, n := range nodes.Items {
		ready[n.Name] = slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		})
	}
	return ready, nil
}

// notCleaned returns the nodes that still hold something of ours: those whose
// agents are there to be waited for, and the others. A node that has left the
// cluster is none of them.
func notCleaned(leases []coordinationv1.Lease, ready map[string]bool, now time.Time) (awaited, away []string) {
	for _, l := range leases {
		node, ok := strings.CutPrefix(l.Name, LeasePrefix)
		isReady, exists := ready[node]
		if !ok || !exists || l.Annotations[AnnotationCleaned] == "true" {
			continue
		}
		alive := l.Spec.RenewTime != nil && now.Sub(l.Spec.RenewTime.Time) < leaseDuration
		if isReady && alive {
			awaited = append(awaited, node)
		} else {
			away = append(away, node)
		}
	}
	slices.Sort(awaited)
	return awaited, away
}

func (c *client) deleteLeases(ctx context.Context, leases []coordinationv1.Lease) error {
	var errs []error
	for _, l := range leases {
		err := c.coordination.Delete().Namespace(c.namespace).Resource("leases").Name(l.Name).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("deleting Lease %s/%s: %w", c.namespace, l.Name, err))
		}
	}
	return errors.Join(errs...)
}
