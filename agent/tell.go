package agent

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/vip"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// settled is how long an agent that starts says nothing of members, backends and
	// problems: it has to hear of them first.
	settled = 3 * time.Second
	// beginning is how long a VIP counts as just taken over.
	beginning = time.Second
	// problemFor is how long a problem lasts before it is an event.
	problemFor = time.Second
	// lookEvery is how often the status is looked at where nobody reports a change, and
	// lookPause the shortest time between two looks.
	lookEvery, lookPause = time.Second, 50 * time.Millisecond
)

// teller makes events of what this member sees.
type teller struct {
	self   string
	record func(*hameshv1.Event)

	mu     sync.Mutex
	rights map[string]ownership.Right  // VIP → the right of this member that was told last
	gained map[string]time.Time        // VIP → when this member last got it
	begun  map[string]ownership.Change // VIP → a right that may be that of the beginning alone
	words  map[string]uint64           // member → boot of which its guard's word was told
	off    map[string]bool             // VIPs whose address was told to be missing
}

func newTeller(self string, record func(*hameshv1.Event)) *teller {
	return &teller{self: self, record: record, rights: map[string]ownership.Right{}, gained: map[string]time.Time{}, begun: map[string]ownership.Change{}, words: map[string]uint64{}, off: map[string]bool{}}
}

// rightReasons say why this member holds what it owns by that right.
var rightReasons = map[ownership.Right]string{
	ownership.NoRight:    "neither a majority of the members nor the store confirms it",
	ownership.Confirmed:  "a majority of the members confirms it, and the store answers",
	ownership.Reasserted: "too few members confirm it, the store does",
	ownership.Failsafe:   "a majority of the members confirms it, but the store does not answer",
}

// owned takes a change of ownership; was is what was known before, ok whether anything
// was. It does not block.
func (t *teller) owned(was tenure, ok bool, c ownership.Change) {
	t.mu.Lock()
	defer t.mu.Unlock()
	event := &hameshv1.Event{Vip: c.VIP, Epoch: c.Epoch, Reason: c.Text}
	if c.Right != ownership.NoRight {
		event.Right = rightToProto(c.Right).Enum()
	}
	switch {
	case !ok: // it has come to know who owned it all along
		return
	case c.Epoch != was.epoch || c.Owner != was.owner:
		delete(t.begun, c.VIP)
		switch t.self {
		case c.Owner:
			event.Kind, event.Message = hameshv1.EventKind_EVENT_KIND_VIP_GAINED, t.self+" owns "+c.VIP
			if was.owner != t.self {
				event.Peer = was.owner
			}
			t.rights[c.VIP], t.gained[c.VIP] = ownership.Confirmed, time.Now() // what everybody expects
		case was.owner:
			event.Kind, event.Message, event.Peer = hameshv1.EventKind_EVENT_KIND_VIP_LOST, t.self+" owns "+c.VIP+" no more", c.Owner
		default:
			return
		}
	case strings.HasPrefix(c.Text, "right "):
		delete(t.begun, c.VIP)
		switch {
		case c.Owner != t.self:
		case c.Right == ownership.Reasserted && time.Since(t.gained[c.VIP]) < beginning:
			// Taking over gives a right by the store, until the first heartbeat is confirmed.
			t.begun[c.VIP] = c
		default:
			t.right(c.VIP, c.Epoch, c.Right)
		}
		return
	default:
		event.Kind, event.Message, event.Reason = hameshv1.EventKind_EVENT_KIND_ADDRESS_CONFLICT, t.self+" "+c.Text, ""
	}
	t.record(event)
}

// right tells the right by which this member holds a VIP now, unless it was told; t.mu is
// held.
func (t *teller) right(vip string, epoch int64, right ownership.Right) {
	if right == t.rights[vip] {
		return
	}
	t.rights[vip] = right
	event := &hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_RIGHT_CHANGED, Vip: vip, Epoch: epoch, Reason: rightReasons[right],
		Message: t.self + " holds " + vip + " by right " + right.String(),
	}
	if right == ownership.NoRight {
		event.Message = t.self + " holds " + vip + " no more"
	} else {
		event.Right = rightToProto(right).Enum()
	}
	t.record(event)
}

// stayed tells the rights that have outlasted the beginning.
func (t *teller) stayed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for vip, c := range t.begun {
		if time.Since(t.gained[vip]) >= beginning {
			delete(t.begun, vip)
			t.right(vip, c.Epoch, c.Right)
		}
	}
}

// withdrawn takes the word of a member's guard, which may come several times.
func (t *teller) withdrawn(member string, boot uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.words[member] >= boot {
		return
	}
	t.words[member] = boot
	t.record(&hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_MEMBER_WITHDRAWN, Peer: member,
		Message: "the agent of " + member + " has ended, and its addresses are off", Reason: "its guard's word",
	})
}

