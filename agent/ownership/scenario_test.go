package ownership

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	seeds = flag.Uint64("seeds", 300, "how many seeds TestSimulation runs")
	seed  = flag.Uint64("seed", 0, "run only this seed, and print its conversation")
)

var (
	defaultTiming = Timing{Heartbeat: 100 * ms, HoldWindow: 300 * ms, SuspectAfter: 400 * ms, LeaseTTL: 3 * time.Second, Margin: 93 * ms}
	fastTiming    = Timing{Heartbeat: 20 * ms, HoldWindow: 60 * ms, SuspectAfter: 90 * ms, LeaseTTL: 2 * time.Second, Margin: 28 * ms}
)

// TestSimulation runs random faults against meshes of 1, 2, 3, 5 and 7 members and
// checks: never two rights at once; and once the faults stop, one holder in bounded time.
func TestSimulation(t *testing.T) {
	if *seed != 0 {
		w, err := runSeed(*seed, true)
		t.Log("\n" + w.conversation())
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	var next, simulated atomic.Uint64
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			for !t.Failed() {
				s := next.Add(1)
				if s > *seeds {
					return
				}
				w, err := runSeed(s, false)
				simulated.Add(uint64(w.now.Seconds()))
				if err != nil {
					t.Errorf("seed %d: %v\n%s\nreplay with: go test ./agent/ownership -run TestSimulation -seed=%d -v", s, err, w.conversation(), s)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d seeds, %d simulated seconds", *seeds, simulated.Load())
}

// runSeed runs one world of which everything follows from the seed.
func runSeed(seed uint64, keep bool) (*world, error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	members := []int{1, 2, 3, 3, 3, 5, 7}[rng.IntN(7)]
	timing := defaultTiming
	if rng.IntN(3) == 0 {
		timing = fastTiming
	}
	external := rng.IntN(3) == 0
	w := newWorld(seed, members, external, timing)
	w.keep = keep
	w.say("seed %d: %d members, external store %v, h=%v", seed, members, external, timing.Heartbeat)
	for w.now < 90*time.Second && w.failed == "" {
		w.run(w.now + time.Duration(rng.Int64N(int64(2*time.Second))))
		w.fault(rng)
	}
	w.heal()
	// Once faults stop: an etcd election where embedded, 3S, and the suspicion that
	// restarts begin with; where a lease has to run out, T and the sweep.
	bound := timing.LeaseTTL + 500*ms + 3*timing.SuspectAfter + 2*time.Second
	w.run(w.now + bound)
	if w.failed == "" && w.holder() == nil {
		w.fail("no single holder %v after the last fault", bound)
	}
	who := w.holder()
	w.run(w.now + 5*time.Second)
	if w.failed == "" && w.holder() != who {
		w.fail("the holder changed in peace")
	}
	if w.failed != "" {
		return w, fmt.Errorf("%s", w.failed)
	}
	return w, nil
}

// fault changes one thing about the world.
func (w *world) fault(rng *rand.Rand) {
	n := w.nodes[rng.IntN(len(w.nodes))]
	p := w.nodes[rng.IntN(len(w.nodes))]
	switch rng.IntN(16) {
	case 0, 1:
		if n.m != nil {
			n.crash(rng.IntN(2) == 0)
		}
	case 2, 3, 4:
		if n.m == nil {
			n.start()
		}
	case 5:
		w.say("cut %s - %s", n.name, p.name)
		w.cut[[2]int{n.id, p.id}], w.cut[[2]int{p.id, n.id}] = true, true
	case 6:
		w.say("cut %s -> %s", n.name, p.name)
		w.cut[[2]int{n.id, p.id}] = true
	case 7:
		w.say("%s isolated", n.name)
		for _, o := range w.nodes {
			w.cut[[2]int{n.id, o.id}], w.cut[[2]int{o.id, n.id}] = true, true
		}
	case 8, 9:
		w.say("links mended")
		clear(w.cut)
	case 10:
		w.store.up = !w.store.up
		w.say("store up %v", w.store.up)
	case 11:
		n.storeCut = !n.storeCut
		w.say("%s store cut %v", n.name, n.storeCut)
	case 12:
		if n.m != nil {
			// Longer than the margin is a SIGSTOP, which the kernel's lifetime bounds; it
			// is simulated as the stall of the machine alone, the keeper running.
			n.stalled = w.now + time.Duration(rng.Int64N(int64(3*w.cfg.Timing.SuspectAfter)))
			w.say("%s stalls until %.3fs", n.name, n.stalled.Seconds())
		}
	case 13:
		w.loss = []float64{0, 0, 0.05, 0.3}[rng.IntN(4)]
		w.delay = []time.Duration{2 * ms, 2 * ms, 20 * ms, 80 * ms}[rng.IntN(4)]
		w.store.lose = []float64{0, 0, 0.1, 0.5}[rng.IntN(4)]
		w.store.slow = []time.Duration{0, 0, 20 * ms, 150 * ms}[rng.IntN(4)]
		w.say("loss %.2f, delay %v, store loses %.1f, slow %v", w.loss, w.delay, w.store.lose, w.store.slow)
	case 14:
		n.elig = !n.elig
		w.say("%s eligible %v", n.name, n.elig)
		n.deliver(Eligibility{n.elig})
	case 15:
		w.say("order: move to %s", p.name)
		for _, o := range w.nodes {
			o.deliver(MoveOrder{ID: 1, VIP: "api", To: p.name})
		}
	}
}

// heal ends all faults at once.
func (w *world) heal() {
	w.say("all faults end")
	clear(w.cut)
	w.loss, w.delay, w.store.lose, w.store.slow, w.store.up = 0, 2*ms, 0, 0, true
	for _, n := range w.nodes {
		n.storeCut, n.stalled = false, 0
		if n.m == nil {
			n.start()
		}
		if !n.elig {
			n.elig = true
			n.deliver(Eligibility{true})
		}
	}
}
