package ownership

import "testing"

// mutations leave out one rule each. Random worlds meet most of them too rarely, so each
// has the script of a world that turns on its rule: with the rule the script ends as
// expected from every seed, without it a breach must show within the budget.
var mutations = []struct {
	name   string
	fault  faultSet
	budget uint64 // seeds
	script string
}{
	{"a confirmation counts from when the ack arrives", countFromAck, 10, `
store cut cp-1
lag cp-3 -> cp-1 180ms
cut cp-1 -> cp-2
run 1s..1200ms
cut cp-1 -> cp-3
run 1s
expect holder cp-2`},
	{"an ack counts before its sender has read the records", unreadyConfirms, 10, `
members 3 witness=cp-3
start all
run 2s
store cut cp-1
store late cp-2 500ms
isolate cp-1
run 500ms
store cut cp-3
restart cp-3
mend
run 2s`},
	{"an ack with a standing grant counts", opposedConfirms, 10, grantWhileSwapIsLate},
	{"the owner counts itself although it granted the VIP away", selfAlwaysCounts, 10, `
members 3 external witness=cp-3
start all
run 2s
store cut cp-1
store late cp-1 3s
store late cp-2 400ms
cut cp-2 -> cp-3
isolate cp-1
run 450ms
join cp-1 cp-2
run 110ms
store mend cp-1
join cp-1 cp-3
run 150ms
join cp-2 cp-3
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
run 2s`},
	{"a higher epoch in a heartbeat ends no right", epochNotHeeded, 5, `
store lose 1
move cp-2
run 60ms
store lose 0
store cut cp-1
run 1s
expect holder cp-2`},
	{"a rewrite's late answer confers a right", lateYesCounts, 10, `
members 3 external
start all
run 2s
isolate cp-1
run 1s
store slow cp-1 250ms
run 3s`},
	{"the lease's deadline counts from the answer", leaseFromAnswer, 10, `
store slow cp-1 240ms
run 2s..2500ms
store starve cp-1
run 500ms
store slow cp-1 0s
run 4s`},
	{"an owner without a store claims for ever", claimsForEver, 10, `
store cut cp-1
isolate cp-1
run 290ms
store drop 1
run 150ms
store drop 0
mend
run 3s
expect holder cp-2`},
	{"a record of an earlier life counts", earlierLifeCounts, 10, `
members 3 witness=cp-3
start all
run 2s
store late cp-1 500ms
store cut cp-2
run 500ms
move cp-2
run 5ms
restart cp-1
run 80ms
store slow cp-1 2s
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
run 2s`},
	{"older boots are heard", olderBootHeard, 10, `
lag cp-1 -> cp-2 200ms
lag cp-1 -> cp-3 200ms
run 1s
mend
store cut cp-1
restart cp-1
run 20ms
power-cut cp-1
run 430ms
expect somebody`},
	{"lower sequence numbers are heard", lowerSequenceHeard, 10, `
members 3 witness=cp-3
start all
run 2s
store cut cp-1
store late cp-2 1s
isolate cp-1
run 180ms
lag cp-2 -> cp-3 300ms
run 110ms
lag cp-2 -> cp-3 0s
run 180ms
join cp-1 cp-2
join cp-1 cp-3
run 500ms
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
run 2s`},
	{"silence during the listener's own stall counts", stallTrusted, 10, `
members 3 fast
start all
run 2s
move cp-1
run 1s
store cut cp-1
run 500ms
stall cp-1 150ms
stall cp-2 150ms
stall cp-3 150ms
run 2s
expect holder cp-1`},
	{"a granter does not wait S after its own start", startNotWaited, 10, `
members 3
start all
run 2s
move cp-1
run 1s
store cut cp-1
cut cp-1 -> cp-2
run 800ms
cut cp-1 -> cp-3
restart cp-3
run 1s`},
	{"a guard's word about an earlier life counts", lateWordBelieved, 20, `
lag cp-1 -> cp-2 1500ms
lag cp-1 -> cp-3 1500ms
kill cp-1
run 5ms
mend
start cp-1
run 500ms
move cp-1
run 3s
expect holder cp-1`},
	{"a grant is forgotten when the owner is heard again", grantForgotten, 10, grantWhileSwapIsLate},
	{"an attempt is handed back although its swap was sent", sentSwapHandedBack, 10, grantWhileSwapIsLate},
	{"a holder grants", holderGrants, 5, `
store cut cp-1
cut cp-1 -> cp-2
run 2s
expect holder cp-1`},
	{"a candidate that hears a claim goes on", claimOverheard, 10, `
members 3 witness=cp-3
start all
run 2s
store cut cp-1
cut cp-1 -> cp-2
run 600ms
mend
run 300ms
cut cp-1 -> cp-3
run 600ms
expect holder cp-1`},
	{"a candidate whose store is silent asks", silentStoreAsks, 5, `
store down
run 1s
isolate cp-1
run 700ms
mend
run 1s
expect holder cp-1`},
	{"unchanged for S is not waited for", revisionNotAwaited, 10, `
members 3 external
start all
run 2s
isolate cp-1
run 2s
expect holder cp-1`},
	{"boot keys are not compared", bootsNotCompared, 10, `
members 3 witness=cp-3
start all
run 2s
store cut cp-1
store late cp-2 600ms
isolate cp-1
run 520ms
restart cp-3
mend
run 100ms
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
run 2s`},
	{"prev is taken as settled", prevTakenAsSettled, 10, `
store slow cp-1 200ms
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
move cp-2
run 2s`},
	{"a word from before the move settles prev", staleWordSettles, 10, `
members 3 preferred=cp-3
start all
run 2s
cut cp-1 -> cp-2
move cp-1
run 1s
store slow cp-1 200ms
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
move cp-2
run 2s`},
	{"the guard's word about any life settles prev", anyGuardSettles, 10, `
kill cp-1
run 500ms
start cp-1
run 1s
move cp-1
run 1s
store slow cp-1 200ms
lag cp-2 -> cp-1 100ms
lag cp-3 -> cp-1 100ms
move cp-2
run 2s`},
	{"a rewrite drops prev before it is settled", prevDropped, 10, `
store slow cp-1 250ms
move cp-2
run 255ms..265ms
isolate cp-1
restart cp-2
run 1s`},
	{"a holder says withdrawn before its kernel has", withdrawnEarly, 10, `
kernel 20ms
move cp-2
run 1s
expect holder cp-2`},
	{"an unanswered move is taken as failed", unansweredFailed, 10, `
store late cp-1 1500ms
move cp-2
run 4s`},
}

