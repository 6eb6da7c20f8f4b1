package ownership

import (
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"
)

// FuzzStep feeds a machine whatever bytes make of events, most of them such as no correct
// peer, store or kernel would send: it must not panic, and its outputs must keep their form.
func FuzzStep(f *testing.F) {
	for seed := range uint64(24) {
		rng := rand.New(rand.NewPCG(seed, 11))
		data := make([]byte, 200+rng.IntN(3000))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b := &fuzzBytes{data: data}
		cfg := Config{
			Self: "cp-1", Boot: 2, Timing: defaultTiming, ExternalStore: b.bool(), Probe: b.bool(),
			Members: []Member{{Name: "cp-1"}, {Name: "cp-2"}, {Name: "cp-3", Witness: b.bool()}}[:1+b.int(3)],
			VIPs:    []VIP{{Name: "api", Preferred: []string{"cp-2"}, Preempt: b.bool()}, {Name: "ingress"}},
		}
		now := Instant(time.Hour)
		m := New(cfg, now)
		for steps := 0; len(b.data) > 0 && steps < 500; steps++ {
			now = now.Add(time.Duration(b.int(256)) * time.Duration(b.int(256)) * 50 * time.Microsecond)
			ev := b.event(now)
			checkOutput(t, cfg, now, ev, m.Step(now, ev))
			m.View(now)
		}
	})
}

func checkOutput(t *testing.T, cfg Config, now Instant, ev Event, out Output) {
	t.Helper()
	if len(out.Holds) != len(cfg.VIPs) {
		t.Fatalf("%d holds for %d VIPs", len(out.Holds), len(cfg.VIPs))
	}
	for i, h := range out.Holds {
		if h.VIP != cfg.VIPs[i].Name {
			t.Errorf("hold %d is for %s", i, h.VIP)
		}
		if h.On && (h.Until <= now || h.Right == NoRight) {
			t.Errorf("at %v, %s is to be held until %v by right %v", now, h.VIP, h.Until, h.Right)
		}
		if h.On && out.Stopped {
			t.Errorf("stopped, and %s is to be held", h.VIP)
		}
	}
	if hb, ok := ev.(HeartbeatReceived); out.Reply != nil && (!ok || hb.Heartbeat.AckBoot != 0) {
		t.Errorf("a reply to %#v", ev)
	}
	if out.Reply != nil && (out.Reply.AckBoot == 0 || len(out.Reply.VIPs) != len(cfg.VIPs)) {
		t.Errorf("an incomplete reply: %+v", out.Reply)
	}
	if out.Wake <= now {
		t.Errorf("wake at %v, which is not after %v", out.Wake, now)
	}
	for _, w := range out.Writes {
		if w.ID == 0 || w.Record.VIP == "" || (w.Record.Owner == "") != w.Release {
			t.Errorf("an incomplete write: %+v", w)
		}
	}
}

// fuzzBytes makes values of bytes; when they run out, zeroes.
type fuzzBytes struct{ data []byte }

// int is in [0, n).
func (b *fuzzBytes) int(n int) int {
	if len(b.data) == 0 {
		return 0
	}
	v := int(b.data[0]) % n
	b.data = b.data[1:]
	return v
}

func (b *fuzzBytes) bool() bool { return b.int(2) == 1 }

func (b *fuzzBytes) member() string {
	return []string{"cp-1", "cp-2", "cp-3", "", "stranger"}[b.int(5)]
}

func (b *fuzzBytes) vip() string { return []string{"api", "ingress", "", "other"}[b.int(4)] }

func (b *fuzzBytes) record() Record {
	return Record{
		VIP: b.vip(), Owner: b.member(), OwnerBoot: uint64(b.int(4)), Prev: b.member(), PrevBoot: uint64(b.int(4)),
		Epoch: int64(b.int(8)), Revision: int64(b.int(8)), Lease: int64(b.int(4)), Gone: b.bool(),
	}
}

func (b *fuzzBytes) records() (all []Record) {
	for range b.int(4) {
		all = append(all, b.record())
	}
	return all
}

