package ownership

import (
	"cmp"
	"slices"
	"time"
)

// quietSince is when anybody but the candidate was last heard to claim the VIP, or when
// this member began to listen.
func (m *Machine) quietSince(v *vip, candidate string) Instant {
	quiet := m.faults.instead(startNotWaited, v.suspectFrom, -forever)
	for member, at := range v.claimAt {
		if member != candidate {
			quiet = max(quiet, at)
		}
	}
	return quiet
}

// keepGrants drops the grants that are void: for a revision that is history, or for an
// attempt that its candidate has handed back. Those of a candidate's earlier boot stand,
// because its swap may still be on the way to the store.
func (m *Machine) keepGrants(now Instant, v *vip) {
	v.grants = slices.DeleteFunc(v.grants, func(g Grant) bool {
		if g.Revision < v.rec.Revision || (m.faults.has(grantForgotten) && m.quietSince(v, g.To) == now) {
			return true
		}
		if g.To == m.cfg.Self {
			return g.ToBoot == m.cfg.Boot && v.ask.Attempt != g.Attempt && !slices.Contains(v.open, g.Attempt)
		}
		p := m.peer(g.To)
		if p == nil || p.beat.Boot != g.ToBoot {
			return false
		}
		r, ok := p.report(v.Name)
		return ok && !slices.Contains(r.Attempts, g.Attempt)
	})
}

// grant answers the asks that are heard. A member that still claims, or whose kernel
// still has the address, grants nobody.
func (m *Machine) grant(now Instant, v *vip) {
	if !m.ready || !v.known || ((v.claims || v.holds()) && !m.faults.has(holderGrants)) {
		return
	}
	give := func(to string, boot uint64, ask Ask) {
		g := Grant{Revision: ask.Revision, To: to, ToBoot: boot, Attempt: ask.Attempt}
		if ask.Attempt == 0 || ask.Revision != v.rec.Revision ||
			now.Sub(m.quietSince(v, to)) < m.cfg.Timing.SuspectAfter ||
			slices.ContainsFunc(v.grants, g.sameAttempt) {
			return
		}
		v.grants = append(v.grants, g)
	}
	give(m.cfg.Self, m.cfg.Boot, v.ask)
	for _, p := range m.peers {
		if r, ok := p.report(v.Name); ok && m.heardWithin(now, p, m.cfg.Timing.SuspectAfter) {
			give(p.Name, p.beat.Boot, r.Ask)
		}
	}
}

// turn is when this member may ask for grants: after a silence of S, each place in the
// rank order one heartbeat later, so that one candidate tries first.
func (m *Machine) turn(now Instant, v *vip) Instant {
	rank := slices.Index(m.ranking(now, v), m.cfg.Self)
	if rank < 0 {
		return forever
	}
	t := m.cfg.Timing
	return m.quietSince(v, m.cfg.Self).Add(t.SuspectAfter + time.Duration(rank)*t.Heartbeat)
}

// ranking lists the candidates that could own the VIP, best first: eligible ones, then
// by preference, priority and name. Ineligible ones come last but do come: health never
// leaves a VIP without a holder.
func (m *Machine) ranking(now Instant, v *vip) []string {
	type entry struct {
		Member
		eligible bool
	}
	var all []entry
	if !m.self.Witness && m.ready && !m.stopping {
		all = append(all, entry{m.self, m.eligible})
	}
	for _, p := range m.peers {
		if !p.Witness && p.beat.Ready && p.beat.Lease != 0 && m.heardWithin(now, p, m.cfg.Timing.SuspectAfter) {
			all = append(all, entry{p.Member, p.beat.Eligible})
		}
	}
	preference := func(name string) int {
		if i := slices.Index(v.Preferred, name); i >= 0 {
			return i
		}
		return len(v.Preferred)
	}
	slices.SortFunc(all, func(a, b entry) int {
		if a.eligible != b.eligible {
			if a.eligible {
				return -1
			}
			return 1
		}
		return cmp.Or(
			cmp.Compare(preference(a.Name), preference(b.Name)),
			cmp.Compare(b.Priority, a.Priority),
			cmp.Compare(a.Name, b.Name))
	})
	names := make([]string, len(all))
	for i, e := range all {
		names[i] = e.Name
	}
	return names
}

