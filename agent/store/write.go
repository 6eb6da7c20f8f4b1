package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hamesh/hamesh/agent/ownership"
)

var errNotReady = errors.New("the store is not started, or this boot is not recorded yet")

// Write sends one transaction and returns at once; exactly one WriteResult follows,
// after at most a second, unless the Store is closed before. A write is sent once:
// neither this package nor the etcd client repeats it.
func (s *Store) Write(w ownership.Write) {
	if !s.begin() {
		return
	}
	go func() {
		defer s.work.Done()
		ctx, cancel := context.WithTimeout(s.life, requestTimeout)
		defer cancel()
		res, err := s.write(ctx, w)
		if err != nil {
			s.log.Debug("write not answered", "vip", w.Record.VIP, "error", err)
		}
		s.events.push(res)
	}()
}

func (s *Store) write(ctx context.Context, w ownership.Write) (ownership.WriteResult, error) {
	res := ownership.WriteResult{ID: w.ID, SentAt: s.cfg.Now(), Outcome: ownership.Unknown}
	select {
	case s.writes <- struct{}{}:
		defer func() { <-s.writes }()
	case <-ctx.Done():
		return res, ctx.Err()
	}
	s.mu.Lock()
	eng, ready := s.engine, s.ready
	s.mu.Unlock()
	if !ready {
		return res, errNotReady
	}
	val, err := encode(w)
	if err != nil {
		return res, fmt.Errorf("encoding the record: %w", err)
	}

	record, fence := s.keys.record(w.Record.VIP), s.keys.fence(w.Record.VIP)
	compare := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(fence), "=", w.Compare)}
	for member, boot := range w.Boots {
		compare = append(compare, clientv3.Compare(clientv3.Value(s.keys.boot(member)), "=", strconv.FormatUint(boot, 10)))
	}
	put := clientv3.OpPut(record, val, clientv3.WithLease(clientv3.LeaseID(w.Record.Lease)))
	if w.Release {
		put = clientv3.OpDelete(record)
	}

	// A proposal on its way to a leader that died is lost, and etcd waits for it all the same.
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	go func(newTerm <-chan struct{}) {
		select {
		case <-ctx.Done():
			return
		case <-newTerm:
		}
		select {
		case <-ctx.Done():
		case <-time.After(lateAnswer):
			giveUp()
		}
	}(eng.newTerm())

	res.SentAt = s.cfg.Now()
	resp, err := eng.client().Txn(ctx).
		If(compare...).
		Then(put, clientv3.OpPut(fence, val)).
		Else(clientv3.OpGet(record), clientv3.OpGet(fence)).
		Commit()
	if err != nil {
		return res, err
	}
	var found, at *mvccpb.KeyValue
	outcome := ownership.Written
	if resp.Succeeded {
		at = &mvccpb.KeyValue{Key: []byte(fence), Value: []byte(val), ModRevision: resp.Header.Revision}
		if !w.Release {
			found = at
		}
	} else {
		outcome = ownership.Refused
		found, at = only(resp.Responses[0].GetResponseRange().Kvs), only(resp.Responses[1].GetResponseRange().Kvs)
	}
	rec, err := decode(w.Record.VIP, found, at)
	if err != nil {
		return res, err
	}
	res.Outcome, res.Record = outcome, rec
	return res, nil
}

func only(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	if len(kvs) == 0 {
		return nil
	}
	return kvs[0]
}
