package ownership

import (
	"container/heap"
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
)

// world is one run.
type world struct {
	rng    *rand.Rand
	now    time.Duration // true time
	queue  events
	seq    int
	cfg    Config // Self and Boot aside
	nodes  []*node
	cut    map[[2]int]bool // frames from → to are lost
	loss   float64
	delay  time.Duration // longest one-way delay
	store  *simStore
	log    []string // the conversation, newest last
	keep   bool     // keep the whole conversation
	failed string
	// With an external store a minority that has it may take over (by the store) from a
	// majority that has not (by majority); then the wire decides. Excepted, and counted.
	minority map[int64]bool // epochs that came about so
	excepted int
}

type timedEvent struct {
	at  time.Duration
	seq int
	run func()
}
type events []timedEvent

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || (e[i].at == e[j].at && e[i].seq < e[j].seq)
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(timedEvent)) }
func (e *events) Pop() any     { o := *e; x := o[len(o)-1]; *e = o[:len(o)-1]; return x }

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
	out      Output
	wakeLife int
	kernel   []simAddress
	storeCut bool
	lease    int64
	elig     bool
}

// simAddress is one VIP in a node's kernel, with the keeper that takes it off in time.
type simAddress struct {
	on      bool
	gen     uint64
	expires time.Duration // true time: the kernel's own lifetime
	until   Instant       // local: the keeper takes it off
}

func newWorld(seed uint64, members int, external bool, timing Timing) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 7)), cut: map[[2]int]bool{}, delay: 2 * ms, minority: map[int64]bool{}}
	w.cfg = Config{Timing: timing, ExternalStore: external, VIPs: []VIP{{Name: "api"}}}
	for i := range members {
		w.cfg.Members = append(w.cfg.Members, Member{Name: fmt.Sprintf("cp-%d", i+1)})
	}
	w.store = &simStore{w: w, external: external, up: true, keys: map[string]Record{}, boots: map[string]uint64{}, leases: map[int64]time.Duration{}, rev: 100}
	for i := range members {
		n := &node{w: w, id: i, name: w.cfg.Members[i].Name, rate: 1 + (w.rng.Float64()-0.5)*0.02, kernel: make([]simAddress, 1), elig: true}
		w.nodes = append(w.nodes, n)
		n.start()
	}
	w.store.sweep()
	return w
}

func (w *world) after(d time.Duration, run func()) {
	w.seq++
	heap.Push(&w.queue, timedEvent{w.now + d, w.seq, run})
}

// run goes on until true time t or the first breach.
func (w *world) run(t time.Duration) {
	for w.failed == "" && len(w.queue) > 0 && w.queue[0].at <= t {
		e := heap.Pop(&w.queue).(timedEvent)
		w.now = e.at
		e.run()
	}
	if w.failed == "" {
		w.now = t
	}
}

func (w *world) say(format string, args ...any) {
	line := fmt.Sprintf("%9.3fs  ", w.now.Seconds()) + fmt.Sprintf(format, args...)
	w.log = append(w.log, line)
	if !w.keep && len(w.log) > 400 {
		w.log = append([]string(nil), w.log[200:]...)
	}
}

func (w *world) fail(format string, args ...any) {
	if w.failed == "" {
		w.failed = fmt.Sprintf(format, args...)
		w.say("BREACH: %s", w.failed)
	}
}

func (w *world) conversation() string { return strings.Join(w.log, "\n") }

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
	n.m, n.stalled, n.lease = New(cfg, n.clock()), 0, 0
	n.w.say("%s starts, boot %d", n.name, n.boot)
	n.step(Eligibility{n.elig})
	n.writeBoot()
}

// crash ends the agent; with power the kernel's addresses go too.
func (n *node) crash(power bool) {
	n.m = nil
	n.life++
	if power {
		for i := range n.kernel {
			n.kernel[i] = simAddress{}
		}
	}
	n.w.say("%s crashes (power %v)", n.name, power)
}

// deliver hands an event to the machine, later if the node is stalled.
func (n *node) deliver(ev Event) {
	if n.m == nil {
		return
	}
	if n.w.now < n.stalled {
		life := n.life
		n.w.after(n.stalled-n.w.now, func() {
			if n.life == life {
				n.deliver(ev)
			}
		})
		return
	}
	n.step(ev)
}

func (n *node) step(ev Event) {
	now := n.clock()
	out := n.m.Step(now, ev)
	n.out = out
	life := n.life
	guard := func(run func()) func() {
		return func() {
			if n.life == life {
				run()
			}
		}
	}
	for _, c := range out.Changes {
		n.w.say("%s: %s owner=%s epoch=%d right=%v: %s", n.name, c.VIP, c.Owner, c.Epoch, c.Right, c.Text)
	}
	for i, h := range out.Holds {
		n.apply(i, h, guard)
	}
	if out.Broadcast != nil {
		for _, p := range n.w.nodes {
			n.send(p, *out.Broadcast)
		}
	}
	if out.Reply != nil {
		if hb, ok := ev.(HeartbeatReceived); ok {
			for _, p := range n.w.nodes {
				if p.name == hb.Heartbeat.Member {
					n.send(p, *out.Reply)
				}
			}
		}
	}
	for _, wr := range out.Writes {
		n.write(wr)
	}
	n.wakeLife++
	wl := n.wakeLife
	n.w.after(max(0, n.inTrue(out.Wake.Sub(now)))+time.Microsecond, guard(func() {
		if n.wakeLife == wl {
			n.deliver(Tick{})
		}
	}))
	n.w.check()
}