// grantWhileSwapIsLate: the owner is cut off until a swap is on its way, and is back, with
// its store, before that arrives.
const grantWhileSwapIsLate = `
members 3 witness=cp-3
start all
run 2s
store cut cp-1
store late cp-1 3s
store late cp-2 500ms
isolate cp-1
run 500ms
mend
store mend cp-1
run 2s`

const threeMembers = "members 3\nstart all\nrun 2s\nexpect holder cp-1"

// TestMutations shows that leaving out any one rule is noticed.
func TestMutations(t *testing.T) {
	for _, mutation := range mutations {
		t.Run(mutation.name, func(t *testing.T) {
			script := mutation.script[1:]
			if script[:7] != "members" {
				script = threeMembers + mutation.script
			}
			caught, said := uint64(0), ""
			for seed := uint64(1); seed <= mutation.budget; seed++ {
				if said, err := runScript(script, seed, 0); err != nil {
					t.Fatalf("with the rule, seed %d: %v\n%s", seed, err, said)
				}
				var err error
				if said, err = runScript(script, seed, mutation.fault); caught == 0 && err != nil {
					caught = seed
					t.Logf("seed %d: %v", seed, err)
				}
			}
			if caught == 0 {
				t.Errorf("not caught by %d seeds; the last one said\n%s", mutation.budget, said)
			}
		})
	}
}
