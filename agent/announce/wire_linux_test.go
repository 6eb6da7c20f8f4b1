package announce

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	os.Exit(m.Run())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// segment is two nodes and a client on a switch.
type segment struct {
	t              *testing.T
	sw             *lab.Switch
	one, two, seer *lab.Port
}

func newSegment(t *testing.T) *segment {
	t.Helper()
	sw, err := lab.NewSwitch("sw")
	must(t, err)
	t.Cleanup(func() { check(t, sw.Close()) })
	s := &segment{t: t, sw: sw}
	for _, h := range []struct {
		name, v4, v6 string
		port         **lab.Port
	}{
		{"cp-1", "10.77.0.11/24", "fd77::11/64", &s.one},
		{"cp-2", "10.77.0.12/24", "fd77::12/64", &s.two},
		{"client", "10.77.0.200/24", "fd77::200/64", &s.seer},
	} {
		host, err := lab.NewHost(h.name)
		must(t, err)
		t.Cleanup(func() { check(t, host.Close()) })
		*h.port, err = sw.Attach(host, "eth0", netip.MustParsePrefix(h.v4), netip.MustParsePrefix(h.v6))
		must(t, err)
		// A link-local address comes with the carrier, a moment after the link is up.
		until(t, 5*time.Second, "link-local address", func() bool {
			addrs, err := host.Netlink().AddrList(link(t, *h.port), netlink.FAMILY_V6)
			must(t, err)
			for _, a := range addrs {
				if a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					return true
				}
			}
			return false
		})
	}
	return s
}

func link(t *testing.T, p *lab.Port) netlink.Link {
	t.Helper()
	l, err := p.Host.Netlink().LinkByName(p.Interface)
	must(t, err)
	return l
}

func until(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !f(); time.Sleep(ms) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, limit)
		}
	}
}

// confined runs f in the port's host with these capabilities in effect.
func confined(p *lab.Port, capabilities uint32, f func() error) error {
	return p.Host.Do(func() error {
		header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var before [2]unix.CapUserData
		if err := unix.Capget(header, &before[0]); err != nil {
			return err
		}
		less := before
		less[0].Effective, less[1].Effective = capabilities, 0
		if err := unix.Capset(header, &less[0]); err != nil {
			return err
		}
		return errors.Join(f(), unix.Capset(header, &before[0]))
	})
}

// announcer runs one on a node until the test ends, with these capabilities in effect.
func (s *segment) announcer(p *lab.Port, capabilities uint32) (*Announcer, <-chan First) {
	firsts := make(chan First, 16)
	a := New(hclog.NewNullLogger(), Config{LeaseTTL: 400 * ms, Announced: func(f First) { firsts <- f }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- confined(p, capabilities, func() error { return a.Run(ctx) }) }()
	s.t.Cleanup(func() {
		cancel()
		check(s.t, <-done)
	})
	return a, firsts
}

const netRaw = 1 << unix.CAP_NET_RAW

// frame is an announcement as the client saw it.
type frame struct {
	at      time.Duration // since capturing began
	mac     net.HardwareAddr
	request bool // ARP only
}

// captureARP delivers every ARP frame for the VIP that the client gets, fully checked.
func (s *segment) captureARP() <-chan frame {
	frames := make(chan frame, 256)
	var c *packet.Conn
	var client *arp.Client
	must(s.t, s.seer.Host.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if c, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ARP, nil); err != nil {
			return err
		}
		client, err = arp.New(ifi, c)
		return err
	}))
	s.t.Cleanup(func() { check(s.t, client.Close()) })
	start := time.Now()
	go func() {
		defer close(frames)
		for {
			p, eth, err := client.Read()
			if err != nil {
				return
			}
			if p.TargetIP != vip4.Addr || p.SenderIP != vip4.Addr {
				continue
			}
			f := frame{at: time.Since(start), mac: p.SenderHardwareAddr}
			target := p.SenderHardwareAddr
			switch p.Operation {
			case arp.OperationRequest:
				f.request = true
				target = net.HardwareAddr{0, 0, 0, 0, 0, 0}
			case arp.OperationReply:
			default:
				s.t.Errorf("operation %d", p.Operation)
			}
			if !bytes.Equal(eth.Source, p.SenderHardwareAddr) || !bytes.Equal(eth.Destination, broadcast) {
				s.t.Errorf("frame from %v to %v, sender %v", eth.Source, eth.Destination, p.SenderHardwareAddr)
			}
			if !bytes.Equal(p.TargetHardwareAddr, target) {
				s.t.Errorf("operation %d: target hardware address %v, want %v", p.Operation, p.TargetHardwareAddr, target)
			}
			if p.HardwareType != 1 || p.ProtocolType != unix.ETH_P_IP || p.HardwareAddrLength != 6 || p.IPLength != 4 {
				s.t.Errorf("packet %+v", p)
			}
			frames <- f
		}
	}()
	return frames
}

