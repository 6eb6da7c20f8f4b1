package affinity

import (
	"math"
	"net/netip"
)

// Floor is how many connections a backend may have however few the others have. Up to
// there affinity alone decides, so that a small cluster's clients stay where they are.
const Floor = 32

// rampFloor takes its place while any candidate ramps up: all clients of those come to the
// others then, and a server that has just started would be left without any for as long as
// clients keep their connections. So few are no load for any server.
const rampFloor = 4

// Candidate is a backend as it stands when a client has to be sent to one.
type Candidate struct {
	Backend
	// Load is the number of its connections.
	Load int
	// Ramp is the share of its clients that it gets as yet, 0 to 1, less than 1 while it
	// comes back from an illness.
	Ramp float64
	// Avoid: take any other one rather.
	Avoid bool
}

// Choose returns the index of the candidate for a client: the first in rank that is
// not full, does not ramp up without this client, and is not to be avoided; where there
// is none such, the first that is not full and not to be avoided, then the first that is not
// to be avoided; and else the first in rank. It returns -1 where there is no candidate.
//
// A candidate is full at factor times its share, by weight, of all connections, the new
// one included, and never below Floor, or below a few where any candidate ramps up; a factor
// below 1 means that none is ever full.
// Mirrokni, Thorup and Zadimoghaddam ("Consistent Hashing with Bounded Loads", 2016) show
// that few clients move for that.
func Choose(client netip.Addr, candidates []Candidate, factor float64) int {
	connections, weights, floor := 1, 0, Floor
	for _, c := range candidates {
		connections += c.Load
		weights += max(c.Weight, 0)
		if c.Ramp < 1 {
			floor = rampFloor
		}
	}
	h := newHasher(client)
	var best [4]standing // of the wanted, those that are not full, the bearable, and of all
	chosen := [4]int{-1, -1, -1, -1}
	for i := range candidates {
		c := &candidates[i]
		s := h.standing(c.Backend)
		grade := 0
		switch {
		case c.Avoid:
			grade = 3
		case factor >= 1 && c.Load >= bound(c.Weight, weights, connections, factor, floor):
			grade = 2
		case c.Ramp < 1 && lot(s) >= c.Ramp:
			grade = 1
		}
		for ; grade < len(chosen); grade++ {
			if chosen[grade] < 0 || s.compare(best[grade]) < 0 {
				chosen[grade], best[grade] = i, s
			}
		}
	}
	for _, i := range chosen {
		if i >= 0 {
			return i
		}
	}
	return -1
}

// bound is how many connections a backend may have.
func bound(weight, weights, connections int, factor float64, floor int) int {
	share := float64(max(weight, 0)) / float64(max(weights, 1))
	return max(floor, int(math.Ceil(factor*share*float64(connections))))
}

// lot is where a client stands in the line for a backend that ramps up, 0 to 1. It stays
// the same, so that no client goes to and fro.
func lot(s standing) float64 {
	return float64(mix(s.score)>>11) / (1 << 53)
}
