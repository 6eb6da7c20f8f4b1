package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hamesh/hamesh/agent/ownership"
)

const vip = "kube-api"

// TestThreeMembers is one story, since every mesh takes seconds to come up.
func TestThreeMembers(t *testing.T) {
	ca := newAuthority(t)
	m := newMesh(t, 3, ca)
	step := func(what string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(what, f) {
			t.FailNow()
		}
	}
	allReady := func() {
		t.Helper()
		for _, n := range m.nodes {
			n.ready()
		}
	}
	var rec ownership.Record

	step("bootstrap in any order", func(t *testing.T) {
		m.start(2, 0, 1)
		allReady()
		st := m.nodes[0].store.Status()
		if st.Kind != "embedded" || !st.Available || !slices.Equal(st.Members, []string{"cp-1", "cp-2", "cp-3"}) || !slices.Contains(st.Members, st.Leader) {
			t.Errorf("status %+v", st)
		}
		info, err := os.Stat(filepath.Join(m.dataDir(0), "etcd"))
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("data directory: %v, %v", info.Mode(), err)
		}
	})

	step("only members get in", func(t *testing.T) {
		cfg := m.config(0)
		u := clientURL(cfg, m.addrs[0])
		for cn, want := range map[string]bool{"cp-2": true, "viewer": false} {
			files := *ca.issue(t, cn, m.addrs[1])
			conf, err := clientTLS([]string{u.String()}, files)
			if err != nil {
				t.Fatal(err)
			}
			c, err := dial([]string{u.String()}, conf, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			if _, err := c.MemberList(ctx); (err == nil) != want {
				t.Errorf("certificate of %s: %v", cn, err)
			}
		}
		conf, err := embeddedTLS(cfg)
		if err != nil {
			t.Fatal(err)
		}
		conf.GetClientCertificate, conf.Certificates = nil, nil
		c, err := dial([]string{u.String()}, conf, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if _, err := c.MemberList(ctx); err == nil {
			t.Error("let in without a certificate")
		}
	})

	step("writes", func(t *testing.T) {
		a, b := m.nodes[0], m.nodes[1]
		boots := map[string]uint64{a.name: a.boot, b.name: b.boot}
		claim := ownership.Write{Boots: boots, Record: ownership.Record{
			VIP: vip, Owner: a.name, OwnerBoot: a.boot, Prev: "cp-9", PrevBoot: 7, Lease: a.leaseOf(0), Reason: "first"}}
		res := a.commit(claim)
		if res.Outcome != ownership.Written || res.Record.Gone || res.Record.Epoch != res.Record.Revision || res.Record.Revision == 0 {
			t.Fatalf("claim: %+v", res)
		}
		rec = res.Record
		want := claim.Record
		want.Epoch, want.Revision = rec.Revision, rec.Revision
		if diff := cmp.Diff(want, rec); diff != "" {
			t.Error(diff)
		}
		got := b.snapshot("the claim", func(s ownership.StoreSnapshot) bool { return !record(s, vip).Gone })
		if diff := cmp.Diff(rec, record(got, vip)); diff != "" {
			t.Error(diff)
		}
		if res := b.commit(claim); res.Outcome != ownership.Refused || res.Record != rec {
			t.Errorf("on the old revision: %+v", res)
		}

		rewrite := claim
		rewrite.Compare, rewrite.Record = rec.Revision, rec
		rewrite.Record.Prev, rewrite.Record.PrevBoot = "", 0
		res = a.commit(rewrite)
		if res.Outcome != ownership.Written || res.Record.Epoch != rec.Epoch || res.Record.Revision <= rec.Revision || res.Record.Prev != "" {
			t.Fatalf("rewrite: %+v", res)
		}
		rec = res.Record

		rewrite.Compare = rec.Revision
		rewrite.Boots = map[string]uint64{b.name: b.boot - 1}
		if res := a.commit(rewrite); res.Outcome != ownership.Refused || res.Record != rec {
			t.Errorf("on an old boot: %+v", res)
		}
		rewrite.Boots = map[string]uint64{"cp-9": 1}
		if res := a.commit(rewrite); res.Outcome != ownership.Refused {
			t.Errorf("on an unknown boot: %+v", res)
		}
		rewrite.Boots, rewrite.Record.Lease = nil, 12345
		if res := a.write(rewrite); res.Outcome != ownership.Unknown || res.Record != (ownership.Record{}) {
			t.Errorf("on no such lease: %+v", res)
		}

		res = a.commit(ownership.Write{Compare: rec.Revision, Release: true, Record: rec})
		if res.Outcome != ownership.Written || !res.Record.Gone || res.Record.Owner != "" || res.Record.Epoch != rec.Epoch {
			t.Fatalf("release: %+v", res)
		}
		got = b.snapshot("the release", func(s ownership.StoreSnapshot) bool { return record(s, vip).Gone })
		if record(got, vip) != res.Record {
			t.Errorf("released: %+v, want %+v", record(got, vip), res.Record)
		}
		claim.Compare = res.Record.Revision
		res = a.commit(claim)
		if res.Outcome != ownership.Written || res.Record.Epoch <= rec.Epoch {
			t.Fatalf("claim after release: %+v", res)
		}
		rec = res.Record
	})

	step("leader moves", func(t *testing.T) {
		var led *node
		await(t, "leader", func() bool {
			lead := m.nodes[0].store.Status().Leader
			i := slices.IndexFunc(m.nodes, func(n *node) bool { return n.name == lead })
			if i >= 0 {
				led = m.nodes[i]
			}
			return i >= 0
		})
		to := "cp-1"
		if led.name == to {
			to = "cp-2"
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := led.store.MoveLeader(ctx, to); err != nil {
			t.Error(err)
		}
		await(t, "new leader", func() bool { return m.nodes[2].store.Status().Leader == to })
		if err := led.store.MoveLeader(ctx, to); !errors.Is(err, ErrNotStoreLeader) {
			t.Errorf("asking another than the leader: %v", err)
		}
	})

	step("one member down, its record ends with the lease", func(t *testing.T) {
		m.stop(0)
		b := m.nodes[1]
		got := record(b.snapshot("the record gone", func(s ownership.StoreSnapshot) bool { return record(s, vip).Gone }), vip)
		want := rec
		want.Gone = true
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
		res := b.commit(ownership.Write{Compare: rec.Revision, Record: ownership.Record{
			VIP: vip, Owner: b.name, OwnerBoot: b.boot, Lease: b.leaseOf(0)}})
		if res.Outcome != ownership.Written || res.Record.Epoch <= rec.Epoch {
			t.Fatalf("claim of a gone record: %+v", res)
		}
		rec = res.Record
		if !b.store.Status().Available {
			t.Error("not available with two of three")
		}
	})

	step("no quorum", func(t *testing.T) {
		b := m.nodes[1]
		m.stop(2)
		await(t, "loss of the store", func() bool { return !b.store.Status().Available })
		res := b.write(ownership.Write{Compare: rec.Revision, Record: rec})
		if res.Outcome != ownership.Unknown {
			t.Errorf("write without a quorum: %+v", res)
		}
		m.start(2)
		m.nodes[2].ready()
		b.ready()
		// The unanswered write may take effect still, after the snapshot even.
		got := record(b.snapshot("a record", func(s ownership.StoreSnapshot) bool { return true }), vip)
		if got.Epoch != rec.Epoch || got.Owner != b.name {
			t.Errorf("after the loss: %+v, before %+v", got, rec)
		}
		m.start(0)
		allReady()
	})

	step("all restart", func(t *testing.T) {
		m.stop(m.all()...)
		m.start(m.all()...)
		allReady()
		got := record(m.nodes[0].snapshot("a record", func(s ownership.StoreSnapshot) bool { return true }), vip)
		if got.Epoch != rec.Epoch || got.Owner != rec.Owner || got.OwnerBoot != rec.OwnerBoot {
			t.Errorf("after the restart: %+v, before %+v", got, rec)
		}
	})

	for _, what := range []string{"etcd", ""} {
		step("lost directory "+filepath.Join("DATA", what), func(t *testing.T) {
			m.stop(2)
			if err := os.RemoveAll(filepath.Join(m.dataDir(2), what)); err != nil {
				t.Fatal(err)
			}
			m.start(2)
			allReady()
			await(t, "full cluster", func() bool {
				return slices.Equal(m.nodes[0].store.Status().Members, []string{"cp-1", "cp-2", "cp-3"})
			})
		})
	}

	step("older boot", func(t *testing.T) {
		m.stop(1)
		boot := m.boot
		m.boot = 5
		m.start(1)
		m.boot = boot
		select {
		case err := <-m.nodes[1].ended:
			if !errors.Is(err, ErrOlderBoot) {
				t.Error(err)
			}
			t.Log(err)
		case <-time.After(patience):
			t.Error("Run goes on")
		}
	})
}

// one starts a mesh of one member, without TLS.
func one(t *testing.T) (*mesh, *node) {
	m := newMesh(t, 1, nil)
	m.start(0)
	m.nodes[0].ready()
	return m, m.nodes[0]
}

func TestLeaseLost(t *testing.T) {
	_, n := one(t)
	lease := n.leaseOf(0)
	res := n.commit(ownership.Write{Record: ownership.Record{VIP: vip, Owner: n.name, Lease: lease}})
	if res.Outcome != ownership.Written {
		t.Fatal(res)
	}
	if err := n.store.Revoke(t.Context()); err != nil {
		t.Fatal(err)
	}
	if next := n.leaseOf(lease); next == lease {
		t.Error("no new lease")
	}
	if !slices.Contains(n.seen(), ownership.Event(ownership.LeaseLost{Lease: lease})) {
		t.Error("loss not told")
	}
	n.snapshot("the record gone", func(s ownership.StoreSnapshot) bool { return record(s, vip).Gone })
}

func TestForeignStore(t *testing.T) {
	m, n := one(t)
	known := n.store.identity()
	foreign := func(what string) {
		t.Helper()
		m.start(0)
		select {
		case err := <-m.nodes[0].ended:
			if !errors.Is(err, ErrForeignStore) {
				t.Errorf("%s: %v", what, err)
			}
			t.Log(err)
		case <-time.After(patience):
			t.Errorf("%s: accepted", what)
		}
		m.stop(0)
	}
	file := identityFile(m.dataDir(0))
	m.stop(0)
	for what, id := range map[string]identity{
		"another mesh": {ID: "x"},
		"gone back":    {ID: known.ID, Revision: known.Revision + 1000},
	} {
		if err := id.save(m.dataDir(0)); err != nil {
			t.Fatal(err)
		}
		foreign(what)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	m.start(0)
	m.nodes[0].ready()
	if _, err := m.nodes[0].store.current().client().Delete(t.Context(), "/hamesh/test/identity"); err != nil {
		t.Fatal(err)
	}
	if err := <-m.nodes[0].ended; !errors.Is(err, ErrForeignStore) {
		t.Errorf("wiped while running: %v", err)
	}
	m.stop(0)
	if err := os.RemoveAll(filepath.Join(m.dataDir(0), "etcd")); err != nil {
		t.Fatal(err)
	}
	foreign("lost directory of the only member")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	m.start(0)
	m.nodes[0].ready()
}

func TestDamagedDataDir(t *testing.T) {
	m, _ := one(t)
	m.stop(0)
	logs, err := filepath.Glob(filepath.Join(m.dataDir(0), "etcd/member/wal/*.wal"))
	if err != nil || len(logs) == 0 {
		t.Fatal(logs, err)
	}
	for _, l := range logs {
		b, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		for i := 100; i < 2000; i++ {
			b[i] ^= 0xa5
		}
		if err := os.WriteFile(l, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.start(0)
	select {
	case err := <-m.nodes[0].ended:
		if !errors.Is(err, ErrDataDir) {
			t.Error(err)
		}
		t.Log(err)
	case <-time.After(patience):
		t.Error("Run goes on")
	}
}

// TestEtcdGivesUp has etcd log what it otherwise exits the process with.
func TestEtcdGivesUp(t *testing.T) {
	_, n := one(t)
	old := n.store.current()
	lease := n.leaseOf(0)
	go old.(*embedded).etcd.GetLogger().Fatal("failed to save state", zap.Error(io.ErrShortWrite))
	await(t, "another etcd", func() bool { now := n.store.current(); return now != nil && now != old })
	n.ready()
	n.leaseOf(lease)
}

func TestExternal(t *testing.T) {
	m, _ := one(t)
	cfg := m.config(0)
	u := clientURL(cfg, m.addrs[0])
	cfg.Embedded, cfg.External = nil, &External{Endpoints: []string{"http://127.0.0.1:1", u.String()}, Prefix: "/elsewhere/"}
	cfg.DataDir = t.TempDir()
	n := run(t, cfg)
	defer n.stop()
	n.ready()
	await(t, "leader", func() bool { return n.store.Status().Leader == "cp-1" })
	if st := n.store.Status(); st.Kind != "external" || !st.Available {
		t.Errorf("%+v", st)
	}
	lease := n.leaseOf(0)
	res := n.commit(ownership.Write{Boots: map[string]uint64{n.name: n.boot}, Record: ownership.Record{VIP: vip, Owner: n.name, Lease: lease}})
	if res.Outcome != ownership.Written {
		t.Fatal(res)
	}
	await(t, "renewals", func() bool {
		return len(slices.DeleteFunc(slices.Clone(n.seen()), func(ev ownership.Event) bool {
			_, is := ev.(ownership.LeaseRenewed)
			return !is
		})) >= 3
	})
	if err := n.store.Revoke(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.leaseOf(lease)
	if err := n.store.MoveLeader(t.Context(), "cp-1"); !errors.Is(err, ErrNotEmbedded) {
		t.Error(err)
	}

	m.stop(0)
	await(t, "loss of the store", func() bool { return !n.store.Status().Available })
	m.start(0)
	n.ready()
	got := record(n.snapshot("a record", func(s ownership.StoreSnapshot) bool { return true }), vip)
	if got.Revision != res.Record.Revision {
		t.Errorf("after the restart: %+v", got)
	}
}

// countingKV is an etcd that fails every transaction.
type countingKV struct {
	pb.UnimplementedKVServer
	code codes.Code
	txns atomic.Int32
}

func (kv *countingKV) Txn(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error) {
	kv.txns.Add(1)
	return nil, status.Error(kv.code, "no")
}

func TestWriteIsSentOnce(t *testing.T) {
	for _, code := range []codes.Code{codes.DeadlineExceeded, codes.Canceled, codes.Unavailable, codes.Internal} {
		t.Run(code.String(), func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			kv := &countingKV{code: code}
			srv := grpc.NewServer()
			pb.RegisterKVServer(srv, kv)
			go srv.Serve(l)
			defer srv.Stop()

			cfg := newMesh(t, 1, nil).config(0)
			cfg.Embedded, cfg.External = nil, &External{Endpoints: []string{"http://" + l.Addr().String()}}
			s, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			eng, err := newExternal(s.cfg)
			if err != nil {
				t.Fatal(err)
			}
			s.setEngine(eng)
			s.ready = true
			s.Write(ownership.Write{ID: 1, Record: ownership.Record{VIP: vip}})
			res := (<-s.Events()).(ownership.WriteResult)
			if res.Outcome != ownership.Unknown || kv.txns.Load() != 1 {
				t.Errorf("%s after %d transactions", res.Outcome, kv.txns.Load())
			}
		})
	}
}

func TestWriteBeforeRun(t *testing.T) {
	s, err := Open(newMesh(t, 1, nil).config(0))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Write(ownership.Write{ID: 1})
	if res := (<-s.Events()).(ownership.WriteResult); res.ID != 1 || res.Outcome != ownership.Unknown {
		t.Errorf("%+v", res)
	}
}

func TestQueueDropsOnlySupersededSnapshots(t *testing.T) {
	q := newQueue()
	defer q.close()
	for i := range 100 {
		at := ownership.Instant(i)
		q.push(ownership.StoreSnapshot{SentAt: at})
		if i%10 == 0 {
			q.push(ownership.WriteResult{ID: uint64(i)})
		}
	}
	var got []string
	for range 11 {
		switch ev := (<-q.out).(type) {
		case ownership.StoreSnapshot:
			got = append(got, fmt.Sprint("snapshot ", int64(ev.SentAt)))
		case ownership.WriteResult:
			got = append(got, fmt.Sprint("write ", ev.ID))
		}
	}
	// The first snapshot may be on its way to a reader already; it is superseded too.
	want := []string{"write 0", "write 10", "write 20", "write 30", "write 40", "write 50",
		"write 60", "write 70", "write 80", "write 90", "snapshot 99"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestParse(t *testing.T) {
	k := keys("/hamesh/test/")
	kv := func(key, val string, rev int64) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte(key), Value: []byte(val), ModRevision: rev}
	}
	held := `{"owner":"cp-1","ownerBoot":3,"lease":9}`
	got, err := k.parse([]*mvccpb.KeyValue{
		kv(k.boot("cp-1"), "3", 1),
		kv(k.identity(), "id", 1),
		kv("/hamesh/test/of/another/version", "?", 1),
		kv(k.fence("a"), held, 5), kv(k.record("a"), held, 5),
		kv(k.fence("b"), held, 7), kv(k.record("b"), held, 6),
		kv(k.fence("c"), `{"owner":"","epoch":2}`, 8),
		kv(k.record("d"), held, 9),
		kv(k.order(drained), `{"state":"drained","by":"alice"}`, 7),
		kv(k.requests(), `[{"id":"r1","what":"drain cp-1","changed":true}]`, 7),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := contents{
		identity: "id",
		boots:    map[string]uint64{"cp-1": 3},
		records: []ownership.Record{
			{VIP: "a", Owner: "cp-1", OwnerBoot: 3, Lease: 9, Epoch: 5, Revision: 5},
			{VIP: "b", Owner: "cp-1", OwnerBoot: 3, Lease: 9, Epoch: 7, Revision: 7, Gone: true},
			{VIP: "c", Epoch: 2, Revision: 8, Gone: true},
		},
		orders: Orders{Revision: 7, InForce: map[Subject]Order{drained: {State: "drained", By: "alice"}}, requests: []request{{"r1", "drain cp-1", true}}},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(contents{}, Orders{})); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []*mvccpb.KeyValue{kv(k.boot("cp-1"), "x", 1), kv(k.fence("a"), "{", 1)} {
		if _, err := k.parse([]*mvccpb.KeyValue{bad}); err == nil {
			t.Errorf("accepted %s", bad)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	good := newMesh(t, 1, nil).config(0)
	for what, spoil := range map[string]func(*Config){
		"no store":     func(c *Config) { c.Embedded = nil },
		"two stores":   func(c *Config) { c.External = &External{Endpoints: []string{"http://x:1"}} },
		"stranger":     func(c *Config) { c.Member = "cp-9" },
		"slash":        func(c *Config) { c.Mesh = "a/b" },
		"no endpoints": func(c *Config) { c.Embedded, c.External = nil, &External{} },
		"wrong address": func(c *Config) {
			e := *c.Embedded
			e.Address = e.Address.Next()
			c.Embedded = &e
		},
		"no boot": func(c *Config) { c.Boot = 0 },
	} {
		cfg := good
		spoil(&cfg)
		if _, err := Open(cfg); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if err := os.MkdirAll(good.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(identityFile(good.DataDir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(good); err == nil {
		t.Error("damaged identity: accepted")
	}
}
