package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/handover"
	"github.com/hamesh/hamesh/agent/peer"
	"github.com/hamesh/hamesh/agent/proxy"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// flowsPace is the least time between two accounts of connections that come: a busy
	// proxy accepts dozens in it. The first one after a pause is told at once.
	flowsPace = 2 * time.Millisecond
	// flowsIdle is how long it may take until others hear that a connection has gone, where
	// none comes. One that is told of in vain costs two packets.
	flowsIdle = 500 * time.Millisecond
	// flowsMost bounds what a member keeps of another one's proxy and VIP: more than a proxy
	// has descriptors for, see shareFiles.
	flowsMost = 1 << 20
	// flowsChunk is how many clients one message names at most.
	flowsChunk = 4096
	// flowsAgain is the pause before a stream that broke is opened again.
	flowsAgain = 20 * time.Millisecond
	// flowsAsk bounds asking another member for a third one's connections.
	flowsAsk = 2 * time.Second
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
	self string
	boot uint64
	vips map[string]netip.Addr
	// take returns which connections of a proxy have come and gone, and what to call when
	// the others have been told; nil: nothing.
	take map[uint16]func() ([]proxy.Flow, func())
	// serves says whether a member may be serving connections by a VIP: it has the address,
	// or keeps what it had when it gave the VIP away, by its newest word, and is heard.
	serves func(member, vip string) bool
	keeps  func(vip string) bool // this node serves what it had when it gave the VIP away
	// unheard says whether a member had not been heard for a while when it was given up.
	unheard func(member string) bool
	peers   map[string]*peer.Link // to every other member
	tell    func(ctx context.Context, vip netip.AddrPort, clients []netip.AddrPort) error
	ports   []uint16
	log     hclog.Logger

	news chan struct{} // one token: connections have come
	// asked is the generation of each VIP's hold for which the others were asked; notifier's
	// own.
	asked map[string]uint64
	wake  chan struct{} // one token: somebody may have to be told

	mu     sync.Mutex
	mine   map[through]map[netip.AddrPort]uint64 // to the connection's number
	theirs map[string]*theirFlows                // by member
	past   map[string]*theirFlows                // those of the boot before
	// lost are this member's connections that ended while it had no address to tell their
	// clients from. The others are not told of their end until the clients are.
	lost  *theirFlows
	links map[*flowLink]struct{}

	// Of its own, and held for moments: the keeper takes it before it takes an address off.
	takenMu sync.Mutex
	taken   map[string]hold
}

// hold is how a VIP is on here, or last was.
type hold struct {
	on              bool
	gen             uint64 // generation of the hold by which this node has it
	putOn, takenOff time.Time
}

// flowLink is what one other member has not been told yet.
type flowLink struct {
	// pending are the changes of each client: whether it is connected. The first time it is
	// everything, see anew.
	pending map[through]map[netip.AddrPort]bool
	anew    bool     // what was told before is void
	told    []func() // to be called when it has been told

	send   func(*hameshv1.ShareFlowsRequest) error
	live   bool // it has been told everything once, and from then on each change at once
	broken context.CancelFunc
}

type theirFlows struct {
	boot  uint64
	flows map[through]clients
	ended map[through]time.Time // when it was noticed to serve them no more
	// told: their clients know, or are being told.
	told map[through]bool
}

func newTheirFlows(boot uint64) *theirFlows {
	return &theirFlows{boot: boot, flows: map[through]clients{}, ended: map[through]time.Time{}, told: map[through]bool{}}
}

