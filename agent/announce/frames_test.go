package announce

import (
	"net"
	"net/netip"
	"testing"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"golang.org/x/net/bpf"
)

var (
	stranger = net.HardwareAddr{2, 0, 0, 0, 0x77, 0x99}
	relayed  = net.HardwareAddr{2, 0, 0, 0, 0x77, 0x98} // the source of frames that name stranger
	client4  = netip.MustParseAddr("10.77.0.200")
	client6  = netip.MustParseAddr("fd77::200")
	any4     = netip.IPv4Unspecified()
	any6     = netip.IPv6Unspecified()
)

func arpPacket(t *testing.T, op arp.Operation, sender, target netip.Addr) []byte {
	t.Helper()
	p, err := arp.NewPacket(op, stranger, sender, relayed, target)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ndPacket(t *testing.T, m ndp.Message, source, destination netip.Addr) []byte {
	t.Helper()
	body, err := ndp.MarshalMessageChecksum(m, source, destination)
	if err != nil {
		t.Fatal(err)
	}
	s, d := source.As16(), destination.As16()
	b := []byte{6 << 4, 0, 0, 0, 0, byte(len(body)), icmpv6, ndp.HopLimit}
	b = append(append(b, s[:]...), d[:]...)
	return append(b, body...)
}

func advertisement(addr netip.Addr, solicited bool) *ndp.NeighborAdvertisement {
	return &ndp.NeighborAdvertisement{
		Solicited: solicited, Override: true, TargetAddress: addr,
		Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: stranger}},
	}
}

func changed(b []byte, off int, to byte) []byte {
	b[off] = to
	return b
}

func TestFramesARP(t *testing.T) {
	other := netip.MustParseAddr("10.77.0.101")
	addrs := []netip.Addr{other, vip4.Addr}
	for name, c := range map[string]struct {
		frame []byte
		want  Kind // 0: does not pass the filter
		addr  netip.Addr
	}{
		"announced by a request":    {arpPacket(t, arp.OperationRequest, vip4.Addr, vip4.Addr), Announcement, vip4.Addr},
		"announced by a reply":      {arpPacket(t, arp.OperationReply, vip4.Addr, vip4.Addr), Announcement, vip4.Addr},
		"another VIP":               {arpPacket(t, arp.OperationReply, other, other), Announcement, other},
		"answer":                    {arpPacket(t, arp.OperationReply, vip4.Addr, client4), Answer, vip4.Addr},
		"answer to a probe":         {arpPacket(t, arp.OperationReply, vip4.Addr, any4), Answer, vip4.Addr},
		"asks in the VIP's name":    {arpPacket(t, arp.OperationRequest, vip4.Addr, client4), Answer, vip4.Addr},
		"probe":                     {arpPacket(t, arp.OperationRequest, any4, vip4.Addr), Probing, vip4.Addr},
		"a client asks for it":      {arpPacket(t, arp.OperationRequest, client4, vip4.Addr), 0, netip.Addr{}},
		"a client announces itself": {arpPacket(t, arp.OperationRequest, client4, client4), 0, netip.Addr{}},
		"probe for another":         {arpPacket(t, arp.OperationRequest, any4, client4), 0, netip.Addr{}},
		"not IPv4":                  {changed(arpPacket(t, arp.OperationReply, vip4.Addr, vip4.Addr), arpProtocol, 9), 0, netip.Addr{}},
		"cut off":                   {arpPacket(t, arp.OperationReply, vip4.Addr, vip4.Addr)[:arpSender+2], 0, netip.Addr{}},
	} {
		t.Run(name, func(t *testing.T) {
			checkFrame(t, arpFilter(addrs), parseARP, c.frame, stranger, c.addr, c.want)
		})
	}
	if _, ok := parseARP(arpPacket(t, arp.OperationReply, any4, vip4.Addr), stranger); ok {
		t.Error("a reply from nobody claims something")
	}
}

