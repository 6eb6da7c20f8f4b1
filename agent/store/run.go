package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/hamesh/hamesh/agent/ownership"
)

// retry calls f until it succeeds, fails for good, or ctx ends. It logs an error when
// it first comes up, not at every attempt.
func retry(ctx context.Context, log hclog.Logger, f func() error) error {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 100 * time.Millisecond
	b.MaxInterval = time.Second
	last := ""
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		err := f()
		if fatal(err) {
			return struct{}{}, backoff.Permanent(err)
		}
		if err != nil && ctx.Err() == nil && err.Error() != last {
			last = err.Error()
			log.Warn("store not usable yet, trying again", "error", err)
		}
		return struct{}{}, err
	}, backoff.WithBackOff(b), backoff.WithMaxElapsedTime(0))
	var permanent *backoff.PermanentError
	if errors.As(err, &permanent) {
		return permanent.Err
	}
	return err
}

// introduce makes sure that this is the right store, then records this boot in it.
func (s *Store) introduce(ctx context.Context, c *clientv3.Client) error {
	return retry(ctx, s.log.With("while", "recording this boot"), func() error {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		if err := s.identify(ctx, c); err != nil {
			return err
		}
		if err := s.recordBoot(ctx, c); err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ready = true
		return nil
	})
}

func (s *Store) identify(ctx context.Context, c *clientv3.Client) error {
	known := s.identity()
	key := s.keys.identity()
	resp, err := c.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("reading the mesh's identity: %w", err)
	}
	if known.ID != "" {
		id := ""
		if len(resp.Kvs) > 0 {
			id = string(resp.Kvs[0].Value)
		}
		return s.recognise(id, resp.Header.Revision, known.Revision)
	}
	if len(resp.Kvs) == 0 {
		// Others may do the same now: whoever is first is right, so read again.
		_, err := c.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, uuid.NewString())).
			Commit()
		if err != nil {
			return fmt.Errorf("writing the mesh's identity: %w", err)
		}
		return s.identify(ctx, c)
	}
	known = identity{ID: string(resp.Kvs[0].Value), Revision: resp.Header.Revision}
	if err := known.save(s.cfg.DataDir); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = known
	return nil
}

func (s *Store) recordBoot(ctx context.Context, c *clientv3.Client) error {
	key := s.keys.boot(s.cfg.Member)
	resp, err := c.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("reading the boot key: %w", err)
	}
	var revision int64
	if len(resp.Kvs) > 0 {
		revision = resp.Kvs[0].ModRevision
		recorded, err := strconv.ParseUint(string(resp.Kvs[0].Value), 10, 64)
		if err != nil {
			return fmt.Errorf("reading the boot key: %w", err)
		}
		if recorded == s.cfg.Boot && s.bootSent {
			return nil // an earlier attempt, whose answer got lost
		}
		if recorded >= s.cfg.Boot {
			return s.olderBoot(recorded)
		}
	}
	s.bootSent = true
	txn, err := c.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
		Then(clientv3.OpPut(key, strconv.FormatUint(s.cfg.Boot, 10))).
		Commit()
	if err != nil {
		return fmt.Errorf("writing the boot key: %w", err)
	}
	if !txn.Succeeded {
		return errors.New("writing the boot key: it changed meanwhile")
	}
	return nil
}

func (s *Store) olderBoot(recorded uint64) error {
	return fmt.Errorf("%w: recorded is %d, this is %d: is another agent running as %s?",
		ErrOlderBoot, recorded, s.cfg.Boot, s.cfg.Member)
}

