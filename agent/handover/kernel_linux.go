package handover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// tableName is the name of our tables, one each of families ip, ip6 and arp. They
	// exist only while there is something in them.
	tableName = "hamesh"
	// holdName is that of the tables for holding back, which stay all the time.
	holdName = "hamesh-hold"
	// probeName is the table in which Open tries what this kernel can do; it exists within
	// a transaction alone.
	probeName = "hamesh-probe"

	// routeProtocol marks our routes (rtnetlink(7), rtm_protocol): "h", which nobody has
	// registered in /usr/share/iproute2/rt_protos.
	routeProtocol = 104
	// routeMetric sets our route apart from the one that the kernel makes and removes with
	// the address itself, whose metric is 0.
	routeMetric = 1024
	// loopback is the index of lo in every network namespace (LOOPBACK_IFINDEX,
	// include/net/flow.h).
	loopback = 1

	// replyTimeout bounds the wait for the kernel's answer, which is there at once.
	replyTimeout = 2 * time.Second
)

// Open connects to the kernel of the calling thread's network namespace, for good, and
// tries whether it can do what the managed addresses need. Nothing is changed or swept.
//
// It needs CAP_NET_ADMIN in the user namespace that owns the network namespace. An error
// wraps ErrPermission, or ErrUnsupported where a VIP has to move without this package.
func Open(config Config) (*Kernel, error) {
	s, err := openSockets()
	if err != nil {
		return nil, fmt.Errorf("open hand-over: %w", err)
	}
	s.managed = config.Managed
	for _, a := range config.Managed {
		if err := s.probe(a.Addr); err != nil {
			s.close()
			return nil, fmt.Errorf("open hand-over: vip %s: %w", a.VIP, err)
		}
	}
	return newKernel(config, s), nil
}

// sockets are netlink sockets that stay open, since opening them costs as much as using them.
type sockets struct {
	managed []Address
	tables  *nftables.Conn
	routes  *netlink.Handle
	diag    map[int]*nl.SocketHandle
}

func openSockets() (*sockets, error) {
	tables, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, explain("nf_tables", err)
	}
	s := &sockets{tables: tables}
	if err := s.openDiag(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// openDiag opens what does without nf_tables.
func (s *sockets) openDiag() (err error) {
	if s.routes, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open rtnetlink: %w", err)
	}
	if err := s.routes.SetSocketTimeout(replyTimeout); err != nil {
		return fmt.Errorf("limit rtnetlink's time: %w", err)
	}
	diag, err := nl.Subscribe(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return explain("sock_diag", err)
	}
	s.diag = map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: {Socket: diag}}
	limit := unix.NsecToTimeval(replyTimeout.Nanoseconds())
	if err := diag.SetReceiveTimeout(&limit); err != nil {
		return fmt.Errorf("limit sock_diag's time: %w", err)
	}
	return nil
}

func (s *sockets) close() {
	if s.tables != nil {
		// The error would be that it is closed already.
		_ = s.tables.CloseLasting()
	}
	if s.routes != nil {
		s.routes.Close()
	}
	for _, h := range s.diag {
		h.Socket.Close()
	}
}

// explain adds to the kernel's bare number what it means for this feature.
func explain(feature string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: %w", feature, ErrPermission, err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL),
		errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("%w %s: %w", ErrUnsupported, feature, err)
	}
	return fmt.Errorf("%s: %w", feature, err)
}

// probe tries each feature that the address needs by itself. It also has the kernel load
// the modules, which takes longer than a move should.
func (s *sockets) probe(addr netip.Addr) error {
	a := Address{Addr: addr, Interface: "lo"}
	f := familyOf(addr)
	type feature struct {
		name   string
		family nftables.TableFamily
		exprs  []expr.Any
	}
	features := []feature{
		{"nf_tables", f.table(), nil},
		{"nf_tables expression socket wildcard", f.table(), unknown()},
		{"nf_tables expression dup", f.table(), send(addr)},
		{"nf_tables payload write", f.table(), hopsLeft(f)},
	}
	if f == ipv4 {
		features = append(features,
			feature{"nf_tables family arp", nftables.TableFamilyARP, unanswered(a)},
			feature{"nf_tables payload write in family arp", nftables.TableFamilyARP, unsent(a, addr)})
	}
	for _, x := range features {
		t := s.tables.AddTable(&nftables.Table{Family: x.family, Name: probeName})
		c := s.tables.AddChain(&nftables.Chain{Name: "probe", Table: t})
		s.tables.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: x.exprs})
		s.tables.DelTable(t)
		if err := s.tables.Flush(); err != nil {
			return explain(x.name, err)
		}
	}
	return nil
}

