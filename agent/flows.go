package agent

import (
	"context"
	"encoding/binary"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/handover"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// flowsLook is how often this node's connections are looked at for those who may have
	// to tell their clients. A connection that is younger is a busy one, and notices.
	flowsLook = 500 * time.Millisecond
	// flowsMost bounds what is shared of one proxy and VIP: a few megabytes at the others.
	flowsMost = 50_000
	// flowsChunk is how many clients one message names at most.
	flowsChunk = 4096
	// flowsBehind is how many messages a member may be behind before it is told all anew.
	flowsBehind = 64
	// flowsBereaved is how long after a death its clients may still be told: whoever waits
	// for longer has noticed by its own keep-alive or has gone, and a VIP that comes here
	// days later would bring segments of nothing to machines that know nothing of it.
	flowsBereaved = 5 * time.Minute
)

// tellAt is when clients are told after the VIP is on here: when two announcements have
// gone out, so that their answers come here; and twice more, as a kernel answers for a
// connection once in half a second at most, and an answer or the news may get lost.
var tellAt = []time.Duration{30 * time.Millisecond, 600 * time.Millisecond, 1300 * time.Millisecond}

// through is a way to this mesh's API servers.
type through struct {
	vip  string
	port uint16
}

// clients are the remote ends of connections.
type clients map[netip.AddrPort]struct{}

// flows knows which clients have connections by the VIPs and with whom: this member's it
// tells the others, and when one of those has died, it tells its clients, if the VIP is
// here now. They would otherwise wait for an answer that nobody will send; an idle watch
// of the API server does so for half a minute or more.
type flows struct {
	self   string
	boot   uint64
	vips   map[string]netip.Addr
	list   func(port uint16, local netip.Addr) []netip.AddrPort
	count  func() uint64 // differs whenever a list may
	silent func(member string) bool
	tell   func(ctx context.Context, vip netip.AddrPort, clients []netip.AddrPort) error
	ports  []uint16
	log    hclog.Logger

	mu     sync.Mutex
	mine   map[through]clients    // written by run alone; no set in it is changed
	theirs map[string]*theirFlows // by member
	past   map[string]*theirFlows // those of the boot before
	links  map[chan *hameshv1.ShareFlowsRequest]struct{}
	wake   chan struct{} // one token: somebody may have to be told

	// Of its own, and held for moments: the keeper takes it before it takes an address off.
	takenMu sync.Mutex
	taken   map[string]uint64 // VIP → generation of the hold by which this node has it
}

type theirFlows struct {
	boot  uint64
	died  time.Time // when that was noticed; zero: it lives
	flows map[through]clients
	// told: their clients know, or are being told.
	told map[through]bool
}

func newFlows(self string, boot uint64, vips map[string]netip.Addr, ports []uint16, log hclog.Logger) *flows {
	return &flows{
		self: self, boot: boot, vips: vips, ports: ports, log: log, tell: handover.Tickle,
		mine: map[through]clients{}, theirs: map[string]*theirFlows{}, past: map[string]*theirFlows{}, taken: map[string]uint64{},
		links: map[chan *hameshv1.ShareFlowsRequest]struct{}{}, wake: make(chan struct{}, 1),
	}
}

// openFlows prepares what is known of connections; the services are there.
func (a *Agent) openFlows(boot uint64) {
	vips := map[string]netip.Addr{}
	for _, v := range a.cfg.VIPs {
		vips[v.Name] = v.Address
	}
	var ports []uint16
	for _, p := range a.cfg.Proxies {
		ports = append(ports, p.Port)
	}
	f := newFlows(a.cfg.Node.Name, boot, vips, ports, a.log.Named("flows"))
	f.list = func(port uint16, local netip.Addr) (all []netip.AddrPort) {
		for _, s := range a.services {
			if s.cfg.Port == port {
				all = s.proxy.Flows(local)
			}
		}
		return all
	}
	f.count = func() (n uint64) {
		for _, s := range a.services {
			stats := s.proxy.Stats()
			n += stats.Accepted
			for _, ended := range stats.Ended {
				n += ended
			}
		}
		return n
	}
	f.silent = func(member string) bool {
		a.board.mu.Lock()
		defer a.board.mu.Unlock()
		return a.board.silent[member]
	}
	a.flows = f
}

