package ownership

import (
	"slices"
	"time"
)

// rightOf returns the right in force at now and its deadline: the later one where both
// are in force.
func (m *Machine) rightOf(now Instant, v *vip) (Right, Instant) {
	if !m.ready || !m.mine(v) || !v.settled || v.wire.yielded != "" {
		return NoRight, 0
	}
	peers, store := m.byMajority(v), m.byStore(v)
	until := max(peers, store)
	switch {
	case now < peers && m.storeAnswers(now) && m.leaseDeadline() > now:
		return Confirmed, until
	case now < peers:
		return Failsafe, until
	case now < store:
		return Reasserted, until
	}
	return NoRight, 0
}

// byMajority is the deadline of the right by majority: a confirmation lasts for F from
// when the confirmed heartbeat was sent, and the majority's weakest one decides.
func (m *Machine) byMajority(v *vip) Instant {
	need := m.majority
	if !grantedAgainst(v.grants, m.cfg.Self, v.rec.Revision) || m.faults.has(selfAlwaysCounts) {
		need--
	}
	if need == 0 {
		return forever
	}
	if len(v.confirmed) < need {
		return -forever
	}
	sent := make([]Instant, 0, len(v.confirmed))
	for _, at := range v.confirmed {
		sent = append(sent, at)
	}
	slices.Sort(sent)
	return sent[len(sent)-need].Add(m.cfg.Timing.HoldWindow)
}

// byStore is the deadline of the right by store.
func (m *Machine) byStore(v *vip) Instant {
	if v.rec.Gone || m.lease == 0 || v.rec.Lease != m.lease || (v.move != nil && v.move.unanswered) {
		return -forever
	}
	return min(m.leaseDeadline(), v.rewritten.Add(m.cfg.Timing.HoldWindow))
}

// leaseDeadline is when the lease may have run out in the store: counted from when the
// answered keep-alive was sent, on a clock that may be slow by 1 % against one that may
// be fast by 1 %, less the time to take the address off.
func (m *Machine) leaseDeadline() Instant {
	if m.lease == 0 {
		return -forever
	}
	t := m.cfg.Timing
	return m.leaseSent.Add(t.LeaseTTL*98/100 - t.Margin)
}

// mayClaim says whether heartbeats claim the VIP. The last clause keeps an owner that
// has no store, and grants standing against it, from blocking everybody for ever.
func (m *Machine) mayClaim(now Instant, v *vip) bool {
	if !m.ready || !m.mine(v) || !v.settled || v.releasing || v.wire.yielded != "" {
		return false
	}
	if v.right != NoRight {
		return true
	}
	return m.heard(now, m.cfg.Timing.HoldWindow) >= m.majority &&
		(m.storeAnswers(now) || m.unopposed(now, v) >= m.majority || m.faults.has(claimsForEver))
}

// unopposed counts the members, oneself included, that have neither granted against
// this owner nor know of a higher epoch.
func (m *Machine) unopposed(now Instant, v *vip) int {
	n := 0
	if !grantedAgainst(v.grants, m.cfg.Self, v.rec.Revision) {
		n++
	}
	for _, p := range m.peers {
		r, ok := p.report(v.Name)
		if ok && m.heardWithin(now, p, m.cfg.Timing.HoldWindow) &&
			!grantedAgainst(r.Grants, m.cfg.Self, v.rec.Revision) && r.Record.Epoch <= v.rec.Epoch {
			n++
		}
	}
	return n
}

// grantedAgainst reports whether a grant to somebody else stands for the revision or a
// later one.
func grantedAgainst(grants []Grant, self string, revision int64) bool {
	return slices.ContainsFunc(grants, func(g Grant) bool { return g.To != self && g.Revision >= revision })
}

// heard counts the members, oneself included, that were heard within d.
func (m *Machine) heard(now Instant, d time.Duration) int {
	n := 1
	for _, p := range m.peers {
		if m.heardWithin(now, p, d) {
			n++
		}
	}
	return n
}

func (m *Machine) heardWithin(now Instant, p *peer, d time.Duration) bool {
	return p.heard && now.Sub(p.heardAt) < d
}

func (p *peer) report(vip string) (Report, bool) {
	for _, r := range p.beat.VIPs {
		if r.VIP == vip {
			return r, true
		}
	}
	return Report{}, false
}

// receive takes a peer's heartbeat and says whether it is to be answered.
func (m *Machine) receive(now Instant, b Heartbeat) (answer bool) {
	p := m.peer(b.Member)
	if p == nil || (p.heard && b.Boot < p.beat.Boot && !m.faults.has(olderBootHeard)) || b.Boot <= p.withdrawn {
		return false
	}
	reborn := p.heard && b.Boot > p.beat.Boot
	stale := p.heard && !reborn && b.Seq <= p.beat.Seq
	if stale && (b.Seq+reorderWindow < p.beat.Seq || b.Seq == p.beat.Seq) {
		return false
	}
	p.heardAt = now
	for _, v := range m.vips {
		if reborn { // its earlier life claims no more
			delete(v.claimAt, p.Name)
		}
		for _, r := range b.VIPs {
			if r.VIP == v.Name && r.Claims {
				v.claimAt[p.Name] = now
			}
		}
	}
	if !stale || m.faults.has(lowerSequenceHeard) {
		p.heard, p.beat = true, b
		p.Witness, p.Priority = b.Witness, b.Priority
	}
	for _, v := range m.vips {
		for _, r := range b.VIPs {
			if r.VIP == v.Name && (r.Record.Revision > 0 || r.Record.Owner != "") && v.known && !m.faults.has(epochNotHeeded) {
				m.adopt(now, v, r.Record)
			}
		}
	}
	if b.AckBoot != 0 {
		m.takeAck(p, b)
		return false
	}
	return true
}

