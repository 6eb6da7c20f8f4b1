package ownership

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// forever is later than any instant that occurs.
const forever = Instant(math.MaxInt64 / 2)

// sentRing is how many broadcasts are remembered for their acks: at one per change and
// one per heartbeat interval that is many hold windows.
const sentRing = 256

// reorderWindow is how far behind the newest heartbeat of a peer an older one may
// arrive and still be answered. Heartbeats and acks of one member travel on different
// streams, so neighbours may overtake each other.
const reorderWindow = 16

// maxPending bounds the unanswered writes of one VIP: a silent store answers none, and
// every one of them would be tried at once when it returns.
const maxPending = 4

// Machine is one member's side of the protocol. It is not safe for concurrent use.
type Machine struct {
	cfg      Config
	self     Member
	majority int

	started Instant // when this boot began
	last    Instant // the previous Step

	ready    bool // boot key written and records read
	eligible bool
	unfit    string // why it is not eligible, for people
	stopping bool

	lease     int64 // of this boot; 0: none
	leaseSent Instant
	storeSeen bool
	storeAt   Instant // when the store last answered anything

	seq   uint64
	sent  [sentRing]sentBeat
	peers []*peer // every other member, in the order of the configuration
	vips  []*vip

	lastBeat   Heartbeat
	lastBeatAt Instant

	nextWrite uint64
	pending   map[uint64]pending

	faults faultSet // rules left out on purpose; none but in tests

	out Output
}

// sentBeat remembers when a broadcast left and what it claimed.
type sentBeat struct {
	seq    uint64
	at     Instant
	claims []int64 // per VIP: the epoch it claimed, 0: none
}

type peer struct {
	Member
	heard   bool
	heardAt Instant
	beat    Heartbeat // the newest
	// withdrawn is the newest boot that the peer's guard has reported dead: whatever it
	// or an earlier one claims is void, and nothing of theirs is heard any more.
	withdrawn uint64
}

// vip is what a member knows and wants of one VIP.
type vip struct {
	VIP

	known     bool // a first snapshot has come
	rec       Record
	recSince  Instant // when rec's revision became known
	goneSince Instant

	suspectFrom Instant            // silence before this proves nothing
	claimAt     map[string]Instant // when each other member was last heard to claim

	grants []Grant // given by this member

	// As owner.
	claims      bool
	settled     bool               // prev has withdrawn
	from        string             // the member that gave it to this one in order; empty: none
	left        map[string]uint64  // member → newest boot whose guard saw the address off
	confirmed   map[string]Instant // member → when the newest heartbeat that it confirmed was sent
	rewritten   Instant            // when the newest answered rewrite was sent; -forever: none
	lastRewrite Instant            // when a rewrite was last tried
	right       Right
	until       Instant // the right's deadline

	// As candidate.
	attempt   uint64 // the last one used
	ask       Ask
	askedAt   Instant
	swapped   bool // ask's swap has been sent, at swappedAt
	swappedAt Instant
	open      []uint64 // attempts whose swap was sent and got no answer

	// The address.
	on        bool
	gen       uint64
	held      bool
	heldGen   uint64
	releasing bool // shutting down with nobody to take it
	released  bool // that write has been tried

	wire     wire
	move     *move
	nextAuto Instant // no move of our own accord before this
	wellFrom Instant // since when the first preferred member could have it
}

type writeKind int

const (
	_ writeKind = iota
	writeSwap
	writeRewrite
	writeMove
	writeRelease
)

type pending struct {
	vip     *vip
	kind    writeKind
	attempt uint64
}