// address takes what the kernel says about an address that is wanted on this node.
func (t *teller) address(c vip.Change) {
	t.mu.Lock()
	defer t.mu.Unlock()
	event := &hameshv1.Event{Vip: c.VIP}
	switch {
	case c.Kind == vip.Disappeared && !t.off[c.VIP]:
		event.Kind, event.Reason = hameshv1.EventKind_EVENT_KIND_ADDRESS_REMOVED, "not by this agent"
		event.Message = fmt.Sprintf("%s was taken off %s", c.Addr, t.self)
	case c.Kind == vip.Appeared && t.off[c.VIP]:
		event.Kind = hameshv1.EventKind_EVENT_KIND_ADDRESS_RESTORED
		event.Message = fmt.Sprintf("%s is back on %s", c.Addr, c.Interface)
	default:
		return
	}
	t.off[c.VIP] = c.Kind == vip.Disappeared
	t.record(event)
}

// move tells that somebody wants a VIP to be moved, or why that came to nothing.
func (t *teller) move(kind hameshv1.EventKind, o *order, reason string) {
	to := o.request.GetTo()
	event := &hameshv1.Event{Kind: kind, Vip: o.request.GetVip(), Peer: to, By: o.by, Reason: reason, Message: "a move of " + o.request.GetVip()}
	if to != "" {
		event.Message += " to " + to
	}
	switch kind {
	case hameshv1.EventKind_EVENT_KIND_MOVE_REQUESTED:
		event.Message += " is asked for"
	default:
		event.Message += " has failed"
	}
	t.record(event)
}

// reloaded tells that the configuration was read again, with what has changed.
func (t *teller) reloaded(changes []config.Change) {
	t.record(&hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_CONFIG_RELOADED, Message: t.self + " has read its configuration again",
		Reason: cmp.Or(inShort(changes), "nothing has changed"),
	})
}

// refused tells that it was read again, and why it is not in force.
func (t *teller) refused(found config.Problems) {
	var findings []string
	for _, p := range found {
		p.File = filepath.Base(p.File)
		findings = append(findings, p.Finding())
	}
	t.record(&hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_CONFIG_REFUSED, Message: t.self + " goes on with the configuration that it had",
		Reason: inShort(findings),
	})
}

// inShort is the first few of many things in one line.
func inShort[T any](all []T) string {
	const few = 3
	var words []string
	for _, x := range all[:min(few, len(all))] {
		words = append(words, fmt.Sprint(x))
	}
	if more := len(all) - few; more > 0 {
		words = append(words, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, "; ")
}

// wants says whether an address should be on this node now.
func (k *keeper) wants(name string) bool {
	return slices.ContainsFunc(k.desired(), func(a vip.Address) bool { return a.VIP == name })
}

// watch tells what becomes different in the status until ctx ends.
func (t *teller) watch(ctx context.Context, status func() *hameshv1.GetStatusResponse, changed func() <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(settled):
	}
	var was *hameshv1.GetStatusResponse
	problems := problems{}
	for {
		next := changed()
		is := status()
		t.stayed()
		if ctx.Err() != nil {
			return nil // what an agent that ends sees is no news
		}
		if sees(is) {
			if was == nil {
				was = well(is)
			}
			for _, event := range append(differences(was, is), problems.look(t.self, is.GetProblems(), time.Now())...) {
				t.record(event)
			}
			was = is
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(now().UntilNext(lookEvery)):
		case <-next:
			time.Sleep(lookPause)
		}
	}
}

// sees says whether the member that reports knows what it says: it does not before it has
// read the store, nor where its ownership loop does not answer.
func sees(s *hameshv1.GetStatusResponse) bool {
	return !slices.ContainsFunc(s.GetNodes(), func(n *hameshv1.Node) bool {
		return n.GetName() == s.GetReportedBy() && n.GetState() == hameshv1.NodeState_NODE_STATE_SUSPECT
	})
}

// well is a status as it should be: what is not so when an agent has started is told.
func well(s *hameshv1.GetStatusResponse) *hameshv1.GetStatusResponse {
	s = proto.CloneOf(s)
	for _, n := range s.GetNodes() {
		n.State, n.UnheardBy = hameshv1.NodeState_NODE_STATE_READY, nil
	}
	for _, b := range s.GetBackends() {
		b.State, b.NotReady = hameshv1.BackendState_BACKEND_STATE_UP, false
	}
	s.Store.Available = true
	return s
}

