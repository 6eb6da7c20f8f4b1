package health

import (
	"fmt"
	"time"
)

// State is what is known of one backend.
type State int

// The zero State says that nothing is known yet; a View never returns it.
const (
	Unknown State = iota
	// Up: it gets new connections.
	Up
	// Down: it gets none, unless all others look down too.
	Down
	// Draining: an operator wants no new connections to it; old ones may end by themselves.
	Draining
	// Disabled: an operator has taken it out; it gets none, whatever happens.
	Disabled
)

// String names the state.
func (s State) String() string {
	switch s {
	case Unknown:
		return "unknown"
	case Up:
		return "up"
	case Down:
		return "down"
	case Draining:
		return "draining"
	case Disabled:
		return "disabled"
	}
	return fmt.Sprintf("State(%d)", int(s))
}

// Result is one check of one backend, and where it leaves the count.
type Result struct {
	OK     bool
	Reason string        // why it failed, a few words; empty where it did not
	Took   time.Duration // from its start to its end
	State  State         // after it: Unknown, Up or Down
}

// Check counts the results of the checks of one backend.
type Check struct {
	rise, fall int
	state      State
	against    int // results in a row that speak against state
	reason     string
}

// NewCheck returns a check that goes up after rise successes in a row and down after
// fall failures in a row; values below 1 count as 1. It starts as Unknown, from
// where a single success makes it Up: at start, waiting longer protects nobody.
func NewCheck(rise, fall int) *Check {
	return &Check{rise: max(rise, 1), fall: max(fall, 1)}
}

// Resume takes the state of an earlier check of the same backend, in place of Unknown.
func (c *Check) Resume(state State) { c.state, c.against = state, 0 }

// Observe takes the next result and reports whether the state has changed. The reason
// says why the check failed.
func (c *Check) Observe(ok bool, reason string) bool {
	if !ok {
		c.reason = reason
	}
	to, needed := Down, c.fall
	if ok {
		to, needed = Up, c.rise
		if c.state == Unknown {
			needed = 1
		}
	}
	if to == c.state {
		c.against = 0
		return false
	}
	c.against++
	if c.against < needed {
		return false
	}
	c.state, c.against = to, 0
	return true
}

// State returns Unknown, Up or Down.
func (c *Check) State() State { return c.state }

// Doubtful reports whether the last results speak against the state, too few of them as
// yet to change it.
func (c *Check) Doubtful() bool { return c.against > 0 }

// Reason returns why the last failed check failed; empty while Up.
func (c *Check) Reason() string {
	if c.state == Up {
		return ""
	}
	return c.reason
}
