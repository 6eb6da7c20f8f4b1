package agent

import (
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// toProto writes what the ownership protocol says in a heartbeat as a message.
func toProto(b ownership.Heartbeat) *hameshv1.Heartbeat {
	h := &hameshv1.Heartbeat{
		Member: b.Member, Boot: b.Boot, Sequence: b.Seq, Ready: b.Ready, Eligible: b.Eligible, Lease: b.Lease,
		Role: hameshv1.Role_ROLE_CANDIDATE, Priority: int32(b.Priority),
	}
	if b.Witness {
		h.Role = hameshv1.Role_ROLE_WITNESS
	}
	for _, r := range b.VIPs {
		v := &hameshv1.VipReport{
			Name: r.VIP, Claims: r.Claims, Holds: r.Holds, Held: r.Held, Right: rightToProto(r.Right), Attempts: r.Attempts,
			Record: &hameshv1.Record{
				Owner: r.Record.Owner, OwnerBoot: r.Record.OwnerBoot, Prev: r.Record.Prev, PrevBoot: r.Record.PrevBoot,
				Epoch: r.Record.Epoch, Revision: r.Record.Revision, Lease: r.Record.Lease, Gone: r.Record.Gone, Reason: r.Record.Reason, Request: r.Record.Request,
			},
		}
		if r.Ask.Attempt != 0 {
			v.Ask = &hameshv1.Ask{Revision: r.Ask.Revision, Attempt: r.Ask.Attempt}
		}
		for _, g := range r.Grants {
			v.Grants = append(v.Grants, &hameshv1.Grant{Revision: g.Revision, To: g.To, ToBoot: g.ToBoot, Attempt: g.Attempt})
		}
		h.Vips = append(h.Vips, v)
	}
	return h
}

// fromProto reads a heartbeat. What a message leaves out is the zero value, which in
// this protocol says nothing.
func fromProto(h *hameshv1.Heartbeat) ownership.Heartbeat {
	b := ownership.Heartbeat{
		Member: h.GetMember(), Boot: h.GetBoot(), Seq: h.GetSequence(),
		Ready: h.GetReady(), Eligible: h.GetEligible(), Lease: h.GetLease(),
		Witness: h.GetRole() == hameshv1.Role_ROLE_WITNESS, Priority: int(h.GetPriority()),
	}
	for _, v := range h.GetVips() {
		rec := v.GetRecord()
		r := ownership.Report{
			VIP: v.GetName(), Claims: v.GetClaims(), Holds: v.GetHolds(), Held: v.GetHeld(), Right: rightFromProto(v.GetRight()), Attempts: v.GetAttempts(),
			Record: ownership.Record{
				VIP: v.GetName(), Owner: rec.GetOwner(), OwnerBoot: rec.GetOwnerBoot(), Prev: rec.GetPrev(), PrevBoot: rec.GetPrevBoot(),
				Epoch: rec.GetEpoch(), Revision: rec.GetRevision(), Lease: rec.GetLease(), Gone: rec.GetGone(), Reason: rec.GetReason(), Request: rec.GetRequest(),
			},
			Ask: ownership.Ask{Revision: v.GetAsk().GetRevision(), Attempt: v.GetAsk().GetAttempt()},
		}
		for _, g := range v.GetGrants() {
			r.Grants = append(r.Grants, ownership.Grant{Revision: g.GetRevision(), To: g.GetTo(), ToBoot: g.GetToBoot(), Attempt: g.GetAttempt()})
		}
		b.VIPs = append(b.VIPs, r)
	}
	return b
}

// ackFromProto reads an ack: a heartbeat that names the one it answers.
func ackFromProto(a *hameshv1.ExchangeResponse) ownership.Heartbeat {
	b := fromProto(a.GetHeartbeat())
	b.AckBoot, b.AckSeq = a.GetAckBoot(), a.GetAckSequence()
	return b
}

var rights = map[ownership.Right]hameshv1.Right{
	ownership.NoRight:    hameshv1.Right_RIGHT_UNSPECIFIED,
	ownership.Confirmed:  hameshv1.Right_RIGHT_CONFIRMED,
	ownership.Reasserted: hameshv1.Right_RIGHT_REASSERTED,
	ownership.Failsafe:   hameshv1.Right_RIGHT_FAILSAFE,
}

func rightToProto(r ownership.Right) hameshv1.Right { return rights[r] }

func rightFromProto(p hameshv1.Right) ownership.Right {
	for r, q := range rights {
		if q == p {
			return r
		}
	}
	return ownership.NoRight
}

var phases = map[ownership.Phase]hameshv1.MovePhase{
	ownership.Accepted:     hameshv1.MovePhase_MOVE_PHASE_ACCEPTED,
	ownership.Recorded:     hameshv1.MovePhase_MOVE_PHASE_RECORDED,
	ownership.Released:     hameshv1.MovePhase_MOVE_PHASE_RELEASED,
	ownership.HeldByTarget: hameshv1.MovePhase_MOVE_PHASE_HELD,
}

var backendStates = map[health.State]hameshv1.BackendState{
	health.Up:       hameshv1.BackendState_BACKEND_STATE_UP,
	health.Down:     hameshv1.BackendState_BACKEND_STATE_DOWN,
	health.Draining: hameshv1.BackendState_BACKEND_STATE_DRAINING,
	health.Disabled: hameshv1.BackendState_BACKEND_STATE_DISABLED,
	health.NotReady: hameshv1.BackendState_BACKEND_STATE_DOWN, // and not_ready beside it
}

// healthReport is what another member says about a backend. Agents before did not tell what
// makes DOWN less than that.
func healthReport(r *hameshv1.BackendReport) health.Report {
	report := health.Report{Backend: r.GetBackend(), Reason: r.GetReason()}
	switch r.GetState() {
	case hameshv1.BackendState_BACKEND_STATE_UP:
		report.State = health.Up
	case hameshv1.BackendState_BACKEND_STATE_DOWN:
		report.State, report.Refuses = health.Down, r.GetRefuses()
		if r.GetNotReady() {
			report.State, report.Refuses = health.NotReady, false
		}
	}
	return report
}
