package ownership

import "time"

const (
	// probeAgain is how soon an address that a stranger has is probed again, and
	// probeGood how long a probe that found nobody stays good.
	probeAgain = time.Second
	probeGood  = 10 * time.Second
)

// Probed answers [Output.Probes]: what the segment says about an address that nobody is
// known to have owned before.
type Probed struct {
	VIP      string
	Stranger string // the link-layer address of whoever has it; empty: nobody has
}

// Foreign says that another node's frame named a VIP.
type Foreign struct {
	VIP    string
	Member string // the member whose interface sent it; empty: a stranger
	// Announcement: an agent spoke, unasked. Else a kernel answered, which it does also
	// when its agent is dead or stuck.
	Announcement bool
}

func (Probed) event()  {}
func (Foreign) event() {}

// wire is what a member has heard on the segment about one VIP.
type wire struct {
	probing  bool
	probedAt Instant
	probed   bool   // there is an answer
	stranger string // who has the address, by the last answer
	yielded  string // to which member's announcement; empty: to none
}

// firstClaim says whether a claim now would be the first of an address as far as the
// store knows: whether somebody else uses it already, only the segment can tell.
func (v *vip) firstClaim() bool { return v.rec.Owner == "" }

// clear says whether the segment allows a first claim.
func (m *Machine) clear(now Instant, v *vip) bool {
	return !m.cfg.Probe || !v.firstClaim() ||
		(v.wire.probed && v.wire.stranger == "" && now.Sub(v.wire.probedAt) < probeGood)
}

// probe asks for a probe before a first claim, and again while a stranger has the address.
func (m *Machine) probe(now Instant, v *vip) {
	w := &v.wire
	if !m.cfg.Probe || m.self.Witness || !m.ready || !v.known || !v.firstClaim() || w.probing || m.stopping ||
		(w.probed && now.Sub(w.probedAt) < probeAgain) || m.clear(now, v) {
		return
	}
	w.probing = true
	m.out.Probes = append(m.out.Probes, v.Name)
}

func (m *Machine) takeProbed(now Instant, p Probed) {
	v := m.vip(p.VIP)
	if v == nil {
		return
	}
	if p.Stranger != "" && p.Stranger != v.wire.stranger {
		m.change(v, "refused: "+p.Stranger+" has the address already")
	}
	v.wire.probing, v.wire.probed, v.wire.probedAt, v.wire.stranger = false, true, now, p.Stranger
}

// takeForeign defends the address, or yields it. A holder whose right the store knows
// says again where it is. One whose store is silent cannot know whether the store has
// named another: it yields to a member's agent, which would not announce without a right.
func (m *Machine) takeForeign(f Foreign) {
	v := m.vip(f.VIP)
	if v == nil || !v.on {
		return
	}
	if v.right == Failsafe && f.Announcement && f.Member != "" {
		v.wire.yielded = f.Member
		m.change(v, "yields to "+f.Member+", which announces it")
		return
	}
	m.out.Announce = append(m.out.Announce, v.Name)
}

// unyield ends yielding: when the store answers, which knows who the owner is, or when
// the other says that it does not hold the address.
func (m *Machine) unyield(now Instant, v *vip) {
	p := m.peer(v.wire.yielded)
	if p == nil || m.storeAnswers(now) {
		v.wire.yielded = ""
		return
	}
	if r, ok := p.report(v.Name); ok && !r.Holds && m.heardWithin(now, p, m.cfg.Timing.HoldWindow) {
		v.wire.yielded = ""
	}
}