func (f family) table() nftables.TableFamily {
	if f == ipv4 {
		return nftables.TableFamilyIPv4
	}
	return nftables.TableFamilyIPv6
}

func (f family) netlink() int {
	if f == ipv4 {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// chain is a base chain with all its rules.
type chain struct {
	name  string
	hook  *nftables.ChainHook
	rules [][]expr.Any
}

// replace makes the chains' rules all that a table of ours of that family has, in one
// transaction, and heals what others have removed. A packet meets the old rules or the new
// ones: the chains stay, as one that is made anew has a hook of its own, and a packet could
// pass the new hook before the transaction and the old one after it, unseen by both.
func (s *sockets) replace(f nftables.TableFamily, table string, chains ...chain) error {
	t := s.tables.AddTable(&nftables.Table{Family: f, Name: table}) // so that there is one to delete
	if len(chains) == 0 {
		s.tables.DelTable(t)
	}
	for _, c := range chains {
		added := s.tables.AddChain(&nftables.Chain{
			Name: c.name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: c.hook,
			// Raw, which is before connection tracking (-200): it would take the packets
			// for invalid ones, and other rules act on that.
			Priority: nftables.ChainPriorityRaw,
		})
		s.tables.FlushChain(added)
		for _, r := range c.rules {
			s.tables.AddRule(&nftables.Rule{Table: t, Chain: added, Exprs: r})
		}
	}
	if err := s.tables.Flush(); err != nil {
		return explain("nf_tables", err)
	}
	return nil
}

func (s *sockets) forward(f family, forwards []forward) error {
	if len(forwards) == 0 {
		return s.replace(f.table(), tableName)
	}
	var rules [][]expr.Any
	for _, w := range forwards {
		for _, port := range w.ports {
			rules = append(rules, w.rules(port)...)
		}
	}
	return s.replace(f.table(), tableName, chain{"forward", nftables.ChainHookPrerouting, rules})
}

func (s *sockets) holdBack(addrs []Address, ports []uint16) error {
	rules := map[family][][]expr.Any{}
	for _, a := range addrs {
		for _, port := range ports {
			rules[familyOf(a.Addr)] = append(rules[familyOf(a.Addr)], a.unacknowledged(port))
		}
	}
	for _, f := range []family{ipv4, ipv6} {
		var chains []chain
		if len(rules[f]) > 0 {
			chains = []chain{{"output", nftables.ChainHookOutput, rules[f]}}
		}
		err := s.replace(f.table(), holdName, chains...)
		if len(chains) == 0 && errors.Is(err, ErrUnsupported) {
			continue // then there is nothing to end
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unacknowledged is, in nft's words, with the bits of fin, syn, rst and ack:
//
//	meta mark & MARK == MARK ip saddr VIP tcp sport PORT tcp flags & 0x17 == ack drop
func (a Address) unacknowledged(port uint16) []expr.Any {
	mark := binaryutil.NativeEndian.PutUint32(HeldMark)
	source := 12 // offset in the IP header (RFC 791, 3.1)
	if a.Addr.Is6() {
		source = 8 // RFC 8200, 3
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mark, Xor: make([]byte, 4)}, equal(mark),
		field(expr.PayloadBaseNetworkHeader, source, a.Addr.BitLen()/8), equal(a.Addr.AsSlice()),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{unix.IPPROTO_TCP}),
		field(expr.PayloadBaseTransportHeader, 0, 2), equal(binaryutil.BigEndian.PutUint16(port)),
		field(expr.PayloadBaseTransportHeader, 13, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpFIN | tcpSYN | tcpRST | tcpACK}, Xor: []byte{0}}, equal([]byte{tcpACK}),
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}

// equal matches what the register holds.
func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

// field loads a field of the packet.
func field(base expr.PayloadBase, offset, length int) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: base, Offset: uint32(offset), Len: uint32(length)}
}

// Flags' bits in byte 13 of the TCP header (RFC 9293, 3.1).
const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

// hops is how often a packet is forwarded at most: a chain of givers is shorter.
const hops = 16

// rules are, in nft's words and with "ip6 hoplimit" for IPv6:
//
//	iifname IF ip daddr VIP tcp dport PORT tcp flags & syn == 0 ip ttl > 16 socket wildcard 1 ip ttl set 16 dup to NODE drop
//	iifname IF ip daddr VIP tcp dport PORT tcp flags & syn == 0 ip ttl > 1 ip ttl <= 16 socket wildcard 1 dup to NODE drop
//	iifname IF ip daddr VIP tcp dport PORT tcp flags & syn == 0 ip ttl <= 1 socket wildcard 1 drop
//
// They go by the interface because packets that this node itself, or a container on it,
// sends to the VIP could not be answered: the former owner's answers would come from
// outside with a source address that is this node's own, and be dropped as martian.
//
// The hops are counted here because nobody else does: nothing between one node's dup and
// the next node's looks at the TTL, and what is 0 becomes 255. In a ring of forwards, which
// there may be for a moment (package doc), a packet of a connection that has ended would go
// round as fast as the processors can, and leave them to nothing else. At the end it is
// dropped, not answered by a reset: who knows its connection may be out of the ring's sight.
func (w forward) rules(port uint16) [][]expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, w.Interface)
	f := familyOf(w.Addr)
	destination := 16 // offset in the IP header (RFC 791, 3.1)
	if f == ipv6 {
		destination = 24 // RFC 8200, 3
	}
	match := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equal(name),
		field(expr.PayloadBaseNetworkHeader, destination, w.Addr.BitLen()/8), equal(w.Addr.AsSlice()),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{unix.IPPROTO_TCP}),
		field(expr.PayloadBaseTransportHeader, 2, 2), equal(binaryutil.BigEndian.PutUint16(port)),
		field(expr.PayloadBaseTransportHeader, 13, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpSYN}, Xor: []byte{0}}, equal([]byte{0}),
		field(expr.PayloadBaseNetworkHeader, f.ttl(), 1),
	}
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	return [][]expr.Any{
		slices.Concat(match, ttl(expr.CmpOpGt, hops), unknown(), hopsLeft(f), send(w.to), drop),
		slices.Concat(match, ttl(expr.CmpOpGt, 1), ttl(expr.CmpOpLte, hops), unknown(), send(w.to), drop),
		slices.Concat(match, ttl(expr.CmpOpLte, 1), unknown(), drop),
	}
}

