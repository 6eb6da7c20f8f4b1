package ownership

// faultSet names rules of the protocol that a machine leaves out. The product leaves out
// none: only the tests set it, to show that the simulation notices the loss of each rule.
// Read the other way round it lists the rules, and where each of them lives.
type faultSet uint64

const (
	// Confirmation and right.

	// countFromAck: a confirmation counts from when the ack arrives, not from when the
	// heartbeat it answers was sent (takeAck).
	countFromAck faultSet = 1 << iota
	// unreadyConfirms: the ack of a member that has not read the records counts (takeAck).
	unreadyConfirms
	// opposedConfirms: the ack of a member whose grant to another stands counts (takeAck).
	opposedConfirms
	// selfAlwaysCounts: so does the owner itself after such a grant of its own (byMajority).
	selfAlwaysCounts
	// epochNotHeeded: records are learned from the store alone, never from heartbeats (receive).
	epochNotHeeded
	// lateYesCounts: a rewrite counts from its answer, not from when it was sent (takeResult).
	lateYesCounts
	// leaseFromAnswer: so does a keep-alive of the lease (Step).
	leaseFromAnswer
	// claimsForEver: an owner without a store claims whatever is granted against it (mayClaim).
	claimsForEver
	// earlierLifeCounts: a record of an earlier life is as good as one of this (mine).
	earlierLifeCounts

	// Hearing.

	// olderBootHeard: heartbeats of a life that is over are taken (receive).
	olderBootHeard
	// lowerSequenceHeard: an overtaken heartbeat replaces the newer one (receive).
	lowerSequenceHeard
	// stallTrusted: silence during the listener's own stall counts (distrustStall).
	stallTrusted
	// startNotWaited: so does silence before the listener's start (quietSince).
	startNotWaited
	// lateWordBelieved: a guard's word about a life before the present one counts (takeWithdrawal).
	lateWordBelieved

	// Grants and the swap.

	// grantForgotten: a grant ends when the owner is heard to claim again (keepGrants).
	grantForgotten
	// sentSwapHandedBack: an attempt is handed back although its swap was sent (swap).
	sentSwapHandedBack
	// holderGrants: a member grants while it claims or holds the VIP itself (grant).
	holderGrants
	// claimOverheard: a candidate that hears a claim goes on (campaign).
	claimOverheard
	// silentStoreAsks: a candidate whose store does not answer asks (campaign).
	silentStoreAsks
	// revisionNotAwaited: the revision need not have been unchanged for S (swap).
	revisionNotAwaited
	// bootsNotCompared: the swap does not compare its granters' boot keys (swap).
	bootsNotCompared

	// Moves.

	// prevTakenAsSettled: the former owner's withdrawal is not waited for (settle).
	prevTakenAsSettled
	// staleWordSettles: any word of not holding settles, also one from before the move (settle).
	staleWordSettles
	// anyGuardSettles: so does a guard's word about an earlier life of the former owner (settle).
	anyGuardSettles
	// prevDropped: a rewrite drops the former owner before it is settled (keepRecord).
	prevDropped
	// withdrawnEarly: a holder says that it has withdrawn before its kernel has (heartbeat).
	withdrawnEarly
	// unansweredFailed: a move without an answer is taken as failed (moveAnswered).
	unansweredFailed
)

func (s faultSet) has(f faultSet) bool { return s&f != 0 }

// instead returns what the rule says, or with the fault what it forbids.
func (s faultSet) instead(f faultSet, rule, wrong Instant) Instant {
	if s.has(f) {
		return wrong
	}
	return rule
}
