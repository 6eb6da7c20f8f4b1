package handover

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/hashicorp/go-hclog"
)

// Errors of this package; use errors.Is.
var (
	// ErrUnsupported is returned where the kernel lacks something; the text says what.
	ErrUnsupported = errors.New("this kernel lacks")
	// ErrNotManaged is returned for an address that Open was not told of.
	ErrNotManaged = errors.New("not a managed address")
	// ErrPermission is returned where the kernel refuses for want of a capability.
	ErrPermission = errors.New("not permitted, CAP_NET_ADMIN is needed")
)

// Address is a VIP on an interface.
type Address struct {
	VIP       string     // the VIP's name
	Addr      netip.Addr // IPv4 or IPv6, without a zone
	Interface string     // where its clients' packets come in
}

// Config is what Open needs to know.
type Config struct {
	Managed []Address // the only addresses that are ever touched
	Log     hclog.Logger
}

// forward sends the packets of unknown connections to another node.
type forward struct {
	Address
	ports []uint16
	to    netip.Addr
}

// system is the operating system's part. All of it is idempotent.
type system interface {
	// forward makes these the only forwards of their family, in one step.
	forward(family, []forward) error
	// quiet makes these the only IPv4 addresses that are kept out of ARP, in one step.
	quiet([]Address) error
	// deliver has packets for addr delivered on this node, whether or not any interface
	// has the address; undeliver ends it.
	deliver(addr netip.Addr) error
	undeliver(addr netip.Addr) error
	// holdBack keeps acknowledgements in that are sent from these addresses and ports by
	// sockets that bear HeldMark; none: from nowhere. In one step for each family.
	holdBack(addrs []Address, ports []uint16) error
	// connections lists the TCP connections with that local address and port (0: any)
	// on which data may still pass.
	connections(addr netip.Addr, port uint16) ([]connection, error)
	// reset ends a connection at once; one that has ended is no error.
	reset(connection) error
	// sweep takes away what any process has done by the methods above, and returns whose
	// packets it had delivered.
	sweep() (delivered []netip.Addr, err error)
	close()
}

// Kernel is the operating system's part in hand-overs. Its methods may be called at the
// same time, and each may be repeated: it then makes good what others have undone. They
// return errors that wrap ErrNotManaged or ErrPermission.
type Kernel struct {
	log     hclog.Logger
	managed []Address
	sys     system

	mu       sync.Mutex // one change at a time
	kept     map[netip.Addr]Address
	forwards map[netip.Addr]forward
}

func newKernel(config Config, sys system) *Kernel {
	return &Kernel{
		log: config.Log, managed: config.Managed, sys: sys,
		kept:     make(map[netip.Addr]Address),
		forwards: make(map[netip.Addr]forward),
	}
}

// Close lets go of the connections to the kernel; no other method may be running or be
// called after it. What was kept and forwarded stays so: Sweep before, to end it.
func (k *Kernel) Close() { k.sys.close() }

func (k *Kernel) find(addr netip.Addr) (Address, error) {
	for _, a := range k.managed {
		if a.Addr == addr {
			return a, nil
		}
	}
	return Address{}, ErrNotManaged
}

// Keep has this node serve the connections that it has on the VIP when the address has
// left its interface; call it before the address leaves. The VIP is then local by a route,
// not by an address, so that nobody takes this node for a holder; it answers no ARP
// request for the VIP and sends none from it, whether or not the interface has the address.
// IPv6 needs nothing of the kind: the kernel speaks only for addresses that the very
// interface has (net/ipv6/ndisc.c). Where Keep returns an error, nothing is kept.
func (k *Kernel) Keep(addr netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	a, err := k.find(addr)
	if err == nil {
		k.kept[addr] = a
		// Silence first: the route by itself would have the kernel answer ARP requests.
		if err = k.quiet(addr); err == nil {
			err = k.sys.deliver(addr)
		}
		if err != nil {
			err = errors.Join(err, k.unkeep(addr))
		}
	}
	if err != nil {
		return fmt.Errorf("keep connections on %v: %w", addr, err)
	}
	return nil
}

// Unkeep ends Keep. Connections that are still there hang rather than break, where the
// interface does not have the address: Reset them before.
func (k *Kernel) Unkeep(addr netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, err := k.find(addr)
	if err == nil {
		err = k.unkeep(addr)
	}
	if err != nil {
		return fmt.Errorf("end keeping connections on %v: %w", addr, err)
	}
	return nil
}

func (k *Kernel) unkeep(addr netip.Addr) error {
	if err := k.sys.undeliver(addr); err != nil {
		return err
	}
	delete(k.kept, addr)
	return k.quiet(addr)
}

// quiet keeps what is kept out of ARP, if that concerns addr.
func (k *Kernel) quiet(addr netip.Addr) error {
	if addr.Is6() {
		return nil
	}
	return k.sys.quiet(slices.DeleteFunc(slices.Collect(maps.Values(k.kept)), func(a Address) bool { return a.Addr.Is6() }))
}

