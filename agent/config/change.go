package config

import (
	"cmp"
	"fmt"
	"strings"
)

// Change is one difference between two configurations.
type Change struct {
	Key  string // as in [Problem].Key, of the newer configuration where that has it
	What string // such as "is debug, was info"
}

// String prints the change on one line: "log.level: is debug, was info".
func (c Change) String() string { return c.Key + ": " + c.What }

// Changes returns what is different in a newer configuration. The order of lists whose
// items have names makes no difference. The error is a [Problems] with every difference
// that an agent does not take on while it runs; the changes are complete also then.
//
// Both configurations have been resolved ([Config.Resolve]), else an interface that is
// left out counts as a difference.
func (c *Config) Changes(newer *Config) (changes []Change, err error) {
	was, is := map[string]setting{}, map[string]setting{}
	for _, s := range c.settings() {
		was[s.id] = s
	}
	var problems Problems
	item := "" // the last one that was added or removed: what is in it is no news
	note := func(s setting, what string) {
		changes = append(changes, Change{s.key, what})
		if s.takes == restart {
			problems = append(problems, newer.source.problem(s.key, what, "restart the agent to change it, or put it back"))
		}
	}
	for _, s := range newer.settings() {
		is[s.id] = s
		switch before, known := was[s.id]; {
		case item != "" && strings.HasPrefix(s.id, item):
		case !known && s.item:
			item = s.id + "."
			note(s, s.value+" is added")
		case before.value != s.value:
			note(s, "is "+cmp.Or(s.value, "left out")+", was "+cmp.Or(before.value, "left out"))
		}
	}
	item = ""
	for _, s := range c.settings() {
		if _, kept := is[s.id]; kept || item != "" && strings.HasPrefix(s.id, item) {
			continue
		}
		if s.item {
			item = s.id + "."
			s.key = s.list
			note(s, s.value+" is removed")
		} else {
			note(s, "is left out, was "+s.value)
		}
	}
	return changes, problems.sorted()
}

// taking is what it takes to change a setting. The zero taking is invalid.
type taking int

const (
	_ taking = iota
	restart
	reload // the agent takes it on while it runs
)

// setting is one value of a configuration, or one named item of a list.
type setting struct {
	id    string // with names in place of indexes: proxies.kube-api.backends.cp-1.weight
	key   string // proxies[0].backends[0].weight
	value string // an item's name
	takes taking
	item  bool
	list  string // an item's list
}

// part is a mapping of the file, whose settings are added to all.
type part struct {
	all     *[]setting
	id, key string // with the dot at the end; empty: the whole file
}

func (p part) set(takes taking, key string, value any) {
	*p.all = append(*p.all, setting{id: p.id + key, key: p.key + key, value: fmt.Sprint(value), takes: takes})
}

func (p part) in(key string) part { return part{p.all, p.id + key + ".", p.key + key + "."} }

// item adds a named item of a list, and returns the part that it is.
func (p part) item(takes taking, list string, i int, name string) part {
	s := setting{
		id: p.id + list + "." + name, key: fmt.Sprintf("%s%s[%d]", p.key, list, i), value: name,
		takes: takes, item: true, list: p.key + list,
	}
	*p.all = append(*p.all, s)
	return part{p.all, s.id + ".", s.key + "."}
}

// settings lists the whole configuration.
func (c *Config) settings() []setting {
	var all []setting
	root := part{all: &all}
	root.set(restart, "mesh", c.Mesh)
	root.set(restart, "node.name", c.Node.Name)
	for i, m := range c.Members {
		member := root.item(restart, "members", i, m.Name)
		if m.Name == c.Node.Name { // the two agree
			member.key = "node."
		}
		member.set(restart, "address", m.Address)
		member.set(restart, "role", m.Role)
		member.set(reload, "priority", m.Priority) // its own to say: another one's changes nothing here
	}
	root.set(restart, "dataDir", c.DataDir)
	c.Store.settings(root)
	root.in("api").set(restart, "port", c.API.Port)
	root.in("api").set(restart, "socket", c.API.Socket)
	root.in("tls").set(restart, "insecure", c.TLS.Insecure)
	c.TLS.settings(root.in("tls"), restart)
	c.Timing.settings(root.in("timing"))
	for i, v := range c.VIPs {
		vip := root.item(restart, "vips", i, v.Name)
		vip.set(restart, "address", v.Address)
		vip.set(restart, "interface", v.Interface)
		vip.set(reload, "preferred", strings.Join(v.Preferred, ", "))
		vip.set(reload, "preempt", v.Preempt)
	}
	for i, p := range c.Proxies {
		p.settings(root.item(restart, "proxies", i, p.Name))
	}
	root.in("metrics").set(restart, "listen", c.Metrics.Listen)
	root.in("log").set(reload, "level", c.Log.Level)
	root.in("log").set(reload, "format", c.Log.Format)
	return all
}

func (s Store) settings(root part) {
	if e := s.Embedded; e != nil {
		root.set(restart, "store", "embedded")
		root.in("store.embedded").set(restart, "clientPort", e.ClientPort)
		root.in("store.embedded").set(restart, "peerPort", e.PeerPort)
	}
	if e := s.External; e != nil {
		root.set(restart, "store", "external")
		external := root.in("store.external")
		external.set(restart, "endpoints", strings.Join(e.Endpoints, ", "))
		external.set(restart, "prefix", e.Prefix)
		if e.TLS != nil {
			e.TLS.settings(external.in("tls"), restart)
		}
	}
}

func (t Timing) settings(timing part) {
	timing.set(restart, "profile", t.Profile)
	timing.set(restart, "heartbeat", t.Heartbeat)
	timing.set(restart, "holdWindow", t.HoldWindow)
	timing.set(restart, "suspectAfter", t.SuspectAfter)
	timing.set(restart, "leaseTTL", t.LeaseTTL)
}

func (f TLSFiles) settings(of part, takes taking) {
	of.set(takes, "caFile", f.CAFile)
	of.set(takes, "certFile", f.CertFile)
	of.set(takes, "keyFile", f.KeyFile)
}

func (p Proxy) settings(proxy part) {
	proxy.set(restart, "port", p.Port)
	for i, b := range p.Backends {
		backend := proxy.item(reload, "backends", i, b.Name)
		backend.set(reload, "address", b.Address)
		backend.set(reload, "node", b.Node)
		backend.set(reload, "weight", b.Weight)
	}
	h, check := p.HealthCheck, proxy.in("healthCheck")
	check.set(reload, "scheme", h.Scheme)
	check.set(reload, "path", h.Path)
	check.set(reload, "interval", h.Interval)
	check.set(reload, "timeout", h.Timeout)
	check.set(reload, "fall", h.Fall)
	check.set(reload, "rise", h.Rise)
	TLSFiles{h.CAFile, h.CertFile, h.KeyFile}.settings(check, reload)
	proxy.set(reload, "onDown", p.OnDown)
	proxy.set(reload, "drainTimeout", p.DrainTimeout)
	proxy.in("balance").set(reload, "loadFactor", p.LoadFactor)
	proxy.set(reload, "slowStart", p.SlowStart)
	proxy.in("limits").set(reload, "connections", p.Limits.Connections)
	proxy.in("limits").set(reload, "perClient", p.Limits.PerClient)
	proxy.set(reload, "connectionLog", p.ConnectionLog)
	proxy.set(reload, "proxyProtocol", p.ProxyProtocol)
}