func (b *fuzzBytes) heartbeat() Heartbeat {
	// Acks name what was sent: numbers start at 1.
	h := Heartbeat{
		Member: b.member(), Boot: uint64(b.int(4)), Seq: uint64(b.int(64)), AckBoot: uint64(b.int(3)), AckSeq: uint64(b.int(64)),
		Ready: b.bool(), Eligible: b.bool(), Witness: b.bool(), Priority: b.int(3), Lease: int64(b.int(4)),
	}
	for range b.int(4) {
		r := Report{
			VIP: b.vip(), Record: b.record(), Claims: b.bool(), Holds: b.bool(), Held: b.bool(), Right: Right(b.int(5)),
			Ask: Ask{Revision: int64(b.int(8)), Attempt: uint64(b.int(4))},
		}
		for range b.int(3) {
			r.Grants = append(r.Grants, Grant{Revision: int64(b.int(8)), To: b.member(), ToBoot: uint64(b.int(4)), Attempt: uint64(b.int(4))})
		}
		for range b.int(3) {
			r.Attempts = append(r.Attempts, uint64(b.int(4)))
		}
		h.VIPs = append(h.VIPs, r)
	}
	return h
}

func (b *fuzzBytes) event(now Instant) Event {
	sent := now.Add(-time.Duration(b.int(256)) * 10 * ms)
	switch b.int(18) {
	case 0, 1, 2, 3:
		return HeartbeatReceived{b.heartbeat()}
	case 4, 5:
		return StoreSnapshot{SentAt: sent, Records: b.records()}
	case 6:
		return LeaseRenewed{Lease: int64(b.int(4)), SentAt: sent}
	case 7:
		return LeaseLost{Lease: int64(b.int(4))}
	case 8, 9:
		return WriteResult{ID: uint64(b.int(32)), SentAt: sent, Outcome: Outcome(b.int(4)), Record: b.record()}
	case 10:
		return AddressState{VIP: b.vip(), Held: b.bool(), Gen: uint64(b.int(8))}
	case 11:
		return Eligibility{Eligible: b.bool()}
	case 12:
		return Withdrawn{Member: b.member(), Boot: uint64(b.int(4)), VIPs: []string{b.vip()}}
	case 13:
		return MoveOrder{ID: uint64(b.int(4)), VIP: b.vip(), To: b.member()}
	case 14:
		if b.int(16) == 0 {
			return Shutdown{}
		}
		return Nudge{}
	case 15:
		return Probed{VIP: b.vip(), Stranger: []string{"", "02:00:00:00:00:99"}[b.int(2)]}
	case 16:
		return Foreign{VIP: b.vip(), Member: b.member(), Announcement: b.bool()}
	}
	return Tick{}
}

// TestSameSeesEveryField checks that a change of any field of a heartbeat is noticed.
func TestSameSeesEveryField(t *testing.T) {
	base := Heartbeat{VIPs: []Report{{}}}
	differs := func(name string, b Heartbeat) {
		t.Helper()
		if b.same(base) {
			t.Errorf("a change of %s is not noticed", name)
		}
	}
	set := func(f reflect.Value) {
		switch f.Kind() {
		case reflect.Bool:
			f.SetBool(true)
		case reflect.String:
			f.SetString("x")
		case reflect.Int, reflect.Int64:
			f.SetInt(1)
		case reflect.Uint64:
			f.SetUint(1)
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 1, 1))
		case reflect.Struct:
			for i := range f.NumField() {
				if g := f.Field(i); g.Kind() == reflect.Uint64 || g.Kind() == reflect.Int64 {
					g.Set(reflect.ValueOf(1).Convert(g.Type()))
				}
			}
		default:
			t.Fatalf("cannot change a %v", f.Kind())
		}
	}
	for i := range reflect.TypeFor[Heartbeat]().NumField() {
		name := reflect.TypeFor[Heartbeat]().Field(i).Name
		if slices.Contains([]string{"Seq", "AckBoot", "AckSeq", "VIPs"}, name) {
			continue
		}
		b := base
		set(reflect.ValueOf(&b).Elem().Field(i))
		differs(name, b)
	}
	for i := range reflect.TypeFor[Report]().NumField() {
		b := Heartbeat{VIPs: []Report{{}}}
		set(reflect.ValueOf(&b.VIPs[0]).Elem().Field(i))
		differs(reflect.TypeFor[Report]().Field(i).Name, b)
	}
}
