package agent

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/handover"
	"github.com/hamesh/hamesh/agent/ownership"
)

const (
	// drainFor is how long connections of a VIP that has moved away are kept at most.
	drainFor = 15 * time.Minute
	// drainLook is how often the connections that are left are counted, which costs
	// milliseconds where there are thousands; chainLook how often the chain is looked at.
	drainLook = time.Second
	chainLook = 50 * time.Millisecond
	// chainMin is how long after a change of the owner forwards stay what they are: by then
	// the segment has learned where the address is, and the giver's heartbeats say that it
	// keeps connections.
	chainMin = 250 * time.Millisecond
	// drainMin is how long a drain lasts at least: connections that were being made when
	// the VIP moved, and news of the drain in heartbeats, have arrived by then.
	drainMin = time.Second
)

// drainer is what handing needs of package handover.
type drainer interface {
	Keep(netip.Addr) error
	Unkeep(netip.Addr) error
	Forward(addr netip.Addr, ports []uint16, to netip.Addr) error
	Unforward(netip.Addr) error
	HoldBack(ports []uint16) error
	EndHoldBack() error
	Established(addr netip.Addr, port uint16) (int, error)
	Reset(netip.Addr) (int, error)
}

// handing keeps established connections across planned moves: the giver goes on serving
// its own, the taker sends it their packets. Whatever fails here costs connections, never
// the move.
//
// After several moves the nodes that still serve connections form a chain: the owner
// forwards what it does not know to the last giver, that one to the giver before it, and
// so on. A member leaves the chain when it becomes the owner, has no connection left or
// dies; whoever forwarded to it then forwards to the one behind it. While they do not all
// know that yet, packets may go round, sixteen times at most; that costs a retransmission,
// where a gap in the chain would cost the connection.
type handing struct {
	self string
	// patience bounds what stands between the decision to take an address off and doing it,
	// half of S: rather lose connections than hold up the withdrawal.
	patience time.Duration
	kernel   drainer // nil: this kernel cannot, moves reset connections
	ports    []uint16
	address  func(vip string) netip.Addr
	// target is where a member takes packets of connections that it keeps; not valid: nowhere.
	target func(vip, member string) netip.Addr
	// arrival is where this node does, if others cannot know that; not valid: they can.
	arrival func(vip string) netip.Addr
	// peer says whether another member serves connections of the VIP that it gave away,
	// and whom it forwards others to, or did before it became the owner.
	peer func(name, vip string) (keeps bool, next string)
	// left is whom the owner before this node forwarded to at last; empty: nobody.
	left func(vip string) string
	log  hclog.Logger

	vips map[string]*handed // every VIP; the map itself never changes
	// count and chain tick while something is kept, or forwarded.
	count, chain *time.Ticker

	mu sync.Mutex // held while the kernel is asked
}

// handed is one VIP's drains.
type handed struct {
	gen       uint64    // of the hold with which it was last given away
	keptSince time.Time // zero: nothing is kept here
	// told is how many connections were kept when last counted, for heartbeats; -1: none
	// are kept. It is read by the ownership loop, which must not wait for mu.
	told     atomic.Int64
	from     string                 // member to which unknown packets are forwarded; empty: none
	target   netip.Addr             // that member's
	toldFrom atomic.Pointer[string] // from, for heartbeats
	arrival  atomic.Pointer[[]byte] // where this node takes what is forwarded, for heartbeats
	owner    string                 // when the chain was last looked at
	// since is when from or the owner last changed.
	since time.Time
}

// behind follows the chain from a member to the first one that serves connections and is
// neither the owner nor this node; empty: there is none.
func (h *handing) behind(vip, member, owner string) string {
	seen := map[string]bool{"": true, h.self: true}
	for !seen[member] {
		seen[member] = true
		keeps, next := h.peer(member, vip)
		if keeps && member != owner {
			return member
		}
		member = next
	}
	return ""
}

// forward sends unknown packets to a member from now on; to nobody if it is empty.
func (h *handing) forward(vip string, v *handed, to string) {
	if to != v.from {
		h.forwardTo(vip, v, to, h.target(vip, to))
	}
}

// forwardTo does so where the member's address is known already.
func (h *handing) forwardTo(vip string, v *handed, to string, target netip.Addr) {
	var err error
	switch {
	case to == "":
		err = h.kernel.Unforward(h.address(vip))
	case !target.IsValid():
		err = errors.New("that member has no address of its own of the VIP's IP version on the VIP's interface")
	default:
		err = h.kernel.Forward(h.address(vip), h.ports, target)
	}
	if err != nil {
		h.log.Warn("could not change where unknown connections go", "vip", vip, "peer", to, "error", err)
		return
	}
	v.from, v.target, v.since = to, target, time.Now()
	v.toldFrom.Store(&to)
	if to != "" {
		h.chain.Reset(chainLook)
	}
}