// Forward sends the packets that come in on the VIP's interface for one of the ports, and
// belong to no connection of this node, to the node that has the given address of the same
// family, its own and no VIP; call it before the VIP is put on here. Each port needs a
// listener bound to the wildcard address: for a port without one nothing is forwarded.
// It replaces the forward that the VIP had, without a packet in between. The other node
// should be reached by the VIP's interface, or its reverse path filter may drop the
// packets. Where Forward returns an error, nothing has changed.
func (k *Kernel) Forward(addr netip.Addr, ports []uint16, to netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	a, err := k.find(addr)
	_, toVIP := k.find(to)
	switch {
	case err != nil:
	case !to.IsValid() || to.Zone() != "" || familyOf(to) != familyOf(addr) || toVIP == nil:
		err = errors.New("the target has to be a node's own address of the same family")
	case len(ports) == 0 || slices.Contains(ports, 0):
		err = fmt.Errorf("ports %v: want at least one, from 1 to 65535", ports)
	default:
		err = k.change(addr, func() { k.forwards[addr] = forward{a, slices.Clone(ports), to} })
	}
	if err != nil {
		return fmt.Errorf("forward connections on %v to %v: %w", addr, to, err)
	}
	return nil
}

// Unforward ends Forward: the kernel answers the next packet of a connection that it does
// not know with a reset, if this node has the address. Where it returns an error, nothing
// has changed.
func (k *Kernel) Unforward(addr netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, err := k.find(addr)
	if err == nil {
		err = k.change(addr, func() { delete(k.forwards, addr) })
	}
	if err != nil {
		return fmt.Errorf("end forwarding connections on %v: %w", addr, err)
	}
	return nil
}

// change changes the forwards of one address, in the kernel too.
func (k *Kernel) change(addr netip.Addr, f func()) error {
	before := maps.Clone(k.forwards)
	f()
	var same []forward
	for _, w := range k.forwards {
		if familyOf(w.Addr) == familyOf(addr) {
			same = append(same, w)
		}
	}
	err := k.sys.forward(familyOf(addr), same)
	if err != nil {
		k.forwards = before
	}
	return err
}

// HeldMark is the socket mark of connections that [Kernel.HoldBack] is about, by itself and
// as a bit of a larger one. kube-proxy's marks have the bits 14 and 15, those of Cilium 8 to 11
// and 16 to 31, those of Calico 16 to 31.
const HeldMark = 1 << 13

// HoldBack has this node send nothing but SYNs, FINs and resets on connections of the managed
// addresses at one of the ports whose sockets bear HeldMark: so whoever accepts connections
// there can have the kernel acknowledge nothing of what a client sends until the mark is taken
// off. Its rules stay until EndHoldBack or Sweep.
func (k *Kernel) HoldBack(ports []uint16) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.sys.holdBack(k.managed, ports); err != nil {
		return fmt.Errorf("hold acknowledgements back: %w", errors.Join(err, k.sys.holdBack(nil, nil)))
	}
	return nil
}

// EndHoldBack ends HoldBack.
func (k *Kernel) EndHoldBack() error { return k.HoldBack(nil) }

// Established returns how many TCP connections this node has whose local end is the VIP
// and the port, from the first answer to a SYN until both sides have closed. Connections
// that this node only forwards are not among them. It wraps ErrUnsupported where the
// kernel has no socket diagnosis (sock_diag(7)).
func (k *Kernel) Established(addr netip.Addr, port uint16) (int, error) {
	_, err := k.find(addr)
	var found []connection
	if err == nil {
		found, err = k.sys.connections(addr, port)
	}
	if err != nil {
		return 0, fmt.Errorf("count connections on %v port %d: %w", addr, port, err)
	}
	return len(found), nil
}

// Reset ends all TCP connections of this node whose local address is the VIP, on any port,
// and returns how many. The peer gets a reset, so it has to come before Unkeep; the process
// here gets ECONNABORTED. It wraps ErrUnsupported where the kernel has no SOCK_DESTROY
// (CONFIG_INET_DIAG_DESTROY): the process then has to close the connections itself.
func (k *Kernel) Reset(addr netip.Addr) (int, error) {
	_, err := k.find(addr)
	var found []connection
	if err == nil {
		found, err = k.sys.connections(addr, 0)
	}
	for i, c := range found {
		if err = k.sys.reset(c); err != nil {
			found = found[:i]
			break
		}
	}
	if err != nil {
		return len(found), fmt.Errorf("reset connections on %v: %w", addr, err)
	}
	return len(found), nil
}

// Sweep ends all keeping and forwarding on this node, that of an earlier run or of another
// process included, whatever VIPs those managed. Connections are left alone.
func (k *Kernel) Sweep() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delivered, err := k.sys.sweep()
	for _, addr := range delivered {
		k.log.Info("swept the keeping of connections that an earlier run has left", "address", addr)
	}
	if err != nil {
		return fmt.Errorf("sweep hand-overs: %w", err)
	}
	clear(k.kept)
	clear(k.forwards)
	return nil
}

// family is an address family.
type family int

// The zero family is invalid.
const (
	_ family = iota
	ipv4
	ipv6
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}
