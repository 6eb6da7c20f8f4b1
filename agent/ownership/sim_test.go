package ownership

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// The simulation runs real Machines against a modelled world: true time, clocks that
// drift, a network that delays, loses, reorders and cuts, a store with leases and
// revisions, kernels that put addresses on and off a little late and expire them by
// themselves. It checks after every step what must never be.

const (
	ms       = time.Millisecond
	expiry   = 500 * ms // how often the store sweeps expired leases
	writeOut = time.Second
	probing  = 600 * ms // how long it takes to find out that nobody has an address
)

// world is one run.
type world struct {
	rng    *rand.Rand
	now    time.Duration // true time
	queue  events
	seq    int
	cfg    Config // Self and Boot aside
	nodes  []*node
	cut    map[[2]int]bool          // frames from → to are lost
	lag    map[[2]int]time.Duration // frames from → to take so much longer
	loss   float64
	delay  time.Duration // longest one-way delay
	kernel time.Duration // longest time to put an address on or off
	store  *simStore
	faults faultSet // rules that every machine leaves out
	log    []line   // the conversation, newest last
	keep   bool     // keep the whole conversation
	failed string
	orders uint64 // how many moves were ordered
	// stranger is the link-layer address of somebody outside the mesh who has the VIP.
	stranger string
	// With an external store a minority that has it may take over (by the store) from a
	// majority that has not (by majority); then the wire decides. Excepted, and counted.
	minority map[int64]bool // epochs that came about so
	excepted int
}

// line is one line of the conversation, put together only when somebody reads it.
type line struct {
	at     time.Duration
	format string
	args   []any
}

type timedEvent struct {
	at  time.Duration
	seq int
	run func()
}

// events is a heap, earliest first. Typed, because boxing each event costs a tenth of the
// simulation's time.
type events []timedEvent

func (e events) less(i, j int) bool {
	return e[i].at < e[j].at || (e[i].at == e[j].at && e[i].seq < e[j].seq)
}

func (e *events) push(ev timedEvent) {
	*e = append(*e, ev)
	h := *e
	for i := len(h) - 1; i > 0; {
		up := (i - 1) / 2
		if !h.less(i, up) {
			return
		}
		h[i], h[up] = h[up], h[i]
		i = up
	}
}

func (e *events) pop() timedEvent {
	h := *e
	first, last := h[0], len(h)-1
	h[0], h[last] = h[last], timedEvent{}
	h = h[:last]
	*e = h
	for i := 0; ; {
		down := 2*i + 1
		if down >= last {
			return first
		}
		if down+1 < last && h.less(down+1, down) {
			down++
		}
		if !h.less(down, i) {
			return first
		}
		h[i], h[down] = h[down], h[i]
		i = down
	}
}

// phase says how far a move has come.
func phase(p MoveProgress) string {
	switch p.Phase {
	case Accepted:
		return "accepted"
	case Recorded:
		return "recorded"
	case Released:
		return "released"
	case HeldByTarget:
		return "held by the target"
	case Failed:
		return "failed: " + p.Err.Error()
	}
	return fmt.Sprintf("phase %d", int(p.Phase))
}

// node is one machine: its agent's Machine (nil: not running) and its kernel.
type node struct {
	w        *world
	id       int
	name     string
	rate     float64 // local seconds per true second
	boot     uint64
	m        *Machine
	life     int // counts starts, so that what was meant for an earlier one is dropped
	stalled  time.Duration
	holds    []Hold        // what the machine last wanted
	wake     time.Duration // true time at which the machine wants to be stepped
	waking   time.Duration // when the earliest queued wake comes; 0: none is queued
	kernel   []simAddress
	storeCut bool
	slow     time.Duration // to the store and back, each way, on top
	late     time.Duration // its writes, on top
	starved  bool          // its keep-alives get lost
	lease    int64
	elig     bool
	moveID   uint64 // the newest order it accepted
	moveSent uint64 // the newest write of a move
	moveLost uint64 // moves up to this write were reported as failed
}