func newFlows(self string, boot uint64, vips map[string]netip.Addr, ports []uint16, log hclog.Logger) *flows {
	return &flows{
		self: self, boot: boot, vips: vips, ports: ports, log: log, tell: handover.Tickle,
		mine: map[through]map[netip.AddrPort]uint64{}, theirs: map[string]*theirFlows{}, past: map[string]*theirFlows{}, taken: map[string]hold{}, lost: newTheirFlows(boot),
		links: map[*flowLink]struct{}{}, wake: make(chan struct{}, 1), news: make(chan struct{}, 1),
		take: map[uint16]func() ([]proxy.Flow, func()){}, asked: map[string]uint64{},
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
	for _, s := range a.services {
		f.take[s.cfg.Port] = s.proxy.TakeFlows
	}
	f.serves = a.board.serves
	f.peers = a.links // made later, see openMesh
	f.unheard = func(member string) bool { return a.board.unheard(member, 2*a.cfg.Timing.SuspectAfter) }
	f.keeps = func(vip string) bool {
		keeps, _, _ := a.handing.keeps(vip)
		return keeps
	}
	a.flows = f
}

// watchFlows has the proxies say which connections come by the VIPs, and hold back new ones
// until the other members know of them. Where there are none, nobody is told.
func (a *Agent) watchFlows() {
	if len(a.links) == 0 {
		return
	}
	f := a.flows
	vips := slices.Collect(maps.Values(f.vips))
	mark := a.handing.holdBack()
	for _, s := range a.services {
		s.proxy.WatchFlows(proxy.FlowWatch{
			Local: func(addr netip.Addr) bool { return slices.Contains(vips, addr) },
			News:  func() { poke(f.news) },
			Mark:  mark,
		})
	}
}

// run tells the others of this node's connections, and the clients of the dead, until ctx ends.
func (f *flows) run(ctx context.Context) error {
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { f.notifier(ctx, &group) })
	tick := time.NewTicker(flowsIdle)
	defer tick.Stop()
	pace := time.NewTimer(0)
	defer pace.Stop()
	var paused time.Time // until when those that have come wait for more
	for {
		news := f.news
		if time.Until(paused) > 0 {
			news = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-pace.C:
		case <-news:
			f.account()
			paused = time.Now().Add(flowsPace)
			pace.Reset(flowsPace)
		case <-tick.C:
			f.account()
		}
	}
}

// notifier tells clients that nobody serves their connections any more, until ctx ends.
func (f *flows) notifier(ctx context.Context, group *sync.WaitGroup) {
	forget := time.NewTicker(flowsBereaved)
	defer forget.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		case <-forget.C:
		}
		f.recall(ctx, group)
		for _, n := range f.bereaved() {
			group.Go(func() { f.notify(ctx, n) })
		}
	}
}

// account takes what has come and gone, and tells it.
func (f *flows) account() {
	for port, take := range f.take {
		all, told := take()
		if len(all) > 0 {
			f.changed(port, all, told)
		}
	}
	f.mu.Lock()
	var live []*flowLink
	for l := range f.links {
		if l.live {
			live = append(live, l)
		}
	}
	f.mu.Unlock()
	// Here, one after the other, and not by a goroutine of each link: at 50 connections a
	// second it is waking those up that costs. None waits: what is under way fits into a
	// connection's buffers, and one on which nothing gets through ends within a second.
	for _, l := range live {
		f.flush(l)
	}
}

// changed notes what has come and gone, and is to be told; told is called when it has been.
func (f *flows) changed(port uint16, all []proxy.Flow, told func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range all {
		w := through{f.vipAt(c.Local), port}
		if f.mine[w] == nil {
			f.mine[w] = map[netip.AddrPort]uint64{}
		}
		switch {
		case f.mine[w][c.Client] > c.ID:
			continue // the client's next connection was told of before
		case c.Open:
			f.mine[w][c.Client] = c.ID
			delete(f.lost.flows[w], c.Client)
		default:
			delete(f.mine[w], c.Client)
			if f.untellable(w.vip, c.At) {
				f.lose(w, c.Client)
				continue
			}
		}
		for l := range f.links {
			l.note(w, c.Client, c.Open)
		}
	}
	if told != nil && len(f.links) == 0 {
		told()
		return
	}
	if told != nil {
		told = lastOf(len(f.links), told)
	}
	for l := range f.links {
		if told != nil {
			l.told = append(l.told, told)
		}
	}
}

// lose notes a client that has to be told that its connection has gone; f.mu is held.
func (f *flows) lose(w through, client netip.AddrPort) {
	if len(f.lost.flows[w]) == 0 {
		f.lost.flows[w] = clients{}
		delete(f.lost.ended, w) // it begins now
	}
	f.lost.flows[w][client] = struct{}{}
	f.lost.told[w] = false
	poke(f.wake)
}

// found ends that for clients that have been told; f.mu is held.
func (f *flows) found(w through, all iter.Seq[netip.AddrPort]) {
	for c := range all {
		if _, lost := f.lost.flows[w][c]; !lost {
			continue // it is connected anew
		}
		delete(f.lost.flows[w], c)
		for l := range f.links {
			l.note(w, c, false)
		}
	}
}

// lastOf returns a function that calls f when it is called for the n-th time.
func lastOf(n int, f func()) func() {
	var left atomic.Int64
	left.Store(int64(n))
	return func() {
		if left.Add(-1) == 0 {
			f()
		}
	}
}

