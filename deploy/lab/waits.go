package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// late is for how long after a fault's end an error may still be its doing.
const late = 5 * time.Second

// Fault is something from which ordinary clients may have to wait.
type Fault struct {
	At, Until time.Time // Until may be zero: no longer than a moment

	// Node is the one that was lost: its API server, and the connections that were made
	// while it held the VIP. Empty: none.
	Node string
}

// Wait is how long a client waited for something beyond what it should.
type Wait struct {
	Sample
	Beyond time.Duration
	Fault  *Fault        // from which it waited; nil: no fault came while it did
	Lost   bool          // its connection was lost with the fault's node
	Age    time.Duration // of its connection at the fault; 0: it had none
}

// String says who waited, for what, and when.
func (w Wait) String() string {
	clock := func(t time.Time) string { return t.UTC().Format("15:04:05.000") }
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s waited %s: ", w.Kind, netip.AddrPortFrom(w.Source, w.Port), w.Beyond.Round(time.Millisecond))
	fmt.Fprintf(&b, "begun %s, ", clock(w.Start))
	if w.Connected.IsZero() {
		b.WriteString("never connected, ")
	} else {
		fmt.Fprintf(&b, "connected %s, ", clock(w.Connected))
	}
	fmt.Fprintf(&b, "ended %s, answer due after %s", clock(w.End), w.Delay)
	if w.Backend != "" {
		fmt.Fprintf(&b, ", by %s", w.Backend)
	}
	if w.Fault != nil {
		fmt.Fprintf(&b, ", fault %s", clock(w.Fault.At))
		if w.Age > 0 {
			fmt.Fprintf(&b, " at the connection's age of %s", w.Age.Round(time.Millisecond))
		}
		if w.Lost {
			b.WriteString(", lost with " + w.Fault.Node)
		}
	}
	switch {
	case w.Unfinished:
		b.WriteString(", UNFINISHED")
	case w.Error != "":
		b.WriteString(": " + w.Error)
	default:
		b.WriteString(", answered")
	}
	return b.String()
}

// Waits is how long ordinary clients waited, and why.
type Waits struct {
	Number     int
	Failed     int
	Errors     map[string]int // the failed ones by cause
	Unfinished int            // whose answer was due, or whose connection was lost
	Longest    time.Duration
	Above      []Wait // those beyond the limit, the longest first

	// Connected is how many had a connection that was lost with a fault's node, and Known
	// the longest time until one of them learnt of it, or to the end.
	Connected int
	Known     time.Duration

	Unexplained []Wait // errors in no fault's time
}

// Judge says how long each client waited beyond what it should: for a good answer, beyond
// the delay that it asked for; for an error, from its beginning or the fault on, whichever
// is later, and at least for as long as its answer was overdue; for what is unfinished, to
// the end, where its answer was due or its connection was lost. The fault is the first one that took its connection, else the last one in its
// time. holder says who held the VIP at a time, and may be nil.
func Judge(samples []Sample, faults []Fault, holder func(time.Time) string, limit time.Duration) Waits {
	w := Waits{Errors: make(map[string]int)}
	for _, s := range samples {
		if s.Kind != Call && s.Kind != Kept && s.Kind != Watch {
			continue
		}
		wait := judge(s, faults, holder)
		w.Number++
		if s.Error != "" {
			w.Failed++
			w.Errors[s.Error]++
			if !explained(s, faults) {
				w.Unexplained = append(w.Unexplained, wait)
			}
		}
		if s.Unfinished && wait.Beyond > 0 {
			w.Unfinished++
		}
		if wait.Lost && (s.Error != "" || s.Unfinished) {
			w.Connected++
			w.Known = max(w.Known, s.End.Sub(wait.Fault.At))
		}
		w.Longest = max(w.Longest, wait.Beyond)
		if wait.Beyond > limit {
			w.Above = append(w.Above, wait)
		}
	}
	slices.SortStableFunc(w.Above, func(a, b Wait) int { return cmp.Compare(b.Beyond, a.Beyond) })
	return w
}

func judge(s Sample, faults []Fault, holder func(time.Time) string) Wait {
	w := Wait{Sample: s}
	for i, f := range faults {
		// A request may begin on a connection that is lost already.
		began := s.Start
		if !s.Connected.IsZero() && s.Connected.Before(began) {
			began = s.Connected
		}
		if f.At.Before(began) || f.At.After(s.End) {
			continue
		}
		lost := f.Node != "" && !s.Connected.IsZero() && s.Connected.Before(f.At) &&
			(s.Backend == f.Node || holder != nil && holder(s.Connected) == f.Node)
		if !lost && f.At.Before(s.Start) {
			continue // it has gone through that one unharmed
		}
		w.Fault, w.Lost, w.Age = &faults[i], lost, 0
		if !s.Connected.IsZero() {
			w.Age = max(0, f.At.Sub(s.Connected))
		}
		if lost {
			break
		}
	}
	from := s.Start
	if w.Fault != nil && w.Fault.At.After(from) {
		from = w.Fault.At
	}
	open := s.Kind == Watch && s.Backend != ""
	switch {
	case s.Error != "":
		switch {
		case !open:
			w.Beyond = max(s.End.Sub(from), s.End.Sub(s.Start)-s.Delay)
		case w.Fault != nil: // else it had all that it wanted until then
			w.Beyond = s.End.Sub(from)
		}
	case s.Unfinished && (w.Lost || s.Connected.IsZero()):
		w.Beyond = s.End.Sub(from)
	case s.Unfinished && open:
	default:
		w.Beyond = max(0, s.End.Sub(s.Start)-s.Delay)
	}
	return w
}

// explained reports whether a fault came while the sample lasted, or was over shortly
// before its end.
func explained(s Sample, faults []Fault) bool {
	return slices.ContainsFunc(faults, func(f Fault) bool {
		until := f.Until
		if until.Before(f.At) {
			until = f.At
		}
		return !f.At.After(s.End) && !s.End.After(until.Add(late))
	})
}
