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
	// NotReady: it answers that it is not ready, and lives; it gets no new connections while
	// another one is up, and old ones may end by themselves. It is the last one here because
	// agents of other versions are told these numbers.
	NotReady
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
	case NotReady:
		return "not ready"
	}
	return fmt.Sprintf("State(%d)", int(s))
}

// Outcome is how one check ended.
type Outcome int

// The zero Outcome counts as Silent.
const (
	// Silent: no answer, or none that counts: a time-out, a reset, a failure of TLS, an answer
	// of a server that does not live.
	Silent Outcome = iota
	// Passed: the answer was the one that was wanted.
	Passed
	// Unready: the answer was another one, and the server lives.
	Unready
	// Refused: the machine answers that nobody listens. A server that has ended has lost its
	// connections by that; one that is being stopped still serves those that it has.
	Refused
)

// Result is one check of one backend, and where it leaves the count.
type Result struct {
	OK     bool
	Reason string        // why it failed, a few words; empty where it did not
	Took   time.Duration // from its start to its end
	State  State         // after it: Unknown, Up, NotReady or Down
	// Refuses: it is Down, and its machine answers for it (Refused).
	Refuses bool
}

// Check counts the results of the checks of one backend.
type Check struct {
	rise, fall int
	state      State
	reason     string
	// Results in a row: passed; failed; failed without an answer; answered.
	passed, failed, unanswered, answered int
	silent                               int // since the last refusal, or since it was not down
}

// NewCheck returns a check that goes up after rise successes in a row, and down after
// fall failures in a row that are no answers; after fall failures that are not all so it is
// not ready, and so it is after rise answers in a row where it was down. Values below 1 count
// as 1. It starts as Unknown, from where a single success makes it Up: at start, waiting
// longer protects nobody.
func NewCheck(rise, fall int) *Check {
	return &Check{rise: max(rise, 1), fall: max(fall, 1)}
}

// Resume takes the state of an earlier check of the same backend, in place of Unknown.
func (c *Check) Resume(state State) {
	*c = Check{rise: c.rise, fall: c.fall, state: state}
	if state == Down {
		c.silent = c.fall // until it refuses
	}
}

// Observe takes the next result and reports whether the state has changed. The reason
// says why the check failed.
func (c *Check) Observe(o Outcome, reason string) bool {
	if o == Passed {
		c.passed, c.failed = c.passed+1, 0
	} else {
		c.passed, c.failed, c.reason = 0, c.failed+1, reason
	}
	if o == Passed || o == Unready {
		c.answered, c.unanswered = c.answered+1, 0
	} else {
		c.answered, c.unanswered = 0, c.unanswered+1
	}
	switch {
	case o == Refused, c.unanswered == 0 && c.state != Down:
		c.silent = 0
	case o == Silent:
		c.silent++
	}
	before := c.state
	switch {
	case c.passed >= c.rise || (c.passed > 0 && c.state == Unknown):
		c.state = Up
	case c.unanswered >= c.fall:
		c.state = Down
	case c.failed >= c.fall && c.state != Down, c.state == Down && c.failed > 0 && c.answered >= c.rise:
		c.state = NotReady
	}
	return c.state != before
}

// State returns Unknown, Up, NotReady or Down.
func (c *Check) State() State { return c.state }

// Refuses reports whether it is Down, and its machine has answered for it lately.
func (c *Check) Refuses() bool { return c.state == Down && c.silent < c.fall }

// Doubtful reports whether the last results speak against the state, too few of them as
// yet to change it.
func (c *Check) Doubtful() bool {
	switch c.state {
	case NotReady:
		return c.passed > 0 || c.unanswered > 0
	case Down:
		return c.answered > 0
	}
	return c.failed > 0
}

// Reason returns why the last failed check failed; empty while Up.
func (c *Check) Reason() string {
	if c.state == Up {
		return ""
	}
	return c.reason
}
