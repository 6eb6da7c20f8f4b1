package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

var (
	drained = Subject{Node: "cp-1"}
	backend = Subject{Proxy: "kube-api", Backend: "cp-2"}
	at      = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)
)

// heardOrders is what a member was told, newest last.
type heardOrders struct {
	mu  sync.Mutex
	all []Orders
}

func (h *heardOrders) hear(o Orders) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, o)
}

// newest is the last that was told; nil: nothing was.
func (h *heardOrders) newest() map[Subject]Order {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.all) == 0 {
		return nil
	}
	return h.all[len(h.all)-1].InForce
}

// always is a wish whose judge writes the same whatever is in force.
func always(request string, writes map[Subject]*Order) Wish {
	var what []string
	for subject := range writes {
		what = append(what, subject.key())
	}
	slices.Sort(what)
	return Wish{Request: request, What: strings.Join(what, " and "),
		Judge: func(Orders) (map[Subject]*Order, error) { return writes, nil }}
}

// Who is asked for an order reads it at once, however seldom it polls.
func TestOrderIsReadAtOnce(t *testing.T) {
	m := newMesh(t, 1, nil)
	heard := &heardOrders{}
	m.boot++
	cfg := m.config(0)
	cfg.OnOrders, cfg.Poll = heard.hear, time.Hour
	m.nodes[0] = run(t, cfg)
	order := Order{State: "drained", By: "alice", At: at}
	await(t, "answer", func() bool {
		_, _, err := m.nodes[0].store.Give(t.Context(), always("r1", map[Subject]*Order{drained: &order}))
		return err == nil
	})
	await(t, "the order", func() bool { return cmp.Equal(heard.newest(), map[Subject]Order{drained: order}) })
}