// New returns the machine of a member that starts at now. It panics if the
// configuration does not name the member itself, or has no candidate.
func New(cfg Config, now Instant) *Machine {
	m := &Machine{
		cfg: cfg, majority: len(cfg.Members)/2 + 1,
		started: now, last: now, lastBeatAt: -forever, pending: map[uint64]pending{},
	}
	found := false
	for _, member := range cfg.Members {
		if member.Name == cfg.Self {
			m.self, found = member, true
			continue
		}
		m.peers = append(m.peers, &peer{Member: member})
	}
	if !found {
		panic(fmt.Sprintf("ownership: %q is not among the members", cfg.Self))
	}
	for _, v := range cfg.VIPs {
		m.vips = append(m.vips, &vip{
			VIP: v, suspectFrom: now, claimAt: map[string]Instant{}, left: map[string]uint64{}, confirmed: map[string]Instant{},
			rewritten: -forever, lastRewrite: -forever, nextAuto: -forever, wellFrom: forever,
		})
	}
	return m
}

// Step takes one event at an instant not before the last one's and returns what the
// member wants now. It must be called at Output.Wake at the latest.
func (m *Machine) Step(now Instant, ev Event) Output {
	if now < m.last {
		panic(fmt.Sprintf("ownership: time went back from %v to %v", m.last, now))
	}
	m.out = Output{}
	m.distrustStall(now)
	m.last = now

	var ack *HeartbeatReceived
	switch ev := ev.(type) {
	case Tick:
	case Nudge:
		m.lastBeatAt = -forever
	case HeartbeatReceived:
		if m.receive(now, ev.Heartbeat) {
			ack = &ev
		}
	case StoreSnapshot:
		m.storeAnswered(now)
		m.takeSnapshot(now, ev)
	case LeaseRenewed:
		m.storeAnswered(now)
		m.lease, m.leaseSent = ev.Lease, m.faults.instead(leaseFromAnswer, ev.SentAt, now)
	case LeaseLost:
		m.storeAnswered(now)
		if ev.Lease == m.lease {
			m.lease = 0
		}
	case WriteResult:
		m.takeResult(now, ev)
	case AddressState:
		if v := m.vip(ev.VIP); v != nil && ev.Gen >= v.heldGen && ev.Gen <= v.gen {
			v.held, v.heldGen = ev.Held, ev.Gen
		}
	case Eligibility:
		m.eligible, m.unfit = ev.Eligible, ev.Reason
	case Withdrawn:
		m.takeWithdrawal(ev)
	case Probed:
		m.takeProbed(now, ev)
	case Foreign:
		m.takeForeign(ev)
	case MoveOrder:
		m.takeOrder(now, ev)
	case Settings:
		m.takeSettings(ev)
	case Shutdown:
		m.stopping = true
	default:
		panic(fmt.Sprintf("ownership: unknown event %T", ev))
	}

	for _, v := range m.vips {
		m.decide(now, v)
	}
	for i, c := range m.out.Changes { // told as things stand after the step
		m.out.Changes[i].Right = m.vip(c.VIP).right
	}
	m.speak(now, ack)
	m.finish(now)
	return m.out
}

// distrustStall starts all suspicions anew where the machine was not stepped for longer
// than it should: one's own silence is no proof of others'.
func (m *Machine) distrustStall(now Instant) {
	if now.Sub(m.last) <= 2*m.cfg.Timing.Heartbeat || m.faults.has(stallTrusted) {
		return
	}
	for _, v := range m.vips {
		v.suspectFrom = now
	}
}

// decide brings everything about one VIP up to date: right, claim, desired address,
// grants, and what to write.
func (m *Machine) decide(now Instant, v *vip) {
	m.settle(now, v)
	m.judge(now, v)
	m.keepGrants(now, v)
	m.probe(now, v)
	m.campaign(now, v)
	m.grant(now, v)
	m.swap(now, v)
	m.keepRecord(now, v)
	m.proceed(now, v)
}

// judge computes right, claim and desired address.
func (m *Machine) judge(now Instant, v *vip) {
	was := v.right
	m.unyield(now, v)
	v.right, v.until = m.rightOf(now, v)
	v.claims = m.mayClaim(now, v)
	if on := v.right != NoRight && !v.releasing; on != v.on {
		v.on = on
		v.gen++
	}
	if v.right != was {
		m.change(v, "right "+v.right.String())
	}
}