// ttl is the offset of the TTL in the IP header (RFC 791, 3.1), or of the hop limit
// (RFC 8200, 3).
func (f family) ttl() int {
	if f == ipv4 {
		return 8
	}
	return 7
}

// ttl compares what was loaded with a number.
func ttl(op expr.CmpOp, n byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: op, Register: 1, Data: []byte{n}}}
}

// hopsLeft leaves a packet that many hops. The copy that dup makes of it gets a checksum of its
// own (net/ipv4/ip_output.c, __ip_local_out), and the packet itself goes nowhere.
func hopsLeft(f family) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: []byte{hops}},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1,
			Base: expr.PayloadBaseNetworkHeader, Offset: uint32(f.ttl()), Len: 1},
	}
}

// unknown matches packets that would end at a listener bound to the wildcard address. One
// of a connection that this node has, in whatever state, ends elsewhere.
func unknown() []expr.Any {
	return []expr.Any{&expr.Socket{Key: expr.SocketKeyWildcard, Register: 1}, equal([]byte{1})}
}

// send sends a copy of the packet to the node, with a TTL less by one and unseen by
// connection tracking (net/ipv4/netfilter/nf_dup_ipv4.c).
func send(to netip.Addr) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: 1, Data: to.AsSlice()}, &expr.Dup{RegAddr: 1}}
}

