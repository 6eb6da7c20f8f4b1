package health

import "testing"

func TestCheck(t *testing.T) {
	tests := []struct {
		name       string
		rise, fall int
		results    string // + for a success, n for an answer that it is not ready, r for a refusal, - for silence
		states     string // after each: ? u n d, or r: down, and it refuses
		doubts     string // after each: . or ~
	}{
		{"the first success is enough", 2, 2, "++", "uu", ".."},
		{"the first failures must be fall", 2, 3, "---", "??d", "~~."},
		{"a success among the first failures", 2, 2, "-+--", "?uud", "~.~."},
		{"fall", 2, 3, "+--+---", "uuuuuud", ".~~.~~."},
		{"rise", 2, 1, "-+-++", "ddddu", ".~.~."},
		{"without limits", 0, 0, "-+n-", "dund", "...."},
		{"not ready", 2, 2, "+nn+nn++", "uunnnnnu", ".~.~..~."},
		{"not ready from the start", 2, 2, "nn", "?n", "~."},
		{"not ready, then silent", 2, 2, "+nn-n--", "uunnnnd", ".~.~.~."},
		{"not ready once, then silent", 2, 2, "+n--", "uund", ".~~."},
		{"silent once, then not ready", 2, 2, "+-n", "uun", ".~."},
		{"down, then not ready", 2, 2, "--nn", "?ddn", "~.~."},
		{"down, then not ready and well by turns", 3, 2, "--n+n+", "?dddnn", "~.~~.~"},
		{"refuses", 2, 2, "+rr--", "uurrd", ".~..."},
		{"silent, then refuses", 2, 2, "+-r", "uur", ".~."},
		{"not ready, then refuses", 2, 3, "+nnnrrr", "uuunnnr", ".~~.~~."},
	}
	letters := map[State]byte{Unknown: '?', Up: 'u', NotReady: 'n', Down: 'd'}
	outcomes := map[byte]Outcome{'+': Passed, 'n': Unready, 'r': Refused, '-': Silent}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := NewCheck(tt.rise, tt.fall)
			for i := range tt.results {
				before := c.State()
				changed := c.Observe(outcomes[tt.results[i]], "HTTP 503")
				letter := letters[c.State()]
				if c.Refuses() {
					letter = 'r'
				}
				if letter != tt.states[i] || c.Doubtful() != (tt.doubts[i] == '~') {
					t.Errorf("result %d: %v, doubtful %t; want %c%c", i, c.State(), c.Doubtful(), tt.states[i], tt.doubts[i])
				}
				if changed != (c.State() != before) {
					t.Errorf("result %d: changed is %t, from %v to %v", i, changed, before, c.State())
				}
				if (c.Reason() == "") != (c.State() == Up) {
					t.Errorf("result %d: reason %q while %v", i, c.Reason(), c.State())
				}
			}
		})
	}
}

func TestCheckResumes(t *testing.T) {
	c := NewCheck(2, 2)
	c.Resume(Up)
	if c.Observe(Silent, "HTTP 503") || c.State() != Up {
		t.Errorf("%v after one failure", c.State())
	}
	c.Resume(Down)
	if c.Refuses() {
		t.Error("it refuses, though no check has been made")
	}
	if c.Observe(Passed, "") || c.State() != Down {
		t.Errorf("%v after one success", c.State())
	}
	c.Resume(NotReady)
	if c.Observe(Silent, "") || c.State() != NotReady || !c.Observe(Silent, "") || c.State() != Down {
		t.Errorf("%v after two failures", c.State())
	}
}
