package store

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestClaim checks that one member at a time has a claim, until it is over or its time has
// passed.
func TestClaim(t *testing.T) {
	m := newMesh(t, 3, nil)
	m.start(m.all()...)
	for _, n := range m.nodes {
		n.ready()
	}
	claim := func(i int, c Claim) error {
		c.Name, c.Value = "crash", name(i)
		if c.Over == nil {
			c.Over = func(string) bool { return false }
		}
		for end := time.Now().Add(patience); ; {
			if err := m.nodes[i].store.Claim(t.Context(), c); !errors.Is(err, ErrUnavailable) || time.Now().After(end) {
				return err
			}
		}
	}
	var won atomic.Int32
	var first atomic.Int32
	var all sync.WaitGroup
	for i := range 3 {
		all.Go(func() {
			switch err := claim(i, Claim{For: time.Minute}); {
			case err == nil:
				won.Add(1)
				first.Store(int32(i))
			case !errors.Is(err, ErrClaimed):
				t.Error(err)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d have it", won.Load())
	}
	one := int(first.Load())
	two, three := (one+1)%3, (one+2)%3
	if err := claim(two, Claim{For: time.Minute}); !errors.Is(err, ErrClaimed) {
		t.Errorf("another's: %v", err)
	}
	if err := claim(one, Claim{For: time.Minute}); err != nil {
		t.Errorf("again: %v", err)
	}
	over := func(value string) bool { return value == name(one) }
	if err := claim(two, Claim{For: time.Second, Over: over}); err != nil {
		t.Errorf("when the first one's is over: %v", err)
	}
	await(t, fmt.Sprintf("%s's claim", name(three)), func() bool { return claim(three, Claim{For: time.Minute, Over: over}) == nil })

	closed := m.nodes[0].store
	m.stop(0)
	if err := closed.Claim(t.Context(), Claim{Name: "x", For: time.Second}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}