// captureNDP does the same for neighbour advertisements.
func (s *segment) captureNDP() <-chan frame {
	frames := make(chan frame, 256)
	var c *ndp.Conn
	must(s.t, s.seer.Host.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		c, _, err = ndp.Listen(ifi, ndp.Unspecified)
		return err
	}))
	must(s.t, c.SetControlMessage(ipv6.FlagDst|ipv6.FlagHopLimit|ipv6.FlagInterface, true))
	s.t.Cleanup(func() { check(s.t, c.Close()) })
	start := time.Now()
	go func() {
		defer close(frames)
		for {
			m, cm, src, err := c.ReadFrom()
			if err != nil {
				return
			}
			na, ok := m.(*ndp.NeighborAdvertisement)
			if !ok || na.TargetAddress != vip6.Addr {
				continue
			}
			if na.Solicited || !na.Override || na.Router || len(na.Options) != 1 {
				s.t.Errorf("advertisement %+v", na)
				continue
			}
			if !src.IsLinkLocalUnicast() || cm.HopLimit != ndp.HopLimit || !cm.Dst.Equal(net.IPv6linklocalallnodes) {
				s.t.Errorf("advertisement from %v to %v, hop limit %d", src, cm.Dst, cm.HopLimit)
			}
			o, ok := na.Options[0].(*ndp.LinkLayerAddress)
			if !ok || o.Direction != ndp.Target {
				s.t.Errorf("option %+v", na.Options[0])
				continue
			}
			frames <- frame{at: time.Since(start), mac: o.Addr}
		}
	}()
	return frames
}

// next returns the next frame, or fails after a limit.
func next(t *testing.T, frames <-chan frame) frame {
	t.Helper()
	select {
	case f := <-frames:
		return f
	case <-time.After(5 * time.Second):
		t.Fatal("no frame within 5s")
		return frame{}
	}
}

// quiet fails if a frame comes within d.
func quiet(t *testing.T, frames <-chan frame, d time.Duration) {
	t.Helper()
	select {
	case f := <-frames:
		t.Errorf("frame %+v", f)
	case <-time.After(d):
	}
}

// wantMAC checks who an announcement is from, and its two forms if it is ARP.
func wantMAC(t *testing.T, frames <-chan frame, target Target, mac net.HardwareAddr) time.Duration {
	t.Helper()
	f := next(t, frames)
	if !bytes.Equal(f.mac, mac) {
		t.Errorf("announced %v, want %v", f.mac, mac)
	}
	if target.Addr.Is4() {
		if second := next(t, frames); !f.request || second.request || !bytes.Equal(second.mac, mac) {
			t.Errorf("frames %+v, %+v", f, second)
		}
	}
	return f.at
}

func families(t *testing.T, f func(t *testing.T, s *segment, target Target, capture func() <-chan frame)) {
	t.Run("IPv4", func(t *testing.T) {
		s := newSegment(t)
		f(t, s, vip4, s.captureARP)
	})
	t.Run("IPv6", func(t *testing.T) {
		s := newSegment(t)
		f(t, s, vip6, s.captureNDP)
	})
}

func TestRealBurst(t *testing.T) {
	families(t, func(t *testing.T, s *segment, target Target, capture func() <-chan frame) {
		a, firsts := s.announcer(s.one, netRaw) // no other capability is needed
		frames := capture()
		a.Start(target, 1)
		var at []time.Duration
		start := wantMAC(t, frames, target, s.one.MAC)
		for at = []time.Duration{0}; at[len(at)-1] < 2100*ms; {
			at = append(at, wantMAC(t, frames, target, s.one.MAC)-start)
		}
		first := <-firsts
		t.Logf("first announced after %v, then at %v", first.After, at)
		if first.After > 500*ms || first.Epoch != 1 || first.VIP != target.VIP {
			t.Errorf("first announcement %+v", first)
		}
		// A busy machine may sleep through beats; it never adds any.
		if len(at) < 4 || len(at) > 7 {
			t.Errorf("announced at %v", at)
		}
		a.Stop(target.VIP)
		quiet(t, frames, 300*ms)
	})
}

func TestRealStop(t *testing.T) {
	families(t, func(t *testing.T, s *segment, target Target, capture func() <-chan frame) {
		a, _ := s.announcer(s.one, netRaw)
		frames := capture()
		a.Start(target, 1)
		wantMAC(t, frames, target, s.one.MAC)
		a.Stop(target.VIP)
		// What was being sent at that moment may still come.
		deadline := time.After(100 * ms)
		for drained := false; !drained; {
			select {
			case <-frames:
			case <-deadline:
				drained = true
			}
		}
		quiet(t, frames, 600*ms)
	})
}

// put gives a node the VIP, or takes it, as package vip would.
func put(t *testing.T, p *lab.Port, target Target, f func(*netlink.Handle, netlink.Link, *netlink.Addr) error) {
	t.Helper()
	bits := target.Addr.BitLen()
	must(t, f(p.Host.Netlink(), link(t, p), &netlink.Addr{
		IPNet: &net.IPNet{IP: target.Addr.AsSlice(), Mask: net.CIDRMask(bits, bits)},
		Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE,
	}))
}

