package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// StartupTaint is the taint by which nodes are kept free of workloads until
// their pulls are ours. Whoever makes the nodes puts it there.
const StartupTaint = "connectedregistry.io/not-ready"

// untaint waits until the node is configured, then takes its startup taint
// away, once: whoever taints it again later means it.
func (d *Daemon) untaint(ctx context.Context) {
	if !d.cfg.RemoveStartupTaint {
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-d.configured:
	}
	for retry := firstWriteRetry; ; retry = min(2*retry, longWriteRetry) {
		removed, err := d.client.removeTaint(ctx, d.cfg.Node)
		if err == nil {
			if removed {
				d.log.Info("the node takes workloads from now on", "taint", StartupTaint)
			}
			return
		}
		if retry == firstWriteRetry {
			d.log.Warn("the node's startup taint cannot be taken away, which is tried again", "error", err)
		}
		if !sleep(ctx, jitter(retry)) {
			return
		}
	}
}

// isConfigured lets untaint go on.
func (d *Daemon) isConfigured() {
	select {
	case <-d.configured:
	default:
		close(d.configured)
	}
}

// removeTaint takes the startup taint from a node, with whatever effects. It needs
// get and patch on that node.
func (c *client) removeTaint(ctx context.Context, node string) (removed bool, err error) {
	for {
		index, err := c.findTaint(ctx, node)
		if err != nil {
			return removed, fmt.Errorf("taint %s of node %s: %w", StartupTaint, node, err)
		}
		if index < 0 {
			return removed, nil
		}
		if err := c.cutTaint(ctx, node, index); err != nil {
			return removed, fmt.Errorf("taint %s of node %s: %w", StartupTaint, node, err)
		}
		removed = true
	}
}

func (c *client) findTaint(ctx context.Context, node string) (index int, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	n := &corev1.Node{}
	if err := c.core.Get().Resource("nodes").Name(node).Do(ctx).Into(n); err != nil {
		return 0, err
	}
	return slices.IndexFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == StartupTaint }), nil
}

// cutTaint fails if somebody has changed the list meanwhile.
func (c *client) cutTaint(ctx context.Context, node string, index int) error {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	path := fmt.Sprintf("/spec/taints/%d", index)
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": path + "/key", "value": StartupTaint},
		{"op": "remove", "path": path},
	})
	if err != nil {
		return err
	}
	return c.core.Patch(types.JSONPatchType).Resource("nodes").Name(node).Body(patch).Do(ctx).Error()
}
