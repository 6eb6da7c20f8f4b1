package announce

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// logged is what was logged.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), what)
}

// listener runs one for both VIPs on a node until the test ends.
func (s *segment) listener(p *lab.Port, capabilities uint32, log io.Writer) <-chan Foreign {
	s.t.Helper()
	foreign := make(chan Foreign, 256)
	l := NewListener(hclog.New(&hclog.LoggerOptions{Output: log}), ListenerConfig{
		Targets:   []Target{vip4, vip6},
		OnForeign: func(f Foreign) { foreign <- f },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- confined(p, capabilities, func() error { return l.Run(ctx) }) }()
	s.t.Cleanup(func() {
		cancel()
		check(s.t, <-done)
	})
	if capabilities == 0 {
		return foreign
	}
	for _, target := range []Target{vip4, vip6} {
		s.hears(foreign, target)
	}
	return foreign
}

// hears announces as a stranger until that is heard, and then waits for silence.
func (s *segment) hears(foreign <-chan Foreign, target Target) {
	s.t.Helper()
	say := s.speaker(s.seer, target)
	until(s.t, 5*time.Second, "listener hears", func() bool {
		say(Announcement, stranger)
		select {
		case f := <-foreign:
			return f.VIP == target.VIP
		case <-time.After(50 * ms):
			return false
		}
	})
	drain(foreign)
}

func drain(foreign <-chan Foreign) {
	for {
		select {
		case <-foreign:
		case <-time.After(50 * ms):
			return
		}
	}
}

// speaker returns a function that sends one frame to everybody: of a kind, or, with 0, a
// client's question for the address.
func (s *segment) speaker(p *lab.Port, target Target) func(Kind, net.HardwareAddr) {
	s.t.Helper()
	protocol := unix.ETH_P_ARP
	if target.Addr.Is6() {
		protocol = unix.ETH_P_IPV6
	}
	var c *packet.Conn
	must(s.t, p.Host.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		c, err = packet.Listen(ifi, packet.Datagram, protocol, nil)
		return err
	}))
	s.t.Cleanup(func() { check(s.t, c.Close()) })
	return func(kind Kind, mac net.HardwareAddr) {
		s.t.Helper()
		b, to := speech(s.t, target.Addr, kind, mac)
		_, err := c.WriteTo(b, &packet.Addr{HardwareAddr: to})
		must(s.t, err)
	}
}

func speech(t *testing.T, addr netip.Addr, kind Kind, mac net.HardwareAddr) (b []byte, to net.HardwareAddr) {
	t.Helper()
	if addr.Is4() {
		op, sender, target := arp.OperationRequest, client4, addr
		switch kind {
		case Announcement:
			sender = addr
		case Answer:
			op, sender, target = arp.OperationReply, addr, client4
		case Probing:
			sender = any4
		}
		p, err := arp.NewPacket(op, mac, sender, broadcast, target)
		must(t, err)
		b, err = p.MarshalBinary()
		must(t, err)
		return b, broadcast
	}
	group, err := ndp.SolicitedNodeMulticast(addr)
	must(t, err)
	g := group.As16()
	to = net.HardwareAddr{0x33, 0x33, g[12], g[13], g[14], g[15]}
	everybody := net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	na := advertisement(addr, kind == Answer)
	na.Options[0].(*ndp.LinkLayerAddress).Addr = mac
	switch kind {
	case Announcement:
		return ndPacket(t, na, netip.MustParseAddr("fe80::1"), netip.IPv6LinkLocalAllNodes()), everybody
	case Answer:
		return ndPacket(t, na, addr, netip.IPv6LinkLocalAllNodes()), everybody
	case Probing:
		return ndPacket(t, &ndp.NeighborSolicitation{TargetAddress: addr}, any6, group), to
	}
	asker := &ndp.LinkLayerAddress{Direction: ndp.Source, Addr: mac}
	return ndPacket(t, &ndp.NeighborSolicitation{TargetAddress: addr, Options: []ndp.Option{asker}}, client6, group), to
}

