//go:build linux

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Diagnose tells what every kernel knows of a client's connection to the VIP: its sockets,
// with port 0 all that the address has, our nf_tables rules, and who the client takes for
// the VIP's holder.
func (m *Mesh) Diagnose(client netip.AddrPort) string {
	var b strings.Builder
	fmt.Fprintf(&b, "the VIP is held by %s\n", strings.Join(m.Recorder.Now(), ", "))
	add := func(host *Host, what string, lines []string, err error) {
		for _, l := range lines {
			fmt.Fprintf(&b, "%s: %s\n", host.Name, l)
		}
		if err != nil {
			fmt.Fprintf(&b, "%s: %s: %v\n", host.Name, what, err)
		}
	}
	hosts := []*Host{m.Client.Host}
	for _, n := range m.Nodes {
		if h := n.Host(); h != nil {
			hosts = append(hosts, h)
		}
	}
	for _, h := range hosts {
		sockets, err := h.sockets(client)
		add(h, "list sockets", sockets, err)
		rules, err := h.rules()
		add(h, "list nf_tables rules", rules, err)
	}
	neighbours, err := m.neighbours()
	add(m.Client.Host, "list neighbours", neighbours, err)
	return b.String()
}

// Known reports whether a node that has power has an established connection with a client.
func (m *Mesh) Known(client netip.AddrPort) (bool, error) {
	for _, n := range m.Nodes {
		h := n.Host()
		if h == nil {
			continue
		}
		lines, err := h.sockets(client)
		if err != nil {
			return false, fmt.Errorf("list the sockets of %s: %w", n.Name, err)
		}
		if slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, " established,") }) {
			return true, nil
		}
	}
	return false, nil
}

var tcpStates = []string{"0", "established", "syn-sent", "syn-received", "fin-wait-1", "fin-wait-2", "time-wait",
	"closed", "close-wait", "last-ack", "listening", "closing", "new-syn-received"}

// sockets lists the TCP sockets that have the address at one of their ends.
func (h *Host) sockets(of netip.AddrPort) (lines []string, err error) {
	var all []*netlink.InetDiagTCPInfoResp
	err = h.Do(func() error {
		// What a listener on [::] has accepted by IPv4 is among those of IPv6.
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			found, err := netlink.SocketDiagTCPInfo(family)
			if err != nil {
				return err
			}
			all = append(all, found...)
		}
		return nil
	})
	is := func(ip net.IP, port uint16) bool {
		a, ok := netip.AddrFromSlice(ip)
		return ok && a.Unmap() == of.Addr() && (of.Port() == 0 || port == of.Port())
	}
	for _, s := range all {
		d := s.InetDiagMsg
		if !is(d.ID.Source, d.ID.SourcePort) && !is(d.ID.Destination, d.ID.DestinationPort) {
			continue
		}
		state := fmt.Sprint(d.State)
		if int(d.State) < len(tcpStates) {
			state = tcpStates[d.State]
		}
		line := fmt.Sprintf("socket %v:%d to %v:%d %s, queues %d in, %d out, timer %d due in %d ms, retries %d",
			d.ID.Source, d.ID.SourcePort, d.ID.Destination, d.ID.DestinationPort, state, d.RQueue, d.WQueue, d.Timer, d.Expires, d.Retrans)
		if i := s.TCPInfo; i != nil {
			line += fmt.Sprintf(", sent again %d, last sent %d ms, last received %d ms, last ack %d ms ago",
				i.Total_retrans, i.Last_data_sent, i.Last_data_recv, i.Last_ack_recv)
		}
		lines = append(lines, line)
	}
	return lines, err
}

// rules lists the rules of our nf_tables tables.
func (h *Host) rules() (lines []string, err error) {
	c, err := nftables.New(nftables.WithNetNSFd(int(h.ns)))
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, chain := range chains {
		if !strings.HasPrefix(chain.Table.Name, ours) {
			continue
		}
		rules, err := c.GetRules(chain.Table, chain)
		errs = append(errs, err)
		for _, r := range rules {
			line := fmt.Sprintf("nf_tables %s %s %s:", familyName(chain.Table.Family), chain.Table.Name, chain.Name)
			for _, e := range r.Exprs {
				line += fmt.Sprintf(" %T%+v", e, e)
			}
			lines = append(lines, strings.ReplaceAll(line, "*expr.", ""))
		}
	}
	return lines, errors.Join(errs...)
}

// neighbours lists what the client's kernel takes for the VIP's machine.
func (m *Mesh) neighbours() (lines []string, err error) {
	all, err := m.Client.Host.links.NeighList(0, netlink.FAMILY_ALL)
	for _, n := range all {
		a, ok := netip.AddrFromSlice(n.IP)
		if !ok || a.Unmap() != m.VIP().Addr() {
			continue
		}
		line := fmt.Sprintf("neighbour %v is %v, state %#x", n.IP, n.HardwareAddr, n.State)
		for _, node := range m.Nodes {
			if n.HardwareAddr.String() == node.mac().String() {
				line += ", which is " + node.Name
			}
		}
		lines = append(lines, line)
	}
	return lines, err
}