// takeWithdrawal takes a guard's word. It replaces the wait for that member's silence and
// nothing else: up for S, unchanged for S, majority and compares remain.
func (m *Machine) takeWithdrawal(w Withdrawn) {
	p := m.peer(w.Member)
	if p == nil || (p.heard && p.beat.Boot > w.Boot && !m.faults.has(lateWordBelieved)) || w.Boot <= p.withdrawn {
		return
	}
	p.withdrawn = w.Boot
	p.heard = false // its heartbeats are history
	for _, v := range m.vips {
		if slices.Contains(w.VIPs, v.Name) {
			delete(v.claimAt, p.Name)
			v.left[p.Name] = w.Boot
		}
	}
}

// takeAck counts the confirmations in an ack.
func (m *Machine) takeAck(p *peer, b Heartbeat) {
	s := m.sent[b.AckSeq%sentRing]
	if b.AckBoot != m.cfg.Boot || b.AckSeq == 0 || s.seq != b.AckSeq || (!b.Ready && !m.faults.has(unreadyConfirms)) {
		return
	}
	for i, v := range m.vips {
		if s.claims[i] == 0 || !m.mine(v) || s.claims[i] != v.rec.Epoch {
			continue
		}
		for _, r := range b.VIPs {
			if r.VIP != v.Name || (grantedAgainst(r.Grants, m.cfg.Self, v.rec.Revision) && !m.faults.has(opposedConfirms)) {
				continue
			}
			sent := m.faults.instead(countFromAck, s.at, m.last)
			if at, ok := v.confirmed[p.Name]; !ok || sent > at {
				v.confirmed[p.Name] = sent
			}
		}
	}
}

// settle looks for the former owner's word that it has withdrawn: a heartbeat of that
// boot that knows the new epoch and says it holds nothing, or any of a later boot, whose
// first act was to sweep.
func (m *Machine) settle(_ Instant, v *vip) {
	if v.settled || v.rec.Prev == "" {
		return
	}
	p := m.peer(v.rec.Prev)
	left, said := v.left[v.rec.Prev]
	if (said && (left >= v.rec.PrevBoot || m.faults.has(anyGuardSettles))) || m.faults.has(prevTakenAsSettled) {
		v.settled = true
		return
	}
	if p == nil || !p.heard || p.beat.Boot < v.rec.PrevBoot {
		return
	}
	r, ok := p.report(v.Name)
	v.settled = p.beat.Boot > v.rec.PrevBoot ||
		(ok && (r.Record.Epoch >= v.rec.Epoch || m.faults.has(staleWordSettles)) && !r.Holds && !r.Claims)
}

// keepRecord writes what an owner owes the store: its name on the lease of this life,
// a settled prev dropped, and where confirmations run short, a rewrite, which also
// voids the grants given against it.
func (m *Machine) keepRecord(now Instant, v *vip) {
	t := m.cfg.Timing
	if !m.ready || m.lease == 0 || v.rec.Owner != m.cfg.Self || v.releasing ||
		now.Sub(v.lastRewrite) < t.HoldWindow/3 || m.unanswered(v) >= maxPending {
		return
	}
	next := v.rec
	next.Lease = m.lease
	switch {
	case v.rec.OwnerBoot < m.cfg.Boot && !v.rec.Gone:
		// An earlier life's record gives no right; its address was swept at start.
		next.OwnerBoot, next.Epoch, next.Reason = m.cfg.Boot, 0, "owner restarted"
	case !m.mine(v) || !v.settled:
		return
	case v.move != nil && v.move.unanswered && !v.move.fencing:
		return // wait for the answer; a time-out becomes a fence
	case v.move != nil && v.move.fencing:
	case v.right == NoRight && !v.claims && (v.rec.Gone || v.rec.Lease != m.lease):
		// Cut off, a lost record is not simply written again. One that claims must: the
		// grants that stand against it would keep it from being confirmed, and its claim
		// everybody else from taking over, for ever. It is safe: the compare proves that
		// nobody has taken the VIP since, and the new revision voids the grants.
		return
	case v.rec.Gone, v.rec.Lease != m.lease, v.rec.Prev != "":
	case m.byMajority(v).Sub(now) < t.HoldWindow/3:
	default:
		return
	}
	if next.Prev != "" && (v.settled || m.faults.has(prevDropped)) {
		next.Prev, next.PrevBoot = "", 0
	}
	v.lastRewrite = now
	m.write(v, writeRewrite, 0, Write{Compare: v.rec.Revision, Record: next})
}
