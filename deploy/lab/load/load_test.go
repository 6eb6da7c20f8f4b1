//go:build linux

package load_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	"github.com/hamesh/hamesh/deploy/lab/load"
)

func TestMain(m *testing.M) {
	lab.Enter()
	os.Exit(m.Run())
}

const port = 6443

// world is a client with many addresses, and a backend on another host.
func world(t *testing.T) (client *lab.Host, b *load.Backend, ends load.Ends) {
	t.Helper()
	sw, err := lab.NewSwitch("seg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, sw) })
	host := func(name, address string) *lab.Host {
		h, err := lab.NewHost(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closed(t, h) })
		if _, err := sw.Attach(h, "eth0", netip.MustParsePrefix(address)); err != nil {
			t.Fatal(err)
		}
		return h
	}
	client, server := host("client", "10.77.1.1/16"), host("server", "10.77.0.21/16")
	sources := netip.MustParsePrefix("10.99.0.0/16")
	if err := errors.Join(load.Own(client, sources), load.Reach(server, sources, netip.MustParseAddr("10.77.1.1"))); err != nil {
		t.Fatal(err)
	}
	if b, err = load.StartBackend(server, port); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, b) })
	return client, b, load.Ends{
		Targets: []netip.AddrPort{netip.MustParseAddrPort("10.77.0.21:6443")},
		From:    sources.Addr().Next(), Sources: 1000,
	}
}

func closed(t *testing.T, c interface{ Close() error }) {
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func generator(t *testing.T, h *lab.Host, e load.Ends) *load.Generator {
	t.Helper()
	g, err := load.StartGenerator(h, e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, g) })
	return g
}

func TestChurn(t *testing.T) {
	client, b, ends := world(t)
	g := generator(t, client, ends)
	asked := int64(0)
	for _, c := range []load.Churn{
		{Most: 16, For: 200 * time.Millisecond},
		{Rate: 500, Most: 1000, For: 500 * time.Millisecond},
	} {
		r, err := g.Churn(c)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v: %+v", c, r)
		asked += int64(r.Good)
		if r.Failures() > 0 || r.Good < 10 || r.Rate <= 0 || r.P50 <= 0 || r.P99 < r.P50 || r.Max < r.P99 {
			t.Errorf("%+v: %+v", c, r)
		}
		if least, most := 200, 300; c.Rate > 0 && (r.Good < least || r.Good > most) {
			t.Errorf("%d were due, want %d to %d", r.Good, least, most)
		}
		if s, err := b.Served(); err != nil || s.Asked != asked {
			t.Errorf("the backend was asked on %d connections (%v), want %d", s.Asked, err, asked)
		}
	}
}

// TestOpenLoop checks that what is due while nobody answers counts from when it was due.
func TestOpenLoop(t *testing.T) {
	client, _, ends := world(t)
	silent, err := client.Listen("tcp4", "10.77.1.1:1") // accepts by its kernel, and answers nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ends.Targets = append(ends.Targets, netip.MustParseAddrPort("10.77.1.1:1"))
	// Every other connection holds one of two places for good, so the rest waits.
	r, err := generator(t, client, ends).Churn(load.Churn{Rate: 1000, Most: 2, For: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	if r.Good > 5 || r.Failed["no answer"] < 60 {
		t.Errorf("with both places taken: %+v", r)
	}
}

func TestRefused(t *testing.T) {
	client, b, ends := world(t)
	g := generator(t, client, ends)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := g.Churn(load.Churn{Rate: 500, Most: 1000, For: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if r.Good > 0 || r.Failures() == 0 || r.Failed["connection refused"] != r.Failures() {
		t.Errorf("without a backend: %+v", r)
	}
	if _, err := g.Hold(1); err == nil {
		t.Error("without a backend, a connection is held")
	}
}

func TestHoldAndAsk(t *testing.T) {
	client, b, ends := world(t)
	g := generator(t, client, ends)
	if _, err := g.Ask(load.Ask{Rate: 100, For: time.Millisecond}); err == nil {
		t.Error("requests over no connection")
	}
	for _, n := range []int{1, 300} {
		if lost, err := g.Hold(n); err != nil || lost != 0 {
			t.Fatalf("hold %d: %d lost, %v", n, lost, err)
		}
		if err := lab.Await(5*time.Second, func() error {
			if s, err := b.Served(); err != nil || s.Open != int64(n) {
				return fmt.Errorf("the backend has %d connections (%w), want %d", s.Open, err, n)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		r, err := g.Ask(load.Ask{Rate: 2000, For: 300 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("over %d: %+v", n, r)
		if r.Failures() > 0 || r.Good < 400 || r.Good > 800 || r.P50 <= 0 {
			t.Errorf("over %d: %+v", n, r)
		}
	}
	// Other loads leave the held ones alone.
	if r, err := g.Churn(load.Churn{Most: 4, For: 50 * time.Millisecond}); err != nil || r.Failures() > 0 {
		t.Errorf("beside: %+v, %v", r, err)
	}
	if lost, err := g.Hold(0); err != nil || lost != 0 {
		t.Errorf("%d lost, %v", lost, err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	lost := 0
	if err := lab.Await(5*time.Second, func() error {
		n, err := g.Hold(0)
		if lost += n; err == nil && lost < 300 {
			err = fmt.Errorf("%d are known to be lost, want all 300", lost)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func TestStream(t *testing.T) {
	client, _, ends := world(t)
	g := generator(t, client, ends)
	for _, d := range []load.Direction{load.Download, load.Upload} {
		r, err := g.Stream(load.Stream{Direction: d, Connections: 2, For: 200 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("direction %d: %.2f Gbit/s", d, float64(r.Bytes)*8/float64(r.Took))
		if r.Bytes < 10<<20 || r.Took < 200*time.Millisecond {
			t.Errorf("direction %d: %+v", d, r)
		}
	}
	if _, err := g.Stream(load.Stream{Connections: 1, For: time.Millisecond}); err == nil {
		t.Error("a stream without a direction")
	}
}
