package ownership

import (
	"fmt"
	"slices"
	"time"
)

// Instant is a point on one node's own clock: the time since an arbitrary origin,
// counted by a clock that also runs during suspend (CLOCK_BOOTTIME). Instants of
// different nodes have nothing to do with each other.
type Instant time.Duration

// Add returns the instant d later.
func (t Instant) Add(d time.Duration) Instant { return t + Instant(d) }

// Sub returns the time from u to t.
func (t Instant) Sub(u Instant) time.Duration { return time.Duration(t - u) }

// UntilNext is the time from t to the next whole multiple of every, at most that. What a
// process does now and then, it does at such instants, so that it wakes up once for all.
func (t Instant) UntilNext(every time.Duration) time.Duration {
	return every - time.Duration(t)%every
}

// String prints the instant as a duration since the origin.
func (t Instant) String() string { return time.Duration(t).String() }

// Config is what a Machine needs to know beforehand. Nothing of it changes but what
// Settings says.
type Config struct {
	Self          string
	Boot          uint64 // higher than that of every earlier start on this node
	Members       []Member
	VIPs          []VIP
	Timing        Timing
	ExternalStore bool // the store can be there when a majority of members is not
	Probe         bool // Output.Probes is answered; else every address counts as free
}

// Member is one agent of the mesh. Role and priority are the member's own to say: its
// heartbeats do, and until one is heard the configuration of others may guess.
type Member struct {
	Name     string
	Witness  bool // votes, never owns
	Priority int  // higher first
}

// VIP is one virtual address; what address, is none of this package's business.
type VIP struct {
	Name      string
	Preferred []string // members, best first
	Preempt   bool     // move back to the first preferred member once it has been well for a while
}

// Timing holds the protocol's parameters; all clocks run within 1 % of true time.
type Timing struct {
	Heartbeat    time.Duration // h: every member to every member
	HoldWindow   time.Duration // F: how long one confirmation lets a node hold
	SuspectAfter time.Duration // S: silence after which a claimant may be given up
	LeaseTTL     time.Duration // T: lease in the store, and lifetime of the address in the kernel
	Margin       time.Duration // from the lapse of a right to the address being off, stalls included
}

// StorePoll is how often the store is read, and the unit of its silence.
func (t Timing) StorePoll() time.Duration { return max(t.Heartbeat, 50*time.Millisecond) }

// Record is who owns one VIP, as the store has it or had it. In the store it is two
// keys: the record itself, attached to the owner's lease, and the fence beside it,
// permanent, written in the same transaction. The fence's mod revision is Revision.
type Record struct {
	VIP       string
	Owner     string // empty: released, or never owned
	OwnerBoot uint64 // the owner's boot id when it was written
	Prev      string // former owner whose withdrawal is not known yet; empty: settled
	PrevBoot  uint64
	Epoch     int64  // revision at which the present owner got it; 0 in a Write: that write's own revision
	Revision  int64  // the fence's mod revision; 0: the VIP was never owned
	Lease     int64  // lease the record hangs on
	Gone      bool   // the record key is not there; Owner is the last owner, from the fence
	Reason    string // why the owner got it
	Request   string // the MoveOrder.Request by which the owner got it, if one was
}

// Newer reports whether r is newer knowledge than o: the higher revision wins, and at
// the same revision gone beats present.
func (r Record) Newer(o Record) bool {
	if r.Revision != o.Revision {
		return r.Revision > o.Revision
	}
	return r.Gone && !o.Gone
}

// Write is one transaction on a VIP's record and fence. It compares the fence's mod
// revision (0: no fence) and the boot keys, then puts both keys, or with Release
// deletes the record and writes the fence with no owner. Where the compare fails it
// reads both keys in the same transaction.
type Write struct {
	ID      uint64
	Compare int64
	Boots   map[string]uint64 // member → boot id that boot/<member> must still have
	Release bool
	Record  Record // Revision and Gone are ignored
}

// Outcome is how a Write went.
type Outcome int

// The zero Outcome is invalid.
const (
	_ Outcome = iota
	// Written: the store has committed it.
	Written
	// Refused: a compare failed; the write will never take effect.
	Refused
	// Unknown: an error or a time-out. It may have been committed, or may still be.
	Unknown
)

// String names the outcome.
func (o Outcome) String() string {
	switch o {
	case Written:
		return "written"
	case Refused:
		return "refused"
	case Unknown:
		return "unknown"
	}
	return fmt.Sprintf("Outcome(%d)", int(o))
}

// Right is the reason for which a member may hold a VIP now.
type Right int