func (s *sockets) quiet(kept []Address) error {
	if len(kept) == 0 {
		return s.replace(nftables.TableFamilyARP, tableName)
	}
	// ARP's hooks have numbers of their own (linux/netfilter_arp.h).
	in := chain{name: "in", hook: nftables.ChainHookRef(0)}
	out := chain{name: "out", hook: nftables.ChainHookRef(1)}
	for _, a := range kept {
		in.rules = append(in.rules, unanswered(a))
		out.rules = append(out.rules, unsent(a, s.own(a)))
	}
	return s.replace(nftables.TableFamilyARP, tableName, in, out)
}

// own returns the interface's first address that is no VIP. Where there is none, or no
// such interface, it is 0.0.0.0, which neighbours answer as well (RFC 5227, 2.1.1).
func (s *sockets) own(a Address) netip.Addr {
	link, err := s.routes.LinkByName(a.Interface)
	if err != nil {
		return netip.IPv4Unspecified()
	}
	addrs, err := s.routes.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return netip.IPv4Unspecified()
	}
	for _, x := range addrs {
		addr, ok := netip.AddrFromSlice(x.IP.To4())
		if ok && !slices.ContainsFunc(s.managed, func(a Address) bool { return a.Addr == addr }) {
			return addr
		}
	}
	return netip.IPv4Unspecified()
}

// Offsets in an ARP packet for Ethernet and IPv4 (RFC 826).
const (
	arpLengths = 4 // of both addresses, a byte each, and then two bytes of operation
	arpSender  = 14
	arpTarget  = 24
)

// question matches ARP requests with addresses of these lengths, which the offsets go by.
func question() []expr.Any {
	return []expr.Any{field(expr.PayloadBaseNetworkHeader, arpLengths, 4), equal([]byte{6, 4, 0, 1})}
}

// unanswered drops what asks for the address.
func unanswered(a Address) []expr.Any {
	return append(question(),
		field(expr.PayloadBaseNetworkHeader, arpTarget, 4), equal(a.Addr.AsSlice()),
		&expr.Verdict{Kind: expr.VerdictDrop})
}

// unsent puts own in the place of the address where this node asks for a neighbour's MAC
// to send a packet from the address: neighbours would learn it from the question
// (RFC 826). Not to ask at all would leave the packet unsent.
func unsent(a Address, own netip.Addr) []expr.Any {
	return append(question(),
		field(expr.PayloadBaseNetworkHeader, arpSender, 4), equal(a.Addr.AsSlice()),
		&expr.Immediate{Register: 1, Data: own.AsSlice()},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1,
			Base: expr.PayloadBaseNetworkHeader, Offset: arpSender, Len: 4})
}

func route(addr netip.Addr) *netlink.Route {
	r := &netlink.Route{
		LinkIndex: loopback,
		Dst:       &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
		Table:     unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL,
		Protocol: routeProtocol, Priority: routeMetric,
	}
	if addr.Is4() {
		r.Scope = netlink.SCOPE_HOST // as IPv4 demands of a local route
	}
	return r
}

func (s *sockets) deliver(addr netip.Addr) error {
	if err := s.routes.RouteReplace(route(addr)); err != nil {
		return explain("local route", err)
	}
	return nil
}

func (s *sockets) undeliver(addr netip.Addr) error {
	if err := s.routes.RouteDel(route(addr)); err != nil && !errors.Is(err, unix.ESRCH) {
		return explain("local route", err)
	}
	return nil
}

