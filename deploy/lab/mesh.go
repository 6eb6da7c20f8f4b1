//go:build linux

package lab

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	hostInterface = "eth0"
	subnetBits    = 16
	vipName       = "kube-api"
	secondVIPName = "kube-api-6" // of a dual segment
	proxyPort     = 16443
)

// The ports where members reach each other: agents, and their embedded etcd.
const (
	MeshPort  = 7443
	StorePort = 7480
)

// vip is the IPv4 one.
var vip = netip.MustParseAddr("10.77.0.100")

// Options say what mesh to make. The zero value is three candidates, embedded etcd,
// the default timing, no TLS between agents.
type Options struct {
	Nodes     int    // 0: 3; at most 80
	Witnesses int    // how many of the nodes, the last ones, are witnesses
	Timing    string // timing profile; empty: default
	Clients   int    // source addresses of the client, of each IP version; 0: 20, at most 250
	Segment   Segment

	ExternalStore bool // three etcd members on a host of their own: Mesh.Store
	Agentless     bool // no agent is started, for what is measured beside hamesh

	TLS func(node string, a netip.Addr) (Files, error) // certificates for each agent; nil: insecure

	// Edit may change a node's configuration before it is written; nil: as it is.
	// The maps and lists are those of the YAML file.
	Edit func(node string, config map[string]any)
}

// Files are where a node's certificates are.
type Files struct{ CA, Certificate, Key string }

// Mesh is a running mesh: nodes cp-1, cp-2, … from 10.77.0.11 on, the VIP 10.77.0.100,
// and a client with the addresses from 10.77.1.1 on, all in 10.77.0.0/16 on one switch. By
// IPv6 they are fd77::11, fd77::100 and fd77::1:1, in fd77::/64.
type Mesh struct {
	Switch   *Switch
	Nodes    []*Node
	Client   *Client
	Store    *Store // nil: embedded in the agents
	Recorder *Recorder
	Second   *Recorder // of the IPv6 VIP of a dual segment; nil: there is none

	options  Options
	plans    []addressing
	dir      string
	stations []interface{ close() error } // what else is on the switch
	stranger *station
}

// NewMesh makes the network, starts every API server and every agent, and returns
// without waiting for an owner. Where a part fails, what was made is closed.
func NewMesh(o Options) (*Mesh, error) {
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	if o.Clients == 0 {
		o.Clients = 20
	}
	if o.Timing == "" {
		o.Timing = "default"
	}
	if o.Nodes < 1 || o.Nodes > 80 || o.Witnesses < 0 || o.Witnesses > o.Nodes || o.Clients < 1 || o.Clients > 250 {
		return nil, fmt.Errorf("make a mesh: %d nodes, %d witnesses, %d clients: out of range", o.Nodes, o.Witnesses, o.Clients)
	}
	plans, err := o.Segment.plans()
	if err != nil {
		return nil, fmt.Errorf("make a mesh: %w", err)
	}
	m := &Mesh{options: o, plans: plans}
	if err := m.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("make a mesh: %w", err), m.Close())
	}
	return m, nil
}

func (m *Mesh) start() (err error) {
	if m.Switch, err = NewSwitch("seg"); err != nil {
		return err
	}
	if m.dir, err = os.MkdirTemp(Dir(), "mesh-"); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	var names []netip.Addr
	for _, p := range m.plans {
		names = append(names, p.vip)
	}
	for i := range m.options.Nodes {
		n, err := newNode(m, fmt.Sprintf("cp-%d", i+1), i)
		if n != nil {
			m.Nodes = append(m.Nodes, n)
		}
		if err != nil {
			return err
		}
		for _, p := range n.prefixes {
			names = append(names, p.Addr())
		}
	}
	if err := writeCertificate(m.dir, names); err != nil {
		return err
	}
	if err := writeClientCertificate(m.dir); err != nil {
		return err
	}
	if m.Client, err = newClient(m); err != nil {
		return err
	}
	for _, n := range m.Nodes {
		if err := n.API.Start(); err != nil {
			return err
		}
	}
	m.Recorder = record(m.plans[0].vip, m.Nodes)
	if len(m.plans) > 1 {
		m.Second = record(m.plans[1].vip, m.Nodes)
	}
	if m.options.ExternalStore {
		if m.Store, err = newStore(m); err != nil {
			return err
		}
		if err := m.Store.Start(); err != nil {
			return err
		}
	}
	if m.options.Agentless {
		return nil
	}
	for _, n := range m.Nodes {
		if err := n.StartAgent(); err != nil {
			return err
		}
	}
	return nil
}