func nextForeign(t *testing.T, foreign <-chan Foreign) Foreign {
	t.Helper()
	select {
	case f := <-foreign:
		return f
	case <-time.After(5 * time.Second):
		t.Fatal("nothing heard within 5s")
		return Foreign{}
	}
}

func silent(t *testing.T, foreign <-chan Foreign, d time.Duration) {
	t.Helper()
	select {
	case f := <-foreign:
		t.Errorf("heard %+v", f)
	case <-time.After(d):
	}
}

func forBoth(t *testing.T, f func(t *testing.T, s *segment, target Target)) {
	families(t, func(t *testing.T, s *segment, target Target, _ func() <-chan frame) { f(t, s, target) })
}

func TestRealListenerHears(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		foreign := s.listener(s.one, netRaw, io.Discard) // no other capability is needed
		say := s.speaker(s.seer, target)
		for _, kind := range []Kind{Announcement, Answer, Probing} {
			mac := stranger
			if kind == Probing && target.Addr.Is6() {
				mac = s.seer.MAC // nothing but the frame's source names it
			}
			// A busy machine may delay one; not all of them.
			var after []time.Duration
			for range 5 {
				sent := time.Now()
				say(kind, mac)
				f := nextForeign(t, foreign)
				after = append(after, time.Since(sent))
				if f.VIP != target.VIP || f.Interface != "eth0" || f.Kind != kind || !bytes.Equal(f.MAC, mac) || f.At.Before(sent) {
					t.Errorf("heard %+v, want %v of %v", f, kind, mac)
				}
			}
			t.Logf("%v heard after %v", kind, after)
			if slices.Min(after) > 50*ms {
				t.Errorf("%v heard after %v", kind, after)
			}
		}
		say(0, stranger)
		silent(t, foreign, 100*ms)
	})
}

func TestRealListenerHearsAnnouncer(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		one := s.listener(s.one, netRaw, io.Discard)
		two := s.listener(s.two, netRaw, io.Discard)
		drain(one) // what two was made to hear
		a, _ := s.announcer(s.two, netRaw)
		a.Start(target, 1)
		for range 3 {
			if f := nextForeign(t, one); f.Kind != Announcement || !bytes.Equal(f.MAC, s.two.MAC) {
				t.Errorf("heard %+v", f)
			}
		}
		silent(t, two, 100*ms) // it is its own

		// A switch that sends a node its own frames back.
		s.speaker(s.seer, target)(Announcement, s.two.MAC)
		silent(t, two, 100*ms)
	})
}

func TestRealListenerHearsKernels(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		foreign := s.listener(s.one, netRaw, io.Discard)
		put(t, s.two, target, (*netlink.Handle).AddrAdd)
		mac, err := s.probe(s.one, netRaw, target)
		must(t, err)
		if !bytes.Equal(mac, s.two.MAC) {
			t.Errorf("probe answered by %v, want %v", mac, s.two.MAC)
		}
		if f := nextForeign(t, foreign); f.Kind != Answer || !bytes.Equal(f.MAC, s.two.MAC) {
			t.Errorf("heard %+v", f)
		}
		drain(foreign)
		if target.Addr.Is4() {
			return
		}
		// The kernel's own duplicate address detection, which the lab turns off.
		must(t, s.two.Host.Sysctl("net/ipv6/conf/eth0/accept_dad", "1"))
		put(t, s.two, target, (*netlink.Handle).AddrDel)
		must(t, s.two.Host.Netlink().AddrAdd(link(t, s.two), &netlink.Addr{
			IPNet: &net.IPNet{IP: target.Addr.AsSlice(), Mask: net.CIDRMask(128, 128)},
		}))
		if f := nextForeign(t, foreign); f.Kind != Probing || !bytes.Equal(f.MAC, s.two.MAC) {
			t.Errorf("heard %+v", f)
		}
	})
}

