package agent

import (
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/vip"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// TestConvert checks that a heartbeat survives the wire: whatever ownership says, its
// peer hears.
func TestConvert(t *testing.T) {
	want := ownership.Heartbeat{
		Member: "cp-1", Boot: 7, Seq: 8, AckBoot: 9, AckSeq: 10, Ready: true, Eligible: true, Witness: true, Priority: 50, Lease: 11,
		VIPs: []ownership.Report{{
			VIP: "api", Claims: true, Holds: true, Held: true, Right: ownership.Failsafe,
			Record: ownership.Record{VIP: "api", Owner: "cp-1", OwnerBoot: 7, Prev: "cp-2", PrevBoot: 6, Epoch: 5, Revision: 12, Lease: 11, Gone: true, Reason: "moved", Request: "r1"},
			Grants: []ownership.Grant{{Revision: 12, To: "cp-3", ToBoot: 4, Attempt: 2}},
			Ask:    ownership.Ask{Revision: 12, Attempt: 3}, Attempts: []uint64{2, 3},
		}},
	}
	for v := reflect.ValueOf(want.VIPs[0]); ; v = v.FieldByName("Record") {
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Fatalf("%s is zero: the test would not see it lost", v.Type().Field(i).Name)
			}
		}
		if v.Type() == reflect.TypeFor[ownership.Record]() {
			break
		}
	}
	b, err := proto.Marshal(&hameshv1.ExchangeResponse{Heartbeat: toProto(want), AckBoot: want.AckBoot, AckSequence: want.AckSeq})
	if err != nil {
		t.Fatal(err)
	}
	var wire hameshv1.ExchangeResponse
	if err := proto.Unmarshal(b, &wire); err != nil {
		t.Fatal(err)
	}
	if got := ackFromProto(&wire); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestNoVIPWithoutGuard: no address is put on before the guard watches, so a VIP that came to
// the node before would be without a holder.
func TestNoVIPWithoutGuard(t *testing.T) {
	a := &Agent{cfg: &config.Config{}, guarded: make(chan struct{})}
	a.orders = newOrders(a)
	a.orders.known = true
	if a.unfit() == "" {
		t.Error("may take a VIP while its guard is being started")
	}
	close(a.guarded)
	if reason := a.unfit(); reason != "" {
		t.Errorf("may not take a VIP though it is guarded: %s", reason)
	}
}