// run looks at this node's connections, and tells the clients of the dead, until ctx ends.
func (f *flows) run(ctx context.Context) error {
	tick := time.NewTicker(flowsLook)
	defer tick.Stop()
	var group sync.WaitGroup
	defer group.Wait()
	last, looked := uint64(0), false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
			for _, n := range f.bereaved() {
				group.Go(func() { f.notify(ctx, n) })
			}
		case <-tick.C:
			if n := f.count(); n != last || !looked {
				last, looked = n, true
				f.look()
			}
		}
	}
}

// look finds out what has changed and tells those who listen.
func (f *flows) look() {
	for vip, addr := range f.vips {
		for _, port := range f.ports {
			now := clients{}
			for _, c := range f.list(port, addr) {
				if len(now) == flowsMost {
					break
				}
				now[c] = struct{}{}
			}
			f.changed(through{vip, port}, now)
		}
	}
}

func (f *flows) changed(w through, now clients) {
	before := f.mine[w]
	changes := slices.Collect(f.messages(w, without(now, before), without(before, now)))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mine[w] = now
	for _, m := range changes {
		for link := range f.links {
			select {
			case link <- m:
			default: // it begins anew
				delete(f.links, link)
				close(link)
			}
		}
	}
}

func without(a, b clients) (rest []netip.AddrPort) {
	for c := range a {
		if _, ok := b[c]; !ok {
			rest = append(rest, c)
		}
	}
	return rest
}

// messages say what has opened and closed, in as many parts as it takes.
func (f *flows) messages(w through, opened, closed []netip.AddrPort) iter.Seq[*hameshv1.ShareFlowsRequest] {
	return func(yield func(*hameshv1.ShareFlowsRequest) bool) {
		for len(opened)+len(closed) > 0 {
			m := f.message(w)
			n, k := min(len(opened), flowsChunk), min(len(closed), flowsChunk)
			m.Opened, opened = pack(opened[:n]), opened[n:]
			m.Closed, closed = pack(closed[:k]), closed[k:]
			if !yield(m) {
				return
			}
		}
	}
}

func (f *flows) message(w through) *hameshv1.ShareFlowsRequest {
	return &hameshv1.ShareFlowsRequest{Member: f.self, Boot: f.boot, Vip: w.vip, Port: uint32(w.port)}
}

func pack(all []netip.AddrPort) (b []byte) {
	for _, c := range all {
		b = append(b, c.Addr().AsSlice()...)
		b = binary.BigEndian.AppendUint16(b, c.Port())
	}
	return b
}

// unpack reads addresses as long as the VIP's; a rest that is no client is nobody.
func unpack(b []byte, like netip.Addr) iter.Seq[netip.AddrPort] {
	size := like.BitLen() / 8
	return func(yield func(netip.AddrPort) bool) {
		for ; len(b) >= size+2; b = b[size+2:] {
			addr, _ := netip.AddrFromSlice(b[:size])
			if !yield(netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[size:]))) {
				return
			}
		}
	}
}

// share tells one member of this one's connections until ctx ends: all of them, and then
// each change.
func (f *flows) share(ctx context.Context, mesh func() (hameshv1.MeshServiceClient, bool)) error {
	for ctx.Err() == nil {
		if client, ok := mesh(); ok {
			f.shareOnce(ctx, client)
		}
		select {
		case <-ctx.Done():
		case <-time.After(flowsLook):
		}
	}
	return nil
}

func (f *flows) shareOnce(ctx context.Context, client hameshv1.MeshServiceClient) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.ShareFlows(ctx)
	if err != nil {
		return // the link's own stream tells of that
	}
	all, changes := f.subscribe()
	defer f.unsubscribe(changes)
	for _, m := range all {
		if stream.Send(m) != nil {
			return
		}
	}
	for {
		select {
		case <-stream.Context().Done():
			return
		case m, ok := <-changes:
			if !ok || stream.Send(m) != nil {
				return
			}
		}
	}
}

func (f *flows) subscribe() (all []*hameshv1.ShareFlowsRequest, changes chan *hameshv1.ShareFlowsRequest) {
	changes = make(chan *hameshv1.ShareFlowsRequest, flowsBehind)
	f.mu.Lock()
	mine := maps.Clone(f.mine)
	f.links[changes] = struct{}{}
	f.mu.Unlock()
	for vip := range f.vips {
		for _, port := range f.ports {
			w := through{vip, port}
			anew := f.message(w)
			anew.Anew = true
			all = slices.AppendSeq(append(all, anew), f.messages(w, without(mine[w], nil), nil))
		}
	}
	return all, changes
}

