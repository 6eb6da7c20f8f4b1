package agent

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/ownership"
)

// idleKernel does whatever it is told, and has no connections.
type idleKernel struct{}

func (idleKernel) Keep(netip.Addr) error                           { return nil }
func (idleKernel) Unkeep(netip.Addr) error                         { return nil }
func (idleKernel) Forward(netip.Addr, []uint16, netip.Addr) error  { return nil }
func (idleKernel) Unforward(netip.Addr) error                      { return nil }
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
