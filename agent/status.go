package agent

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// oneWayAfter is how long a member that is heard may be out of reach: longer than a few
// attempts to connect.
const oneWayAfter = 3 * time.Second

// board is what this member knows beside the ownership machine, and who waits for news.
type board struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change
	owners  map[string]tenure
	peers   map[string]*hameshv1.Heartbeat // the newest of each other member
	silent  map[string]bool                // members given up
	heardAt map[string]time.Time           // when each other member was heard last
	// next is whom a member forwarded unknown connections of a VIP to when it last was not
	// its holder; keys are MEMBER/VIP.
	next map[string]string

	reason atomic.Pointer[string] // why this node is not eligible; empty: it is

	lasting lasting
}

// tenure is the present ownership of a VIP as this agent has seen it come about.
type tenure struct {
	owner       string
	before      string // the owner before; empty: none is known
	epoch       int64
	since       time.Time
	transitions uint32
}

func newBoard() *board {
	b := &board{changed: make(chan struct{}), owners: map[string]tenure{}, peers: map[string]*hameshv1.Heartbeat{}, heardAt: map[string]time.Time{}, next: map[string]string{}}
	starting := "starting"
	b.reason.Store(&starting)
	return b
}

// notify wakes everybody who watches the status.
func (b *board) notify() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.changed)
	b.changed = make(chan struct{})
}

// Changed implements server.StatusSource.
func (a *Agent) Changed() <-chan struct{} {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	return a.board.changed
}

// noteChange keeps count of owners, and returns what was known before, if anything was.
func (b *board) noteChange(c ownership.Change, at time.Time) (was tenure, known bool) {
	b.mu.Lock()
	was, known = b.owners[c.VIP]
	t := was
	if !known || c.Epoch != t.epoch || c.Owner != t.owner {
		if t.owner != "" && c.Owner != t.owner {
			t.transitions++
			t.before = t.owner
		}
		t.owner, t.epoch, t.since = c.Owner, c.Epoch, at
		b.owners[c.VIP] = t
	}
	b.mu.Unlock()
	b.notify()
	return was, known
}

// isSilent says whether a member has been given up.
func (b *board) isSilent(member string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.silent[member]
}

// serves says whether a member may be serving connections by a VIP: it has the address, or
// keeps what it had when it gave the VIP away, by its newest word, and is heard.
func (b *board) serves(member, vip string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.silent[member] {
		return false
	}
	for _, v := range b.peers[member].GetVips() {
		if v.GetName() == vip {
			return v.GetHolds() || v.GetKeeps()
		}
	}
	return true // not heard yet
}

// unheard says whether a member is given up, and was last heard that long ago at least.
func (b *board) unheard(member string, since time.Duration) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.silent[member] && time.Since(b.heardAt[member]) >= since
}

// hear keeps a peer's newest heartbeat, and wakes watchers where it says something new. It
// says whether that is about connections that it serves.
func (b *board) hear(h *hameshv1.Heartbeat) (serving bool) {
	b.mu.Lock()
	was := b.peers[h.GetMember()]
	if was != nil && (h.GetBoot() < was.GetBoot() || (h.GetBoot() == was.GetBoot() && h.GetSequence() < was.GetSequence())) {
		b.mu.Unlock()
		return false
	}
	b.peers[h.GetMember()], b.heardAt[h.GetMember()] = h, time.Now()
	for _, v := range h.GetVips() {
		if !v.GetHolds() {
			b.next[h.GetMember()+"/"+v.GetName()] = v.GetForwardsTo()
		}
	}
	b.mu.Unlock()
	if was == nil || was.GetReady() != h.GetReady() || was.GetEligible() != h.GetEligible() || was.GetReason() != h.GetReason() || holdsDiffer(was, h) {
		b.notify()
	}
	return !slices.EqualFunc(was.GetVips(), h.GetVips(), func(v, w *hameshv1.VipReport) bool {
		return (v.GetHolds() || v.GetKeeps()) == (w.GetHolds() || w.GetKeeps())
	})
}

func holdsDiffer(a, b *hameshv1.Heartbeat) bool {
	if len(a.GetVips()) != len(b.GetVips()) {
		return true
	}
	for i, v := range a.GetVips() {
		if w := b.GetVips()[i]; v.GetHeld() != w.GetHeld() || v.GetRight() != w.GetRight() {
			return true
		}
	}
	return false
}