// within runs f while nobody else changes anything, and returns when it is done, or when
// it takes too long: then f goes on by itself.
func (h *handing) within(vip string, f func(v *handed)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.mu.Lock()
		defer h.mu.Unlock()
		f(h.vips[vip])
	}()
	select {
	case <-done:
	case <-time.After(h.patience):
		h.log.Warn("keeping connections takes too long; the address goes first", "vip", vip)
	}
}

// give prepares for the address to be taken off because it goes to another member.
func (h *handing) give(hold ownership.Hold) {
	if h.kernel == nil || !hold.Planned {
		return
	}
	// Where this node forwards to the taker, it goes on to for a moment; see lookChain.
	h.within(hold.VIP, func(v *handed) {
		v.gen = hold.Gen
		if err := h.kernel.Keep(h.address(hold.VIP)); err != nil {
			h.log.Warn("connections will not survive this move", "vip", hold.VIP, "error", err)
			return
		}
		v.keptSince = time.Now()
		v.told.Store(0)
		h.lookArrival(hold.VIP, v)
		h.count.Reset(drainLook)
	})
}

// take prepares for the address to be put on. Taken from a member that has died, what is
// unknown here goes on to whoever that one forwarded to, or this node did: clients of the dead
// are reset there. Where nobody keeps connections, they are reset here.
func (h *handing) take(hold ownership.Hold) {
	if h.kernel == nil {
		return
	}
	h.within(hold.VIP, func(v *handed) {
		from := hold.Peer
		if from == "" {
			from = h.behind(hold.VIP, h.left(hold.VIP), h.self)
		}
		if from == "" {
			from = h.behind(hold.VIP, v.from, h.self)
		}
		h.forward(hold.VIP, v, from)
		h.lookArrival(hold.VIP, v)
	})
}

// held ends what was kept of an address that is back on its interface.
func (h *handing) held(hold ownership.Hold) {
	if h.kernel == nil || h.vips[hold.VIP].told.Load() < 0 {
		return
	}
	h.within(hold.VIP, func(v *handed) {
		if hold.Gen > v.gen { // else it has been given away since
			h.unkeep(hold.VIP, v)
		}
	})
}

func (h *handing) unkeep(vip string, v *handed) {
	if v.keptSince.IsZero() {
		return
	}
	if err := h.kernel.Unkeep(h.address(vip)); err != nil {
		h.log.Warn("could not end a drain", "vip", vip, "error", err)
		return // tried again
	}
	v.keptSince = time.Time{}
	v.told.Store(-1)
}

// keeps says whether connections of a VIP that moved away are still served here, how many
// when they were last counted, and where unknown ones go. It does not block.
func (h *handing) keeps(vip string) (keeps bool, n int, forwardsTo string) {
	told := h.vips[vip].told.Load()
	return told >= 0, int(max(told, 0)), *h.vips[vip].toldFrom.Load()
}

// run ends drains that are over, until ctx ends.
func (h *handing) run(ctx context.Context, owner func(vip string) string) error {
	if h.kernel == nil {
		return nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.count.C:
			h.each(func(vip string, v *handed) {
				h.lookArrival(vip, v) // for those who have to forward here while it is kept
				if !v.keptSince.IsZero() {
					h.lookKept(vip, v)
				}
			})
		case <-h.chain.C:
			h.each(func(vip string, v *handed) {
				h.lookChain(vip, v, owner(vip))
			})
		}
	}
}

// each looks at every VIP, and ends the looking that no VIP needs any more.
func (h *handing) each(look func(vip string, v *handed)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	kept, forwarded := false, false
	for vip, v := range h.vips {
		look(vip, v)
		kept = kept || !v.keptSince.IsZero()
		forwarded = forwarded || v.from != ""
	}
	if !kept {
		h.count.Stop()
	}
	if !forwarded {
		h.chain.Stop()
	}
}

// lookChain leaves out of the chain who is in it no longer. A new owner, which nobody has
// to forward to, is known to be that before it has the address: until the segment sends
// there, who forwarded to it goes on to.
func (h *handing) lookChain(vip string, v *handed, owner string) {
	if owner != v.owner {
		v.owner, v.since = owner, time.Now()
	}
	if v.from != "" && time.Since(v.since) >= chainMin {
		h.forward(vip, v, h.behind(vip, v.from, owner))
	}
}

func (h *handing) lookKept(vip string, v *handed) {
	addr := h.address(vip)
	n := 0
	for _, port := range h.ports {
		found, err := h.kernel.Established(addr, port)
		if err != nil {
			h.log.Debug("could not count the connections that are left", "vip", vip, "error", err)
			n = 1 // at least until the deadline
			break
		}
		n += found
	}
	v.told.Store(int64(n))
	switch age := time.Since(v.keptSince); {
	case age < drainMin:
	case n == 0:
		h.log.Info("every connection of a moved VIP has ended", "vip", vip)
		h.unkeep(vip, v)
	case age > drainFor:
		if reset, err := h.kernel.Reset(addr); err != nil {
			h.log.Warn("could not reset what is left of a drain", "vip", vip, "error", err)
		} else {
			h.log.Info("drain deadline: reset what was left", "vip", vip, "connections", reset)
		}
		h.unkeep(vip, v)
	}
}