// simAddress is one VIP in a node's kernel, with the keeper that takes it off in time.
type simAddress struct {
	on      bool
	gen     uint64
	putting bool          // on its way to be on
	expires time.Duration // true time: the kernel's own lifetime
	until   Instant       // local: the keeper takes it off
	keeping time.Duration // true time of the keeper's earliest queued look; 0: none
}

// newWorld makes a world in which nobody has started yet.
func newWorld(seed uint64, members int, external bool, timing Timing) *world {
	w := &world{
		rng: rand.New(rand.NewPCG(seed, 7)), delay: 2 * ms, kernel: 2 * ms,
		cut: map[[2]int]bool{}, lag: map[[2]int]time.Duration{}, minority: map[int64]bool{},
	}
	w.cfg = Config{Timing: timing, ExternalStore: external, VIPs: []VIP{{Name: "api"}}}
	w.store = &simStore{w: w, external: external, up: true, keys: map[string]Record{}, boots: map[string]uint64{}, leases: map[int64]time.Duration{}, rev: 100}
	for i := range members {
		name := fmt.Sprintf("cp-%d", i+1)
		w.cfg.Members = append(w.cfg.Members, Member{Name: name})
		w.nodes = append(w.nodes, &node{w: w, id: i, name: name, rate: 1 + float64((w.rng.Float64()-0.5)*0.02), kernel: make([]simAddress, 1), elig: true})
	}
	w.store.sweep()
	return w
}

// startAll starts whoever does not run.
func (w *world) startAll() {
	for _, n := range w.nodes {
		if n.m == nil {
			n.start()
		}
	}
}

func (w *world) after(d time.Duration, run func()) {
	w.seq++
	w.queue.push(timedEvent{w.now + d, w.seq, run})
}

// run goes on until true time t or the first breach.
func (w *world) run(t time.Duration) {
	for w.failed == "" && len(w.queue) > 0 && w.queue[0].at <= t {
		e := w.queue.pop()
		w.now = e.at
		e.run()
	}
	if w.failed == "" {
		w.now = t
	}
}

func (w *world) say(format string, args ...any) {
	w.log = append(w.log, line{w.now, format, args})
	if !w.keep && len(w.log) > 400 {
		w.log = append([]line(nil), w.log[200:]...)
	}
}

func (w *world) fail(format string, args ...any) {
	if w.failed == "" {
		w.failed = fmt.Sprintf(format, args...)
		w.say("BREACH: %s", w.failed)
	}
}

func (w *world) conversation() string {
	var b strings.Builder
	for _, l := range w.log {
		fmt.Fprintf(&b, "%9.3fs  %s\n", l.at.Seconds(), fmt.Sprintf(l.format, l.args...))
	}
	return b.String()
}

// transit is a one-way delay.
func (w *world) transit() time.Duration {
	return 50*time.Microsecond + time.Duration(w.rng.Int64N(int64(w.delay)))
}

func (n *node) clock() Instant { return Instant(float64(n.w.now+time.Hour) * n.rate) }

// inTrue is how long a local duration takes in true time.
func (n *node) inTrue(d time.Duration) time.Duration { return time.Duration(float64(d) / n.rate) }

func (n *node) start() {
	n.boot++
	n.life++
	cfg := n.w.cfg
	cfg.Self, cfg.Boot = n.name, n.boot
	for i := range n.kernel { // sweep
		n.kernel[i] = simAddress{}
	}
	n.m, n.stalled, n.lease, n.waking, n.moveSent, n.moveLost = New(cfg, n.clock()), 0, 0, 0, 0, 0
	n.m.faults = n.w.faults
	n.w.say("%s starts, boot %d", n.name, n.boot)
	n.step(Eligibility{Eligible: n.elig})
	n.writeBoot()
}

// powerCut ends the agent, its guard and its kernel's addresses at once.
func (n *node) powerCut() {
	n.die()
	for i := range n.kernel {
		n.kernel[i] = simAddress{}
	}
	n.w.say("%s loses power", n.name)
}