// differences makes events of what is different between two statuses of one member. What
// an operator has ordered is left out: whoever took the order has told it. A disabled
// backend, which does not show whether it is up, becomes in now what it was before.
func differences(was, now *hameshv1.GetStatusResponse) (all []*hameshv1.Event) {
	for i, n := range now.GetNodes() {
		before, after := standing(was.GetNodes()[i], was.GetReportedBy()), standing(n, now.GetReportedBy())
		if before == after || n.GetName() == now.GetReportedBy() {
			continue
		}
		event := &hameshv1.Event{Peer: n.GetName(), Reason: n.GetReason()}
		switch after {
		case hameshv1.NodeState_NODE_STATE_DOWN:
			event.Kind, event.Message = hameshv1.EventKind_EVENT_KIND_MEMBER_DOWN, n.GetName()+" is not heard"
		case hameshv1.NodeState_NODE_STATE_SUSPECT:
			event.Kind, event.Message = hameshv1.EventKind_EVENT_KIND_MEMBER_SUSPECT, n.GetName()+" is heard, and not ready"
		default:
			event.Kind, event.Message, event.Reason = hameshv1.EventKind_EVENT_KIND_MEMBER_BACK, n.GetName()+" is heard, and ready", ""
		}
		all = append(all, event)
	}
	before := map[[2]string]*hameshv1.Backend{}
	for _, b := range was.GetBackends() {
		before[[2]string{b.GetProxy(), b.GetName()}] = b
	}
	for _, b := range now.GetBackends() {
		former := before[[2]string{b.GetProxy(), b.GetName()}]
		if b.GetState() == hameshv1.BackendState_BACKEND_STATE_DISABLED {
			b.State, b.NotReady = former.GetState(), former.GetNotReady()
		}
		event := &hameshv1.Event{Proxy: b.GetProxy(), Backend: b.GetName(), Reason: b.GetReason()}
		switch was, is := serving(former.GetState()), serving(b.GetState()); {
		case was == hameshv1.BackendState_BACKEND_STATE_UP && b.GetNotReady():
			event.Kind, event.Message = hameshv1.EventKind_EVENT_KIND_BACKEND_DOWN, "API server "+b.GetName()+" is not ready"
		case is == hameshv1.BackendState_BACKEND_STATE_DOWN && !b.GetNotReady() && (was == hameshv1.BackendState_BACKEND_STATE_UP || former.GetNotReady()):
			event.Kind, event.Message = hameshv1.EventKind_EVENT_KIND_BACKEND_DOWN, "API server "+b.GetName()+" is down"
		case was == hameshv1.BackendState_BACKEND_STATE_DOWN && is == hameshv1.BackendState_BACKEND_STATE_UP:
			event.Kind, event.Message = hameshv1.EventKind_EVENT_KIND_BACKEND_UP, "API server "+b.GetName()+" is up"
		default:
			continue
		}
		all = append(all, event)
	}
	switch was, is := was.GetStore().GetAvailable(), now.GetStore().GetAvailable(); {
	case was && !is:
		all = append(all, &hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_STORE_AWAY, Message: "the store does not answer " + now.GetReportedBy()})
	case is && !was:
		all = append(all, &hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_STORE_BACK, Message: "the store answers " + now.GetReportedBy()})
	}
	return all
}

// standing is a node's state as one member's own ears have it, orders aside.
func standing(n *hameshv1.Node, listener string) hameshv1.NodeState {
	switch {
	case slices.Contains(n.GetUnheardBy(), listener):
		return hameshv1.NodeState_NODE_STATE_DOWN
	case n.GetState() == hameshv1.NodeState_NODE_STATE_DRAINED:
		return hameshv1.NodeState_NODE_STATE_READY
	}
	return n.GetState()
}

// serving is a backend's state, an order to drain it aside: what is down is not draining.
func serving(s hameshv1.BackendState) hameshv1.BackendState {
	if s == hameshv1.BackendState_BACKEND_STATE_DRAINING {
		return hameshv1.BackendState_BACKEND_STATE_UP
	}
	return s
}

// toldElsewhere are the problems that are events of another kind, or none.
var toldElsewhere = []string{
	"STORE_UNAVAILABLE", "NODE_DOWN", "NODE_NOT_READY", "NODE_DRAINED", "BACKEND_DOWN", "BACKEND_VIEWS_DIFFER",
	"BACKEND_ORDERED", "MEMBER_CUT_OFF",
	"VIP_FAILSAFE", "VIP_IN_USE", "TLS_INSECURE", "CONFIG_REFUSED",
}

// problems are those of the status, by what they say.
type problems map[string]*problem

type problem struct {
	event *hameshv1.Event // of its beginning
	since time.Time
	told  bool
	here  bool
}

// look makes events of problems that have lasted for a while, and of their ends.
func (p problems) look(self string, now []*hameshv1.Problem, at time.Time) (all []*hameshv1.Event) {
	for _, known := range p {
		known.here = false
	}
	for _, found := range now {
		code, message := found.GetCode(), found.GetMessage()
		// Each node tells of its own fitness.
		if slices.Contains(toldElsewhere, code) || (code == "NODE_NOT_ELIGIBLE" && !strings.HasPrefix(message, self+" ")) {
			continue
		}
		key := code + ": " + message
		if p[key] == nil {
			p[key] = &problem{since: at, event: &hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_PROBLEM_BEGAN, Message: message, Reason: code}}
			if code == "VIP_CONFLICT" {
				p[key].event.Kind = hameshv1.EventKind_EVENT_KIND_ADDRESS_CONFLICT
			}
		}
		known := p[key]
		known.here = true
		if !known.told && at.Sub(known.since) >= problemFor {
			known.told = true
			all = append(all, known.event)
		}
	}
	for key, known := range p {
		if known.here {
			continue
		}
		delete(p, key)
		if known.told {
			all = append(all, &hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_PROBLEM_ENDED, Message: known.event.GetMessage(), Reason: known.event.GetReason()})
		}
	}
	return all
}