func TestFramesND(t *testing.T) {
	// Differs in the last word alone, and has the same solicited-node group.
	other := netip.MustParseAddr("fd77::1:0:100")
	addrs := []netip.Addr{other, vip6.Addr}
	all := netip.IPv6LinkLocalAllNodes()
	local := netip.MustParseAddr("fe80::1")
	solicit := func(addr netip.Addr, o ...ndp.Option) *ndp.NeighborSolicitation {
		return &ndp.NeighborSolicitation{TargetAddress: addr, Options: o}
	}
	from := &ndp.LinkLayerAddress{Direction: ndp.Source, Addr: stranger}
	for name, c := range map[string]struct {
		frame []byte
		want  Kind
		addr  netip.Addr
		mac   net.HardwareAddr
	}{
		"announcement":           {ndPacket(t, advertisement(vip6.Addr, false), local, all), Announcement, vip6.Addr, stranger},
		"another VIP":            {ndPacket(t, advertisement(other, false), local, all), Announcement, other, stranger},
		"answer":                 {ndPacket(t, advertisement(vip6.Addr, true), vip6.Addr, client6), Answer, vip6.Addr, stranger},
		"answer to a probe":      {ndPacket(t, advertisement(vip6.Addr, false), vip6.Addr, all), Answer, vip6.Addr, stranger},
		"names no MAC":           {ndPacket(t, &ndp.NeighborAdvertisement{TargetAddress: vip6.Addr}, local, all), Announcement, vip6.Addr, relayed},
		"asks in the VIP's name": {ndPacket(t, solicit(client6, from), vip6.Addr, all), Answer, vip6.Addr, stranger},
		"probe":                  {ndPacket(t, solicit(vip6.Addr, ndp.NewNonce()), any6, all), Probing, vip6.Addr, relayed},
		"a client asks for it":   {ndPacket(t, solicit(vip6.Addr, from), client6, all), 0, netip.Addr{}, nil},
		"of another":             {ndPacket(t, advertisement(client6, false), local, all), 0, netip.Addr{}, nil},
		"probe for another":      {ndPacket(t, solicit(client6), any6, all), 0, netip.Addr{}, nil},
		"routed":                 {changed(ndPacket(t, advertisement(vip6.Addr, false), local, all), ip6HopLimit, 254), 0, netip.Addr{}, nil},
		"not ICMPv6":             {changed(ndPacket(t, advertisement(vip6.Addr, false), local, all), ip6Next, 6), 0, netip.Addr{}, nil},
		"another ICMPv6 message": {changed(ndPacket(t, advertisement(vip6.Addr, false), local, all), icmpType, 128), 0, netip.Addr{}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			checkFrame(t, ndFilter(addrs), parseND, c.frame, c.mac, c.addr, c.want)
		})
	}
	whole := ndPacket(t, advertisement(vip6.Addr, false), local, all)
	for n := range whole {
		if _, ok := parseND(whole[:n], relayed); ok {
			t.Errorf("%d bytes of it claim something", n)
		}
	}
}

func checkFrame(t *testing.T, filter []bpf.Instruction, parse func([]byte, net.HardwareAddr) (claim, bool),
	frame []byte, mac net.HardwareAddr, addr netip.Addr, want Kind) {
	t.Helper()
	vm, err := bpf.NewVM(filter)
	if err != nil {
		t.Fatal(err)
	}
	n, err := vm.Run(frame)
	if err != nil {
		t.Fatal(err)
	}
	if passed := n >= len(frame); passed != (want != 0) {
		t.Fatalf("passed: %t", passed)
	}
	if want == 0 {
		return
	}
	got, ok := parse(frame, relayed)
	if !ok || got.addr != addr || got.mac.String() != mac.String() || got.kind != want {
		t.Errorf("claim %v by %v, %v, %t; want %v by %v, %v", got.addr, got.mac, got.kind, ok, addr, mac, want)
	}
}

// TestFilterSize: the kernel takes no more than 4096 instructions (BPF_MAXINSNS).
func TestFilterSize(t *testing.T) {
	addrs := make([]netip.Addr, 100)
	for i := range addrs {
		addrs[i] = netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(i)})
	}
	filter := ndFilter(addrs)
	if _, err := bpf.Assemble(filter); err != nil || len(filter) > 4096 {
		t.Errorf("%d instructions, error %v", len(filter), err)
	}
}