// TestRealListenerSleepsThroughQuestions counts what the kernel hands over, and says what
// a frame costs with an ear open and without.
func TestRealListenerSleepsThroughQuestions(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		say := s.speaker(s.seer, target)
		const questions = 10_000
		burst := func() time.Duration {
			before := cpu(t)
			for range questions {
				say(0, s.seer.MAC)
			}
			return cpu(t) - before
		}
		without := burst()
		var e *ear
		must(t, s.one.Host.Do(func() (err error) {
			ifi, err := net.InterfaceByName("eth0")
			if err == nil {
				e, err = openEar(ifi.Index, []netip.Addr{target.Addr})
			}
			return err
		}))
		t.Cleanup(e.close)
		with := burst()
		t.Logf("%d questions cost %v with an ear open, and %v without", questions, with, without)
		if with > 2*without+500*ms {
			t.Errorf("%d questions cost %v instead of %v", questions, with, without)
		}
		stats, err := e.conn.Stats()
		must(t, err)
		if stats.Packets+stats.Drops != 0 {
			t.Errorf("%+v passed the filter", stats)
		}
		say(Announcement, stranger)
		must(t, e.conn.SetReadDeadline(time.Now().Add(5*time.Second)))
		if c, err := e.hear(); err != nil || c.kind != Announcement {
			t.Errorf("heard %+v, error %v", c, err)
		}
		if stats, err = e.conn.Stats(); err != nil || stats.Packets != 1 {
			t.Errorf("%+v passed the filter, error %v", stats, err)
		}
	})
}

// cpu is what the process, and the kernel in its name, have used.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	must(t, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestRealListenerInterfaceChanges(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		log := new(logged)
		foreign := s.listener(s.one, netRaw, log)
		links := s.one.Host.Netlink()

		// The MAC changes: what was foreign is its own, and the other way about.
		mac := net.HardwareAddr{2, 0, 0, 0, 0x77, 1}
		say := s.speaker(s.seer, target)
		must(t, links.LinkSetHardwareAddr(link(t, s.one), mac))
		say(Announcement, mac)
		silent(t, foreign, 100*ms)
		say(Announcement, s.one.MAC)
		if f := nextForeign(t, foreign); !bytes.Equal(f.MAC, s.one.MAC) {
			t.Errorf("heard %+v", f)
		}

		must(t, links.LinkSetDown(link(t, s.one)))
		say(Announcement, stranger)
		silent(t, foreign, 100*ms)
		must(t, links.LinkSetUp(link(t, s.one)))
		s.hears(foreign, target)
		if n := log.count("WARN"); n != 0 {
			t.Errorf("%d warnings for an interface that was down", n)
		}

		must(t, links.LinkDel(link(t, s.one)))
		until(t, 5*time.Second, "warnings", func() bool { return log.count("fails") == 2 })
		_, err := s.sw.Attach(s.one.Host, "eth0", netip.MustParsePrefix("10.77.0.11/24"))
		must(t, err)
		s.hears(foreign, target)
		until(t, 5*time.Second, "the good news", func() bool { return log.count("works again") == 2 })
		if n := log.count("fails"); n != 2 {
			t.Errorf("%d warnings, want one for each family", n)
		}
	})
}

func TestRealListenerStartsBeforeItsInterface(t *testing.T) {
	s := newSegment(t)
	must(t, s.one.Host.Netlink().LinkSetDown(link(t, s.one)))
	up := time.AfterFunc(200*ms, func() { check(t, s.one.Host.Netlink().LinkSetUp(link(t, s.one))) })
	defer up.Stop()
	log := new(logged)
	s.listener(s.one, netRaw, log) // returns once both families are heard
	if n := log.count("WARN"); n != 0 {
		t.Errorf("%d warnings for an interface that was down", n)
	}
}

