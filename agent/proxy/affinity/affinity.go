package affinity

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/cespare/xxhash/v2"
)

// Backend is one place a client can be sent to.
type Backend struct {
	// Key is the backend's address as text, host:port. Names are a matter of each
	// node's configuration, the address is not: so every node gives the same answer.
	Key string
	// Weight is the backend's share among the others, 1 to about 1000 (the cost grows
	// with it). A backend of weight 0 or less comes after all others.
	Weight int
}

// Rank returns the indices of all backends, the best one for a valid client first. It is weighted
// rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit
// rates", 1998): the order of two backends depends on nothing but the client and
// those two, so losing a backend moves its own clients only, each to its next in rank.
//
// An IPv4-mapped IPv6 client counts as IPv4, and a zone is ignored: it names an
// interface of this host only.
func Rank(client netip.Addr, backends []Backend) []int {
	h := newHasher(client)
	standings := make([]standing, len(backends))
	order := make([]int, len(backends))
	for i, b := range backends {
		standings[i] = h.standing(b)
		order[i] = i
	}
	slices.SortFunc(order, func(i, j int) int { return standings[i].compare(standings[j]) })
	return order
}

// hasher draws for one client.
type hasher struct {
	client [16]byte
	first  int // byte of its address; the last one is the host's, those before the subnet's
}

func newHasher(client netip.Addr) hasher {
	h := hasher{client: client.As16()}
	if client.Unmap().Is4() {
		h.first = 12
	}
	return h
}

// standing is a backend's place in a client's order.
type standing struct {
	score    uint64
	key      string
	weighted bool
}

func (h hasher) standing(b Backend) standing {
	var room [80]byte
	subnet := append(append(room[:0], h.client[h.first:15]...), b.Key...)
	return standing{score(xxhash.Sum64(subnet), h.client[15], b.Weight), b.Key, b.Weight > 0}
}

// compare is negative where s comes before t.
func (s standing) compare(t standing) int {
	if s.weighted != t.weighted {
		if s.weighted {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(t.score, s.score), cmp.Compare(s.key, t.key))
}

// score is the best of weight draws, which gives each backend its share exactly. The
// usual logarithm gives the same shares, but floating point may round differently on
// another architecture, and then two nodes would disagree.
func score(subnet uint64, host byte, weight int) uint64 {
	best := draw(subnet, host)
	for range weight - 1 {
		subnet += 0x9e3779b97f4a7c15
		best = max(best, draw(subnet, host))
	}
	return best
}

// draw is uniform over 64 bits for each subnet and host. Besides, the 256 hosts of one
// subnet get 256 different top bytes: clients are few and have neighbouring addresses,
// and so their shares vary by a third less than by chance alone.
func draw(subnet uint64, host byte) uint64 {
	key := mix(subnet)
	return uint64(permute(host, key))<<56 | mix(key^uint64(host))>>8
}

// permute maps the 256 bytes one to one, in a way that depends on the key: each of its
// steps can be undone.
func permute(x byte, key uint64) byte {
	for ; key > 0; key >>= 16 {
		x = (x + byte(key)) * (byte(key>>8) | 1)
		x ^= x >> 4
	}
	return x
}

// mix is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable
// pseudorandom number generators", 2014).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