// mine reports whether the newest record names this boot of this member, or is gone
// with it as the last owner.
func (m *Machine) mine(v *vip) bool {
	return v.known && v.rec.Owner == m.cfg.Self && (v.rec.OwnerBoot == m.cfg.Boot || m.faults.has(earlierLifeCounts))
}

// holds is what the member says about its kernel. Between a wish and the report that it
// was carried out the address may be there or not: then it says that it is.
func (v *vip) holds() bool { return v.on || v.held || v.heldGen != v.gen }

// adopt takes newer knowledge about a record.
func (m *Machine) adopt(now Instant, v *vip, rec Record) {
	if v.known && !rec.Newer(v.rec) {
		return
	}
	old := v.rec
	rec.VIP = v.Name
	if !v.known || rec.Revision != old.Revision {
		v.recSince = now
		v.ask, v.swapped, v.open = Ask{}, false, nil
	}
	if rec.Gone && (!v.known || !old.Gone) {
		v.goneSince = now
	}
	changed := !v.known || rec.Epoch != old.Epoch || rec.Owner != old.Owner
	if changed || rec.Prev != old.Prev {
		v.settled = rec.Prev == ""
	}
	if changed {
		v.confirmed = map[string]Instant{}
		v.rewritten = -forever
		v.lastRewrite = -forever
	}
	v.rec, v.known = rec, true
	if changed && m.mine(v) {
		v.from = rec.Prev
	}
	switch {
	case !changed:
	case rec.Owner == "" && rec.Reason == "":
		m.change(v, "nobody has owned it yet")
	default:
		m.change(v, rec.Reason)
	}
}

func (m *Machine) takeSnapshot(now Instant, s StoreSnapshot) {
	for _, v := range m.vips {
		// A proposal that was on its way to a store's leader that died is lost, and nobody
		// says so. A read sent well after it that shows the old revision is reason enough to
		// begin another attempt; should the first one come through, the second will fail.
		if v.swapped && s.SentAt.Sub(v.swappedAt) > 2*m.cfg.Timing.StorePoll() {
			v.ask, v.swapped = Ask{}, false
		}
		i := slices.IndexFunc(s.Records, func(r Record) bool { return r.VIP == v.Name })
		if i >= 0 {
			m.adopt(now, v, s.Records[i])
		} else {
			m.adopt(now, v, Record{VIP: v.Name, Gone: true})
		}
	}
	m.ready = true
}

func (m *Machine) storeAnswered(now Instant) { m.storeSeen, m.storeAt = true, now }

// storeAnswers is false once nothing was answered for four polls: long enough for one
// to be late, short enough that an owner without a store stops blocking others.
func (m *Machine) storeAnswers(now Instant) bool {
	return m.storeSeen && now.Sub(m.storeAt) < 4*m.cfg.Timing.StorePoll()
}

func (m *Machine) vip(name string) *vip {
	for _, v := range m.vips {
		if v.Name == name {
			return v
		}
	}
	return nil
}

func (m *Machine) peer(name string) *peer {
	for _, p := range m.peers {
		if p.Name == name {
			return p
		}
	}
	return nil
}

func (m *Machine) write(v *vip, kind writeKind, attempt uint64, w Write) {
	m.nextWrite++
	w.ID = m.nextWrite
	w.Record.VIP = v.Name
	m.pending[w.ID] = pending{v, kind, attempt}
	m.out.Writes = append(m.out.Writes, w)
}

// unanswered counts a VIP's writes in flight.
func (m *Machine) unanswered(v *vip) (n int) {
	for _, p := range m.pending {
		if p.vip == v {
			n++
		}
	}
	return n
}

