package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Errors of Give.
var (
	// ErrUnavailable: the store did not answer in time. Nothing was ordered, or all of it:
	// giving the same request again finds out.
	ErrUnavailable = errors.New("the store does not answer")
	// ErrRequestReused: the request is known, and was about something else.
	ErrRequestReused = errors.New("the request was used for another order")
)

const (
	// orderWithin bounds one Give, with an election of the store's leader in between.
	orderWithin = 3 * time.Second
	// requestsKept is how many requests are remembered: each poll reads them.
	requestsKept = 32
)

// Subject is what an order is about: a backend of a proxy, or a node.
type Subject struct {
	Proxy, Backend string
	Node           string // empty: about a backend
}

// Order is what an operator wants of a subject until it is taken back. The field names
// are read by people with etcdctl and by agents of other versions.
type Order struct {
	State string    `json:"state"` // the caller's word: nothing here depends on it
	By    string    `json:"by"`    // who wants it
	At    time.Time `json:"at"`    // when, by the clock of the member that was asked
}

// Orders is everything operators want.
type Orders struct {
	// Revision is that of the newest request; 0: there was none ever.
	Revision int64
	InForce  map[Subject]Order
	requests []request
}

// Answered says whether a request is kept, which a caller that got no answer cannot know.
// The last 32 are.
func (o Orders) Answered(id string) bool {
	return slices.ContainsFunc(o.requests, func(r request) bool { return r.ID == id })
}

// request is one call that was answered.
type request struct {
	ID      string `json:"id"`
	What    string `json:"what"` // to tell a repeated request from another one
	Changed bool   `json:"changed"`
}

// Wish is one operator's request.
type Wish struct {
	Request string // unique to this wish
	What    string // what is asked for, in words: the same for the same wish
	// Judge looks at the orders that are in force and says what is to be written over them;
	// a nil order takes the one of that subject back. It may be called several times; its
	// error ends the wish.
	Judge func(Orders) (map[Subject]*Order, error)
}

func (s Subject) key() string {
	if s.Node != "" {
		return "nodes/" + s.Node
	}
	return "backends/" + s.Proxy + "/" + s.Backend
}

func (k keys) order(s Subject) string { return string(k) + "orders/" + s.key() }
func (k keys) requests() string       { return string(k) + "orders/requests" }

// add takes one key; name is what follows "orders/". An order that cannot be read is not
// in force: what somebody wrote by hand must not keep the records from being read.
func (o *Orders) add(name string, kv *mvccpb.KeyValue) {
	var subject Subject
	if name == "requests" {
		o.Revision = kv.ModRevision
		if json.Unmarshal(kv.Value, &o.requests) != nil {
			o.requests = nil
		}
		return
	} else if node, ok := strings.CutPrefix(name, "nodes/"); ok {
		subject.Node = node
	} else if backend, ok := strings.CutPrefix(name, "backends/"); ok {
		subject.Proxy, subject.Backend, _ = strings.Cut(backend, "/")
	} else {
		return // another version's
	}
	var order Order
	if json.Unmarshal(kv.Value, &order) == nil {
		o.InForce[subject] = order
	}
}

// Give keeps an operator's orders in the store: all that the wish is about, or nothing.
// It returns the revision at which they are, for comparison with [Orders], and whether
// anything is different from before; of a repeated request, whether anything was then.
// Errors: ErrUnavailable, ErrRequestReused, and those of wish.Judge.
func (s *Store) Give(ctx context.Context, wish Wish) (revision int64, changed bool, err error) {
	if !s.begin() {
		return 0, false, ErrUnavailable
	}
	defer s.work.Done()
	// Not under ctx itself: an embedded etcd is called in this process, and would take the
	// caller of a gRPC call that ctx belongs to for its own, and panic where that one came
	// without TLS (server/auth, AuthInfoFromTLS).
	own, cancel := context.WithTimeout(s.life, orderWithin)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	for {
		revision, changed, done, err := s.give(own, wish)
		if done || err != nil {
			s.hurry()
			return revision, changed, err
		}
		// Another order came between: look again.
	}
}

// give tries once; not done: another order came between.
func (s *Store) give(ctx context.Context, wish Wish) (revision int64, changed, done bool, err error) {
	unanswered := func(err error) error { return fmt.Errorf("%w: %w", ErrUnavailable, err) }
	s.mu.Lock()
	eng, ready := s.engine, s.ready
	s.mu.Unlock()
	if !ready {
		return 0, false, false, unanswered(errNotReady)
	}
	one, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := eng.client().Get(one, string(s.keys)+"orders/", clientv3.WithPrefix())
	if err != nil {
		return 0, false, false, unanswered(err)
	}
	got, err := s.keys.parse(resp.Kvs)
	if err != nil {
		return 0, false, false, fmt.Errorf("reading the orders: %w", err)
	}
	orders := got.orders
	if i := slices.IndexFunc(orders.requests, func(r request) bool { return r.ID == wish.Request }); i >= 0 {
		if orders.requests[i].What != wish.What {
			return 0, false, false, fmt.Errorf("%w: to %s", ErrRequestReused, orders.requests[i].What)
		}
		return orders.Revision, orders.requests[i].Changed, true, nil
	}
	writes, err := wish.Judge(orders)
	if err != nil {
		return 0, false, false, err
	}
	var ops []clientv3.Op
	for subject, order := range writes {
		if order == nil {
			ops = append(ops, clientv3.OpDelete(s.keys.order(subject)))
			continue
		}
		val, err := json.Marshal(order)
		if err != nil {
			return 0, false, false, fmt.Errorf("encoding an order: %w", err)
		}
		ops = append(ops, clientv3.OpPut(s.keys.order(subject), string(val)))
	}
	requests := append(orders.requests, request{wish.Request, wish.What, len(writes) > 0})
	val, err := json.Marshal(requests[max(0, len(requests)-requestsKept):])
	if err != nil {
		return 0, false, false, fmt.Errorf("encoding the requests: %w", err)
	}
	ops = append(ops, clientv3.OpPut(s.keys.requests(), string(val)))
	one, cancel = context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	txn, err := eng.client().Txn(one).
		If(clientv3.Compare(clientv3.ModRevision(s.keys.requests()), "=", orders.Revision)).
		Then(ops...).
		Commit()
	if err != nil {
		return 0, false, false, unanswered(err)
	}
	return txn.Header.Revision, len(writes) > 0, txn.Succeeded, nil
}
