package ownership

import "slices"

// wellFor is how long the first preferred member must have been able to own a VIP
// before it is moved there unasked, in lease TTLs: long enough that a node that comes
// and goes is left alone.
const wellFor = 10

// move is a planned hand-over, as its giver sees it.
type move struct {
	order      MoveOrder
	ordered    bool // by somebody who wants to hear how it goes
	to         string
	reason     string
	unanswered bool  // its write may have been committed, or may still be
	fencing    bool  // that write timed out: void it by a write of our own
	epoch      int64 // the epoch it made, once known
	since      Instant
	released   bool
}

// takeOrder starts a move, or refuses it.
func (m *Machine) takeOrder(now Instant, o MoveOrder) {
	refuse := func(why Refusal) {
		m.out.Moves = append(m.out.Moves, MoveProgress{ID: o.ID, VIP: o.VIP, To: o.To, Phase: Failed, Err: why})
	}
	v := m.vip(o.VIP)
	switch {
	case v == nil:
		refuse(UnknownVIP)
		return
	case v.right == NoRight:
		refuse(NotOwner)
		return
	case v.move != nil:
		refuse(Busy)
		return
	case o.To != "" && o.To != m.cfg.Self && m.peer(o.To) == nil:
		refuse(UnknownMember)
		return
	case !m.storeAnswers(now):
		refuse(StoreSilent)
		return
	}
	to := o.To
	if to == "" {
		if to = m.heir(now, v); to == "" {
			refuse(NoCandidate)
			return
		}
	}
	if !m.canTake(now, to) {
		refuse(NotEligible)
		return
	}
	m.startMove(now, v, to, "moved by an operator", &o)
}

// heir is the best other candidate that is eligible, or "".
func (m *Machine) heir(now Instant, v *vip) string {
	for _, name := range m.ranking(now, v) {
		if name != m.cfg.Self && m.canTake(now, name) {
			return name
		}
	}
	return ""
}

// canTake says whether a peer could own a VIP now.
func (m *Machine) canTake(now Instant, name string) bool {
	p := m.peer(name)
	return p != nil && !p.Witness && p.beat.Ready && p.beat.Eligible && p.beat.Lease != 0 &&
		m.heardWithin(now, p, m.cfg.Timing.SuspectAfter)
}

func (m *Machine) startMove(now Instant, v *vip, to, reason string, o *MoveOrder) {
	v.move = &move{to: to, reason: reason, since: now}
	if o != nil {
		v.move.order, v.move.ordered = *o, true
	}
	m.progress(v, Accepted, NotRefused)
	m.writeMove(v)
}

func (m *Machine) writeMove(v *vip) {
	p := m.peer(v.move.to)
	v.move.unanswered = true
	m.write(v, writeMove, 0, Write{Compare: v.rec.Revision, Record: Record{
		Owner: p.Name, OwnerBoot: p.beat.Boot, Lease: p.beat.Lease,
		Prev: m.cfg.Self, PrevBoot: m.cfg.Boot, Reason: v.move.reason, Request: v.move.order.Request,
	}})
}

func (m *Machine) moveAnswered(now Instant, v *vip, r WriteResult) {
	mv := v.move
	if mv == nil {
		return
	}
	switch r.Outcome {
	case Written:
		mv.unanswered, mv.fencing = false, false
		mv.epoch = r.Record.Epoch
		m.progress(v, Recorded, NotRefused)
	case Refused:
		mv.unanswered, mv.fencing = false, false
		switch {
		case !m.mine(v):
			m.failMove(now, v, Superseded)
		case !m.canTake(now, mv.to):
			m.failMove(now, v, NotEligible)
		default: // a rewrite of our own came between
			m.writeMove(v)
		}
	case Unknown:
		if m.faults.has(unansweredFailed) {
			m.failMove(now, v, Superseded)
			return
		}
		// Reading the old revision would not prove that it failed; only a write does.
		mv.fencing = true
		v.lastRewrite = -forever
	}
}

func (m *Machine) failMove(now Instant, v *vip, why Refusal) {
	m.progress(v, Failed, why)
	v.move = nil
	v.nextAuto = now.Add(m.cfg.Timing.LeaseTTL)
}

func (m *Machine) progress(v *vip, phase Phase, why Refusal) {
	if !v.move.ordered {
		return
	}
	m.out.Moves = append(m.out.Moves, MoveProgress{
		ID: v.move.order.ID, VIP: v.Name, From: m.cfg.Self, To: v.move.to, Phase: phase, Epoch: v.move.epoch, Err: why,
	})
}