func TestOrders(t *testing.T) {
	m := newMesh(t, 3, nil)
	heard := make([]*heardOrders, 3)
	start := func() {
		for i := range 3 {
			m.boot++
			cfg := m.config(i)
			heard[i] = &heardOrders{}
			cfg.OnOrders = heard[i].hear
			m.nodes[i] = run(t, cfg)
		}
		for _, n := range m.nodes {
			n.ready()
		}
	}
	inForce := func(want map[Subject]Order) {
		t.Helper()
		for i := range 3 {
			await(t, fmt.Sprintf("%v on %s", want, name(i)), func() bool { return cmp.Equal(heard[i].newest(), want) })
		}
	}
	// give repeats what was not answered, as a client does: the same request.
	give := func(i int, w Wish) (int64, bool, error) {
		t.Helper()
		for end := time.Now().Add(patience); ; {
			revision, changed, err := m.nodes[i].store.Give(t.Context(), w)
			if !errors.Is(err, ErrUnavailable) || time.Now().After(end) {
				return revision, changed, err
			}
		}
	}
	start()
	// Told before the first snapshot, which has come.
	inForce(map[Subject]Order{})
	first := Order{State: "drained", By: "alice", At: at}
	second := Order{State: "draining", By: "bob", At: at}

	revision, changed, err := give(0, always("r1", map[Subject]*Order{drained: &first, backend: &second}))
	if err != nil || !changed || revision == 0 {
		t.Fatalf("changed %v at %d, %v", changed, revision, err)
	}
	inForce(map[Subject]Order{drained: first, backend: second})
	if last := heard[1].all[len(heard[1].all)-1]; last.Revision != revision {
		t.Errorf("given at %d, told at %d", revision, last.Revision)
	}

	if _, changed, err := give(1, always("r2", map[Subject]*Order{drained: nil})); err != nil || !changed {
		t.Fatalf("taken back: %v, %v", changed, err)
	}
	inForce(map[Subject]Order{backend: second})
	// A late repetition of the first one, through another member.
	if _, changed, err := give(2, always("r1", map[Subject]*Order{drained: &first, backend: &second})); err != nil || !changed {
		t.Errorf("repeated: %v, %v", changed, err)
	}
	if _, _, err := give(2, always("r1", map[Subject]*Order{drained: &first})); !errors.Is(err, ErrRequestReused) {
		t.Errorf("the same request for something else: %v", err)
	}
	if _, changed, err := give(0, always("r3", nil)); err != nil || changed {
		t.Errorf("nothing to do: %v, %v", changed, err)
	}
	refusal := errors.New("no")
	if _, _, err := give(0, Wish{Request: "r4", Judge: func(Orders) (map[Subject]*Order, error) { return nil, refusal }}); !errors.Is(err, refusal) {
		t.Errorf("refused: %v", err)
	}
	inForce(map[Subject]Order{backend: second})

	t.Run("one at a time", func(t *testing.T) {
		// Each wants to be the only one; whoever comes second sees the first.
		taken := errors.New("taken")
		var won, lost int
		var mu sync.Mutex
		var all sync.WaitGroup
		for i := range 12 {
			all.Go(func() {
				_, _, err := give(i%3, Wish{Request: fmt.Sprint("race", i), What: fmt.Sprint(i), Judge: func(now Orders) (map[Subject]*Order, error) {
					if _, ok := now.InForce[drained]; ok {
						return nil, taken
					}
					return map[Subject]*Order{drained: &first}, nil
				}})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					won++
				case errors.Is(err, taken):
					lost++
				default:
					t.Error(err)
				}
			})
		}
		all.Wait()
		if won != 1 || lost != 11 {
			t.Errorf("%d won, %d lost", won, lost)
		}
	})

	t.Run("all restart", func(t *testing.T) {
		m.stop(m.all()...)
		start()
		inForce(map[Subject]Order{drained: first, backend: second})
	})

	t.Run("no quorum", func(t *testing.T) {
		m.stop(1, 2)
		await(t, "loss of the store", func() bool { return !m.nodes[0].store.Status().Available })
		begun := time.Now()
		if _, _, err := m.nodes[0].store.Give(t.Context(), always("r5", map[Subject]*Order{drained: nil})); !errors.Is(err, ErrUnavailable) {
			t.Errorf("without a quorum: %v", err)
		}
		if took := time.Since(begun); took > orderWithin+time.Second {
			t.Errorf("it took %v to say so", took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := m.nodes[0].store.Give(ctx, always("r6", nil)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("for a caller that has gone: %v", err)
		}
		if got := heard[0].newest(); !cmp.Equal(got, map[Subject]Order{drained: first, backend: second}) {
			t.Errorf("meanwhile: %v", got)
		}
	})

	closed := m.nodes[0].store
	m.stop(0)
	if _, _, err := closed.Give(t.Context(), always("r7", nil)); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}

// What cannot be read is not in force, and keeps nothing else from being read.
func TestDamagedOrders(t *testing.T) {
	k := keys("/hamesh/test/")
	var kvs []*mvccpb.KeyValue
	for key, value := range map[string]string{
		"identity": "id", "orders/requests": "[", "orders/nodes/cp-1": `{"state":"drained"}`, "orders/nodes/cp-2": "drained",
		"orders/backends/kube-api/cp-3": `{"state":7}`, "orders/backends/kube-api/cp-2": `{"state":"disabled","new":1}`, "orders/other": "x",
	} {
		kvs = append(kvs, &mvccpb.KeyValue{Key: []byte(string(k) + key), Value: []byte(value), ModRevision: 8})
	}
	got, err := k.parse(kvs)
	want := map[Subject]Order{drained: {State: "drained"}, backend: {State: "disabled"}}
	if err != nil || got.identity != "id" || got.orders.Revision != 8 || !cmp.Equal(got.orders.InForce, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

// Old requests are forgotten: every poll reads them all.
func TestRequestsAreBounded(t *testing.T) {
	m := newMesh(t, 1, nil)
	m.start(0)
	n := m.nodes[0]
	n.ready()
	for i := range requestsKept + 5 {
		if _, _, err := n.store.Give(t.Context(), always(strings.Repeat("x", 100)+fmt.Sprint(i), nil)); err != nil {
			t.Fatal(err)
		}
	}
	var newest Orders
	if _, _, err := n.store.Give(t.Context(), Wish{Request: "last", Judge: func(now Orders) (map[Subject]*Order, error) {
		newest = now
		return nil, nil
	}}); err != nil {
		t.Fatal(err)
	}
	if newest.Answered(strings.Repeat("x", 100)+"0") || !newest.Answered(newest.requests[0].ID) {
		t.Error("a request that is forgotten counts as kept, or one that is kept does not")
	}
	if len(newest.requests) != requestsKept || !strings.HasSuffix(newest.requests[requestsKept-1].ID, fmt.Sprint(requestsKept+4)) {
		t.Errorf("%d requests are kept, the last is %q", len(newest.requests), newest.requests[len(newest.requests)-1].ID)
	}
}
