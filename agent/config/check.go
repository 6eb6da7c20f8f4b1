package config

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// maxEmbedded is the most members with an embedded store: beyond seven voters etcd only
// gets slower.
const maxEmbedded = 7

// check compares the values with each other and completes roles and priorities. Values
// that were refused on their own are zero here and are passed over.
func (d *document) check(c *Config) {
	d.checkMembers(c)
	d.checkNode(c)
	for i := range c.Members {
		c.Members[i].Role = cmp.Or(c.Members[i].Role, Candidate)
		c.Members[i].Priority = cmp.Or(c.Members[i].Priority, 100)
	}
	if !slices.ContainsFunc(c.Members, isCandidate) && len(c.Members) > 0 {
		d.fail("members", "has no candidate, so nobody could own a VIP", "make at least one member a candidate")
	}
	d.checkTiming(c.Timing)
	d.checkVIPs(c)
	d.checkProxies(c)
	d.checkPorts(c)
}

func isCandidate(m Member) bool { return m.Role == Candidate }

// distinct notes a problem where a value stands at another key already. Zero values were
// refused before.
func distinct[T comparable](d *document, seen map[T]string, value T, key string) {
	var zero T
	if value == zero {
		return
	}
	if first, ok := seen[value]; ok {
		d.fail(key, fmt.Sprintf("%s is also %s", quote(fmt.Sprint(value)), first), "make them differ, or leave one out")
		return
	}
	seen[value] = key
}

func (d *document) checkMembers(c *Config) {
	names, addresses := map[string]string{}, map[netip.Addr]string{}
	for i, m := range c.Members {
		key := fmt.Sprintf("members[%d]", i)
		distinct(d, names, m.Name, key+".name")
		distinct(d, addresses, m.Address, key+".address")
		first := c.Members[0].Address
		switch {
		case !m.Address.IsValid() || !first.IsValid():
		case m.Address.Is4() != first.Is4():
			d.fail(key+".address", fmt.Sprintf("%v and %v are of different families", m.Address, first),
				"give all members an address of one family")
		case m.Address.IsLoopback() != first.IsLoopback():
			d.fail(key+".address", fmt.Sprintf("of %v and %v one is a loopback address", m.Address, first),
				"give each member the address where the others reach it")
		}
	}
	if c.Store.Embedded != nil && len(c.Members) > maxEmbedded {
		d.fail("members", fmt.Sprintf("are %d, more than the %d that an embedded store may have", len(c.Members), maxEmbedded),
			"leave some out, or use an external store")
	}
}

// checkNode makes the node and its entry in members agree, each filling what the other
// leaves out.
func (d *document) checkNode(c *Config) {
	n := &c.Node
	i := slices.IndexFunc(c.Members, func(m Member) bool { return m.Name == n.Name })
	if n.Name == "" || len(c.Members) == 0 {
		return
	}
	if i < 0 {
		d.fail("node.name", quote(n.Name)+" is not a member", "give one of "+memberNames(c)+", or add it to members")
		return
	}
	m := &c.Members[i]
	if n.Address.IsValid() && m.Address.IsValid() && n.Address != m.Address {
		d.fail("node.address", fmt.Sprintf("%v is not the address of member %s, %v", n.Address, m.Name, m.Address),
			"make the two the same")
	}
	if n.Role != "" && m.Role != "" && n.Role != m.Role {
		d.fail("node.role", fmt.Sprintf("is %s, and in members[%d] %s", n.Role, i, m.Role), "make the two the same")
	}
	if n.Priority != 0 && m.Priority != 0 && n.Priority != m.Priority {
		d.fail("node.priority", fmt.Sprintf("is %d, and in members[%d] %d", n.Priority, i, m.Priority), "make the two the same")
	}
	m.Role = cmp.Or(m.Role, n.Role, Candidate)
	m.Priority = cmp.Or(m.Priority, n.Priority, 100)
	n.Role, n.Priority = m.Role, m.Priority
}

func memberNames(c *Config) string {
	var names []string
	for _, m := range c.Members {
		names = append(names, m.Name)
	}
	return strings.Join(names, ", ")
}

func (d *document) checkTiming(t Timing) {
	if t.Heartbeat == 0 || t.HoldWindow == 0 || t.SuspectAfter == 0 || t.LeaseTTL == 0 {
		return
	}
	fail := func(message, remedy string, keys ...string) {
		i := slices.IndexFunc(keys, func(key string) bool { return d.given("timing." + key) })
		d.fail("timing."+keys[max(i, 0)], message, remedy)
	}
	if t.HoldWindow < 2*t.Heartbeat {
		fail(fmt.Sprintf("a hold window of %v is less than two heartbeats of %v: a right that each heartbeat renews "+
			"would lapse whenever one is late", t.HoldWindow, t.Heartbeat),
			"make holdWindow at least two heartbeats, better three", "holdWindow", "heartbeat")
	}
	// The clocks of two nodes may differ by 1 % each way, so the holder's window and its
	// margin may take that much longer on the other's clock.
	least := (t.HoldWindow*10100 + t.Margin*9999 + 9899) / 9900
	if t.SuspectAfter < least {
		up := (least + time.Millisecond - 1).Truncate(time.Millisecond)
		fail(fmt.Sprintf("suspicion after %v is too early for a hold window of %v and a margin of %v: "+
			"a node could be given up while it still holds", t.SuspectAfter, t.HoldWindow, t.Margin),
			"make suspectAfter at least "+up.String()+", or holdWindow shorter", "suspectAfter", "holdWindow")
	}
	if t.LeaseTTL <= t.SuspectAfter {
		fail(fmt.Sprintf("a lease of %v is not longer than suspicion after %v: it would end before the faster way is tried",
			t.LeaseTTL, t.SuspectAfter), "make leaseTTL longer than suspectAfter", "leaseTTL", "suspectAfter")
	}
}