func (m *Machine) takeResult(now Instant, r WriteResult) {
	p, ok := m.pending[r.ID]
	if !ok {
		return
	}
	delete(m.pending, r.ID)
	v := p.vip
	if r.Outcome != Unknown {
		m.storeAnswered(now)
		m.adopt(now, v, r.Record)
	}
	// A late yes confers no right by itself: the rewrite counts from when it was sent,
	// and only for the epoch that it was about.
	if r.Outcome == Written && (p.kind == writeSwap || p.kind == writeRewrite) &&
		m.mine(v) && r.Record.Epoch == v.rec.Epoch && r.SentAt > v.rewritten {
		v.rewritten = m.faults.instead(lateYesCounts, r.SentAt, now)
	}
	switch p.kind {
	case writeSwap:
		if v.ask.Attempt == p.attempt && v.swapped {
			v.ask, v.swapped = Ask{}, false
		}
		if r.Outcome != Unknown { // certain now, either way
			v.open = slices.DeleteFunc(v.open, func(a uint64) bool { return a == p.attempt })
		}
	case writeMove:
		m.moveAnswered(now, v, r)
	case writeRelease:
		v.released = true
	case writeRewrite:
		if v.move != nil && v.move.fencing && r.Outcome == Written {
			m.failMove(now, v, Superseded)
		}
	}
}

// change records something worth telling.
func (m *Machine) change(v *vip, text string) {
	m.out.Changes = append(m.out.Changes, Change{VIP: v.Name, Owner: v.rec.Owner, Epoch: v.rec.Epoch, Right: v.right, Text: text})
}

// speak sends a heartbeat to everybody when one is due or something changed, and the
// ack that is owed.
func (m *Machine) speak(now Instant, ack *HeartbeatReceived) {
	beat := m.heartbeat()
	if now.Sub(m.lastBeatAt) >= m.cfg.Timing.Heartbeat || !beat.same(m.lastBeat) {
		m.lastBeat, m.lastBeatAt = beat, now
		b := beat
		m.seq++
		b.Seq = m.seq
		s := sentBeat{seq: m.seq, at: now, claims: make([]int64, len(m.vips))}
		for i, v := range m.vips {
			if v.claims {
				s.claims[i] = v.rec.Epoch
			}
		}
		m.sent[m.seq%sentRing] = s
		m.out.Broadcast = &b
	}
	if ack != nil {
		b := beat
		m.seq++
		b.Seq, b.AckBoot, b.AckSeq = m.seq, ack.Heartbeat.Boot, ack.Heartbeat.Seq
		m.out.Reply = &b
	}
}

func (m *Machine) heartbeat() Heartbeat {
	b := Heartbeat{Member: m.cfg.Self, Boot: m.cfg.Boot, Ready: m.ready, Eligible: m.eligible && !m.stopping,
		Witness: m.self.Witness, Priority: m.self.Priority, Lease: m.lease}
	for _, v := range m.vips {
		r := Report{VIP: v.Name, Claims: v.claims, Holds: v.holds() && (v.on || !m.faults.has(withdrawnEarly)), Held: v.held, Right: v.right, Ask: v.ask,
			Grants: slices.Clone(v.grants), Attempts: slices.Clone(v.open)}
		if v.known {
			r.Record = v.rec
		}
		if v.ask.Attempt != 0 && !v.swapped {
			r.Attempts = append(r.Attempts, v.ask.Attempt)
		}
		b.VIPs = append(b.VIPs, r)
	}
	return b
}