const (
	// NoRight is in force.
	NoRight Right = iota
	// Confirmed by a majority of members, with a good lease.
	Confirmed
	// Reasserted by the store: it confirms the owner, because too few peers do.
	Reasserted
	// Failsafe is being confirmed by a majority while the store does not answer.
	Failsafe
)

// String names the right.
func (r Right) String() string {
	switch r {
	case NoRight:
		return "none"
	case Confirmed:
		return "confirmed"
	case Reasserted:
		return "reasserted"
	case Failsafe:
		return "failsafe"
	}
	return fmt.Sprintf("Right(%d)", int(r))
}

// Heartbeat is everything a member says about itself. It reports on every VIP of its
// configuration, in that order; a peer whose configuration lacks a VIP ignores it.
type Heartbeat struct {
	Member   string
	Boot     uint64
	Seq      uint64 // grows with every heartbeat and ack of this boot
	AckBoot  uint64 // boot id of the heartbeat that this one answers; 0: not an ack
	AckSeq   uint64
	Ready    bool // it confirms, grants and holds
	Eligible bool // it may take VIPs
	Witness  bool // it never does
	Priority int
	Lease    int64
	VIPs     []Report
}

// Report is what a member says about one VIP.
type Report struct {
	VIP      string
	Record   Record // the newest it knows
	Claims   bool
	Holds    bool // its kernel has the address, or may come to have it
	Held     bool // its kernel had the address when it was last read back; decides nothing
	Right    Right
	Grants   []Grant  // all of its own that stand
	Ask      Ask      // what it wants; zero: nothing
	Attempts []uint64 // its attempts that may still change the record; grants for others are void
}

// same reports whether two heartbeats say the same; sequence numbers aside.
func (b Heartbeat) same(o Heartbeat) bool {
	if b.Member != o.Member || b.Boot != o.Boot || b.Ready != o.Ready || b.Eligible != o.Eligible ||
		b.Witness != o.Witness || b.Priority != o.Priority || b.Lease != o.Lease {
		return false
	}
	return slices.EqualFunc(b.VIPs, o.VIPs, func(r, p Report) bool {
		return r.VIP == p.VIP && r.Record == p.Record && r.Claims == p.Claims && r.Holds == p.Holds && r.Held == p.Held &&
			r.Right == p.Right && r.Ask == p.Ask && slices.Equal(r.Grants, p.Grants) && slices.Equal(r.Attempts, p.Attempts)
	})
}

// Ask is a candidate's wish to replace one revision of a record.
type Ask struct {
	Revision int64
	Attempt  uint64 // numbers the tries of one boot, from 1; 0: no ask
}

// Grant is a member's word that a candidate may replace one revision of a record. It
// does not age: it stands until the granter learns of a higher revision, or that the
// attempt is over.
type Grant struct {
	Revision int64
	To       string
	ToBoot   uint64
	Attempt  uint64
}

// Event is anything that happens to a member: see the types that implement it.
type Event interface{ event() }

// Tick says only that time has passed.
type Tick struct{}

// Nudge asks for a heartbeat at once: something has changed that travels with
// heartbeats but is none of this package's business.
type Nudge struct{}

// HeartbeatReceived is a peer's heartbeat or ack, from the member it was
// authenticated as.
type HeartbeatReceived struct{ Heartbeat Heartbeat }

// StoreSnapshot is the store's answer to one linearizable read of all records. The
// first one of a boot comes only after the member's boot key has been written.
type StoreSnapshot struct {
	SentAt  Instant // when the read was sent
	Records []Record
}

// LeaseRenewed says that the store granted or renewed the lease of this boot.
type LeaseRenewed struct {
	Lease  int64
	SentAt Instant // when the answered request was sent
}

// LeaseLost says that the store knows no such lease any more.
type LeaseLost struct{ Lease int64 }

// WriteResult is the answer to a Write, or the lack of one.
type WriteResult struct {
	ID      uint64
	SentAt  Instant
	Outcome Outcome
	Record  Record // Written: as it now is; Refused: as it was found; Unknown: zero
}

// AddressState is what the kernel has after a [Hold] was applied.
type AddressState struct {
	VIP  string
	Held bool
	Gen  uint64 // the newest Hold that had been applied when this was read
}

// Eligibility says whether this member may take VIPs, and for people, why not.
type Eligibility struct {
	Eligible bool
	Reason   string
}

// Withdrawn is the word of a member's guard: the kernel has reported that the agent of
// that boot is gone, and its addresses have been taken off and seen to be off. It is
// proof where silence is none.
type Withdrawn struct {
	Member string
	Boot   uint64
	VIPs   []string
}