// knows returns the client's neighbour entry for the VIP.
func (s *segment) knows(target Target) net.HardwareAddr {
	s.t.Helper()
	family := netlink.FAMILY_V4
	if target.Addr.Is6() {
		family = netlink.FAMILY_V6
	}
	all, err := s.seer.Host.Netlink().NeighList(link(s.t, s.seer).Attrs().Index, family)
	must(s.t, err)
	for _, n := range all {
		if n.IP.Equal(target.Addr.AsSlice()) {
			return n.HardwareAddr
		}
	}
	return nil
}

// resolve has the client ask for the VIP, and returns when it knows it.
func (s *segment) resolve(target Target, mac net.HardwareAddr) {
	s.t.Helper()
	must(s.t, s.seer.Host.Do(func() error {
		c, err := net.Dial("udp", net.JoinHostPort(target.Addr.String(), "9"))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("?"))
		return err
	}))
	until(s.t, 5*time.Second, "client resolves the VIP", func() bool { return bytes.Equal(s.knows(target), mac) })
}

func TestRealTakeover(t *testing.T) {
	for name, age := range map[string]time.Duration{"fresh entry": 0, "old entry": 1200 * ms} {
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, s *segment, target Target, _ func() <-chan frame) {
				a, _ := s.announcer(s.two, netRaw)
				put(t, s.one, target, (*netlink.Handle).AddrAdd)
				s.resolve(target, s.one.MAC)
				known := time.Now()
				until(t, 5*time.Second, "age", func() bool { return time.Since(known) >= age })

				put(t, s.one, target, (*netlink.Handle).AddrDel)
				put(t, s.two, target, (*netlink.Handle).AddrAdd)
				start := time.Now()
				a.Start(target, 2)
				until(t, 2*time.Second, "client learns the new MAC", func() bool { return bytes.Equal(s.knows(target), s.two.MAC) })
				t.Logf("client knows the new MAC after %v", time.Since(start))
			})
		})
	}
}

func TestRealInterfaceChanges(t *testing.T) {
	families(t, func(t *testing.T, s *segment, target Target, capture func() <-chan frame) {
		a, _ := s.announcer(s.one, netRaw)
		frames := capture()
		links := s.one.Host.Netlink()
		// refreshed asks again and again, until it is this MAC that is announced.
		refreshed := func(mac net.HardwareAddr) {
			t.Helper()
			until(t, 3*time.Second, "announcement of "+mac.String(), func() bool {
				a.Refresh(target.VIP)
				select {
				case f := <-frames:
					return bytes.Equal(f.mac, mac)
				default:
					return false
				}
			})
		}
		a.Start(target, 1)
		refreshed(s.one.MAC)

		mac := net.HardwareAddr{0x02, 0, 0, 0, 0x77, 0x01}
		must(t, links.LinkSetHardwareAddr(link(t, s.one), mac))
		refreshed(mac)

		// Down, announcing fails and is counted; up again, it goes on by itself.
		must(t, links.LinkSetDown(link(t, s.one)))
		until(t, 3*time.Second, "failure", func() bool {
			a.Refresh(target.VIP)
			st, _ := a.Stats(target.VIP)
			return st.Failed > 0 && errors.Is(st.Err, unix.ENETDOWN)
		})
		must(t, links.LinkSetUp(link(t, s.one)))
		until(t, 3*time.Second, "recovery", func() bool {
			a.Refresh(target.VIP)
			st, _ := a.Stats(target.VIP)
			return st.Err == nil
		})
		refreshed(mac)

		// Another interface in its place.
		must(t, links.LinkDel(link(t, s.one)))
		p, err := s.sw.Attach(s.one.Host, "eth0", netip.MustParsePrefix("10.77.0.11/24"))
		must(t, err)
		refreshed(p.MAC)
	})
}

func TestRealErrors(t *testing.T) {
	s := newSegment(t)
	a, _ := s.announcer(s.one, 0)
	gone := Target{"gone", vip4.Addr, "eth7"}
	for _, target := range []Target{vip4, vip6, gone} {
		a.Start(target, 1)
	}
	until(t, 5*time.Second, "failures", func() bool {
		four, _ := a.Stats("four")
		six, _ := a.Stats("six")
		missing, _ := a.Stats("gone")
		return errors.Is(four.Err, ErrPermission) && errors.Is(six.Err, ErrPermission) &&
			missing.Err != nil && strings.Contains(missing.Err.Error(), "eth7") && four.Sent+six.Sent == 0
	})
}

func TestRealNeedsLinkLocal(t *testing.T) {
	s := newSegment(t)
	a, _ := s.announcer(s.one, netRaw)
	frames := s.captureNDP()
	links := s.one.Host.Netlink()
	l := link(t, s.one)
	addrs, err := links.AddrList(l, netlink.FAMILY_V6)
	must(t, err)
	for _, addr := range addrs {
		if addr.IP.IsLinkLocalUnicast() {
			must(t, links.AddrDel(l, &addr))
		}
	}
	a.Start(vip6, 1)
	until(t, 5*time.Second, "failure", func() bool {
		st, _ := a.Stats("six")
		return st.Err != nil && strings.Contains(st.Err.Error(), "link-local")
	})
	quiet(t, frames, 100*ms)
}
