package agent

import (
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
	// next is whom a member forwarded unknown connections of a VIP to when it last was not
	// its holder; keys are MEMBER/VIP.
	next map[string]string

	reason atomic.Pointer[string] // why this node is not eligible; empty: it is

	lasting lasting
}

// tenure is the present ownership of a VIP as this agent has seen it come about.
type tenure struct {
	owner       string
	epoch       int64
	since       time.Time
	transitions uint32
}

func newBoard() *board {
	b := &board{changed: make(chan struct{}), owners: map[string]tenure{}, peers: map[string]*hameshv1.Heartbeat{}, next: map[string]string{}}
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

// hear keeps a peer's newest heartbeat, and wakes watchers where it says something new.
func (b *board) hear(h *hameshv1.Heartbeat) {
	b.mu.Lock()
	was := b.peers[h.GetMember()]
	if was != nil && (h.GetBoot() < was.GetBoot() || (h.GetBoot() == was.GetBoot() && h.GetSequence() < was.GetSequence())) {
		b.mu.Unlock()
		return
	}
	b.peers[h.GetMember()] = h
	for _, v := range h.GetVips() {
		if !v.GetHolds() {
			b.next[h.GetMember()+"/"+v.GetName()] = v.GetForwardsTo()
		}
	}
	b.mu.Unlock()
	if was == nil || was.GetReady() != h.GetReady() || was.GetEligible() != h.GetEligible() || was.GetReason() != h.GetReason() || holdsDiffer(was, h) {
		b.notify()
	}
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