// MoveOrder asks the owner to hand a VIP to another candidate. It is answered by
// [MoveProgress]; an owner takes one order at a time.
type MoveOrder struct {
	ID      uint64 // comes back in the progress
	Request string // goes into the record
	VIP     string
	To      string // empty: the best other candidate
}

// Settings takes the place of what of a Config may change: this member's priority, and
// the preferences of VIPs, which are found by their names.
type Settings struct {
	Priority int
	VIPs     []VIP
}

// Shutdown asks the member to hand everything over; Output.Stopped says when it has.
type Shutdown struct{}

func (Tick) event()              {}
func (Nudge) event()             {}
func (HeartbeatReceived) event() {}
func (StoreSnapshot) event()     {}
func (LeaseRenewed) event()      {}
func (LeaseLost) event()         {}
func (WriteResult) event()       {}
func (AddressState) event()      {}
func (Eligibility) event()       {}
func (Withdrawn) event()         {}
func (MoveOrder) event()         {}
func (Settings) event()          {}
func (Shutdown) event()          {}

// Output is what a member wants after an event. Holds are the whole desired state and
// may be lost or repeated; the rest happens once, and may be lost too, since whatever
// matters is said again.
//
// Order: where Holds take an address off, that is done, and seen to be done by an
// AddressState, BEFORE anything in this package tells a peer or the store that it is
// off; so the parts of one Output may be carried out in any order, or at once.
type Output struct {
	Holds     []Hold     // one per VIP, in the order of the configuration
	Broadcast *Heartbeat // for every peer
	Reply     *Heartbeat // the ack for the heartbeat of this event
	Writes    []Write
	Moves     []MoveProgress
	Changes   []Change
	Probes    []string           // VIPs to look for on the segment, each answered by a Probed
	Announce  []string           // VIPs to announce again now: somebody else did
	Silent    map[string]Instant // members not heard for S, each with when it was last heard
	Wake      Instant            // step again then at the latest
	Stopped   bool               // after Shutdown: nothing is held or owned any more
}

// Hold is the desired state of one address.
type Hold struct {
	VIP   string
	On    bool
	Gen   uint64  // grows whenever On changes
	Until Instant // On only: take it off then, unless told otherwise before
	Epoch int64
	Right Right
	// Planned: off because the VIP goes to another member in order, which is Peer. With
	// On, Peer is the member that gave it away in order; empty where it was taken.
	Planned bool
	Peer    string
}

// Phase is how far a move has come.
type Phase int

// The zero Phase is invalid.
const (
	_ Phase = iota
	// Accepted: the owner has taken the order.
	Accepted
	// Recorded: the store names the target.
	Recorded
	// Released: the old owner's kernel no longer has the address.
	Released
	// HeldByTarget: the target's kernel has it. The last phase.
	HeldByTarget
	// Failed: the owner goes on owning it; Err says why.
	Failed
)

// MoveProgress is one phase of a move.
type MoveProgress struct {
	ID       uint64
	VIP      string
	From, To string
	Phase    Phase
	Epoch    int64
	Err      Refusal // Failed only
}

// Refusal is why a member does not do what it was asked.
type Refusal int

const (
	// NotRefused is the zero value.
	NotRefused Refusal = iota
	// UnknownVIP is not in the configuration.
	UnknownVIP
	// UnknownMember is not in the configuration.
	UnknownMember
	// NotOwner has no right to the VIP, so it cannot give it away.
	NotOwner
	// NotEligible is the target: away, not ready, a witness, or not eligible.
	NotEligible
	// NoCandidate is there to take it.
	NoCandidate
	// Busy with another move of the same VIP.
	Busy
	// StoreSilent is a store that does not answer.
	StoreSilent
	// Superseded by a change of the record under the move.
	Superseded
)

// String says it for people.
func (r Refusal) String() string {
	names := [...]string{"not refused", "unknown VIP", "unknown member", "not the owner", "target not eligible",
		"no other candidate", "another move is in progress", "the store does not answer", "the record changed meanwhile"}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("Refusal(%d)", int(r))
}

// Error makes a Refusal an error.
func (r Refusal) Error() string { return r.String() }

// Change is a step in a VIP's life worth telling an operator: a new owner, or a new
// right of this member.
type Change struct {
	VIP   string
	Owner string
	Epoch int64
	Right Right // this member's
	Text  string
}

func (g Grant) sameAttempt(o Grant) bool {
	return g.To == o.To && g.ToBoot == o.ToBoot && g.Attempt == o.Attempt && g.Revision == o.Revision
}