// finish fills in the desired state and when to step again.
func (m *Machine) finish(now Instant) {
	t := m.cfg.Timing
	wake := m.lastBeatAt.Add(t.Heartbeat)
	soonest := func(at Instant) {
		if at > now && at < wake {
			wake = at
		}
	}
	for _, p := range m.peers {
		if m.heardWithin(now, p, t.SuspectAfter) {
			soonest(p.heardAt.Add(t.SuspectAfter))
			continue
		}
		if m.out.Silent == nil {
			m.out.Silent = map[string]Instant{}
		}
		m.out.Silent[p.Name] = p.heardAt
	}
	stopped := m.stopping
	for _, v := range m.vips {
		h := Hold{VIP: v.Name, On: v.on, Gen: v.gen, Until: v.until, Epoch: v.rec.Epoch, Right: v.right}
		switch {
		case v.on:
			h.Peer = v.from
		case v.rec.Prev == m.cfg.Self && v.rec.PrevBoot == m.cfg.Boot:
			h.Planned, h.Peer = true, v.rec.Owner
		}
		m.out.Holds = append(m.out.Holds, h)
		if v.right != NoRight {
			soonest(v.until)
			soonest(v.until - Instant(t.HoldWindow/3))
		}
		soonest(v.lastRewrite.Add(t.HoldWindow / 3))
		if quiet := m.quietSince(v, m.cfg.Self).Add(t.SuspectAfter); quiet > now {
			soonest(quiet)
		} else if !v.claims {
			soonest(m.turn(now, v))
		}
		for _, p := range m.peers {
			if r, _ := p.report(v.Name); r.Ask.Attempt != 0 {
				soonest(m.quietSince(v, p.Name).Add(t.SuspectAfter))
			}
		}
		soonest(v.recSince.Add(t.SuspectAfter))
		soonest(v.nextAuto)
		soonest(v.wire.probedAt.Add(probeAgain))
		if v.holds() || v.move != nil || (m.mine(v) && !v.released) {
			stopped = false
		}
	}
	m.out.Wake = wake
	m.out.Stopped = stopped
}

// View is what a member knows, for people.
type View struct {
	Ready        bool
	Eligible     bool
	StoreAnswers bool
	VIPs         []VIPView
	Peers        []PeerView
}

// VIPView is one VIP as this member knows it.
type VIPView struct {
	Name    string
	Record  Record
	Right   Right    // the owner's, by its own word or, for this member, by its own judgement
	Holders []string // members that say they hold it
	// Stranger is the link-layer address of who has the address although nobody of the
	// mesh has ever owned it, by this member's own probe.
	Stranger string
	Until    time.Duration
}

// PeerView is another member as this one knows it.
type PeerView struct {
	Name     string
	Heard    bool
	Silence  time.Duration // since it was last heard
	Boot     uint64
	Ready    bool
	Eligible bool
}

// View returns what the member knows at the given instant. A peer that has been silent
// for S counts neither as holder nor as heard.
func (m *Machine) View(now Instant) View {
	view := View{Ready: m.ready, Eligible: m.eligible && !m.stopping, StoreAnswers: m.storeAnswers(now)}
	for _, v := range m.vips {
		vv := VIPView{Name: v.Name, Record: v.rec, Until: v.until.Sub(now), Stranger: v.wire.stranger}
		if v.held {
			vv.Holders = append(vv.Holders, m.cfg.Self)
		}
		if m.mine(v) {
			vv.Right = v.right
		}
		for _, p := range m.peers {
			r, ok := p.report(v.Name)
			if !ok || !m.heardWithin(now, p, m.cfg.Timing.SuspectAfter) {
				continue
			}
			if r.Held {
				vv.Holders = append(vv.Holders, p.Name)
			}
			if p.Name == v.rec.Owner && p.beat.Boot == v.rec.OwnerBoot {
				vv.Right = r.Right
			}
		}
		view.VIPs = append(view.VIPs, vv)
	}
	for _, p := range m.peers {
		view.Peers = append(view.Peers, PeerView{
			Name: p.Name, Heard: m.heardWithin(now, p, m.cfg.Timing.SuspectAfter), Silence: now.Sub(p.heardAt),
			Boot: p.beat.Boot, Ready: p.beat.Ready, Eligible: p.beat.Eligible,
		})
	}
	return view
}