// keepLease holds a lease at all times. SentAt is taken before each request, so what
// the reader concludes from it is on the safe side.
func (s *Store) keepLease(ctx context.Context, eng engine) error {
	for {
		var lease clientv3.LeaseID
		err := retry(ctx, s.log.With("while", "getting a lease"), func() error {
			ctx, cancel := context.WithTimeout(ctx, requestTimeout)
			defer cancel()
			sent := s.cfg.Now()
			ttl := int64((s.cfg.LeaseTTL + time.Second - 1) / time.Second)
			resp, err := eng.client().Grant(ctx, ttl)
			if err != nil {
				return fmt.Errorf("getting a lease: %w", err)
			}
			if resp.TTL > ttl {
				s.log.Warn("store grants only longer leases than asked for", "asked", ttl, "granted", resp.TTL)
			}
			lease = resp.ID
			s.setLease(lease)
			s.events.push(ownership.LeaseRenewed{Lease: int64(lease), SentAt: sent})
			return nil
		})
		if err != nil {
			return err
		}
		if err := s.renewLease(ctx, eng, lease); err != nil {
			return err
		}
		s.log.Warn("lease lost, getting a new one", "lease", int64(lease))
		s.setLease(clientv3.NoLease)
		s.events.push(ownership.LeaseLost{Lease: int64(lease)})
	}
}

// renewLease returns nil when the store knows the lease no more.
func (s *Store) renewLease(ctx context.Context, eng engine, lease clientv3.LeaseID) error {
	due := func() <-chan time.Time {
		return time.After(s.cfg.Now().UntilNext(max(s.cfg.LeaseTTL/6, 100*time.Millisecond)))
	}
	next := due()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-next:
			next = due() // begins now: an answer that is late does not put it off
		}
		sent := s.cfg.Now()
		one, cancel := context.WithTimeout(ctx, min(s.cfg.LeaseTTL/3, requestTimeout))
		ttl, err := eng.renew(one, lease)
		cancel()
		switch {
		case err != nil:
			s.log.Debug("lease not renewed", "lease", int64(lease), "error", err)
		case ttl <= 0:
			return nil
		default:
			s.events.push(ownership.LeaseRenewed{Lease: int64(lease), SentAt: sent})
		}
	}
}

func (s *Store) setLease(lease clientv3.LeaseID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lease = lease
}

// poll reads everything every Poll. A read that hangs neither delays the next one nor
// piles up: at most maxPolls are under way.
func (s *Store) poll(ctx context.Context, c *clientv3.Client, g *errgroup.Group) error {
	slots := make(chan struct{}, maxPolls)
	answering := false
	for {
		if now := s.available(); now != answering {
			answering = now
			if now {
				s.log.Info("store answers")
			} else {
				s.log.Warn("store does not answer")
			}
		}
		select {
		case slots <- struct{}{}:
			g.Go(func() error {
				defer func() { <-slots }()
				err := s.read(ctx, c)
				if errors.Is(err, rpctypes.ErrLeaderChanged) {
					err = s.read(ctx, c) // the new one answers
				}
				if fatal(err) {
					return err
				}
				if err != nil {
					s.log.Debug("poll not answered", "error", err)
				}
				return nil
			})
		default:
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(s.cfg.Now().UntilNext(s.cfg.Poll)):
		case <-s.due:
		}
	}
}

// hurry makes the next poll due.
func (s *Store) hurry() {
	select {
	case s.due <- struct{}{}:
	default:
	}
}

// read asks for everything below the prefix, linearizably, and delivers it.
func (s *Store) read(ctx context.Context, c *clientv3.Client) error {
	// Within 4·Poll an answer still proves that the store answers; a starved machine
	// gets a little longer where polls are quick.
	ctx, cancel := context.WithTimeout(ctx, min(max(4*s.cfg.Poll, 400*time.Millisecond), requestTimeout))
	defer cancel()
	least := s.identity().Revision
	sent := s.cfg.Now()
	resp, err := c.Get(ctx, string(s.keys), clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("reading the records: %w", err)
	}
	got, err := s.keys.parse(resp.Kvs)
	if err != nil {
		return fmt.Errorf("reading the records: %w", err)
	}
	if err := s.recognise(got.identity, resp.Header.Revision, least); err != nil {
		return err
	}
	if recorded := got.boots[s.cfg.Member]; recorded > s.cfg.Boot {
		return s.olderBoot(recorded)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered, s.answers = s.cfg.Now(), true
	if sent < s.polled {
		return nil // a later question was answered earlier
	}
	s.polled = sent
	if got.orders.Revision != s.ordered {
		s.ordered = got.orders.Revision
		s.cfg.OnOrders(got.orders)
	}
	s.events.push(ownership.StoreSnapshot{SentAt: sent, Records: got.records})
	return nil
}
