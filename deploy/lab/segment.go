//go:build linux

package lab

import (
	"fmt"
	"net/netip"
)

// Segment says which IP versions a mesh's segment has.
type Segment int

// In Options the zero Segment stands for IPv4.
const (
	_    Segment = iota
	IPv4         // nodes, clients and the VIP
	IPv6         // the same; there is no other IP version
	Dual         // both on every machine, a VIP of each; members reach each other by IPv4
)

// addressing is how the machines of a mesh are called in one IP version.
type addressing struct {
	vipName     string
	vip         netip.Addr
	firstNode   netip.Addr
	firstClient netip.Addr
	bits        int // of the subnet that holds all of them
}

var (
	four = addressing{vipName, vip, netip.MustParseAddr("10.77.0.11"), netip.MustParseAddr("10.77.1.1"), subnetBits}
	six  = addressing{vipName, netip.MustParseAddr("fd77::100"), netip.MustParseAddr("fd77::11"), netip.MustParseAddr("fd77::1:1"), 64}
)

// plans are the addressings of a segment; members reach each other by the first.
func (s Segment) plans() ([]addressing, error) {
	switch s {
	case 0, IPv4:
		return []addressing{four}, nil
	case IPv6:
		return []addressing{six}, nil
	case Dual:
		second := six
		second.vipName = secondVIPName
		return []addressing{four, second}, nil
	}
	return nil, fmt.Errorf("no segment is of kind %d", s)
}

// node and client return the nth one's address, counted from 0, with its prefix length.
func (a addressing) node(n int) netip.Prefix { return netip.PrefixFrom(nth(a.firstNode, n), a.bits) }
func (a addressing) client(n int) netip.Prefix {
	return netip.PrefixFrom(nth(a.firstClient, n), a.bits)
}
