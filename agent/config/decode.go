package config

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.yaml.in/yaml/v3"
)

const (
	apiVersion = "hamesh/v1"
	kind       = "Agent"
)

// config decodes the whole document: types, ranges and defaults. Whether the values go
// together is for check to say.
func (d *document) config(root field) *Config {
	o := root.object("apiVersion", "kind", "mesh", "node", "members", "dataDir", "store", "api",
		"tls", "timing", "vips", "proxies", "metrics", "log")
	o["apiVersion"].exactly(apiVersion)
	o["kind"].exactly(kind)
	c := &Config{
		Mesh:    o["mesh"].required("name the mesh").name(),
		Node:    o["node"].required("say which member this is: node: {name: …, address: …}").thisNode(),
		DataDir: o["dataDir"].absolute("/var/lib/hamesh"),
		Store:   o["store"].store(),
		API:     o["api"].api(),
		TLS:     o["tls"].required("give caFile, certFile and keyFile, or insecure: true in a lab").tls(),
		Timing:  o["timing"].timing(),
		Metrics: Metrics{Listen: o["metrics"].object("listen")["listen"].addressPort("127.0.0.1:7444")},
		Log:     o["log"].log(),
	}
	for _, f := range o["members"].items("list every voter of the mesh, this node included") {
		c.Members = append(c.Members, f.member())
	}
	for _, f := range o["vips"].list() {
		c.VIPs = append(c.VIPs, f.vip())
	}
	for _, f := range o["proxies"].list() {
		c.Proxies = append(c.Proxies, f.proxy())
	}
	return c
}

func (f field) exactly(want string) {
	s := f.required("write "+want).text("", want)
	if s != "" && s != want {
		f.fail(quote(s)+" is not known to this version of hameshd", "write "+want)
	}
}

func (f field) thisNode() Node {
	o := f.object("name", "address", "role", "priority")
	n := Node{
		Name:    o["name"].required("name this node as in members").name(),
		Address: o["address"].required("give this node's address as in members").address(),
	}
	n.Role, n.Priority = o["role"].role(), o["priority"].priority()
	return n
}

func (f field) member() Member {
	o := f.object("name", "address", "role", "priority")
	m := Member{
		Name:    o["name"].required("name the member").name(),
		Address: o["address"].required("give the address where peers reach it").address(),
	}
	m.Role, m.Priority = o["role"].role(), o["priority"].priority()
	return m
}

// role is empty where it is left out, until check has compared node and members.
func (f field) role() Role {
	if !f.given() {
		return ""
	}
	return choice(f, Candidate, Witness)
}

// priority is 0 where it is left out, until check has compared node and members.
func (f field) priority() int { return f.integer(0, 1, 255) }

func (f field) store() Store {
	o := f.object("embedded", "external")
	if !o["external"].given() {
		e := o["embedded"].object("clientPort", "peerPort")
		return Store{Embedded: &Embedded{
			ClientPort: e["clientPort"].port(7479),
			PeerPort:   e["peerPort"].port(7480),
		}}
	}
	if o["embedded"].given() {
		f.fail("is both embedded and external", "leave one of the two")
	}
	return Store{External: o["external"].external()}
}

var keyPrefix = regexp.MustCompile(`^(/[^/]+)+$`)

func (f field) external() *External {
	o := f.object("endpoints", "prefix", "tls")
	e := &External{Prefix: o["prefix"].text("/hamesh", "a prefix of keys")}
	if e.Prefix != "" && !keyPrefix.MatchString(e.Prefix) {
		o["prefix"].fail(quote(e.Prefix)+" is not a prefix of keys", "begin each part with one slash, such as /hamesh")
	}
	schemes, seen := map[string]bool{}, map[string]string{}
	for _, item := range o["endpoints"].items("list the etcd servers, such as https://10.0.0.5:2379") {
		endpoint, scheme := item.endpoint()
		if scheme != "" {
			schemes[scheme] = true
		}
		distinct(f.doc, seen, endpoint, item.key)
		e.Endpoints = append(e.Endpoints, endpoint)
	}
	if o["tls"].given() {
		files := o["tls"].object("caFile", "certFile", "keyFile")
		e.TLS = o["tls"].files(files)
	}
	switch {
	case len(schemes) > 1:
		o["endpoints"].fail("has both http and https", "use https for all of them")
	case schemes["http"] && e.TLS != nil:
		o["endpoints"].fail("is http, and tls has files", "use https, or leave tls out")
	case schemes["https"] && e.TLS == nil && !o["tls"].given():
		o["tls"].fail("is missing, and the endpoints are https", "give caFile, certFile and keyFile")
	}
	return e
}

