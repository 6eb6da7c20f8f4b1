//go:build linux

package lab_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/arp"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestWire(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 2, Clients: 1})
	_, err := m.WaitOwner(soon)
	must(t, err)
	w, err := m.WatchWire()
	must(t, err)
	from := time.Now()
	second := m.Nodes[1]

	must(t, m.Impersonate(arp.OperationRequest))
	must(t, m.Impersonate(arp.OperationReply))
	must(t, lab.Await(soon, func() error {
		frames := w.Frames(from, time.Now())
		if len(frames) != 2 {
			return fmt.Errorf("frames %+v, want two", frames)
		}
		for i, op := range []arp.Operation{arp.OperationRequest, arp.OperationReply} {
			if f := frames[i]; f.Operation != op || !f.Announced || slices.Contains([]string{"cp-1", "cp-2"}, f.Speaker) {
				return fmt.Errorf("frame %+v, want a stranger's announcement", f)
			}
		}
		return nil
	}))
	if d := w.Doubles(from, time.Now()); len(d) > 0 {
		t.Errorf("one kernel has the VIP, but %+v", d)
	}

	// Two kernels with the address answer the same request.
	must(t, second.Host().AddAddress("eth0", netip.PrefixFrom(m.VIP().Addr(), 32)))
	must(t, lab.Await(soon, func() error {
		d := w.Doubles(from, time.Now())
		if len(d) == 0 {
			return errors.New("nobody saw two answers")
		}
		if got := slices.Sorted(slices.Values(d[0].Speakers)); !slices.Equal(got, []string{"cp-1", "cp-2"}) {
			t.Errorf("answered by %v", got)
		}
		return nil
	}))
	must(t, second.DeleteAddress(m.VIP().Addr()))
	must(t, second.DeleteAddress(m.VIP().Addr()))
	if has, err := second.Has(m.VIP().Addr()); has || err != nil {
		t.Errorf("the address is there after it was deleted (%v)", err)
	}
}

func TestKillAll(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	_, err := m.WaitOwner(soon)
	must(t, err)
	must(t, m.Nodes[0].KillAll())
	if left := processes(t); len(left) != 2 { // this one and the API server
		t.Errorf("processes %v, want 2", left)
	}
	must(t, m.Nodes[0].API.Sick()) // it is there and obeys
	must(t, m.Nodes[0].StartAgent())
	_, err = m.WaitOwner(soon)
	must(t, err)
}

func TestBurnEnds(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	_, err := m.WaitOwner(soon)
	must(t, err)
	before := len(processes(t))
	must(t, m.Burn(2, 100*time.Millisecond))
	must(t, lab.Await(soon, func() error {
		if n := len(processes(t)); n > before {
			return fmt.Errorf("%d processes more", n-before)
		}
		return nil
	}))
	if m.Burn(2, time.Hour) == nil {
		t.Error("burns for an hour")
	}
}