func (f *flows) unsubscribe(changes chan *hameshv1.ShareFlowsRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.links, changes)
}

// hear takes what another member says of its connections.
func (f *flows) hear(member string, m *hameshv1.ShareFlowsRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	vip, ok := f.vips[m.GetVip()]
	w := through{m.GetVip(), uint16(m.GetPort())}
	if !ok || m.GetPort() != uint32(w.port) || !slices.Contains(f.ports, w.port) {
		return
	}
	t := f.theirs[member]
	switch {
	case t == nil || m.GetBoot() > t.boot:
		if t != nil {
			if t.died.IsZero() {
				t.died = time.Now()
			}
			f.past[member] = t // its connections died with it
			poke(f.wake)
		}
		t = &theirFlows{boot: m.GetBoot(), flows: map[through]clients{}, told: map[through]bool{}}
		f.theirs[member] = t
	case m.GetBoot() < t.boot:
		return
	}
	t.died = time.Time{}
	if m.GetAnew() || t.flows[w] == nil {
		t.flows[w] = clients{}
	}
	t.told[w] = false
	for c := range unpack(m.GetClosed(), vip) {
		delete(t.flows[w], c)
	}
	for c := range unpack(m.GetOpened(), vip) {
		if len(t.flows[w]) < flowsMost {
			t.flows[w][c] = struct{}{}
		}
	}
}

// took says that a VIP is on here, and announced, by the hold of that generation. It does
// not block.
func (f *flows) took(vip string, gen uint64) {
	f.takenMu.Lock()
	defer f.takenMu.Unlock()
	if f.taken[vip] != gen {
		f.taken[vip] = gen
		poke(f.wake)
	}
}

// gave says that a VIP is to be on here no longer. It does not block.
func (f *flows) gave(vip string) {
	f.takenMu.Lock()
	defer f.takenMu.Unlock()
	delete(f.taken, vip)
}

// has says by the hold of which generation a VIP is on here, if it is.
func (f *flows) has(vip string) (gen uint64, here bool) {
	f.takenMu.Lock()
	defer f.takenMu.Unlock()
	gen, here = f.taken[vip]
	return gen, here
}

// news is whom to tell of what.
type news struct {
	through
	member  string
	of      *theirFlows
	gen     uint64
	clients []netip.AddrPort
}

// bereaved finds the clients that are to be told: those of dead members, and of earlier
// lives of others, through VIPs that are here.
func (f *flows) bereaved() (all []news) {
	f.mu.Lock()
	defer f.mu.Unlock()
	find := func(member string, t *theirFlows) {
		if time.Since(t.died) > flowsBereaved {
			clear(t.flows)
		}
		for w, c := range t.flows {
			if gen, here := f.has(w.vip); here && !t.told[w] && len(c) > 0 {
				t.told[w] = true
				all = append(all, news{w, member, t, gen, without(c, nil)})
			}
		}
	}
	for member, t := range f.theirs {
		switch {
		case !f.silent(member):
			t.died = time.Time{}
			continue
		case t.died.IsZero():
			t.died = time.Now()
		}
		find(member, t)
	}
	for member, t := range f.past {
		find(member, t)
	}
	return all
}

// notify tells clients, as long as the VIP stays here. Where it went before they were told
// once, they are told when it comes back.
func (f *flows) notify(ctx context.Context, n news) {
	told, gone := false, false
	defer func() {
		if told {
			return
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		n.of.told[n.through] = false
		if gone {
			poke(f.wake) // it may be back already
		}
	}()
	f.log.Info("telling clients that who served them is gone", "vip", n.vip, "peer", n.member, "connections", len(n.clients))
	begun := time.Now()
	for _, at := range tellAt {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(begun.Add(at))):
		}
		if gen, here := f.has(n.vip); !here || gen != n.gen {
			gone = true
			return
		}
		err := f.tell(ctx, netip.AddrPortFrom(f.vips[n.vip], n.port), n.clients)
		told = told || err == nil
		if err != nil && ctx.Err() == nil {
			f.log.Warn("could not tell every client", "vip", n.vip, "peer", n.member, "error", err)
		}
	}
}
