package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

const (
	firstBlock, lastBlock = 200, 249
	// maxNodes is what the pods' part of a block has room for.
	maxNodes = 30
	bridge   = "nodes"
	// bridgeMAC is chosen, since a bridge without one takes the lowest of its
	// ports', and changes it under the nodes when another is plugged in.
	bridgeMAC = "02:00:00:00:00:01"
)

// network is the addresses of one cluster, all in 10.<block>.0.0/16.
type network struct{ block byte }

func (n network) addr(c, d byte) netip.Addr { return netip.AddrFrom4([4]byte{10, n.block, c, d}) }

func (n network) all() netip.Prefix      { return netip.PrefixFrom(n.addr(0, 0), 16) }
func (n network) machines() netip.Prefix { return netip.PrefixFrom(n.addr(0, 0), 24) }
func (n network) control() netip.Addr    { return n.addr(0, 1) }
func (n network) host() netip.Addr       { return n.addr(0, 254) }
func (n network) services() netip.Prefix { return netip.PrefixFrom(n.addr(16, 0), 20) }
func (n network) apiService() netip.Addr { return n.addr(16, 1) }
func (n network) pods() netip.Prefix     { return netip.PrefixFrom(n.addr(32, 0), 19) }

// node and nodePods belong to the node of that number, 1 to maxNodes.
func (n network) node(number int) netip.Addr { return n.addr(0, byte(1+number)) }
func (n network) nodePods(number int) netip.Prefix {
	return netip.PrefixFrom(n.addr(byte(32+number), 0), 24)
}

// hostLink is the one device that the host gets.
func (n network) hostLink() string { return fmt.Sprintf("crtest%d", n.block) }

// freeNetwork returns the first block that overlaps nothing the host can reach
// otherwise.
func freeNetwork(used []netip.Prefix) (network, error) {
candidates:
	for block := firstBlock; block <= lastBlock; block++ {
		n := network{byte(block)}
		for _, p := range used {
			if p.Overlaps(n.all()) {
				continue candidates
			}
		}
		return n, nil
	}
	return network{}, fmt.Errorf("no free network from 10.%d.0.0/16 to 10.%d.0.0/16 on this host", firstBlock, lastBlock)
}

// hostNetworks returns the IPv4 prefixes of the host's addresses and routes,
// the default route left out.
func hostNetworks() ([]netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var used []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			used = append(used, p.Masked())
		}
	}
	table, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return nil, err
	}
	return append(used, routes(table)...), nil
}

// routes reads /proc/net/route: a header, then lines whose second and eighth
// fields are destination and mask, in hexadecimal and the machine's byte order.
func routes(table []byte) []netip.Prefix {
	var all []netip.Prefix
	lines := bufio.NewScanner(bytes.NewReader(table))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 8 {
			continue
		}
		dest, err1 := hex.DecodeString(f[1])
		mask, err2 := hex.DecodeString(f[7])
		if err1 != nil || err2 != nil || len(dest) != 4 || len(mask) != 4 {
			continue
		}
		var d [4]byte
		binary.NativeEndian.PutUint32(d[:], binary.BigEndian.Uint32(dest))
		var m [4]byte
		binary.NativeEndian.PutUint32(m[:], binary.BigEndian.Uint32(mask))
		if ones, _ := net.IPMask(m[:]).Size(); ones > 0 {
			all = append(all, netip.PrefixFrom(netip.AddrFrom4(d), ones))
		}
	}
	return all
}

// ip runs a batch of ip(8) commands in the network of a process; 0 is the
// host's.
func ip(ctx context.Context, pid int, lines ...string) error {
	args := []string{"ip", "-batch", "-"}
	if pid != 0 {
		args = append([]string{"nsenter", "--target", strconv.Itoa(pid), "--net", "--"}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("%q: %w", lines, err)
	}
	return nil
}

// connectHost makes the bridge in the control plane's network, plugs the host
// into it, and routes the services over it.
func (n network) connectHost(ctx context.Context, control int) error {
	if err := ip(ctx, 0, fmt.Sprintf("link add %s type veth peer name host netns %d", n.hostLink(), control)); err != nil {
		return err
	}
	err := ip(ctx, control,
		"link set lo up",
		"link add "+bridge+" address "+bridgeMAC+" type bridge",
		fmt.Sprintf("addr add %s/%d dev %s", n.control(), n.machines().Bits(), bridge),
		"link set "+bridge+" up",
		"link set host master "+bridge,
		"link set host up",
		// Any route will do: kube-proxy changes the destination of what the
		// API server sends there, but only of what has a route at first.
		fmt.Sprintf("route add %s dev %s", n.services(), bridge),
	)
	if err != nil {
		return err
	}
	return ip(ctx, 0,
		fmt.Sprintf("addr add %s/%d dev %s", n.host(), n.machines().Bits(), n.hostLink()),
		"link set "+n.hostLink()+" up",
		fmt.Sprintf("route add %s via %s", n.services(), n.control()),
	)
}

// connectNode plugs a node into the bridge and tells everybody the way to its
// pods, and it the way to theirs. peers are the process and number of the nodes
// that run.
func (n network) connectNode(ctx context.Context, control, node, number int, peers map[int]int) error {
	port := nodeName(number)
	if err := ip(ctx, control, fmt.Sprintf("link add %s type veth peer name eth0 netns %d", port, node)); err != nil {
		return err
	}
	toPods := func(number int) string {
		return fmt.Sprintf("route replace %s via %s", n.nodePods(number), n.node(number))
	}
	if err := ip(ctx, control, "link set "+port+" master "+bridge, "link set "+port+" up", toPods(number)); err != nil {
		return err
	}
	lines := []string{
		"link set lo up",
		fmt.Sprintf("addr add %s/%d dev eth0", n.node(number), n.machines().Bits()),
		"link set eth0 up",
		fmt.Sprintf("route add default via %s", n.control()),
	}
	for pid, peer := range peers {
		lines = append(lines, toPods(peer))
		if err := ip(ctx, pid, toPods(number)); err != nil {
			return err
		}
	}
	if err := ip(ctx, node, lines...); err != nil {
		return err
	}
	return ip(ctx, 0, toPods(number))
}

// disconnectHost removes the host's device at once, rather than whenever the
// kernel gets to the network it was paired with.
func (n network) disconnectHost(ctx context.Context) error {
	_, err := net.InterfaceByName(n.hostLink())
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			return nil // there is none
		}
		return err
	}
	err = ip(ctx, 0, "link del "+n.hostLink())
	if _, gone := net.InterfaceByName(n.hostLink()); gone != nil {
		return nil
	}
	return err
}
