package config

import (
	_ "embed" // for the example
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Config is a whole, valid configuration of one agent. Only [Config.Resolve] changes it.
type Config struct {
	Mesh    string // name of the mesh, a DNS label
	Node    Node
	Members []Member // every voter, this node included; at least one candidate
	DataDir string   // absolute; default /var/lib/hamesh
	Store   Store
	API     API
	TLS     TLS
	Timing  Timing
	VIPs    []VIP
	Proxies []Proxy
	Metrics Metrics
	Log     Log

	source source
}

// Node is this node. It agrees with the entry of the same name in Config.Members.
type Node struct {
	Name     string // a DNS label (RFC 1123)
	Address  netip.Addr
	Role     Role
	Priority int
}

// Role is what a member may do. The zero Role is invalid.
type Role string

// The roles.
const (
	Candidate Role = "candidate" // votes and may own a VIP
	Witness   Role = "witness"   // only votes
)

// Member is a voter of the mesh.
type Member struct {
	Name     string     // a DNS label (RFC 1123)
	Address  netip.Addr // where peers reach it; never a VIP
	Role     Role       // default candidate
	Priority int        // 1 to 255, the higher one takes a VIP first; default 100
}

// Store is where the records are kept: exactly one of the two is set.
type Store struct {
	Embedded *Embedded
	External *External
}

// Embedded is the etcd server inside the agent.
type Embedded struct {
	ClientPort uint16 // default 7479
	PeerPort   uint16 // default 7480
}

// External is an etcd cluster that somebody else runs.
type External struct {
	Endpoints []string  // scheme://host:port, all https or all http
	Prefix    string    // of every key, begins with "/" and does not end in one; default /hamesh
	TLS       *TLSFiles // nil exactly where the endpoints are http
}

// TLSFiles names PEM files. A relative path in the configuration counts from the
// directory of the configuration file; here it is already joined to that.
type TLSFiles struct{ CAFile, CertFile, KeyFile string }

// API is where the agent serves gRPC.
type API struct {
	Port   uint16 // default 7443
	Socket string // absolute, at most 107 bytes (unix(7), sun_path); default /run/hamesh/hameshd.sock
}

// TLS is how members trust each other: either Insecure, or all three files.
type TLS struct {
	Insecure bool
	TLSFiles
}

// Timing is the mesh's time constants, the same on every member.
// SuspectAfter ≥ (101/99)·HoldWindow + 1.01·Margin holds: even with each clock 1 % off,
// a holder has let go before anybody gives up on it.
type Timing struct {
	Profile      Profile       // which the values left out came from
	Heartbeat    time.Duration // 5 ms to 10 s; default 100 ms, fast 12 ms
	HoldWindow   time.Duration // how long one confirmation lets a node hold; at least 2·Heartbeat; default 300 ms, fast 36 ms
	SuspectAfter time.Duration // silence after which a member may give up on another; default 400 ms, fast 60 ms
	LeaseTTL     time.Duration // whole seconds, 2 s to 60 s, more than SuspectAfter; default 3 s, fast 2 s
	Margin       time.Duration // from a lapsed right to the address being off, stalls included; the profile's: 93 ms, fast 22 ms
}

// Profile is a set of time constants that fit together. The zero Profile is invalid.
type Profile string

// The profiles.
const (
	ProfileDefault Profile = "default"
	ProfileFast    Profile = "fast"
)

// VIP is a virtual address of the mesh.
type VIP struct {
	Name      string     // a DNS label (RFC 1123)
	Address   netip.Addr // unicast, never an address of a node
	Interface string     // where left out, empty until Config.Resolve, and on a witness for good
	Preferred []string   // candidates, best first
	Preempt   bool       // a preferred node takes the VIP back; false unless Preferred is set
}

// Proxy is a TCP proxy in front of API servers.
type Proxy struct {
	Name        string // a DNS label (RFC 1123)
	Port        uint16
	Backends    []Backend // 1 to 64
	HealthCheck HealthCheck
	OnDown      OnDown // default close
	// LoadFactor bounds a backend's connections to so many times its fair share, 1.1 to 10;
	// 0: no bound; default 1.5.
	LoadFactor float64
	// SlowStart is how long a backend that recovers takes to get all its clients back,
	// 0 to 10 min; default 10 s.
	SlowStart time.Duration
	// DrainTimeout is how long connections are left to a backend that drains, 1 s to 24 h;
	// default 15 min.
	DrainTimeout  time.Duration
	Limits        Limits
	ConnectionLog ConnectionLog
	ProxyProtocol ProxyProtocol
}

// Limits bound the connections of a proxy's clients at a time.
type Limits struct {
	Connections int // up to 1,000,000; 0: as many as there are descriptors for, which is the default
	PerClient   int // of one address, up to 1,000,000; 0, the default: no limit
}

// ConnectionLog is which connections are logged when they end. The zero ConnectionLog is
// invalid.
type ConnectionLog string

// The choices.
const (
	LogOff    ConnectionLog = "off" // the default
	LogErrors ConnectionLog = "errors"
	LogAll    ConnectionLog = "all"
)

// ProxyProtocol is whether backends are told who the client is. The zero ProxyProtocol is
// invalid.
type ProxyProtocol string

// The choices.
const (
	ProxyProtocolNone ProxyProtocol = "none" // the default
	ProxyProtocolV2   ProxyProtocol = "v2"   // by a header in front of the client's bytes; kube-apiserver knows none
)

// Backend is one API server behind a proxy.
type Backend struct {
	Name    string // a DNS label (RFC 1123)
	Address netip.AddrPort
	Node    string // the member it runs on; empty: none
	Weight  int    // its share of the clients among the others, 1 to 256; default 1
}

// HealthCheck is how a proxy's backends are checked.
type HealthCheck struct {
	Scheme   Scheme        // default https
	Path     string        // request target, begins with "/"; default /readyz; empty with tcp
	Interval time.Duration // 50 ms to 1 min; default 500 ms
	Timeout  time.Duration // 10 ms to Interval; default 400 ms, or 4/5 of Interval where that is less
	Fall     int           // failures in a row until a backend is down, 1 to 10; default 2
	Rise     int           // successes in a row until it is up, 1 to 10; default 2
	CAFile   string        // verifies the backends' certificates; empty: they are not verified
	// CertFile and KeyFile are this node's towards the backends; both or neither is set.
	CertFile, KeyFile string
}

// Scheme is the protocol of a health check. The zero Scheme is invalid.
type Scheme string

// The schemes.
const (
	HTTPS Scheme = "https"
	HTTP  Scheme = "http"
	TCP   Scheme = "tcp" // a connection that opens is enough
)

// OnDown is what becomes of a backend's connections when it goes down. The zero OnDown
// is invalid.
type OnDown string

// The choices.
const (
	Close OnDown = "close" // at once
	Drain OnDown = "drain" // they may finish
)

// Metrics is where metrics and the status page are served.
type Metrics struct {
	Listen netip.AddrPort // default 127.0.0.1:7444
}

// Log is how the agent logs.
type Log struct {
	Level  hclog.Level // trace, debug, info, warn or error; default info
	Format Format      // default text
}

// Format is how a line of the log looks. The zero Format is invalid.
type Format string

// The formats.
const (
	Text Format = "text"
	JSON Format = "json"
)

//go:embed example.yaml
var example []byte

// Example returns a complete configuration of a mesh with three members, with comments.
func Example() []byte { return slices.Clone(example) }

// maxSize bounds a configuration file, in bytes. Real ones have a few kilobytes.
const maxSize = 1 << 20

// Load reads the file and parses it, see [Parse]. It also fails where the file cannot
// be read.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading configuration: %w", err)
	}
	// One byte more than allowed lets Parse see that there is too much.
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	return Parse(path, data)
}

// Parse decodes a configuration strictly, fills in the defaults and makes every check
// that needs no machine. The name is that of the file: it stands in the problems, and
// relative paths count from its directory. An error is always a [Problems].
func Parse(name string, data []byte) (*Config, error) {
	d := &document{source: source{file: name, at: map[string]position{}}}
	root, ok := d.read(data)
	if !ok {
		return nil, d.problems.sorted()
	}
	c := d.config(root)
	c.source = d.source
	d.check(c)
	if err := d.problems.sorted(); err != nil {
		return nil, err
	}
	return c, nil
}