// endpoint reads the URL of an etcd server, and returns its scheme beside it. The
// scheme is empty where the URL is wrong.
func (f field) endpoint() (endpoint, scheme string) {
	const want = "scheme, host and port alone, such as https://10.0.0.5:2379"
	s := f.text("", want)
	if s == "" {
		return "", ""
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" ||
		s != u.Scheme+"://"+u.Host || !validPort(u.Port()) {
		f.fail(quote(s)+" is not the URL of an etcd server", "give "+want)
		return s, ""
	}
	return s, u.Scheme
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func (f field) api() API {
	o := f.object("port", "socket")
	a := API{Port: o["port"].port(7443), Socket: o["socket"].absolute("/run/hamesh/hameshd.sock")}
	// sun_path has 108 bytes and the kernel wants the final zero among them (unix(7)).
	if len(a.Socket) > 107 {
		o["socket"].fail(fmt.Sprintf("has %d bytes, more than the 107 that a socket's path may have", len(a.Socket)),
			"choose a shorter path, such as /run/hamesh/hameshd.sock")
	}
	return a
}

func (f field) tls() TLS {
	o := f.object("insecure", "caFile", "certFile", "keyFile")
	t := TLS{Insecure: o["insecure"].boolean()}
	files := o["caFile"].given() || o["certFile"].given() || o["keyFile"].given()
	switch {
	case t.Insecure && files:
		f.fail("is insecure and has files", "leave insecure out, or the files")
	case !t.Insecure && f.given():
		t.TLSFiles = *f.files(o)
	}
	return t
}

// files reads three files, all of which are required.
func (f field) files(o map[string]field) *TLSFiles {
	const remedy = "give all of caFile, certFile and keyFile"
	return &TLSFiles{
		CAFile:   o["caFile"].required(remedy).file(),
		CertFile: o["certFile"].required(remedy).file(),
		KeyFile:  o["keyFile"].required(remedy).file(),
	}
}

var profiles = map[Profile]Timing{
	ProfileDefault: {
		Profile: ProfileDefault, Heartbeat: 100 * time.Millisecond, HoldWindow: 300 * time.Millisecond,
		SuspectAfter: 400 * time.Millisecond, LeaseTTL: 3 * time.Second, Margin: 93 * time.Millisecond,
	},
	ProfileFast: {
		Profile: ProfileFast, Heartbeat: 12 * time.Millisecond, HoldWindow: 36 * time.Millisecond,
		SuspectAfter: 60 * time.Millisecond, LeaseTTL: 2 * time.Second, Margin: 22 * time.Millisecond,
	},
}

func (f field) timing() Timing {
	o := f.object("profile", "heartbeat", "holdWindow", "suspectAfter", "leaseTTL")
	t := profiles[choice(o["profile"], ProfileDefault, ProfileFast)]
	t.Heartbeat = o["heartbeat"].duration(t.Heartbeat, 5*time.Millisecond, 10*time.Second)
	t.HoldWindow = o["holdWindow"].duration(t.HoldWindow, 10*time.Millisecond, 30*time.Second)
	t.SuspectAfter = o["suspectAfter"].duration(t.SuspectAfter, 20*time.Millisecond, time.Minute)
	t.LeaseTTL = o["leaseTTL"].duration(t.LeaseTTL, 2*time.Second, time.Minute)
	if t.LeaseTTL%time.Second != 0 {
		o["leaseTTL"].fail(t.LeaseTTL.String()+" is not a whole number of seconds, the unit of etcd's leases",
			"give "+t.LeaseTTL.Truncate(time.Second).String()+" or a second more")
	}
	return t
}

func (f field) vip() VIP {
	o := f.object("name", "address", "interface", "preferred", "preempt")
	v := VIP{
		Name:    o["name"].required("name the VIP").name(),
		Address: o["address"].required("give the address that clients use").address(),
		Preempt: o["preempt"].boolean(),
	}
	if v.Address.IsLoopback() {
		o["address"].fail(v.Address.String()+" is a loopback address", "give one that clients reach")
	}
	if i := o["interface"]; i.given() {
		v.Interface = i.text("", "the name of an interface, such as eth0")
		// As the kernel checks it (net/core/dev.c, dev_valid_name; IFNAMSIZ is 16 with the zero).
		if len(v.Interface) > 15 || v.Interface == "." || v.Interface == ".." || strings.ContainsAny(v.Interface, "/: ") {
			i.fail(quote(v.Interface)+" is not the name of an interface", "give one that ip link shows, such as eth0")
		}
	}
	for _, p := range o["preferred"].list() {
		v.Preferred = append(v.Preferred, p.name())
	}
	return v
}

func (f field) proxy() Proxy {
	o := f.object("name", "port", "backends", "healthCheck", "onDown", "drainTimeout", "balance", "slowStart",
		"limits", "connectionLog", "proxyProtocol")
	limits := o["limits"].object("connections", "perClient")
	p := Proxy{
		Name:         o["name"].required("name the proxy").name(),
		Port:         o["port"].required("give the port that it listens on, such as 16443").port(0),
		HealthCheck:  o["healthCheck"].healthCheck(),
		OnDown:       choice(o["onDown"], Close, Drain),
		DrainTimeout: o["drainTimeout"].duration(15*time.Minute, time.Second, 24*time.Hour),
		LoadFactor:   o["balance"].object("loadFactor")["loadFactor"].loadFactor(),
		SlowStart:    o["slowStart"].duration(10*time.Second, 0, 10*time.Minute),
		Limits: Limits{
			Connections: limits["connections"].integer(0, 0, 1_000_000),
			PerClient:   limits["perClient"].integer(0, 0, 1_000_000),
		},
		ConnectionLog: choice(o["connectionLog"], LogOff, LogErrors, LogAll),
		ProxyProtocol: choice(o["proxyProtocol"], ProxyProtocolNone, ProxyProtocolV2),
	}
	for _, b := range o["backends"].items("list the API servers behind it") {
		p.Backends = append(p.Backends, b.backend())
	}
	if len(p.Backends) > maxBackends {
		o["backends"].fail(fmt.Sprintf("has %d, more than the %d that a proxy may have", len(p.Backends), maxBackends), "leave some out")
	}
	return p
}

// maxBackends is how many backends the proxy's bookkeeping holds for each connection.
const maxBackends = 64

// loadFactor reads a factor, or off. The result is 0 where it is off or wrong.
func (f field) loadFactor() float64 {
	if !f.given() {
		return 1.5
	}
	const want = "a number from 1.1 to 10, or off"
	if f.node.Kind == yaml.ScalarNode && (f.node.Value == "off" || f.node.Value == "0") {
		return 0
	}
	if f.node.Kind != yaml.ScalarNode || f.node.ShortTag() != "!!float" && f.node.ShortTag() != "!!int" {
		f.mismatch(want)
		return 0
	}
	factor, err := strconv.ParseFloat(f.node.Value, 64)
	// Put so that what is not a number is refused too.
	if err != nil || !(factor >= 1.1 && factor <= 10) {
		f.fail(quote(f.node.Value)+" is out of range", "give "+want)
		return 0
	}
	return factor
}

func (f field) backend() Backend {
	o := f.object("name", "address", "node", "weight")
	b := Backend{
		Name: o["name"].required("name the backend").name(),
		Node: o["node"].name(), Weight: o["weight"].integer(1, 1, 256),
	}
	if a := o["address"].required("give the API server's address and port, such as 10.77.0.11:6443"); a.given() {
		b.Address = a.addressPort("10.77.0.11:6443")
		if b.Address.IsValid() && !a.unicast(b.Address.Addr()) {
			b.Address = netip.AddrPort{}
		}
	}
	return b
}

func (f field) healthCheck() HealthCheck {
	o := f.object("scheme", "path", "interval", "timeout", "fall", "rise", "caFile", "certFile", "keyFile")
	h := HealthCheck{
		Scheme:   choice(o["scheme"], HTTPS, HTTP, TCP),
		Interval: o["interval"].duration(500*time.Millisecond, 50*time.Millisecond, time.Minute),
		Fall:     o["fall"].integer(2, 1, 10),
		Rise:     o["rise"].integer(2, 1, 10),
		CAFile:   o["caFile"].file(),
		CertFile: o["certFile"].file(),
		KeyFile:  o["keyFile"].file(),
	}
	h.Timeout = o["timeout"].duration(min(400*time.Millisecond, h.Interval*4/5), 10*time.Millisecond, time.Minute)
	if h.Interval > 0 && h.Timeout > h.Interval {
		o["timeout"].fail(fmt.Sprintf("%v is longer than the interval, %v: checks would pile up", h.Timeout, h.Interval),
			"give at most the interval")
	}
	if h.Scheme == HTTP || h.Scheme == TCP {
		for _, key := range []string{"caFile", "certFile", "keyFile"} {
			if o[key].given() {
				o[key].fail("is of no use with the scheme "+string(h.Scheme), "use https, or leave it out")
				break
			}
		}
	}
	for key, other := range map[string]string{"certFile": "keyFile", "keyFile": "certFile"} {
		if o[key].given() && !o[other].given() {
			o[other].fail("is missing, and "+key+" is given", "give both, or neither")
		}
	}
	if h.Scheme == TCP {
		if o["path"].given() {
			o["path"].fail("is of no use with the scheme tcp", "use https or http, or leave it out")
		}
		return h
	}
	h.Path = o["path"].text("/readyz", "a path")
	if h.Path == "" {
		return h
	}
	if _, err := url.ParseRequestURI(h.Path); err != nil || h.Path[0] != '/' || strings.ContainsAny(h.Path, " #") {
		o["path"].fail(quote(h.Path)+" is not the path of a request", "begin it with a slash, such as /readyz")
	}
	return h
}

func (f field) log() Log {
	o := f.object("level", "format")
	level := choice(o["level"], "info", "trace", "debug", "warn", "error")
	return Log{Level: hclog.LevelFromString(level), Format: choice(o["format"], Text, JSON)}
}