// proceed drives a move on, and starts the ones nobody ordered: away from an owner that
// shuts down or is not eligible, and back to the preferred member where that is wished.
func (m *Machine) proceed(now Instant, v *vip) {
	if v.move != nil {
		m.follow(now, v)
		return
	}
	if m.stopping && m.mine(v) && (v.right == NoRight || !m.storeAnswers(now) || m.heir(now, v) == "" || now < v.nextAuto) {
		m.release(now, v)
		return
	}
	m.watchPreferred(now, v)
	if v.right == NoRight || v.right == Failsafe || now < v.nextAuto || !m.storeAnswers(now) || m.unanswered(v) > 0 {
		return
	}
	to := m.heir(now, v)
	switch {
	case to == "":
	case m.stopping:
		m.startMove(now, v, to, m.cfg.Self+" shuts down", nil)
	case !m.eligible:
		reason := m.cfg.Self + " is not eligible"
		if m.unfit != "" {
			reason += ": " + m.unfit
		}
		m.startMove(now, v, to, reason, nil)
	case now.Sub(v.wellFrom) >= wellFor*m.cfg.Timing.LeaseTTL:
		m.startMove(now, v, v.Preferred[0], v.Preferred[0]+" is preferred", nil)
	}
}

// takeSettings takes priority and preferences. Another first preferred member has to be
// well for as long as the one before it had.
func (m *Machine) takeSettings(s Settings) {
	m.self.Priority = s.Priority
	for _, newer := range s.VIPs {
		if v := m.vip(newer.Name); v != nil {
			if !slices.Equal(v.Preferred, newer.Preferred) {
				v.wellFrom = forever
			}
			v.VIP = newer
		}
	}
}

// watchPreferred notes since when the first preferred member could have the VIP.
func (m *Machine) watchPreferred(now Instant, v *vip) {
	switch {
	case !v.Preempt || len(v.Preferred) == 0 || v.right == NoRight || !m.canTake(now, v.Preferred[0]):
		v.wellFrom = forever
	case v.wellFrom == forever:
		v.wellFrom = now
	}
}

// follow watches a move that is under way.
func (m *Machine) follow(now Instant, v *vip) {
	mv := v.move
	if mv.epoch == 0 {
		// Its write was answered by nobody, but somebody has told of a newer record.
		if !m.mine(v) && mv.unanswered && v.rec.Owner == mv.to && v.rec.Prev == m.cfg.Self && v.rec.PrevBoot == m.cfg.Boot {
			mv.epoch, mv.unanswered, mv.fencing = v.rec.Epoch, false, false
			m.progress(v, Recorded, NotRefused)
		} else if !m.mine(v) {
			m.failMove(now, v, Superseded)
			return
		}
		if mv.epoch == 0 {
			if m.stopping && mv.fencing {
				// Without a store nothing can be handed over in order. The address goes off,
				// which settles the move too, should it have been committed.
				m.failMove(now, v, StoreSilent)
				return
			}
			if mv.ordered && now.Sub(mv.since) > 2*m.cfg.Timing.LeaseTTL {
				m.progress(v, Failed, StoreSilent)
				mv.ordered = false // nobody waits any more; the fence goes on
			}
			return
		}
	}
	if !mv.released && !v.holds() {
		mv.released = true
		m.progress(v, Released, NotRefused)
	}
	p := m.peer(mv.to)
	r, _ := p.report(v.Name)
	switch {
	case mv.released && r.Held && r.Record.Epoch >= mv.epoch:
		m.progress(v, HeldByTarget, NotRefused)
		v.move = nil
	case v.rec.Epoch > mv.epoch, now.Sub(mv.since) > 2*m.cfg.Timing.LeaseTTL:
		m.failMove(now, v, Superseded)
	}
}

// release gives the VIP up with nobody to take it: the address goes first, and only
// when the kernel has it no more does the record.
func (m *Machine) release(_ Instant, v *vip) {
	if !v.releasing {
		v.releasing, v.claims = true, false
		if v.on {
			v.on = false
			v.gen++
		}
	}
	busy := slices.ContainsFunc(m.out.Writes, func(w Write) bool { return w.Release })
	for _, p := range m.pending {
		busy = busy || (p.vip == v && p.kind == writeRelease)
	}
	if v.holds() || v.released || busy {
		return
	}
	m.write(v, writeRelease, 0, Write{Compare: v.rec.Revision, Release: true, Record: Record{Reason: m.cfg.Self + " shut down"}})
}