// kill ends the agent alone: its guard takes the addresses off and tells every member.
func (n *node) kill() {
	boot := n.boot
	n.die()
	n.w.say("%s killed", n.name)
	n.w.after(n.w.transit(), func() {
		if n.boot != boot {
			return // a new agent has taken the lock, and sweeps
		}
		n.takeOff("guard takes the address off")
		for _, p := range n.w.nodes {
			n.frame(p, Withdrawn{Member: n.name, Boot: boot, VIPs: []string{"api"}})
		}
	})
}

// killBoth ends agent and guard: the addresses stay until the kernel's lifetime ends them.
func (n *node) killBoth() {
	n.die()
	n.w.say("%s killed, its guard too", n.name)
}

func (n *node) die() {
	n.m = nil
	n.life++
}

func (n *node) takeOff(why string) {
	for i := range n.kernel {
		if n.kernel[i].on {
			n.kernel[i].on = false
			n.w.say("%s: %s", n.name, why)
		}
	}
}

// deliver hands an event to the machine, later if the node is stalled.
func (n *node) deliver(ev Event) {
	if n.m == nil {
		return
	}
	if n.w.now < n.stalled {
		n.w.after(n.stalled-n.w.now, n.inThisLife(func() { n.deliver(ev) }))
		return
	}
	n.step(ev)
}

// inThisLife drops what was meant for an agent that has ended meanwhile.
func (n *node) inThisLife(run func()) func() {
	life := n.life
	return func() {
		if n.life == life {
			run()
		}
	}
}

func (n *node) step(ev Event) {
	now := n.clock()
	out := n.m.Step(now, ev)
	n.holds = out.Holds
	for _, c := range out.Changes {
		n.w.say("%s: %s owner=%s epoch=%d right=%v: %s", n.name, c.VIP, cmp.Or(c.Owner, "nobody"), c.Epoch, c.Right, c.Text)
	}
	for _, p := range out.Moves {
		n.w.say("%s: move to %s: %s", n.name, cmp.Or(p.To, "anybody"), phase(p))
		switch {
		case p.Phase == Accepted:
			n.moveID = p.ID
		case p.Phase == Failed && p.ID == n.moveID:
			n.moveLost = n.moveSent
		}
	}
	for i, h := range out.Holds {
		n.apply(i, h)
		n.checkLabel(h)
	}
	if out.Broadcast != nil {
		var ev Event = HeartbeatReceived{*out.Broadcast}
		for _, p := range n.w.nodes {
			n.frame(p, ev)
		}
	}
	if out.Reply != nil {
		to := ev.(HeartbeatReceived).Heartbeat.Member
		for _, p := range n.w.nodes {
			if p.name == to {
				n.frame(p, HeartbeatReceived{*out.Reply})
			}
		}
	}
	for _, vip := range out.Probes {
		n.w.after(probing, n.inThisLife(func() { n.deliver(Probed{VIP: vip, Stranger: n.w.stranger}) }))
	}
	for _, wr := range out.Writes {
		if wr.Record.Prev == n.name {
			n.moveSent = wr.ID
		}
		n.write(wr)
	}
	if out.Stopped {
		n.die()
		n.takeOff("BUG: stopped while it holds")
		n.w.say("%s stops", n.name)
	} else {
		n.wake = n.w.now + max(0, n.inTrue(out.Wake.Sub(now))) + time.Microsecond
		n.sleep()
	}
	n.w.check()
}

// sleep queues a step for n.wake, unless one comes earlier: that one looks again.
func (n *node) sleep() {
	if n.waking != 0 && n.waking <= n.wake {
		return
	}
	at := n.wake
	n.waking = at
	n.w.after(at-n.w.now, n.inThisLife(func() {
		if n.waking != at {
			return
		}
		n.waking = 0
		if n.w.now < n.wake {
			n.sleep()
			return
		}
		n.deliver(Tick{})
	}))
}