// apply is the effect side of one Hold: put on or off a little later, renew, and a
// keeper of its own that takes it off when the right lapses.
func (n *node) apply(i int, h Hold, guard func(func()) func()) {
	a := &n.kernel[i]
	lifetime := n.w.cfg.Timing.LeaseTTL
	if h.On {
		a.until = h.Until
	}
	if h.Gen == a.gen {
		if h.On && a.on {
			a.expires = n.w.now + lifetime
			n.keeper(i, h.Gen)
		}
		return
	}
	a.gen = h.Gen
	took := 100*time.Microsecond + time.Duration(n.w.rng.Int64N(int64(2*ms)))
	n.w.after(took, guard(func() {
		if a.gen != h.Gen {
			return
		}
		if h.On && n.clock() >= a.until {
			return // too late: it lapsed in between
		}
		if a.on != h.On {
			n.w.say("%s: kernel %s", n.name, map[bool]string{true: "has the address", false: "has it no more"}[h.On])
		}
		a.on, a.expires = h.On, n.w.now+lifetime
		if h.On {
			n.keeper(i, h.Gen)
		}
		n.w.check()
		n.deliver(AddressState{VIP: h.VIP, Held: h.On, Gen: h.Gen})
	}))
}

// keeper takes the address off within the margin of the deadline, whatever the machine
// does; the kernel does at the end of the lifetime.
func (n *node) keeper(i int, gen uint64) {
	a := &n.kernel[i]
	if a.until < forever {
		late := time.Duration(n.w.rng.Int64N(int64(n.w.cfg.Timing.Margin)))
		n.w.after(max(0, n.inTrue(a.until.Sub(n.clock())+late)), func() {
			if a.on && a.gen == gen && n.m != nil && n.clock() >= a.until {
				a.on = false
				n.w.say("%s: keeper takes the address off", n.name)
			}
		})
	}
	n.w.after(a.expires-n.w.now, func() {
		if a.on && a.gen == gen && n.w.now >= a.expires {
			a.on = false
			n.w.say("%s: the kernel's lifetime ends", n.name)
		}
	})
}

func (n *node) send(to *node, b Heartbeat) {
	w := n.w
	if to == n || w.cut[[2]int{n.id, to.id}] || w.rng.Float64() < w.loss {
		return
	}
	w.after(w.transit(), func() {
		if !w.cut[[2]int{n.id, to.id}] {
			to.deliver(HeartbeatReceived{b})
		}
	})
}

// rightful reports whether the node's right is in force at this very instant.
func (n *node) rightful(i int) bool {
	if n.m == nil || len(n.out.Holds) == 0 {
		return false
	}
	h := n.out.Holds[i]
	return h.Right != NoRight && n.clock() < h.Until
}

// check is what must be so at every instant.
func (w *world) check() {
	var rightful, holding []string
	var epoch int64
	for _, n := range w.nodes {
		if n.rightful(0) {
			rightful = append(rightful, n.name)
			epoch = max(epoch, n.out.Holds[0].Epoch)
		}
		if n.m != nil && n.kernel[0].on {
			holding = append(holding, n.name)
		}
	}
	switch {
	case len(rightful) == 2 && w.minority[epoch]:
		w.excepted++
	case len(rightful) > 1:
		w.fail("two nodes have a right: %v", rightful)
	case len(holding) > 1 && len(w.minority) == 0:
		w.fail("two kernels of running agents have the address: %v", holding)
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
	if found != nil && !found.rightful(0) {
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
	slow     time.Duration
	lose     float64 // answers lost after the commit
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
func (n *node) ask(timeout time.Duration, serve func() any, done func(answer any, ok bool)) {
	w, life, over := n.w, n.life, false
	finish := func(answer any, ok bool) {
		if !over && n.life == life {
			over = true
			done(answer, ok)
		}
	}
	w.after(n.inTrue(timeout), func() { finish(nil, false) })
	w.after(w.transit()+time.Duration(w.rng.Int64N(int64(2*ms)))+w.store.slow, func() {
		if !w.store.serves(n) {
			return
		}
		answer := serve()
		if w.rng.Float64() < w.store.lose {
			return
		}
		w.after(w.transit()+w.store.slow, func() {
			if w.store.serves(n) || w.store.external {
				finish(answer, true)
			}
		})
	})
}

func (n *node) writeBoot() {
	boot := n.boot
	n.ask(writeOut, func() any { n.w.store.boots[n.name] = boot; return true }, func(_ any, ok bool) {
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
	n.ask(2*every, func() any {
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
	n.ask(ttl/6, func() any {
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
	sent, s := n.clock(), n.w.store
	n.ask(writeOut, func() any {
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