func (f *flows) vipAt(addr netip.Addr) string {
	for vip, a := range f.vips {
		if a == addr {
			return vip
		}
	}
	return ""
}

func (l *flowLink) note(w through, client netip.AddrPort, open bool) {
	if l.pending[w] == nil {
		l.pending[w] = map[netip.AddrPort]bool{}
	}
	l.pending[w][client] = open
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
func (f *flows) share(ctx context.Context, link *peer.Link) error {
	for {
		client, ok := link.AwaitMesh(ctx)
		if !ok {
			return nil
		}
		f.shareOnce(ctx, client)
		select {
		case <-ctx.Done():
		case <-time.After(flowsAgain):
		}
	}
}

func (f *flows) shareOnce(ctx context.Context, client hameshv1.MeshServiceClient) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.ShareFlows(ctx)
	if err != nil {
		return // the link's own stream tells of that
	}
	link := f.subscribe()
	link.send, link.broken = stream.Send, cancel
	defer f.unsubscribe(link)
	for f.flush(link) { // all that came while it was told the rest
		if f.goLive(link) {
			<-stream.Context().Done()
			return
		}
	}
}

// goLive has a link told of each change at once from now on, if it knows all that is so now.
func (f *flows) goLive(l *flowLink) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l.live = len(l.pending) == 0 && len(l.told) == 0
	return l.live
}

// flush tells a member what it has not been told yet; false: its stream is broken.
func (f *flows) flush(l *flowLink) bool {
	messages, told := f.untold(l)
	defer func() {
		for _, t := range told {
			t() // also where nobody is told by this link any more: the others go on
		}
	}()
	for _, m := range messages {
		if l.send(m) != nil {
			l.broken()
			return false
		}
	}
	return true
}

// subscribe returns what is to be told to another member: everything at first.
func (f *flows) subscribe() *flowLink {
	l := &flowLink{pending: map[through]map[netip.AddrPort]bool{}, anew: true}
	f.mu.Lock()
	defer f.mu.Unlock()
	for w, all := range f.mine {
		for c := range all {
			l.note(w, c, true)
		}
	}
	for w, all := range f.lost.flows {
		for c := range all {
			l.note(w, c, true)
		}
	}
	f.links[l] = struct{}{}
	return l
}

func (f *flows) unsubscribe(l *flowLink) {
	f.mu.Lock()
	told := l.told
	l.told = nil
	delete(f.links, l)
	f.mu.Unlock()
	for _, t := range told {
		t()
	}
}

// untold takes what a member has not been told yet, as messages, and what to call when they
// have been sent.
func (f *flows) untold(l *flowLink) (all []*hameshv1.ShareFlowsRequest, told []func()) {
	f.mu.Lock()
	pending, anew := l.pending, l.anew
	told = l.told
	l.pending, l.anew, l.told = map[through]map[netip.AddrPort]bool{}, false, nil
	f.mu.Unlock()
	if anew {
		for vip := range f.vips {
			for _, port := range f.ports {
				m := f.message(through{vip, port})
				m.Anew = true
				all = append(all, m)
			}
		}
	}
	for w, changes := range pending {
		var opened, closed []netip.AddrPort
		for c, open := range changes {
			if open {
				opened = append(opened, c)
			} else {
				closed = append(closed, c)
			}
		}
		all = slices.AppendSeq(all, f.messages(w, opened, closed))
	}
	return all, told
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
			f.past[member] = t // its connections died with it
			poke(f.wake)
		}
		t = newTheirFlows(m.GetBoot())
		f.theirs[member] = t
	case m.GetBoot() < t.boot:
		return
	}
	if m.GetAnew() || t.flows[w] == nil {
		t.flows[w] = clients{}
	}
	t.told[w] = false
	delete(t.ended, w)
	if len(m.GetOpened()) > 0 && !f.serves(member, w.vip) {
		poke(f.wake) // it tells of them late
	}
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
	if h := f.taken[vip]; !h.on || h.gen != gen {
		if !h.on {
			h.putOn = time.Now()
		}
		h.on, h.gen = true, gen
		f.taken[vip] = h
		poke(f.wake)
	}
}

// gave says that a VIP is to be on here no longer. It does not block.
func (f *flows) gave(vip string) {
	f.takenMu.Lock()
	defer f.takenMu.Unlock()
	h := f.taken[vip]
	h.on, h.takenOff = false, time.Now()
	f.taken[vip] = h
}