func (d *document) checkVIPs(c *Config) {
	names, addresses := map[string]string{}, map[netip.Addr]string{}
	for i, v := range c.VIPs {
		key := fmt.Sprintf("vips[%d]", i)
		distinct(d, names, v.Name, key+".name")
		distinct(d, addresses, v.Address, key+".address")
		for j, m := range c.Members {
			if v.Address.IsValid() && v.Address == m.Address {
				d.fail(key+".address", fmt.Sprintf("%v is the address of a node, members[%d]", v.Address, j),
					"give an address that no node has of its own")
			}
		}
		if e := c.Store.External; e != nil && v.Address.IsValid() {
			for j, endpoint := range e.Endpoints {
				u, err := url.Parse(endpoint)
				if err == nil && u.Hostname() == v.Address.String() {
					d.fail(fmt.Sprintf("store.external.endpoints[%d]", j), fmt.Sprintf("%v is VIP %s: nobody could take it without the store, "+
						"nor reach the store without it", v.Address, v.Name), "give the etcd server's own address")
				}
			}
		}
		preferred := map[string]string{}
		for j, name := range v.Preferred {
			at := fmt.Sprintf("%s.preferred[%d]", key, j)
			distinct(d, preferred, name, at)
			d.checkReference(c, at, name)
			if k := slices.IndexFunc(c.Members, func(m Member) bool { return m.Name == name }); k >= 0 && c.Members[k].Role == Witness {
				d.fail(at, quote(name)+" is a witness, which never owns a VIP", "name a candidate")
			}
		}
		if v.Preempt && len(v.Preferred) == 0 {
			d.fail(key+".preempt", "is true, and no node is preferred", "set preferred, or leave preempt out")
		}
	}
}

// checkReference notes a problem where a name is not that of a member.
func (d *document) checkReference(c *Config, key, name string) {
	if name != "" && len(c.Members) > 0 && !slices.ContainsFunc(c.Members, func(m Member) bool { return m.Name == name }) {
		d.fail(key, quote(name)+" is not a member", "give one of "+memberNames(c))
	}
}

func (d *document) checkProxies(c *Config) {
	proxied := map[uint16]string{}
	for _, p := range c.Proxies {
		proxied[p.Port] = p.Name
	}
	names := map[string]string{}
	for i, p := range c.Proxies {
		key := fmt.Sprintf("proxies[%d]", i)
		distinct(d, names, p.Name, key+".name")
		backends, addresses := map[string]string{}, map[netip.AddrPort]string{}
		for j, b := range p.Backends {
			key := fmt.Sprintf("%s.backends[%d]", key, j)
			distinct(d, backends, b.Name, key+".name")
			distinct(d, addresses, b.Address, key+".address")
			d.checkReference(c, key+".node", b.Node)
			if proxy, ok := proxied[b.Address.Port()]; ok && b.Address.IsValid() {
				if whose := owned(c, b.Address.Addr()); whose != "" {
					d.fail(key+".address", fmt.Sprintf("%v is %s on the port of proxy %s: connections would run in a circle",
						b.Address, whose, quote(proxy)), "give the address and port of the API server itself")
				}
			}
		}
	}
}

// owned says in words why connections to an address end at a node of this mesh; it is
// empty where they do not.
func owned(c *Config, addr netip.Addr) string {
	for _, v := range c.VIPs {
		if v.Address == addr {
			return "VIP " + v.Name
		}
	}
	for _, m := range c.Members {
		if m.Address == addr {
			return "node " + m.Name
		}
	}
	if addr.IsLoopback() {
		return "this node"
	}
	return ""
}

// checkPorts notes a problem where two listeners of this node want one port. The
// addresses do not matter: proxies listen on all of them.
func (d *document) checkPorts(c *Config) {
	type listener struct {
		key  string
		port uint16
	}
	listeners := []listener{{"api.port", c.API.Port}, {"metrics.listen", c.Metrics.Listen.Port()}}
	if e := c.Store.Embedded; e != nil {
		listeners = append(listeners, listener{"store.embedded.clientPort", e.ClientPort}, listener{"store.embedded.peerPort", e.PeerPort})
	}
	for i, p := range c.Proxies {
		listeners = append(listeners, listener{fmt.Sprintf("proxies[%d].port", i), p.Port})
	}
	// Of two the one to change is the one in the file: the defaults come first.
	slices.SortStableFunc(listeners, func(a, b listener) int {
		switch {
		case d.given(a.key) == d.given(b.key):
			return 0
		case d.given(b.key):
			return -1
		}
		return 1
	})
	seen := map[uint16]string{}
	for _, l := range listeners {
		if first, ok := seen[l.port]; ok && l.port != 0 {
			d.fail(l.key, fmt.Sprintf("port %d is also that of %s", l.port, first), "choose another port for one of them")
			continue
		}
		seen[l.port] = l.key
	}
}
