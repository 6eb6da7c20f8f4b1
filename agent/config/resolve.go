package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// Host is what the checks of [Config.Resolve] need to know of a machine.
type Host struct{ Interfaces []Interface }

// Interface is a network interface with its addresses.
type Interface struct {
	Name     string
	Up       bool // administratively; it may still have no carrier
	Loopback bool
	Addrs    []netip.Prefix // not masked: address and length of the subnet
}

// ThisHost returns the interfaces of the network namespace of the process.
func ThisHost() (Host, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return Host{}, fmt.Errorf("listing interfaces: %w", err)
	}
	var h Host
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			return Host{}, fmt.Errorf("listing addresses of %s: %w", i.Name, err)
		}
		own := Interface{Name: i.Name, Up: i.Flags&net.FlagUp != 0, Loopback: i.Flags&net.FlagLoopback != 0}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				ones, _ := n.Mask.Size()
				own.Addrs = append(own.Addrs, netip.PrefixFrom(addr.Unmap(), ones))
			}
		}
		h.Interfaces = append(h.Interfaces, own)
	}
	return h, nil
}

// holds says whether one of the interface's subnets has the address. An address that
// is a subnet of its own does not count: a VIP that a former run left behind says
// nothing about where it belongs.
func (i Interface) holds(addr netip.Addr) bool {
	return slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return !p.IsSingleIP() && p.Contains(addr) })
}

func (h Host) has(addr netip.Addr) bool {
	return slices.ContainsFunc(h.Interfaces, func(i Interface) bool {
		return slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return p.Addr() == addr })
	})
}

// ErrNotThisHost is returned by [Config.Resolve] where the host does not have
// node.address, so that the host's interfaces say nothing about the configuration.
var ErrNotThisHost = errors.New("not the host of this configuration")

// Resolve checks the configuration against the machine and fills in the interfaces of
// VIPs that name none: the one interface whose subnet holds the VIP. On a witness, which
// never holds a VIP, interfaces are neither filled in nor checked.
//
// The warnings, one line each, are of what works but is hardly meant; they are complete
// also with an error. The error is a [Problems], or wraps [ErrNotThisHost]: the agent
// must not start then, while a mere check of the file may count it as one more warning
// that the checks of the machine were left out.
func (c *Config) Resolve(h Host) (warnings []string, err error) {
	warn := func(key, message, remedy string) {
		warnings = append(warnings, c.source.problem(key, message, remedy).Error())
	}
	c.advise(warn)
	if !h.has(c.Node.Address) {
		p := c.source.problem("node.address", fmt.Sprintf("no interface of this host has %v", c.Node.Address),
			"run on that node, or give the address of this one")
		return warnings, fmt.Errorf("%w: %w", ErrNotThisHost, Problems{p})
	}
	if c.Node.Role == Witness {
		return warnings, nil
	}
	var problems Problems
	for i := range c.VIPs {
		v, key := &c.VIPs[i], fmt.Sprintf("vips[%d].interface", i)
		var fit, usable []string
		for _, n := range h.Interfaces {
			if n.Loopback {
				continue
			}
			usable = append(usable, n.Name)
			if n.holds(v.Address) {
				fit = append(fit, n.Name)
			}
		}
		fail := func(message, remedy string) { problems = append(problems, c.source.problem(key, message, remedy)) }
		switch {
		case v.Interface == "" && len(fit) == 1:
			v.Interface = fit[0]
		case v.Interface == "" && len(fit) == 0:
			fail(fmt.Sprintf("is left out, and no interface has a subnet with %v", v.Address), "set it to one of "+strings.Join(usable, ", "))
			continue
		case v.Interface == "":
			fail(fmt.Sprintf("is left out, and several interfaces have a subnet with %v", v.Address), "set it to one of "+strings.Join(fit, ", "))
			continue
		case !slices.Contains(usable, v.Interface):
			fail(quote(v.Interface)+" is not an interface of this host that could announce a VIP", "set it to one of "+strings.Join(usable, ", "))
			continue
		case !slices.Contains(fit, v.Interface):
			warn(key, fmt.Sprintf("no subnet of %s has %v, so neighbours may never ask for it there", v.Interface, v.Address),
				"make sure that a router sends it to this link")
		}
		if n := slices.IndexFunc(h.Interfaces, func(n Interface) bool { return n.Name == v.Interface }); !h.Interfaces[n].Up {
			warn(key, v.Interface+" is down", "set it up: ip link set "+v.Interface+" up")
		}
	}
	return warnings, problems.sorted()
}

// advise warns of what is allowed but hardly meant, without looking at the machine.
func (c *Config) advise(warn func(key, message, remedy string)) {
	switch n := len(c.Members); {
	case n == 2 && c.Store.Embedded != nil:
		warn("members", "two members with an embedded store survive no loss: the one left is not a majority", "add a witness")
	case n%2 == 0 && c.Store.Embedded != nil:
		warn("members", fmt.Sprintf("%d members survive no more losses than %d", n, n-1), "add a witness, or leave one out")
	}
	if c.TLS.Insecure {
		warn("tls.insecure", "whoever reaches the ports controls the mesh", "give caFile, certFile and keyFile outside a lab")
	}
	if len(c.VIPs) == 0 && len(c.Proxies) == 0 {
		warn("", "has neither vips nor proxies, so the mesh does nothing", "add a VIP")
	}
}
