package affinity

import (
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// candidates are n backends, all of them wanted.
func candidates(n int) []Candidate {
	all := make([]Candidate, n)
	for i := range all {
		all[i] = Candidate{Backend: Backend{Key: fmt.Sprintf("10.77.0.%d:6443", 11+i), Weight: 1}, Ramp: 1}
	}
	return all
}

var someClient = rapid.Custom(func(t *rapid.T) netip.Addr {
	return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "client")))
})

// Where nothing speaks against any, the choice is the first in rank.
func TestChooseIsTheFirstInRank(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := candidates(rapid.IntRange(1, 8).Draw(t, "backends"))
		backends := make([]Backend, len(all))
		for i := range all {
			all[i].Weight = rapid.IntRange(1, 4).Draw(t, "weight")
			all[i].Load = rapid.IntRange(0, Floor-1).Draw(t, "load")
			backends[i] = all[i].Backend
		}
		client := someClient.Draw(t, "client")
		want := Rank(client, backends)[0]
		if got := Choose(client, all, 1.5); got != want {
			t.Fatalf("chose %d, want %d", got, want)
		}
		if got := Choose(client, all, 1.5); got != want {
			t.Fatalf("asked again: %d, want %d", got, want)
		}
	})
	if got := Choose(netip.MustParseAddr("10.0.0.1"), nil, 1.5); got != -1 {
		t.Errorf("of none: %d", got)
	}
}

// Whoever comes, in whatever order: no backend gets above its bound, and no client is
// sent on from a backend that has room.
func TestChooseHoldsTheBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := candidates(rapid.IntRange(1, 6).Draw(t, "backends"))
		weights := 0
		for i := range all {
			all[i].Weight = rapid.IntRange(1, 5).Draw(t, "weight")
			weights += all[i].Weight
		}
		floor := Floor
		if rapid.Bool().Draw(t, "some ramp up") {
			floor = rampFloor
			all[0].Ramp = rapid.Float64Range(0, 0.99).Draw(t, "ramp")
			for i := range all[1:] {
				all[1+i].Ramp = rapid.SampledFrom([]float64{0, 0.5, 1}).Draw(t, "ramp")
			}
		}
		factor := rapid.Float64Range(1.1, 4).Draw(t, "factor")
		clients := rapid.SliceOfN(someClient, 1, 5).Draw(t, "clients") // few, so that they crowd
		total := 0
		for range 600 {
			client := clients[rapid.IntRange(0, len(clients)-1).Draw(t, "which")]
			i := Choose(client, all, factor)
			first := Choose(client, all, 0)
			total++
			limit := func(c Candidate) int { return bound(c.Weight, weights, total, factor, floor) }
			if i != first && floor == Floor && all[first].Load < limit(all[first]) {
				t.Fatalf("a client was sent on from a backend with %d connections, less than %d", all[first].Load, limit(all[first]))
			}
			all[i].Load++
			if all[i].Load > limit(all[i]) {
				t.Fatalf("backend %d has %d of %d connections, more than %d", i, all[i].Load, total, limit(all[i]))
			}
		}
	})
}

// Least movement: whatever happens to one backend moves no client between two others that
// have room.
func TestChooseMovesFew(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := candidates(rapid.IntRange(2, 8).Draw(t, "backends"))
		client := someClient.Draw(t, "client")
		before := Choose(client, all, 1.5)
		sick := rapid.IntRange(0, len(all)-1).Draw(t, "sick")
		switch rapid.IntRange(0, 2).Draw(t, "how") {
		case 0:
			all[sick].Avoid = true
		case 1:
			all[sick].Ramp = rapid.Float64Range(0, 0.99).Draw(t, "ramp")
		case 2:
			all[sick].Load = 1000
		}
		after := Choose(client, all, 1.5)
		if before != sick && after != before {
			t.Fatalf("a client of %d came to %d when %d became sick", before, after, sick)
		}
	})
}

// A backend that comes back gets more and more clients, and none that goes away again.
func TestChooseRampsUp(t *testing.T) {
	all := candidates(3)
	clients := consecutive("10.77.0.1", 1000)
	came := map[netip.Addr]bool{}
	for step := 0; step <= 10; step++ {
		all[1].Ramp = float64(step) / 10
		n := 0
		for _, c := range clients {
			chosen := Choose(c, all, 0) == 1
			if came[c] && !chosen {
				t.Fatalf("client %v went away again", c)
			}
			came[c] = chosen
			if chosen {
				n++
			}
		}
		if want := 333 * step / 10; n < want-50 || n > want+50 {
			t.Errorf("at %v it has %d clients, want about %d", all[1].Ramp, n, want)
		}
	}
}

// One that is full is a worse choice than one that ramps up; and of those that ramp up and are
// not full it is the first in rank, so that clients do not go to and fro.
func TestChooseFullIsWorseThanRampingUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := candidates(rapid.IntRange(2, 6).Draw(t, "backends"))
		old := rapid.IntRange(0, len(all)-1).Draw(t, "old")
		backends := make([]Backend, len(all))
		for i := range all {
			backends[i] = all[i].Backend
			if i != old {
				all[i].Ramp, all[i].Load = 0, rapid.IntRange(0, 1).Draw(t, "load")
			}
		}
		all[old].Load = rapid.IntRange(2*rampFloor+len(all), 1000).Draw(t, "crowd")
		client := someClient.Draw(t, "client")
		want := -1
		for _, i := range Rank(client, backends) {
			if i != old {
				want = i
				break
			}
		}
		if got := Choose(client, all, 1.5); got != want {
			t.Fatalf("chose %d, want %d", got, want)
		}
		if got := Choose(client, all, 0); got != old {
			t.Fatalf("without a bound it chose %d, want the one that does not ramp up, %d", got, old)
		}
	})
}

func TestChooseAvoids(t *testing.T) {
	all := candidates(3)
	client := netip.MustParseAddr("10.77.0.50")
	all[0].Load, all[1].Avoid, all[2].Ramp = 1000, true, 0
	all[0].Load = 1000
	if got := Choose(client, all, 1.5); got == 1 {
		t.Error("chose the one to avoid before one that is full and one that ramps up")
	}
	all[0].Avoid, all[2].Avoid = true, true
	if got, want := Choose(client, all, 1.5), Rank(client, []Backend{all[0].Backend, all[1].Backend, all[2].Backend})[0]; got != want {
		t.Errorf("all are to be avoided: chose %d, want the first in rank, %d", got, want)
	}
}

func BenchmarkChoose(b *testing.B) {
	all := candidates(3)
	client := netip.MustParseAddr("10.77.0.50")
	b.ReportAllocs()
	for b.Loop() {
		Choose(client, all, 1.5)
	}
}
