//go:build linux

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// ours is how the names of an agent's nf_tables tables begin.
	ours = "hamesh"
	// holds is the name of the tables that every running agent has.
	holds = "hamesh-hold"
	// keptRoutes is the protocol of an agent's routes (package handover).
	keptRoutes = 104
)

// dataFiles are what an agent's data directory has for good: etcd's directory, and its own.
var dataFiles = []string{"boot", "crash", "etcd", "events", "identity", "lock"}

// Remains lists what the node's agents have left since the first one was started on its
// present host, each thing as a person would call it: addresses, our nf_tables tables with
// their rules, routes, rules, system settings, promiscuous interfaces, and files that do not
// belong; not the rules that an agent has as long as it runs. Where the last agent was stopped in order, also its socket and any process.
func (n *Node) Remains() (left []string, err error) {
	host := n.Host()
	if host == nil {
		return nil, nil
	}
	n.mu.RLock()
	before := n.before
	n.mu.RUnlock()
	if before == nil {
		return nil, nil
	}
	now, err := host.traces()
	if err != nil {
		return nil, fmt.Errorf("look for what is left on %s: %w", n.Name, err)
	}
	running := n.process().running()
	for _, t := range now {
		if running && strings.Contains(t, " "+holds+" ") {
			continue
		}
		if !slices.Contains(before, t) {
			left = append(left, t)
		}
	}
	for _, t := range before {
		if !slices.Contains(now, t) {
			left = append(left, "no more: "+t)
		}
	}
	if n.process().stoppedInOrder() {
		api := 0
		if p := n.API.running(); p.running() {
			api = p.cmd.Process.Pid
		}
		pids, err := host.others(api)
		if err != nil {
			return nil, err
		}
		for _, pid := range pids {
			command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it may have ended
			left = append(left, fmt.Sprintf("process %d %s", pid, bytes.ReplaceAll(command, []byte{0}, []byte{' '})))
		}
	}
	files, err := n.files()
	return append(left, files...), err
}

// Leave ends every agent, and returns as an error what is left on the nodes afterwards. As
// long as a majority runs, one after the other is stopped in order, and has somebody to give
// its VIPs to; the rest is killed by SIGKILL, and may leave its socket. With what status they
// end is not looked at: an etcd that has just lost others may not close in time.
func (m *Mesh) Leave() error {
	var running []*Node
	for _, n := range m.Nodes {
		if n.process().running() {
			running = append(running, n)
		}
	}
	var errs []error
	for i, n := range running {
		if len(running)-i > max(len(m.Nodes)/2, 1) {
			errs = append(errs, n.Thaw(), n.process().end(unix.SIGTERM))
		} else {
			errs = append(errs, n.KillAgent())
		}
	}
	for _, n := range m.Nodes {
		errs = append(errs, Await(patience, func() error {
			left, err := n.Remains()
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("the agents of %s have left: %s", n.Name, strings.Join(left, "; "))
			}
			return err
		}))
	}
	return errors.Join(errs...)
}

// files lists what is on the node's disk and should not be there.
func (n *Node) files() (left []string, err error) {
	own := []string{filepath.Base(n.configFile()), filepath.Base(n.Program()), filepath.Base(n.notices.path()), filepath.Base(n.LogFile()), filepath.Base(n.API.log()), "data"}
	if !n.process().stoppedInOrder() {
		own = append(own, filepath.Base(n.socket()))
	}
	for _, d := range []struct {
		dir   string
		known []string
	}{
		{n.dir, own},
		{filepath.Join(n.dir, "data"), dataFiles},
		{filepath.Dir(dir), []string{filepath.Base(dir)}},
	} {
		entries, err := os.ReadDir(d.dir)
		if err != nil {
			return nil, fmt.Errorf("list the files of %s: %w", n.Name, err)
		}
		for _, e := range entries {
			if !slices.Contains(d.known, e.Name()) {
				left = append(left, "file "+filepath.Join(d.dir, e.Name()))
			}
		}
	}
	return left, nil
}

// traces lists what there is on the host of all that an agent can change.
func (h *Host) traces() (all []string, err error) {
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	links, err := h.links.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
		if l.Attrs().Promisc > 0 {
			add("promiscuous interface %s", l.Attrs().Name)
		}
	}
	addresses, err := h.links.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addresses {
		if !a.IP.IsLinkLocalUnicast() { // comes late
			add("address %v on %s", a.IPNet, names[a.LinkIndex])
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// The table has to be named, or only the main one is listed.
		routes, err := h.links.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Protocol != unix.RTPROT_KERNEL {
				add("route %v", r)
			}
		}
		rules, err := h.links.RuleList(family)
		if err != nil {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		for _, r := range rules {
			add("rule %v", r)
		}
	}
	tables, err := h.tables()
	if err != nil {
		return nil, err
	}
	settings, err := h.settings()
	return append(append(all, tables...), settings...), err
}

// tables lists our nf_tables tables, with how many rules they have.
func (h *Host) tables() (all []string, err error) {
	c, err := nftables.New(nftables.WithNetNSFd(int(h.ns)))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list nf_tables tables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nf_tables chains: %w", err)
	}
	for _, t := range tables {
		if !strings.HasPrefix(t.Name, ours) {
			continue
		}
		rules := 0
		for _, chain := range chains {
			if chain.Table.Name == t.Name && chain.Table.Family == t.Family {
				found, err := c.GetRules(t, chain)
				if err != nil {
					return nil, fmt.Errorf("list nf_tables rules: %w", err)
				}
				rules += len(found)
			}
		}
		all = append(all, fmt.Sprintf("nf_tables table %s of family %s with %d rules", t.Name, familyName(t.Family), rules))
	}
	return all, nil
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyARP:
		return "arp"
	}
	return fmt.Sprint(f)
}

// settings lists every system setting of IPv4 and IPv6 and its value.
func (h *Host) settings() (all []string, err error) {
	err = h.Do(func() error {
		for _, root := range []string{"/proc/sys/net/ipv4", "/proc/sys/net/ipv6"} {
			err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
				if err != nil || e.IsDir() {
					return err
				}
				b, err := os.ReadFile(path)
				// Some can only be written, others have no value yet.
				if err != nil && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EIO)) {
					return nil
				}
				all = append(all, fmt.Sprintf("setting %s = %s", strings.TrimPrefix(path, "/proc/sys/"), bytes.TrimSpace(b)))
				return err
			})
			if err != nil {
				return fmt.Errorf("read system settings: %w", err)
			}
		}
		return nil
	})
	return all, err
}

// Handing reports whether the node has our nf_tables rules that send packets for the address's
// IP version to another node, and whether a route of ours keeps the address local.
func (n *Node) Handing(address netip.Addr) (forwards, keeps bool, err error) {
	host := n.Host()
	if host == nil {
		return false, false, nil
	}
	tables, err := host.tables()
	if err != nil {
		return false, false, err
	}
	family, route := netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: keptRoutes}
	table := "table " + ours + " of family ip "
	if address.Is6() {
		family, table = netlink.FAMILY_V6, "table "+ours+" of family ip6 "
	}
	routes, err := host.links.RouteListFiltered(family, route, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return false, false, fmt.Errorf("list the routes of %s: %w", n.Name, err)
	}
	forwards = slices.ContainsFunc(tables, func(t string) bool { return strings.Contains(t, table) })
	keeps = slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.IP.Equal(address.AsSlice()) })
	return forwards, keeps, nil
}
