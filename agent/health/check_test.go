package health

import "testing"

func TestCheck(t *testing.T) {
	tests := []struct {
		name       string
		rise, fall int
		results    string // + for a success, - for a failure
		states     string // after each: ? u d
		doubts     string // after each: . or ~
	}{
		{"the first success is enough", 2, 2, "++", "uu", ".."},
		{"the first failures must be fall", 2, 3, "---", "??d", "~~."},
		{"a success among the first failures", 2, 2, "-+--", "?uud", "~.~."},
		{"fall", 2, 3, "+--+---", "uuuuuud", ".~~.~~."},
		{"rise", 2, 1, "-+-++", "ddddu", ".~.~."},
		{"without limits", 0, 0, "-+-", "dud", "..."},
	}
	letters := map[State]byte{Unknown: '?', Up: 'u', Down: 'd'}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := NewCheck(tt.rise, tt.fall)
			for i := range tt.results {
				before := c.State()
				changed := c.Observe(tt.results[i] == '+', "HTTP 503")
				if letters[c.State()] != tt.states[i] || c.Doubtful() != (tt.doubts[i] == '~') {
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
	if c.Observe(false, "HTTP 503") || c.State() != Up {
		t.Errorf("%v after one failure", c.State())
	}
	c.Resume(Down)
	if c.Observe(true, "") || c.State() != Down {
		t.Errorf("%v after one success", c.State())
	}
}
