package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry/cache"
)

// peerRetry is how often a cache that other nodes cannot be served from, for
// want of a certificate or because the address is taken, looks whether it can.
const peerRetry = 10 * time.Second

// peerAddress is where a node serves others: its own address, and no other that
// its machine has. Empty: nowhere.
func peerAddress(ip string, port uint16) (string, error) {
	if port == 0 {
		return "", nil
	}
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return "", fmt.Errorf("--peer-port needs the node's own IP address: give it with --node-ip or $NODE_IP, not %q", ip)
	}
	return netip.AddrPortFrom(addr.Unmap(), port).String(), nil
}

// peersOf are the nodes that c names.
func peersOf(c *v1alpha1.NodeConfiguration) []cache.Peer {
	var all []cache.Peer
	for _, p := range c.Peers {
		all = append(all, cache.Peer{Node: p.Node, Address: p.Address})
	}
	return all
}

// listenPeers takes the address for other nodes. The error says why the cache
// does without them for now.
func (n *nodeCache) listenPeers(ctx context.Context) (*cache.PeerConfig, error) {
	p := &cache.PeerConfig{
		Node:     n.node,
		CertFile: filepath.Join(n.peerTLS, "tls.crt"),
		KeyFile:  filepath.Join(n.peerTLS, "tls.key"),
		CAFile:   filepath.Join(n.peerTLS, "ca.crt"),
	}
	if _, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile); err != nil {
		return nil, fmt.Errorf("other nodes are not asked, and not served, until the certificate for it is there: %w", err)
	}
	var lc net.ListenConfig
	var err error
	if p.Listener, err = lc.Listen(ctx, "tcp", n.peer); err != nil {
		return nil, fmt.Errorf("other nodes are not asked, and not served: %w: stop what uses the address or give another with --peer-port", err)
	}
	return p, nil
}

// awaitPeers returns true when listenPeers would succeed, and false when ctx
// ends.
func (n *nodeCache) awaitPeers(ctx context.Context) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(peerRetry):
		}
		if p, err := n.listenPeers(ctx); err == nil {
			return p.Listener.Close() == nil
		}
	}
}

func (n *nodeCache) tellPeers(c *cache.Cache, peers []cache.Peer) {
	if err := c.SetPeers(peers); err != nil {
		n.log.Error("the cache asks the nodes that it was told of before", "error", err)
	}
}

// validPeering checks what is given for peers.
func (c *nodeCacheConfig) validPeering() error {
	if c.peer != "" && (c.node == "" || c.peerTLS == "") {
		return errors.New("--peer-port needs --node and --peer-tls")
	}
	return nil
}
