package affinity

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

var three = []Backend{{"10.77.0.11:6443", 1}, {"10.77.0.12:6443", 1}, {"10.77.0.13:6443", 1}}

// consecutive returns n addresses from first on.
func consecutive(first string, n int) []netip.Addr {
	addrs := make([]netip.Addr, 0, n)
	for a := netip.MustParseAddr(first); len(addrs) < n; a = a.Next() {
		addrs = append(addrs, a)
	}
	return addrs
}

func TestRankSharesEvenly(t *testing.T) {
	subnets := map[string][]netip.Addr{
		"one /22":        consecutive("10.77.0.1", 1000),
		"another /22":    consecutive("192.168.4.1", 1000),
		"IPv6 addresses": consecutive("2001:db8::1", 1000),
		"four /24": slices.Concat(consecutive("10.1.0.1", 250), consecutive("10.2.0.1", 250),
			consecutive("172.16.9.1", 250), consecutive("192.168.0.1", 250)),
	}
	for name, clients := range subnets {
		t.Run(name, func(t *testing.T) {
			var share [3]int
			for _, c := range clients {
				share[Rank(c, three)[0]]++
			}
			for i, n := range share {
				if n < 300 || n > 366 {
					t.Errorf("backend %d has %d of 1000 clients; want a third, give or take a tenth", i, n)
				}
			}
			t.Log(share)
		})
	}
}

// Not only the one set of addresses that people write down: nearly any.
func TestRankSharesEvenlyAlmostAlways(t *testing.T) {
	uneven := 0
	for subnet := range 200 {
		first := netip.AddrFrom4([4]byte{10, byte(subnet), byte(4 * subnet), 1})
		var share [3]int
		for _, c := range consecutive(first.String(), 1000) {
			share[Rank(c, three)[0]]++
		}
		if slices.Min(share[:]) < 300 || slices.Max(share[:]) > 366 {
			uneven++
		}
	}
	if uneven > 2 {
		t.Errorf("%d of 200 sets of clients are shared unevenly", uneven)
	}
}

func TestPermute(t *testing.T) {
	for key := range uint64(1000) {
		var seen [256]bool
		for x := range 256 {
			seen[permute(byte(x), mix(key))] = true
		}
		if slices.Contains(seen[:], false) {
			t.Fatalf("with key %d not every byte is hit", key)
		}
	}
}

func TestRankHonoursWeights(t *testing.T) {
	weighted := []Backend{{"a:1", 1}, {"b:1", 3}, {"c:1", 0}}
	var share [3]int
	clients := consecutive("10.77.0.0", 20000)
	for _, c := range clients {
		order := Rank(c, weighted)
		share[order[0]]++
		if order[2] != 2 {
			t.Fatalf("client %v: order %v; the backend without weight is not last", c, order)
		}
	}
	if share[0] < 4700 || share[0] > 5300 {
		t.Errorf("shares %v of 20000; want 5000, 15000, 0", share)
	}
}

// Every version of the program, on every machine, must give these answers.
func TestRankGolden(t *testing.T) {
	weighted := []Backend{{"10.77.0.11:6443", 2}, {"[fd00::12]:6443", 5}, {"10.77.0.13:6443", 0}, {"10.77.0.14:443", 1}}
	tests := []struct {
		client   string
		backends []Backend
		want     []int
	}{
		{"10.77.0.50", three, []int{2, 0, 1}},
		{"::ffff:10.77.0.50", three, []int{2, 0, 1}},
		{"192.168.1.7", three, []int{2, 1, 0}},
		{"2001:db8::7", three, []int{1, 2, 0}},
		{"fe80::7%eth0", three, []int{1, 2, 0}},
		{"fe80::7%lan1", three, []int{1, 2, 0}},
		{"10.77.0.52", weighted, []int{1, 3, 0, 2}},
		{"10.77.0.51", weighted, []int{1, 0, 3, 2}},
		{"2001:db8::7", weighted, []int{1, 0, 3, 2}},
		{"10.77.0.50", nil, []int{}},
	}
	for _, tt := range tests {
		if got := Rank(netip.MustParseAddr(tt.client), tt.backends); !slices.Equal(got, tt.want) {
			t.Errorf("Rank(%s, %v) = %v, want %v", tt.client, tt.backends, got, tt.want)
		}
	}
}

func TestRankProperties(t *testing.T) {
	addr := rapid.Custom(func(t *rapid.T) netip.Addr {
		if rapid.Bool().Draw(t, "IPv4") {
			return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address")))
		}
		return netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "address")))
	})
	backend := rapid.Custom(func(t *rapid.T) Backend {
		return Backend{
			Key:    netip.AddrPortFrom(addr.Draw(t, "address"), rapid.Uint16().Draw(t, "port")).String(),
			Weight: rapid.IntRange(-1, 5).Draw(t, "weight"),
		}
	})
	keys := func(order []int, of []Backend) []string {
		var names []string
		for _, i := range order {
			names = append(names, of[i].Key)
		}
		return names
	}
	rapid.Check(t, func(t *rapid.T) {
		client := addr.Draw(t, "client")
		backends := rapid.SliceOfNDistinct(backend, 1, 8, func(b Backend) string { return b.Key }).Draw(t, "backends")
		want := keys(Rank(client, backends), backends)

		if got := keys(Rank(client, backends), backends); !slices.Equal(got, want) {
			t.Fatalf("called again: %v, want %v", got, want)
		}
		if got := keys(Rank(netip.AddrFrom16(client.As16()), backends), backends); !slices.Equal(got, want) {
			t.Fatalf("mapped: %v, want %v", got, want)
		}
		shuffled := rapid.Permutation(backends).Draw(t, "shuffled")
		if got := keys(Rank(client, shuffled), shuffled); !slices.Equal(got, want) {
			t.Fatalf("in another order: %v, want %v", got, want)
		}
		lost := rapid.IntRange(0, len(backends)-1).Draw(t, "lost")
		left := slices.Delete(slices.Clone(backends), lost, lost+1)
		rest := slices.DeleteFunc(slices.Clone(want), func(key string) bool { return key == backends[lost].Key })
		if got := keys(Rank(client, left), left); !slices.Equal(got, rest) {
			t.Fatalf("without %s: %v, want %v", backends[lost].Key, got, rest)
		}
	})
}

func BenchmarkRank(b *testing.B) {
	client := netip.MustParseAddr("10.77.0.50")
	for b.Loop() {
		Rank(client, three)
	}
}