// campaign begins an attempt to take over, or gives one up.
func (m *Machine) campaign(now Instant, v *vip) {
	if v.ask.Attempt == 0 && now < m.quietSince(v, m.cfg.Self).Add(m.cfg.Timing.SuspectAfter) {
		return // the usual case, decided without ranking anybody
	}
	may := m.ready && v.known && m.lease != 0 && (m.storeAnswers(now) || m.faults.has(silentStoreAsks)) && !m.stopping && !v.claims && v.right == NoRight &&
		// A record that is mine is written again, not taken over; unless the former
		// owner's word is missing, or it is gone and nobody confirms me.
		(v.rec.Owner != m.cfg.Self || v.rec.Gone || !v.settled) &&
		now >= m.turn(now, v) && m.clear(now, v)
	switch {
	case v.ask.Attempt == 0 && may:
		v.attempt++
		v.ask, v.askedAt, v.swapped = Ask{Revision: v.rec.Revision, Attempt: v.attempt}, now, false
	case v.ask.Attempt != 0 && !may && !v.swapped && !m.faults.has(claimOverheard):
		v.ask = Ask{}
	}
}

// swap writes this member into the record once enough members have granted that.
func (m *Machine) swap(now Instant, v *vip) {
	t := m.cfg.Timing
	if v.ask.Attempt == 0 || v.swapped || (now.Sub(v.recSince) < t.SuspectAfter && !m.faults.has(revisionNotAwaited)) {
		return
	}
	want := Grant{Revision: v.ask.Revision, To: m.cfg.Self, ToBoot: m.cfg.Boot, Attempt: v.ask.Attempt}
	boots := map[string]uint64{}
	if slices.ContainsFunc(v.grants, want.sameAttempt) {
		boots[m.cfg.Self] = m.cfg.Boot
	}
	near := 1 // members within reach, oneself included
	for _, p := range m.peers {
		r, ok := p.report(v.Name)
		if ok && p.beat.Ready && slices.ContainsFunc(r.Grants, want.sameAttempt) {
			boots[p.Name] = p.beat.Boot
		}
		if m.heardWithin(now, p, t.SuspectAfter) {
			near++
		}
	}
	next := Record{Owner: m.cfg.Self, OwnerBoot: m.cfg.Boot, Lease: m.lease}
	switch {
	case len(boots) >= m.majority:
		// A majority that heard no claim for S, and confirms nobody else from now on,
		// has settled whatever former owner the record still named.
		next.Reason = "took over from " + ownerName(v.rec)
	case m.cfg.ExternalStore && v.rec.Gone && near < m.majority && len(boots) == near &&
		now.Sub(v.goneSince) >= t.SuspectAfter && now.Sub(v.askedAt) >= 2*t.Heartbeat:
		next.Reason = "took over from " + ownerName(v.rec) + " whose lease ran out"
		if !v.settled {
			next.Prev, next.PrevBoot = v.rec.Prev, v.rec.PrevBoot
		}
	default:
		return
	}
	v.swapped, v.swappedAt = true, now
	if !m.faults.has(sentSwapHandedBack) {
		v.open = append(v.open, v.ask.Attempt)
	}
	if m.faults.has(bootsNotCompared) {
		boots = nil
	}
	m.write(v, writeSwap, v.ask.Attempt, Write{Compare: v.ask.Revision, Boots: boots, Record: next})
}

func ownerName(r Record) string {
	if r.Owner == "" {
		return "nobody"
	}
	return r.Owner
}
