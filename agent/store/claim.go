package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrClaimed says that what was to be claimed is another's still.
var ErrClaimed = errors.New("claimed by another")

// Claim is what one member at a time may do.
type Claim struct {
	Name  string // of what is claimed
	Value string // says by whom; the same value may claim again
	// For is how long it lasts, in whole seconds, by the store's clock; longer where etcd's
	// leader changes.
	For time.Duration
	// Over says whether another's claim, of which the time has not passed, counts no more.
	Over func(value string) bool
}

func (k keys) claim(name string) string { return string(k) + "claims/" + name }

// Claim keeps a claim in the store. Errors: ErrClaimed, ErrUnavailable.
func (s *Store) Claim(ctx context.Context, c Claim) error {
	if !s.begin() {
		return ErrUnavailable
	}
	defer s.work.Done()
	s.mu.Lock()
	eng, ready := s.engine, s.ready
	s.mu.Unlock()
	if !ready {
		return fmt.Errorf("%w: %w", ErrUnavailable, errNotReady)
	}
	own, cancel := context.WithTimeout(s.life, orderWithin) // not under ctx itself: see Give
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	key := s.keys.claim(c.Name)
	resp, err := eng.client().Get(own, key)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	var revision int64
	if len(resp.Kvs) > 0 {
		revision = resp.Kvs[0].ModRevision
		if held := string(resp.Kvs[0].Value); held != c.Value && !c.Over(held) {
			return fmt.Errorf("%s: %w: %s", c.Name, ErrClaimed, held)
		}
	}
	lease, err := eng.client().Grant(own, int64(c.For/time.Second))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	txn, err := eng.client().Txn(own).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
		Then(clientv3.OpPut(key, c.Value, clientv3.WithLease(lease.ID))).
		Commit()
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	case !txn.Succeeded:
		return fmt.Errorf("%s: %w at the same time", c.Name, ErrClaimed)
	}
	return nil
}