// has says by the hold of which generation a VIP is on here, if it is.
func (f *flows) has(vip string) (gen uint64, here bool) {
	f.takenMu.Lock()
	defer f.takenMu.Unlock()
	return f.taken[vip].gen, f.taken[vip].on
}

// untellable says whether the client of a connection that ended at that time could not be told
// so: the VIP was off here, and connections were not kept.
func (f *flows) untellable(vip string, at time.Time) bool {
	f.takenMu.Lock()
	h := f.taken[vip]
	f.takenMu.Unlock()
	return !h.takenOff.IsZero() && !at.Before(h.takenOff) && (!h.on || at.Before(h.putOn)) && !f.keeps(vip)
}

// news is whom to tell of what.
type news struct {
	through
	member  string
	of      *theirFlows
	gen     uint64
	clients []netip.AddrPort
}

// recalled is what a member has said of its connections.
func (f *flows) recalled(member string) (all []*hameshv1.ShareFlowsRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.theirs[member]
	if t == nil {
		return nil
	}
	for w, c := range t.flows {
		for m := range f.messages(w, slices.Collect(maps.Keys(c)), nil) {
			m.Member, m.Boot = member, t.boot
			all = append(all, m)
		}
	}
	return all
}

// recall asks the other members for the connections of those that this one does not hear, and
// did not before either: it was not told of the last ones. It does so once for each time that
// a VIP comes here.
func (f *flows) recall(ctx context.Context, group *sync.WaitGroup) {
	for vip := range f.vips {
		gen, here := f.has(vip)
		if !here || f.asked[vip] == gen {
			continue
		}
		f.asked[vip] = gen
		for member := range f.peers {
			if !f.unheard(member) {
				continue
			}
			for other, link := range f.peers {
				if other != member {
					group.Go(func() { f.ask(ctx, link, member) })
				}
			}
		}
	}
}

func (f *flows) ask(ctx context.Context, link *peer.Link, member string) {
	ctx, cancel := context.WithTimeout(ctx, flowsAsk)
	defer cancel()
	client, ok := link.AwaitMesh(ctx)
	if !ok {
		return
	}
	stream, err := client.RecallFlows(ctx, &hameshv1.RecallFlowsRequest{Member: member})
	for err == nil {
		var said *hameshv1.RecallFlowsResponse
		if said, err = stream.Recv(); err == nil {
			f.hear(member, said.GetFlows())
		}
	}
	if !errors.Is(err, io.EOF) {
		f.log.Debug("could not ask for the connections of a member that is not heard", "peer", member, "asked", link.String(), "error", err)
	}
	poke(f.wake)
}

// bereaved finds the clients that are to be told: those of members, and of earlier lives of
// others, that serve nobody through a VIP that is here.
func (f *flows) bereaved() (all []news) {
	f.mu.Lock()
	defer f.mu.Unlock()
	find := func(member string, t *theirFlows, serves func(member, vip string) bool) {
		for w, c := range t.flows {
			if serves(member, w.vip) {
				delete(t.ended, w)
				continue
			}
			if t.ended[w].IsZero() {
				t.ended[w] = time.Now()
			}
			switch {
			case time.Since(t.ended[w]) <= flowsBereaved:
			case t == f.lost:
				f.found(w, maps.Keys(maps.Clone(c)))
			default:
				clear(c)
			}
			if gen, here := f.has(w.vip); here && !t.told[w] && len(c) > 0 {
				t.told[w] = true
				all = append(all, news{w, member, t, gen, slices.Collect(maps.Keys(c))})
			}
		}
	}
	for member, t := range f.theirs {
		find(member, t, f.serves)
	}
	never := func(string, string) bool { return false }
	for member, t := range f.past {
		find(member, t, never)
	}
	find(f.self, f.lost, never)
	return all
}

// notify tells clients, as long as the VIP stays here. Where it went before they were told
// once, they are told when it comes back.
func (f *flows) notify(ctx context.Context, n news) {
	told, gone := false, false
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		switch {
		case !told:
		case n.of == f.lost:
			f.found(n.through, slices.Values(n.clients))
			return
		default:
			return
		}
		n.of.told[n.through] = false
		if gone {
			poke(f.wake) // it may be back already
		}
	}()
	f.log.Info("telling clients that their connections are gone", "vip", n.vip, "served by", n.member, "connections", len(n.clients))
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