// apply is the effect side of one Hold: put on or off a little later, renew, and a
// keeper of its own that takes it off when the right lapses.
func (n *node) apply(i int, h Hold) {
	a := &n.kernel[i]
	lifetime := n.w.cfg.Timing.LeaseTTL
	if h.On {
		a.until = h.Until
	}
	changed := h.Gen != a.gen
	switch {
	case !changed && h.On && a.on:
		a.expires = n.w.now + lifetime
		n.keep(a)
		return
	case !changed && (!h.On || a.putting):
		return
	}
	// New, or lapsed while the machine was late to find that its right goes on.
	a.gen, a.putting = h.Gen, h.On
	took := 100*time.Microsecond + time.Duration(n.w.rng.Int64N(int64(n.w.kernel)))
	n.w.after(took, n.inThisLife(func() {
		if a.gen != h.Gen {
			return
		}
		a.putting = false
		if h.On && n.clock() >= a.until {
			return // too late: it lapsed in between
		}
		if a.on != h.On {
			n.w.say("%s: kernel %s", n.name, map[bool]string{true: "has the address", false: "has it no more"}[h.On])
		}
		a.on, a.expires = h.On, n.w.now+lifetime
		if h.On {
			n.keep(a)
			n.announce(a, h.Gen)
		}
		n.w.check()
		n.deliver(AddressState{VIP: h.VIP, Held: h.On, Gen: h.Gen})
	}))
}

// announce is heard by every other holder: no fault here cuts the segment itself.
func (n *node) announce(a *simAddress, gen uint64) {
	if !a.on || a.gen != gen {
		return
	}
	for _, p := range n.w.nodes {
		if p != n && p.m != nil && p.kernel[0].on {
			n.w.after(n.w.transit(), p.inThisLife(func() {
				p.deliver(Foreign{VIP: "api", Member: n.name, Announcement: true})
			}))
		}
	}
	n.w.after(time.Second, n.inThisLife(func() { n.announce(a, gen) }))
}

// keep takes the address off within the margin of the deadline, whatever the machine
// does; the kernel does at the end of the lifetime, also when the agent is gone.
func (n *node) keep(a *simAddress) {
	if !a.on {
		return
	}
	at := a.expires
	if a.until < forever {
		late := time.Duration(n.w.rng.Int64N(int64(n.w.cfg.Timing.Margin)))
		at = min(at, n.w.now+max(0, n.inTrue(a.until.Sub(n.clock())+late))+time.Microsecond)
	}
	if a.keeping != 0 && a.keeping <= at {
		return
	}
	a.keeping = at
	n.w.after(at-n.w.now, func() {
		if a.keeping != at {
			return
		}
		a.keeping = 0
		switch {
		case !a.on:
		case n.m != nil && n.clock() >= a.until:
			a.on = false
			n.w.say("%s: keeper takes the address off", n.name)
		case n.w.now >= a.expires:
			a.on = false
			n.w.say("%s: the kernel's lifetime ends", n.name)
		case n.m == nil: // nobody renews it any more
			a.until = forever
			n.keep(a)
		default:
			n.keep(a)
		}
	})
}

// frame carries one event to another node, if the network lets it.
func (n *node) frame(to *node, ev Event) {
	w := n.w
	link := [2]int{n.id, to.id}
	if to == n || w.cut[link] || (w.loss > 0 && w.rng.Float64() < w.loss) {
		return
	}
	w.after(w.transit()+w.lag[link], func() {
		if !w.cut[link] {
			to.deliver(ev)
		}
	})
}

// rightful reports whether the node's right is in force at this very instant.
func (n *node) rightful() bool {
	return n.m != nil && len(n.holds) > 0 && n.holds[0].Right != NoRight && n.clock() < n.holds[0].Until
}

// check is what must be so at every instant.
func (w *world) check() {
	rightful, holding, epoch := 0, 0, int64(0)
	for _, n := range w.nodes {
		if n.rightful() {
			rightful++
			epoch = max(epoch, n.holds[0].Epoch)
		}
		if n.m != nil && n.kernel[0].on {
			holding++
		}
	}
	switch {
	case rightful == 2 && w.minority[epoch]:
		w.excepted++
	case rightful > 1:
		w.fail("two nodes have a right")
	case holding > 1 && len(w.minority) == 0:
		w.fail("two kernels of running agents have the address")
	}
}