// VIP is where clients connect to: the virtual address and the proxy's port.
func (m *Mesh) VIP() netip.AddrPort { return netip.AddrPortFrom(m.plans[0].vip, proxyPort) }

// SecondVIP is the same for the IPv6 VIP, called kube-api-6, of a dual segment.
func (m *Mesh) SecondVIP() netip.AddrPort { return netip.AddrPortFrom(m.plans[1].vip, proxyPort) }

// TLS is a client's configuration that trusts the stand-in API servers, by whichever
// of the mesh's addresses they are reached.
func (m *Mesh) TLS() (*tls.Config, error) {
	certificate, _ := certificateFiles(m.dir)
	return trustedTLS(certificate)
}

// ClientFiles are the certificate and key by which stand-in API servers know a client, and
// the authority of such certificates. They are there before the first configuration is made
// (Options.Edit).
func (m *Mesh) ClientFiles() Files { return clientFiles(m.dir) }

// ServerCA is the file that verifies the stand-in API servers' certificate.
func (m *Mesh) ServerCA() string {
	certificate, _ := certificateFiles(m.dir)
	return certificate
}

// Node returns the node of that name, or nil.
func (m *Mesh) Node(name string) *Node {
	i := slices.IndexFunc(m.Nodes, func(n *Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return m.Nodes[i]
}

// Close ends the mesh: every process, link and file of it. It returns what went wrong,
// a data race that an agent built with the race detector has reported too. Closing
// again does nothing.
func (m *Mesh) Close() error {
	var errs []error
	for _, r := range []**Recorder{&m.Recorder, &m.Second} {
		if *r != nil {
			errs = append(errs, (*r).stop())
			*r = nil
		}
	}
	for _, s := range m.stations {
		errs = append(errs, s.close())
	}
	m.stations = nil
	if m.Client != nil {
		errs = append(errs, m.Client.close())
		m.Client = nil
	}
	for _, n := range slices.Backward(m.Nodes) {
		errs = append(errs, n.PowerOff(), n.notices.close(), n.races())
	}
	m.Nodes = nil
	if m.Store != nil {
		errs = append(errs, m.Store.close())
		m.Store = nil
	}
	if m.Switch != nil {
		errs = append(errs, m.Switch.Close())
		m.Switch = nil
	}
	if m.dir != "" {
		errs = append(errs, os.RemoveAll(m.dir))
		m.dir = ""
	}
	return errors.Join(errs...)
}

// races finds what the race detector has written to the agent's log.
func (n *Node) races() error {
	b, err := os.ReadFile(n.LogFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if i := bytes.Index(b, []byte("WARNING: DATA RACE")); i >= 0 {
		return fmt.Errorf("agent of %s: %.8000s", n.Name, b[i:])
	}
	return nil
}

// config is the node's agent.yaml.
func (m *Mesh) config(n *Node) (map[string]any, error) {
	type object = map[string]any
	var members, backends, vips []any
	for _, p := range m.plans {
		vips = append(vips, object{"name": p.vipName, "address": p.vip.String(), "interface": hostInterface})
	}
	role := "candidate"
	for i, node := range m.Nodes {
		members = append(members, object{"name": node.Name, "address": node.Address.String()})
		backends = append(backends, object{
			"name": node.Name, "node": node.Name,
			"address": netip.AddrPortFrom(node.Address, apiPort).String(),
		})
		if node == n && i >= len(m.Nodes)-m.options.Witnesses {
			role = "witness"
		}
	}
	config := object{
		"apiVersion": "hamesh/v1",
		"kind":       "Agent",
		"mesh":       "lab",
		"node":       object{"name": n.Name, "address": n.Address.String(), "role": role},
		"members":    members,
		"dataDir":    n.dir + "/data",
		"api":        object{"port": MeshPort, "socket": n.socket()},
		"store":      object{"embedded": object{"peerPort": StorePort}},
		"tls":        object{"insecure": true},
		"timing":     object{"profile": m.options.Timing},
		"vips":       vips,
		"proxies": []any{object{
			"name": vipName, "port": proxyPort, "backends": backends,
			"healthCheck": object{"scheme": "https", "path": "/readyz"},
		}},
		"metrics": object{"listen": "127.0.0.1:7444"},
		"log":     object{"level": "debug", "format": "text"},
	}
	if m.Store != nil {
		config["store"] = object{"external": object{"endpoints": m.Store.Endpoints(), "prefix": "/hamesh"}}
	}
	if m.options.TLS != nil {
		files, err := m.options.TLS(n.Name, n.Address)
		if err != nil {
			return nil, fmt.Errorf("certificates of %s: %w", n.Name, err)
		}
		config["tls"] = object{"caFile": files.CA, "certFile": files.Certificate, "keyFile": files.Key}
	}
	if m.options.Edit != nil {
		m.options.Edit(n.Name, config)
	}
	return config, nil
}

// StopStore takes the embedded store away from every agent, and nothing else: etcd's
// members no longer reach each other. The returned function brings it back.
func (m *Mesh) StopStore() (start func() error, err error) {
	var alone [][]*Port
	for _, n := range m.Nodes {
		if port := n.Port(); port != nil {
			alone = append(alone, []*Port{port})
		}
	}
	return m.Switch.Partition(Frames{TCPPort: StorePort}, alone...)
}

// Await calls the condition every 20 ms until it returns nil, and returns its last
// error where it never does in time.
func Await(limit time.Duration, condition func() error) error {
	for deadline := time.Now().Add(limit); ; {
		err := condition()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %s: %w", limit, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// WaitOwner waits until exactly one kernel has the VIP and that node's agent says that
// it is the owner, and returns it.
func (m *Mesh) WaitOwner(limit time.Duration) (*Node, error) {
	var owner *Node
	err := Await(limit, func() error {
		holders := m.Recorder.Now()
		if len(holders) != 1 {
			return fmt.Errorf("wait for one holder: there are %d %v", len(holders), holders)
		}
		owner = m.Node(holders[0])
		status, err := owner.Status()
		if err != nil {
			return err
		}
		for _, v := range status.GetVips() {
			if v.GetName() == vipName && v.GetOwner() == owner.Name {
				return nil
			}
		}
		return fmt.Errorf("%s holds the VIP, but does not say that it owns it", owner.Name)
	})
	return owner, m.explain(err)
}

// WaitHealthy waits until every powered node's agent calls the mesh healthy.
func (m *Mesh) WaitHealthy(limit time.Duration) error {
	return m.explain(Await(limit, func() error {
		for _, n := range m.Nodes {
			if n.Host() == nil {
				continue
			}
			status, err := n.Status()
			if err != nil {
				return err
			}
			if status.GetState() != hameshv1.State_STATE_HEALTHY {
				return fmt.Errorf("%s says %s: %v", n.Name, status.GetState(), status.GetProblems())
			}
		}
		return nil
	}))
}

// explain adds the ends of the agents' logs to an error.
func (m *Mesh) explain(err error) error {
	if err == nil {
		return nil
	}
	var logs strings.Builder
	for _, n := range m.Nodes {
		fmt.Fprintf(&logs, "\n--- %s\n%s", n.Name, n.Log())
	}
	return fmt.Errorf("%w%s", err, logs.String())
}
