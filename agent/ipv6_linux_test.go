package agent_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// advertisement is an unsolicited neighbour advertisement of the VIP that came to the client.
type advertisement struct {
	at      time.Time
	speaker net.HardwareAddr
}

// advertisements hears them until the test ends. What is solicited, does not override what
// neighbours know, or is not for all of them, is no announcement (RFC 4861, 7.2.6).
func advertisements(t *testing.T, m *lab.Mesh) (heard func() []advertisement) {
	t.Helper()
	var conn *packet.Conn
	if err := m.Client.Host.Do(func() error {
		i, err := net.InterfaceByName(m.Client.Port.Interface)
		if err != nil {
			return err
		}
		conn, err = packet.Listen(i, packet.Raw, unix.ETH_P_IPV6, nil)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var all []advertisement
	var group sync.WaitGroup
	t.Cleanup(func() {
		conn.Close()
		group.Wait()
	})
	group.Go(func() {
		// Offsets behind an Ethernet header: RFC 8200, 3 and RFC 4861, 4.4.
		const nextHeader, destination, kind, flags, target, end = 14 + 6, 14 + 24, 54, 58, 62, 78
		const override, solicited = 0x20, 0x40
		nodes := netip.MustParseAddr("ff02::1").As16()
		vip := m.VIP().Addr().As16()
		for b := make([]byte, 2048); ; {
			n, _, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			if n < end || b[nextHeader] != unix.IPPROTO_ICMPV6 || b[kind] != 136 || !bytes.Equal(b[target:end], vip[:]) ||
				b[flags]&(override|solicited) != override || !bytes.Equal(b[destination:destination+16], nodes[:]) {
				continue
			}
			mu.Lock()
			all = append(all, advertisement{time.Now(), bytes.Clone(b[6:12])})
			mu.Unlock()
		}
	})
	return func() []advertisement {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// announcedBy waits for a node's announcement after a moment, and fails where somebody else
// spoke later.
func announcedBy(t *testing.T, heard func() []advertisement, n *lab.Node, from time.Time) {
	t.Helper()
	if err := lab.Await(time.Second, func() error {
		last := -1
		all := heard()
		for i, a := range all {
			if a.at.After(from) && bytes.Equal(a.speaker, n.Port().MAC) {
				last = i
			}
		}
		if last < 0 {
			return fmt.Errorf("%s has not announced the VIP", n.Name)
		}
		if last != len(all)-1 {
			return fmt.Errorf("after %s, %v has announced the VIP", n.Name, all[len(all)-1].speaker)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// TestIPv6 walks a mesh that has no IPv4 at all through moves and a crash, with the promises
// of one that has.
func TestIPv6(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60, Segment: lab.IPv6})
	heard := advertisements(t, m)
	owner(t, m)
	healthy(t, m)
	agree(t, m)

	t.Run("planned moves", func(t *testing.T) {
		moveUnderLoad(t, m, m.VIP(), m.Client.Sources, m.Recorder, func(to *lab.Node) {
			from := time.Now()
			move(t, m, to)
			announcedBy(t, heard, to, from)
		})
	})

	t.Run("the owner's power is cut", func(t *testing.T) {
		giver := owner(t, m)
		w := openWatches(t, m, 200)
		time.Sleep(1500 * time.Millisecond) // the others know of them
		run := load(t, m, lab.Load{Rate: 100})
		time.Sleep(500 * time.Millisecond)
		cut := time.Now()
		if err := giver.PowerOff(); err != nil {
			t.Fatal(err)
		}
		middle, last := w.after(t, cut)
		next := owner(t, m)
		announcedBy(t, heard, next, cut)
		r := stop(t, run, cut)
		h := never(t, m, cut, time.Second)
		t.Logf("after the cut: no holder for %v; half of the idle clients know %v, all %v; longest gap of new connections %v, failed %d of %d %v",
			h.LongestNone, middle, last, r.Gap, r.Failed, r.Requests, r.Errors)
		if last > 3*time.Second {
			t.Errorf("the last idle client knew %v after the cut", last)
		}
		if limit := leaseTTL + 1500*time.Millisecond; r.Gap > limit {
			t.Errorf("no answer for %v, more than %v", r.Gap, limit)
		}
		if err := giver.PowerOn(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	})

	t.Run("a link is cut", func(t *testing.T) {
		victim := owner(t, m)
		run := load(t, m, lab.Load{Rate: 100})
		time.Sleep(300 * time.Millisecond)
		cut := time.Now()
		if err := victim.Port().Cut(); err != nil {
			t.Fatal(err)
		}
		if err := lab.Await(5*time.Second, func() error {
			if now := m.Recorder.Now(); len(now) != 1 || now[0] == victim.Name {
				return fmt.Errorf("the kernels with the address are those of %v", now)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
		announcedBy(t, heard, m.Node(m.Recorder.Now()[0]), cut)
		r := stop(t, run, cut)
		h := never(t, m, cut, leaseTTL)
		t.Logf("after the cut: no holder for %v; longest gap %v, failed %d of %d %v", h.LongestNone, r.Gap, r.Failed, r.Requests, r.Errors)
		if r.Gap > leaseTTL+1500*time.Millisecond {
			t.Errorf("no answer for %v", r.Gap)
		}
		if err := victim.Port().Mend(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	})
}

// TestDual moves the IPv6 VIP of members that reach each other by IPv4, and cuts the power of
// who has that and an IPv4 one.
func TestDual(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 20, Segment: lab.Dual})
	first := owner(t, m)
	healthy(t, m)
	moveSecond := func(to *lab.Node) {
		hactl(t, to, 0, "", "move-vip", "kube-api-6", "--to", to.Name, "--wait")
	}
	moveSecond(first)

	t.Run("planned moves", func(t *testing.T) {
		moveUnderLoad(t, m, m.SecondVIP(), m.Client.SecondSources, m.Second, moveSecond)
	})
	t.Run("the owner of both is cut", func(t *testing.T) {
		victim := owner(t, m)
		moveSecond(victim)
		cut := time.Now()
		if err := victim.PowerOff(); err != nil {
			t.Fatal(err)
		}
		if err := lab.Await(5*time.Second, func() error {
			for _, r := range []*lab.Recorder{m.Recorder, m.Second} {
				if now := r.Now(); len(now) != 1 || now[0] == victim.Name {
					return fmt.Errorf("the kernels with an address are those of %v", now)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, r := range []*lab.Recorder{m.Recorder, m.Second} {
			h := r.Between(cut, time.Now())
			t.Logf("no holder for %v", h.LongestNone)
			if h.Max > 1 || h.LongestNone > leaseTTL {
				t.Errorf("%d holders at once, none for %v", h.Max, h.LongestNone)
			}
		}
	})
}
