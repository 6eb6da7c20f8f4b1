package agent

import (
	"context"
	"maps"
	"time"

	"github.com/hamesh/hamesh/agent/ownership"
)

// loop feeds the ownership machine and carries its outputs to where they take effect.
// It is the only goroutine that touches the machine, and it waits for nothing but the
// next event: whatever could block (netlink, disk, network, the log) is behind a slot
// or a channel that never fills.
type loop struct {
	machine *ownership.Machine
	done    chan struct{} // closed when run returns
	inputs  chan input
	store   <-chan ownership.Event
	effects effects
	beat    func() // called once a step, for /healthz

	silent map[string]ownership.Instant // as last told
}

// input is one event, with what is wanted back.
type input struct {
	event ownership.Event            // nil: only look
	reply chan<- ownership.Heartbeat // gets the ack, or is closed without one
	look  func(*ownership.Machine, ownership.Instant)
}

// effects are the loop's ways out; none may block.
type effects struct {
	hold      func([]ownership.Hold)
	broadcast func(ownership.Heartbeat)
	write     func(ownership.Write)
	silent    func(map[string]ownership.Instant) // whenever other members fall silent or speak again
	progress  func(ownership.MoveProgress)
	change    func(ownership.Change)
	probe     func(vip string)
	announce  func(vip string)
	stopped   func()
}

// run steps the machine until ctx ends.
func (l *loop) run(ctx context.Context) error {
	defer close(l.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var in input
		select {
		case <-ctx.Done():
			return nil
		case in = <-l.inputs:
		case ev := <-l.store:
			in.event = ev
		case <-timer.C:
			in.event = ownership.Tick{}
		}
		at := now()
		if in.event != nil {
			out := l.machine.Step(at, in.event)
			l.carry(out, in.reply)
			timer.Reset(out.Wake.Sub(at))
		}
		if in.look != nil {
			in.look(l.machine, at)
		}
		l.beat()
	}
}

func (l *loop) carry(out ownership.Output, reply chan<- ownership.Heartbeat) {
	l.effects.hold(out.Holds)
	if !maps.Equal(out.Silent, l.silent) {
		l.silent = out.Silent
		l.effects.silent(out.Silent)
	}
	if reply != nil {
		if out.Reply != nil {
			reply <- *out.Reply // has room for one
		}
		close(reply)
	}
	if out.Broadcast != nil {
		l.effects.broadcast(*out.Broadcast)
	}
	for _, w := range out.Writes {
		l.effects.write(w)
	}
	for _, name := range out.Probes {
		l.effects.probe(name)
	}
	for _, name := range out.Announce {
		l.effects.announce(name)
	}
	for _, c := range out.Changes {
		l.effects.change(c)
	}
	for _, p := range out.Moves {
		l.effects.progress(p)
	}
	if out.Stopped {
		l.effects.stopped()
	}
}

// post hands an event to the loop; it is dropped when ctx ends first.
func (l *loop) post(ctx context.Context, ev ownership.Event) {
	select {
	case l.inputs <- input{event: ev}:
	case <-ctx.Done():
	case <-l.done:
	}
}

// answer hands a heartbeat to the loop and waits for the ack; false: there is none.
func (l *loop) answer(ctx context.Context, ev ownership.Event) (ownership.Heartbeat, bool) {
	reply := make(chan ownership.Heartbeat, 1)
	select {
	case l.inputs <- input{event: ev, reply: reply}:
	case <-ctx.Done():
		return ownership.Heartbeat{}, false
	case <-l.done:
		return ownership.Heartbeat{}, false
	}
	select {
	case b, ok := <-reply:
		return b, ok
	case <-ctx.Done():
		return ownership.Heartbeat{}, false
	case <-l.done:
		return ownership.Heartbeat{}, false
	}
}

// view looks at the machine; false when ctx ends first.
func (l *loop) view(ctx context.Context) (view ownership.View, ok bool) {
	done := make(chan ownership.View, 1)
	in := input{look: func(m *ownership.Machine, at ownership.Instant) { done <- m.View(at) }}
	select {
	case l.inputs <- in:
	case <-ctx.Done():
		return view, false
	case <-l.done:
		return view, false
	}
	select {
	case view = <-done:
		return view, true
	case <-ctx.Done():
		return view, false
	case <-l.done:
		return view, false
	}
}
