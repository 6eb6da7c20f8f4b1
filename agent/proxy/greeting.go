package proxy

import (
	"encoding/binary"
	"net/netip"
)

// Greeting is what the proxy tells a backend about the client.
type Greeting int

// The zero Greeting counts as GreetingNone.
const (
	_ Greeting = iota
	// GreetingNone: nothing.
	GreetingNone
	// GreetingV2: a header of the PROXY protocol, version 2, before the client's bytes
	// (haproxy.org, doc/proxy-protocol.txt, section 2.2).
	GreetingV2
)

// Of a header: the signature, version 2 with the command PROXY, then the family with TCP
// and the length of the addresses.
const (
	headerStart = "\r\n\r\n\x00\r\nQUIT\n\x21"
	headerTCP4  = "\x11\x00\x0c"
	headerTCP6  = "\x21\x00\x24"
)

// appendHeader appends what tells that a client has connected to a local address. Both
// are of one family: they are the ends of one connection.
func appendHeader(buf []byte, client, local netip.AddrPort) []byte {
	buf = append(buf, headerStart...)
	if client.Addr().Is4() {
		buf = append(buf, headerTCP4...)
	} else {
		buf = append(buf, headerTCP6...)
	}
	buf = append(buf, client.Addr().AsSlice()...)
	buf = append(buf, local.Addr().AsSlice()...)
	buf = binary.BigEndian.AppendUint16(buf, client.Port())
	return binary.BigEndian.AppendUint16(buf, local.Port())
}