func TestNextBoot(t *testing.T) {
	dir, start := t.TempDir(), time.UnixMilli(1_000_000)
	last := uint64(0)
	for _, wall := range []time.Time{start, start, start.Add(time.Hour), start.Add(-time.Hour), time.UnixMilli(-5)} {
		boot, err := nextBoot(dir, wall)
		if err != nil || boot <= last {
			t.Fatalf("at %v: boot %d after %d, %v", wall, boot, last, err)
		}
		last = boot
	}
	if err := os.WriteFile(filepath.Join(dir, "boot"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := nextBoot(dir, start); err == nil || !strings.Contains(err.Error(), "delete the file") {
		t.Errorf("a damaged file: %v", err)
	}
}

// keeperRig is a keeper over a kernel in memory.
type keeperRig struct {
	*keeper
	fake *vip.Fake

	mu     sync.Mutex
	states []ownership.AddressState
	epochs []int64 // told to the announcer
}

var keeperVIP = vip.Address{VIP: "api", Addr: netip.MustParseAddr("10.77.0.100"), Interface: "eth0"}

// hangingKernel blocks what puts addresses on, as a stuck netlink socket would.
type hangingKernel struct {
	*vip.Kernel
	hang chan struct{}
}

func (h *hangingKernel) Set(desired func() []vip.Address) ([]vip.Address, error) {
	held, err := h.Kernel.Set(desired)
	<-h.hang
	return held, err
}

func newKeeperRig(t *testing.T, wrap func(*vip.Kernel) kernel) *keeperRig {
	r := &keeperRig{fake: vip.NewFake("eth0")}
	k, err := r.fake.Open(hclog.NewNullLogger(), []vip.Address{keeperVIP})
	if err != nil {
		t.Fatal(err)
	}
	r.keeper = newKeeper(wrap(k), []vip.Address{keeperVIP}, 3*time.Second, hclog.NewNullLogger())
	r.report = func(s ownership.AddressState) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.states = append(r.states, s)
	}
	r.announce = func(hold ownership.Hold) {
		if r.slots[0].mu.TryLock() {
			t.Error("announced without the slot's lock: a withdrawal may come in between, and is silenced first")
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if !slices.Contains(r.epochs, hold.Epoch) {
			r.epochs = append(r.epochs, hold.Epoch)
		}
	}
	r.silence = func(string) {}
	r.take, r.give, r.held = func(ownership.Hold) {}, func(ownership.Hold) {}, func(ownership.Hold) {}
	begun := time.Now()
	r.now = func() ownership.Instant { return ownership.Instant(time.Hour).Add(time.Since(begun)) }
	return r
}

func (r *keeperRig) has() bool { return strings.Contains(r.fake.String(), "10.77.0.100") }

// last is the newest state reported.
func (r *keeperRig) last() ownership.AddressState {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.states) == 0 {
		return ownership.AddressState{}
	}
	return r.states[len(r.states)-1]
}

func TestKeeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newKeeperRig(t, func(k *vip.Kernel) kernel { return k })
		go func() { _ = r.run(t.Context()) }()
		synctest.Wait()
		at := ownership.Instant(time.Hour)
		on := ownership.Hold{VIP: "api", On: true, Gen: 1, Until: at.Add(300 * time.Millisecond), Epoch: 5}

		r.set([]ownership.Hold{on})
		synctest.Wait()
		if !r.has() || r.last() != (ownership.AddressState{VIP: "api", Held: true, Gen: 1}) || !slices.Equal(r.epochs, []int64{5}) {
			t.Fatalf("after a hold: %q, reported %+v, announced %v", r.fake, r.last(), r.epochs)
		}
		// Renewed in time, it stays, for longer than its lifetime in the kernel.
		for range 100 {
			time.Sleep(100 * time.Millisecond)
			at = at.Add(100 * time.Millisecond)
			on.Until = at.Add(300 * time.Millisecond)
			r.set([]ownership.Hold{on})
			if !r.has() {
				t.Fatal("a right in force, and the address is off")
			}
		}
		// Nobody says more: off at the deadline, and reported.
		time.Sleep(299 * time.Millisecond)
		if !r.has() {
			t.Error("off before the deadline")
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if r.has() || r.last().Held {
			t.Errorf("past the deadline: %q, reported %+v", r.fake, r.last())
		}
		// It had been confirmed in time, after all: on again at once.
		at = at.Add(301 * time.Millisecond)
		on.Until = at.Add(100 * time.Millisecond)
		r.set([]ownership.Hold{on})
		synctest.Wait()
		if !r.has() || !r.last().Held {
			t.Errorf("confirmed again: %q, reported %+v", r.fake, r.last())
		}
		// Told to: off at once, and said so for the newest wish.
		r.set([]ownership.Hold{{VIP: "api", Gen: 2}})
		synctest.Wait()
		if r.has() || r.last() != (ownership.AddressState{VIP: "api", Gen: 2}) {
			t.Errorf("after a withdrawal: %q, reported %+v", r.fake, r.last())
		}
		// Deleted by hand: put on again when the kernel tells.
		on.Gen, on.Until = 3, at.Add(time.Hour)
		r.set([]ownership.Hold{on})
		synctest.Wait()
		if err := r.fake.Del(netip.PrefixFrom(keeperVIP.Addr, 32), "eth0"); err != nil {
			t.Fatal(err)
		}
		r.refresh()
		synctest.Wait()
		if !r.has() {
			t.Error("deleted by hand, and not put on again")
		}
	})
}

// TestKeeperWithdrawsWhileStuck checks that a deadline is met while putting addresses on
// hangs.
func TestKeeperWithdrawsWhileStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		r := newKeeperRig(t, func(k *vip.Kernel) kernel { return &hangingKernel{k, hang} })
		go func() { _ = r.run(t.Context()) }()
		at := ownership.Instant(time.Hour)
		r.set([]ownership.Hold{{VIP: "api", On: true, Gen: 1, Until: at.Add(300 * time.Millisecond)}})
		hang <- struct{}{} // the one at the start; the next puts the address on, and hangs
		synctest.Wait()
		if !r.has() {
			t.Fatal("not put on")
		}
		time.Sleep(301 * time.Millisecond)
		synctest.Wait()
		if r.has() {
			t.Error("the deadline has passed, and the address is still on")
		}
		close(hang)
	})
}

// TestPatientWriter checks that nobody who logs waits for a reader that does not read.
func TestPatientWriter(t *testing.T) {
	r, stuck := io.Pipe()
	w := newPatientWriter(stuck)
	for range 2 * linesKept {
		if _, err := w.Write([]byte("line\n")); err != nil {
			t.Fatal(err)
		}
	}
	if w.dropped.Load() == 0 {
		t.Error("nothing was dropped")
	}
	go w.flush()
	b := make([]byte, 64<<10)
	said := ""
	for !strings.Contains(said, "lines of the log were dropped") {
		n, err := r.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		said += string(b[:n])
	}
}
