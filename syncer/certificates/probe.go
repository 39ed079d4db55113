package certificates

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	probeTimeout  = 5 * time.Second
	probesAtATime = 16
)

// probe asks every replica behind the Service for the chain that it serves.
func (r *run) probe(ctx context.Context, o observed) ([]replica, error) {
	slices, err := r.Client.DiscoveryV1().EndpointSlices(r.cr.Namespace).List(ctx, metav1.ListOptions{
		LabelSelector: discoveryv1.LabelServiceName + "=" + r.service.Name,
	})
	if err != nil {
		return nil, fmt.Errorf("listing the endpoints of service %s/%s: %w", r.cr.Namespace, r.service.Name, err)
	}
	list := endpoints(slices.Items, r.service.PortName)
	var group errgroup.Group
	group.SetLimit(probesAtATime)
	for i := range list {
		group.Go(func() error {
			if err := r.probeOne(ctx, list[i].address, o); err != nil {
				list[i].fault = err.Error()
			}
			return nil
		})
	}
	_ = group.Wait() // faults are told one by one
	return list, ctx.Err()
}

// endpoints are the replicas that get connections or will again; those that are
// about to end are left out.
func endpoints(slices []discoveryv1.EndpointSlice, portName string) []replica {
	var list []replica
	for _, slice := range slices {
		port := ""
		for _, p := range slice.Ports {
			if p.Port != nil && (portName == "" && len(slice.Ports) == 1 || p.Name != nil && *p.Name == portName) {
				port = strconv.Itoa(int(*p.Port))
			}
		}
		for _, e := range slice.Endpoints {
			if port == "" || len(e.Addresses) == 0 || e.Conditions.Terminating != nil && *e.Conditions.Terminating {
				continue
			}
			ready := e.Conditions.Ready == nil || *e.Conditions.Ready
			list = append(list, replica{address: net.JoinHostPort(e.Addresses[0], port), ready: ready})
		}
	}
	return list
}

// probeOne makes a handshake and holds what is served against what is to be.
func (r *run) probeOne(ctx context.Context, address string, o observed) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	raw, err := r.Dial(ctx, "tcp", address)
	if err != nil {
		return err
	}
	// What is served is judged below, against the CAs to come and not by name.
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: r.service.Name}) //nolint:gosec // see above
	defer func() { _ = conn.Close() }()
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	chain := conn.ConnectionState().PeerCertificates
	switch {
	case len(chain) == 0:
		return errors.New("serves no certificate")
	case !chain[0].Equal(o.served.leaf()):
		return errors.New("still serves another certificate")
	}
	if err := verifyChain(chain, o.offer.roots, r.now); err != nil {
		return fmt.Errorf("serves a chain that does not verify: %w", err)
	}
	return nil
}