func TestRealListenerErrors(t *testing.T) {
	s := newSegment(t)
	log := new(logged)
	s.listener(s.one, 0, log)
	until(t, 5*time.Second, "warnings", func() bool { return log.count(ErrPermission.Error()) == 2 })
	time.Sleep(lookEvery + 200*ms)
	if n := log.count("WARN"); n != 2 {
		t.Errorf("%d warnings", n)
	}
}

func (s *segment) probe(p *lab.Port, capabilities uint32, target Target) (mac net.HardwareAddr, err error) {
	err = confined(p, capabilities, func() error {
		var err error
		mac, err = Probe(s.t.Context(), target)
		return err
	})
	return mac, err
}

func TestRealProbe(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		start := time.Now()
		mac, err := s.probe(s.one, netRaw, target)
		if err != nil || mac != nil {
			t.Errorf("nobody has it: %v, %v", mac, err)
		}
		if took := time.Since(start); took < 400*ms {
			t.Errorf("took %v", took)
		}

		// A holder is told of nobody but others.
		put(t, s.one, target, (*netlink.Handle).AddrAdd)
		if mac, err = s.probe(s.one, netRaw, target); err != nil || mac != nil {
			t.Errorf("only the prober has it: %v, %v", mac, err)
		}
		put(t, s.two, target, (*netlink.Handle).AddrAdd)
		start = time.Now()
		if mac, err = s.probe(s.one, netRaw, target); err != nil || !bytes.Equal(mac, s.two.MAC) {
			t.Errorf("two has it as well: %v, %v", mac, err)
		}
		t.Logf("answered after %v", time.Since(start))
		if mac, err = s.probe(s.seer, netRaw, target); err != nil || mac == nil {
			t.Errorf("two have it: %v, %v", mac, err)
		}
	})
}

func TestRealProbeHearsOthers(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		say := s.speaker(s.seer, target)
		// during says something 100 ms into a probe, and returns what the probe finds.
		during := func(kind Kind, mac net.HardwareAddr) net.HardwareAddr {
			t.Helper()
			timer := time.AfterFunc(100*ms, func() { say(kind, mac) })
			defer timer.Stop()
			found, err := s.probe(s.one, netRaw, target)
			must(t, err)
			return found
		}
		if mac := during(Announcement, stranger); !bytes.Equal(mac, stranger) {
			t.Errorf("announced meanwhile: %v", mac)
		}
		if mac := during(Probing, s.seer.MAC); !bytes.Equal(mac, s.seer.MAC) {
			t.Errorf("probed for by another: %v", mac)
		}
		if mac := during(0, s.seer.MAC); mac != nil {
			t.Errorf("a client asks: %v", mac)
		}
		// Whoever has it comes before whoever would like to.
		say2 := s.speaker(s.two, target)
		timer := time.AfterFunc(200*ms, func() { say2(Answer, stranger) })
		defer timer.Stop()
		if mac := during(Probing, s.seer.MAC); !bytes.Equal(mac, stranger) {
			t.Errorf("probed for by one, and had by another: %v", mac)
		}
	})
}

func TestRealProbeErrors(t *testing.T) {
	forBoth(t, func(t *testing.T, s *segment, target Target) {
		if _, err := s.probe(s.one, 0, target); !errors.Is(err, ErrPermission) {
			t.Errorf("no capability: %v", err)
		}
		if _, err := s.probe(s.one, netRaw, Target{target.VIP, target.Addr, "eth7"}); err == nil || !strings.Contains(err.Error(), "eth7") {
			t.Errorf("no interface: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
		defer cancel()
		start := time.Now()
		must(t, s.one.Host.Do(func() error {
			if _, err := Probe(ctx, target); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("out of time: %v", err)
			}
			return nil
		}))
		if took := time.Since(start); took > 300*ms {
			t.Errorf("took %v", took)
		}
		must(t, s.one.Cut())
		until(t, 5*time.Second, "carrier lost", func() bool {
			_, err := s.probe(s.one, netRaw, target)
			return errors.Is(err, unix.ENETDOWN)
		})
	})
}