// died leaves out a member that has fallen silent: its connections are dead, and a reset
// tells their clients so at their next packet.
func (h *handing) died(member string, owner func(vip string) string) {
	if h.kernel == nil {
		return
	}
	h.each(func(vip string, v *handed) {
		if v.from == member {
			h.forward(vip, v, h.behind(vip, member, owner(vip)))
		}
	})
}

// resume goes on with what another agent did for a VIP.
func (h *handing) resume(vip string, d drain) {
	v := h.vips[vip]
	if h.kernel == nil || v == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	v.owner = d.Owner
	if d.Kept {
		v.keptSince = time.Now().Add(-d.Age)
		v.told.Store(d.Count)
		if err := h.kernel.Keep(h.address(vip)); err != nil { // it does already; the kernel's part is known anew
			h.log.Warn("connections that were kept may break", "vip", vip, "error", err)
		}
	}
	if d.Forwards != "" {
		if !d.Target.IsValid() { // an older agent's word
			d.Target = h.target(vip, d.Forwards)
		}
		h.forwardTo(vip, v, d.Forwards, d.Target)
		if v.from == "" { // else the kernel would go on with what nobody knows of
			h.forwardTo(vip, v, "", netip.Addr{})
		}
	}
	v.since = time.Now().Add(trustWithin) // the members of the chain have to be heard first
}

// holdBack has the kernel acknowledge nothing on new connections through VIPs until their mark
// is taken off, and returns that mark; 0: it cannot.
func (h *handing) holdBack() uint32 {
	if h.kernel == nil {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.kernel.HoldBack(h.ports); err != nil {
		h.log.Warn("new connections are acknowledged before the other members know of them", "error", err)
		return 0
	}
	return handover.HeldMark
}

// endHoldBack ends that.
func (h *handing) endHoldBack() {
	if h.kernel == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.kernel.EndHoldBack(); err != nil {
		h.log.Warn("could not end holding acknowledgements back", "error", err)
	}
}

// openHanding connects to the kernel and sweeps, unless another agent's work goes on; a
// kernel that cannot do it is no error.
func (a *Agent) openHanding() {
	h := &handing{
		self: a.cfg.Node.Name, patience: a.cfg.Timing.SuspectAfter / 2, log: a.log.Named("handover"), vips: map[string]*handed{},
		address: func(vip string) netip.Addr { return a.vip(vip).Address },
		target:  a.forwardTarget, arrival: a.arrival, peer: a.keptBy, left: a.leftBehind,
		count: time.NewTicker(drainLook), chain: time.NewTicker(chainLook),
	}
	for _, v := range a.cfg.VIPs {
		h.vips[v.Name] = &handed{}
		h.vips[v.Name].told.Store(-1)
		h.vips[v.Name].toldFrom.Store(new(string))
		h.lookArrival(v.Name, h.vips[v.Name])
	}
	a.handing = h
	for _, p := range a.cfg.Proxies {
		h.ports = append(h.ports, p.Port)
	}
	if len(a.managed) == 0 || len(h.ports) == 0 {
		return
	}
	config := handover.Config{Log: h.log}
	for _, m := range a.managed {
		config.Managed = append(config.Managed, handover.Address{VIP: m.VIP, Addr: m.Addr, Interface: m.Interface})
	}
	k, err := handover.Open(config)
	if err == nil && a.owns {
		err = k.Sweep()
	}
	if err != nil {
		h.log.Warn("moves of VIPs will reset established connections", "error", err)
		return
	}
	h.kernel = k
	a.closers = append(a.closers, func() {
		if a.owns {
			if err := k.Sweep(); err != nil {
				h.log.Warn("could not sweep", "error", err)
			}
		}
		k.Close()
	})
}

// keptBy says whether a member serves connections of a VIP that it gave away, and whom it
// forwarded others to when it last was not the holder. A dead one serves none.
func (a *Agent) keptBy(name, vip string) (keeps bool, next string) {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	for _, v := range a.board.peers[name].GetVips() {
		if v.GetName() == vip {
			keeps = v.GetKeeps() && !a.board.silent[name]
		}
	}
	return keeps, a.board.next[name+"/"+vip]
}

// leftBehind is whom the member that owned a VIP before this agent, or still does, forwarded
// unknown connections to when it was last heard.
func (a *Agent) leftBehind(vip string) string {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	before := a.board.owners[vip].owner
	if before == a.cfg.Node.Name {
		before = a.board.owners[vip].before
	}
	for _, v := range a.board.peers[before].GetVips() {
		if v.GetName() == vip {
			return v.GetForwardsTo()
		}
	}
	return ""
}

// ownerOf is the owner of a VIP as this agent last knew it.
func (a *Agent) ownerOf(vip string) string {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	return a.board.owners[vip].owner
}