// checkLabel checks what status would say: confirmed means that the lease is good.
func (n *node) checkLabel(h Hold) {
	if expires, ok := n.w.store.leases[n.lease]; h.Right == Confirmed && (!ok || n.w.now > expires) {
		n.w.fail("%s is confirmed on a lease that has run out", n.name)
	}
}

// holder is the one node whose kernel has the address and whose right is in force.
func (w *world) holder() *node {
	var found *node
	for _, n := range w.nodes {
		if n.m != nil && n.kernel[0].on {
			if found != nil {
				return nil
			}
			found = n
		}
	}
	if found != nil && !found.rightful() {
		return nil
	}
	return found
}

// simStore is etcd: one linearizable history, leases swept every 500 ms, silent without
// a quorum (embedded) or while it is down.
type simStore struct {
	w        *world
	external bool
	up       bool
	slow     time.Duration // each way, on top
	late     time.Duration // longest delay of a write before its commit, on top
	drop     float64       // requests lost before the commit
	lose     float64       // answers lost after the commit
	rev      int64
	keys     map[string]Record // the fence of each VIP; Gone: no record beside it
	boots    map[string]uint64
	leases   map[int64]time.Duration // true time of expiry
	next     int64
	silent   bool // had no quorum at the last look
}

// serves says whether the store would commit for a client on this node.
func (s *simStore) serves(n *node) bool {
	if !s.up || n.storeCut {
		return false
	}
	if s.external {
		return true
	}
	w, near := s.w, 0
	for _, p := range w.nodes {
		if p.m != nil && w.now >= p.stalled &&
			(p == n || (!w.cut[[2]int{n.id, p.id}] && !w.cut[[2]int{p.id, n.id}])) {
			near++
		}
	}
	return near > len(w.nodes)/2
}

func (s *simStore) sweep() {
	quorum := s.external && s.up
	for _, n := range s.w.nodes {
		quorum = quorum || (n.m != nil && s.serves(n))
	}
	switch {
	case !quorum:
		s.silent = true
	case s.silent: // a new leader renews every lease
		s.silent = false
		for id := range s.leases {
			s.leases[id] = s.w.now + s.w.cfg.Timing.LeaseTTL
		}
	default:
		for id, at := range s.leases {
			if s.w.now >= at {
				delete(s.leases, id)
				for name, r := range s.keys {
					if r.Lease == id && !r.Gone {
						r.Gone = true
						s.keys[name] = r
						s.w.say("store: the lease of %s's record (%s) runs out", name, r.Owner)
					}
				}
			}
		}
	}
	s.w.after(expiry, s.sweep)
}

// ask sends a request to the store; serve runs at the commit, done with its result back
// on the node, or with ok false at the time-out.
func (n *node) ask(timeout, late time.Duration, serve func() any, done func(answer any, ok bool)) {
	w, life, over := n.w, n.life, false
	finish := func(answer any, ok bool) {
		if !over && n.life == life {
			over = true
			done(answer, ok)
		}
	}
	w.after(n.inTrue(timeout), func() { finish(nil, false) })
	w.after(w.transit()+time.Duration(w.rng.Int64N(int64(2*ms)))+w.store.slow+n.slow+late, func() {
		if !w.store.serves(n) || (w.store.drop > 0 && w.rng.Float64() < w.store.drop) {
			return
		}
		answer := serve()
		if w.store.lose > 0 && w.rng.Float64() < w.store.lose {
			return
		}
		w.after(w.transit()+w.store.slow+n.slow, func() {
			if w.store.serves(n) || w.store.external {
				finish(answer, true)
			}
		})
	})
}

func (n *node) writeBoot() {
	boot := n.boot
	n.ask(writeOut, 0, func() any { n.w.store.boots[n.name] = boot; return true }, func(_ any, ok bool) {
		if !ok {
			n.writeBoot()
			return
		}
		n.poll()
		n.keepAlive()
	})
}

