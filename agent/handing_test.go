package agent

import (
	"context"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/ownership"
)

// idleKernel does whatever it is told, and has no connections.
type idleKernel struct{}

func (idleKernel) Keep(netip.Addr) error                           { return nil }
func (idleKernel) Unkeep(netip.Addr) error                         { return nil }
func (idleKernel) Forward(netip.Addr, []uint16, netip.Addr) error  { return nil }
func (idleKernel) Unforward(netip.Addr) error                      { return nil }
func (idleKernel) HoldBack([]uint16) error                         { return nil }
func (idleKernel) EndHoldBack() error                              { return nil }
func (idleKernel) Established(netip.Addr, uint16) (n int, _ error) { return 0, nil }
func (idleKernel) Reset(netip.Addr) (n int, _ error)               { return 0, nil }

// The chain is looked at while there is one, and else nothing wakes the agent.
func TestHandingRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var looks atomic.Int64
		var keeps atomic.Bool
		keeps.Store(true)
		h := &handing{
			self: "cp-1", patience: time.Second, kernel: idleKernel{}, ports: []uint16{16443}, log: hclog.NewNullLogger(),
			address: func(string) netip.Addr { return netip.MustParseAddr("10.77.0.100") },
			target:  func(string, string) netip.Addr { return netip.MustParseAddr("10.77.0.12") },
			arrival: func(string) netip.Addr { return netip.Addr{} },
			peer:    func(string, string) (bool, string) { return keeps.Load(), "" },
			count:   time.NewTicker(drainLook), chain: time.NewTicker(chainLook),
			vips: map[string]*handed{"v": {}},
		}
		h.vips["v"].told.Store(-1)
		h.vips["v"].toldFrom.Store(new(string))
		ended := make(chan error)
		go func() {
			ended <- h.run(ctx, func(string) string {
				looks.Add(1)
				return "cp-1"
			})
		}()
		looked := func(span time.Duration) int64 {
			before := looks.Load()
			time.Sleep(span)
			synctest.Wait()
			return looks.Load() - before
		}
		looked(time.Second)
		if n := looked(time.Minute); n != 0 {
			t.Errorf("%d looks without a chain", n)
		}
		for range 2 {
			keeps.Store(true)
			h.take(ownership.Hold{VIP: "v", On: true, Peer: "cp-2"})
			if n := looked(time.Second / 2); n < 9 {
				t.Errorf("%d looks at a chain in half a second", n)
			}
			if _, _, to := h.keeps("v"); to != "cp-2" {
				t.Errorf("forwards to %q", to)
			}
			keeps.Store(false)
			looked(time.Second)
			if _, _, to := h.keeps("v"); to != "" {
				t.Errorf("forwards to %q, which keeps nothing", to)
			}
			if n := looked(time.Minute); n != 0 {
				t.Errorf("%d looks after the chain", n)
			}
		}

		h.give(ownership.Hold{VIP: "v", Gen: 1, Planned: true})
		if keeps, _, _ := h.keeps("v"); !keeps {
			t.Error("nothing is kept")
		}
		looked(drainMin + 2*drainLook)
		if keeps, _, _ := h.keeps("v"); keeps {
			t.Error("kept on with no connection left")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// forwards is a kernel that says where packets of unknown connections go.
type forwards struct {
	idleKernel
	to map[netip.Addr]netip.Addr
}

func (f forwards) Forward(vip netip.Addr, _ []uint16, target netip.Addr) error {
	f.to[vip] = target
	return nil
}

func (f forwards) Unforward(vip netip.Addr) error {
	delete(f.to, vip)
	return nil
}

// An agent that goes on in another one's place forwards where that one did, though it has
// heard of nobody yet, and leaves nobody out of the chain before it could hear them.
func TestForwardsAreResumed(t *testing.T) {
	vip, told, fixed := netip.MustParseAddr("fd00::100"), netip.MustParseAddr("fd00::12"), netip.MustParseAddr("fd00::13")
	for name, c := range map[string]struct {
		drain drain
		fixed netip.Addr // the configuration's
		to    netip.Addr
	}{
		"an address that was told":       {drain{Forwards: "cp-2", Target: told}, netip.Addr{}, told},
		"from an agent that passed none": {drain{Forwards: "cp-2"}, fixed, fixed},
		"to nobody knows where":          {drain{Forwards: "cp-2"}, netip.Addr{}, netip.Addr{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				kernel := forwards{to: map[netip.Addr]netip.Addr{vip: told}} // the one before
				h := &handing{
					self: "cp-1", patience: time.Second, kernel: kernel, ports: []uint16{16443}, log: hclog.NewNullLogger(),
					address: func(string) netip.Addr { return vip },
					target:  func(string, string) netip.Addr { return c.fixed },
					arrival: func(string) netip.Addr { return netip.Addr{} },
					peer:    func(string, string) (bool, string) { return false, "" }, // not heard
					left:    func(string) string { return "" },
					count:   time.NewTicker(drainLook), chain: time.NewTicker(chainLook),
					vips: map[string]*handed{"v": {}},
				}
				h.vips["v"].told.Store(-1)
				h.vips["v"].toldFrom.Store(new(string))
				h.resume("v", c.drain)
				ended := make(chan error)
				go func() { ended <- h.run(ctx, func(string) string { return "" }) }()
				goesTo := func(want netip.Addr) {
					t.Helper()
					h.mu.Lock()
					defer h.mu.Unlock()
					if got := kernel.to[vip]; got != want {
						t.Errorf("forwarded to %v, want %v", got, want)
					}
				}
				time.Sleep(trustWithin - chainLook)
				goesTo(c.to)
				time.Sleep(time.Second) // not heard all that time
				goesTo(netip.Addr{})
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Whoever takes a VIP from a dead member goes on to forward to those that still serve
// connections that they had before: those that the dead one forwarded to, or this node did.
func TestForwardsOutliveTheForwarder(t *testing.T) {
	vip := netip.MustParseAddr("10.77.0.100")
	address := map[string]netip.Addr{"cp-2": netip.MustParseAddr("10.77.0.12"), "cp-3": netip.MustParseAddr("10.77.0.13")}
	for name, c := range map[string]struct {
		keep string // who keeps connections
		left string // whom the dead one forwarded to
		from string // whom this node forwarded to
		want string
	}{
		"nobody keeps any":                {"", "", "", ""},
		"the dead one forwarded":          {"cp-2", "cp-2", "", "cp-2"},
		"to one that keeps no more":       {"", "cp-2", "", ""},
		"to this node, which did as well": {"cp-2", "cp-1", "cp-2", "cp-2"},
		"to this node, and on to itself":  {"", "cp-1", "cp-3", ""},
	} {
		kernel := forwards{to: map[netip.Addr]netip.Addr{}}
		h := &handing{
			self: "cp-1", patience: time.Second, kernel: kernel, ports: []uint16{16443}, log: hclog.NewNullLogger(),
			address: func(string) netip.Addr { return vip },
			target:  func(_, member string) netip.Addr { return address[member] },
			arrival: func(string) netip.Addr { return netip.Addr{} },
			peer:    func(member, _ string) (bool, string) { return member == c.keep, "" },
			left:    func(string) string { return c.left },
			count:   time.NewTicker(time.Hour), chain: time.NewTicker(time.Hour),
			vips: map[string]*handed{"v": {from: c.from}},
		}
		h.vips["v"].toldFrom.Store(&c.from)
		h.take(ownership.Hold{VIP: "v", On: true, Gen: 2})
		if got := h.vips["v"].from; got != c.want {
			t.Errorf("%s: forwards to %q, want %q", name, got, c.want)
		}
	}
}

func TestFits(t *testing.T) {
	cfg := func(edit func(*config.Config)) *config.Config {
		c := &config.Config{
			Node: config.Node{Name: "cp-1"}, DataDir: "/var/lib/hamesh",
			VIPs:    []config.VIP{{Name: "kube-api", Address: netip.MustParseAddr("10.0.0.100"), Interface: "eth0"}},
			Proxies: []config.Proxy{{Name: "kube-api", Port: 16443}},
		}
		edit(c)
		return c
	}
	same := func(*config.Config) {}
	left := provenanceOf(cfg(same))
	if err := left.fits(cfg(same)); err != nil {
		t.Error(err)
	}
	for want, edit := range map[string]func(*config.Config){
		"cp-2":               func(c *config.Config) { c.Node.Name = "cp-2" },
		"kube-api:6443":      func(c *config.Config) { c.Proxies[0].Port = 6443 },
		"10.0.0.101 on eth0": func(c *config.Config) { c.VIPs[0].Address = netip.MustParseAddr("10.0.0.101") },
		"10.0.0.100 on eth1": func(c *config.Config) { c.VIPs[0].Interface = "eth1" },
		"VIPs map[]":         func(c *config.Config) { c.VIPs = nil },
		"port 7000":          func(c *config.Config) { c.API.Port = 7000 },
		"/run/other":         func(c *config.Config) { c.API.Socket = "/run/other" },
		"127.0.0.1:7000":     func(c *config.Config) { c.Metrics.Listen = netip.MustParseAddrPort("127.0.0.1:7000") },
	} {
		if err := left.fits(cfg(edit)); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "restart") {
			t.Errorf("%s: %v", want, err)
		}
	}
	left.VIPs, left.Listen = nil, nil // an older agent's
	if err := left.fits(cfg(func(c *config.Config) { c.API.Port = 7000 })); err != nil {
		t.Error(err)
	}
}