func (s *sockets) sweep() (delivered []netip.Addr, err error) {
	var errs []error
	for _, f := range []family{ipv4, ipv6} {
		filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: routeProtocol}
		routes, err := s.routes.RouteListFiltered(f.netlink(), filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			errs = append(errs, fmt.Errorf("list local routes: %w", err))
		}
		for _, r := range routes {
			addr, _ := netip.AddrFromSlice(r.Dst.IP)
			delivered = append(delivered, addr.Unmap())
			errs = append(errs, s.undeliver(addr.Unmap()))
		}
	}
	for _, f := range []nftables.TableFamily{ipv4.table(), ipv6.table(), nftables.TableFamilyARP} {
		// Where the kernel does not know the family there is nothing to sweep.
		if err := s.replace(f, tableName); !errors.Is(err, ErrUnsupported) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, s.holdBack(nil, nil))
	return delivered, errors.Join(errs...)
}

// connection is a socket as sock_diag names it: struct inet_diag_sockid.
type connection struct {
	family byte
	id     [48]byte
}

// live are the states of TCP in which data may still pass, as bits. BPF's numbers for
// them are the kernel's own (net/ipv4/tcp.c, tcp_set_state, checks that at build time).
const live = 1<<unix.BPF_TCP_ESTABLISHED | 1<<unix.BPF_TCP_SYN_RECV |
	1<<unix.BPF_TCP_FIN_WAIT1 | 1<<unix.BPF_TCP_FIN_WAIT2 |
	1<<unix.BPF_TCP_CLOSE_WAIT | 1<<unix.BPF_TCP_LAST_ACK | 1<<unix.BPF_TCP_CLOSING

func (s *sockets) connections(addr netip.Addr, port uint16) ([]connection, error) {
	families := []byte{unix.AF_INET6}
	if addr.Is4() {
		// A listener on [::] accepts IPv4 connections as mapped IPv6 ones.
		families = append(families, unix.AF_INET)
	}
	var found []connection
	for _, f := range families {
		req := s.request(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, diagRequest(f, live, [48]byte{}))
		req.AddData(nl.NewRtAttr(inetDiagReqBytecode, local(addr, port)))
		msgs, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0)
		if err != nil {
			return nil, explain("sock_diag for TCP", err)
		}
		for _, m := range msgs { // struct inet_diag_msg
			found = append(found, connection{m[0], [48]byte(m[4:])})
		}
	}
	return found, nil
}

func (s *sockets) reset(c connection) error {
	req := s.request(nl.SOCK_DESTROY, unix.NLM_F_ACK, diagRequest(c.family, 0, c.id))
	if _, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return explain("sock_diag's SOCK_DESTROY", err)
	}
	return nil
}

func (s *sockets) request(kind, flags int, body []byte) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = s.diag
	req.AddData(raw(body))
	return req
}

// raw is a message body.
type raw []byte

func (r raw) Len() int          { return len(r) }
func (r raw) Serialize() []byte { return r }

// diagRequest is struct inet_diag_req_v2 (linux/inet_diag.h).
func diagRequest(family byte, states uint32, id [48]byte) []byte {
	b := []byte{family, unix.IPPROTO_TCP, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, states)
	return append(b, id[:]...)
}

// From linux/inet_diag.h.
const (
	inetDiagReqBytecode = 1
	inetDiagBCSCond     = 7 // a condition on the local end
)

// local is a filter that the kernel runs for each socket: one struct inet_diag_bc_op and
// its struct inet_diag_hostcond. An IPv4 address matches mapped ones too.
func local(addr netip.Addr, port uint16) []byte {
	family, wanted := byte(unix.AF_INET), int32(port)
	if addr.Is6() {
		family = unix.AF_INET6
	}
	if port == 0 {
		wanted = -1 // any
	}
	length := 4 + 8 + addr.BitLen()/8
	// Where to go on: at the end exactly, which accepts, or 4 beyond it, which does not.
	b := []byte{inetDiagBCSCond, byte(length)}
	b = binary.NativeEndian.AppendUint16(b, uint16(length+4))
	b = append(b, family, byte(addr.BitLen()), 0, 0)
	b = binary.NativeEndian.AppendUint32(b, uint32(wanted))
	return append(b, addr.AsSlice()...)
}