func (n *node) poll() {
	life, every := n.life, n.inTrue(n.w.cfg.Timing.StorePoll())
	sent := n.clock()
	n.w.after(every, func() {
		if n.life == life {
			n.poll()
		}
	})
	n.ask(2*every, 0, func() any {
		var all []Record
		for name, r := range n.w.store.keys {
			r.VIP = name
			all = append(all, r)
		}
		return all
	}, func(answer any, ok bool) {
		if ok {
			n.deliver(StoreSnapshot{SentAt: sent, Records: answer.([]Record)})
		}
	})
}

func (n *node) keepAlive() {
	s, life, ttl := n.w.store, n.life, n.w.cfg.Timing.LeaseTTL
	sent, lease := n.clock(), n.lease
	n.w.after(n.inTrue(ttl/6), func() {
		if n.life == life {
			n.keepAlive()
		}
	})
	if n.starved {
		return
	}
	n.ask(ttl/6, 0, func() any {
		if lease == 0 {
			s.next++
			s.leases[s.next] = n.w.now + ttl
			return s.next
		}
		if _, ok := s.leases[lease]; !ok {
			return int64(0)
		}
		s.leases[lease] = n.w.now + ttl
		return lease
	}, func(answer any, ok bool) {
		switch {
		case !ok:
		case answer.(int64) == 0:
			if n.lease == lease {
				n.lease = 0
				n.deliver(LeaseLost{lease})
			}
		case n.lease == 0 || n.lease == answer.(int64):
			n.lease = answer.(int64)
			n.deliver(LeaseRenewed{Lease: n.lease, SentAt: sent})
		}
	})
}

func (n *node) write(wr Write) {
	sent, s, life, late := n.clock(), n.w.store, n.life, n.late
	if s.late > 0 {
		late += time.Duration(n.w.rng.Int64N(int64(s.late)))
	}
	n.ask(writeOut, late, func() any {
		r, exists := s.keys[wr.Record.VIP]
		fits := r.Revision == wr.Compare
		for member, boot := range wr.Boots {
			fits = fits && s.boots[member] == boot
		}
		if _, alive := s.leases[wr.Record.Lease]; !wr.Release && !alive {
			return nil // an error: requested lease not found
		}
		if !fits {
			if !exists {
				r.Gone = true
			}
			return WriteResult{Outcome: Refused, Record: r}
		}
		s.rev++
		next := wr.Record
		next.Revision = s.rev
		if next.Epoch == 0 {
			next.Epoch = s.rev
			if len(wr.Boots) > 0 && len(wr.Boots) <= len(n.w.nodes)/2 {
				n.w.minority[next.Epoch] = true
			}
		}
		next.Gone = wr.Release
		s.keys[wr.Record.VIP] = next
		s.said(r, next)
		if n.life == life && next.Prev == n.name && wr.ID <= n.moveLost {
			n.w.fail("a move that %s reported as failed was carried out", n.name)
		}
		return WriteResult{Outcome: Written, Record: next}
	}, func(answer any, ok bool) {
		r, is := answer.(WriteResult)
		if !ok || !is {
			r = WriteResult{Outcome: Unknown}
		}
		r.ID, r.SentAt = wr.ID, sent
		r.Record.VIP = wr.Record.VIP
		n.deliver(r)
	})
}

const rewrites = "store: %s rewrites its record, r%d to r%d"

// said tells of a committed write, of rewrites in a row only once.
func (s *simStore) said(was, is Record) {
	w := s.w
	switch last := len(w.log) - 1; {
	case was.Owner != is.Owner || was.Epoch != is.Epoch || was.Prev != is.Prev:
		w.say("store: r%d %s owner=%s epoch=%d prev=%s", is.Revision, is.VIP, cmp.Or(is.Owner, "nobody"), is.Epoch, cmp.Or(is.Prev, "settled"))
	case last >= 0 && w.log[last].format == rewrites:
		w.log[last].args[2] = is.Revision
	default:
		w.say(rewrites, is.Owner, is.Revision, is.Revision)
	}
}
