//go:build linux

package main

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func held(holders ...[]string) (h lab.Holding) {
	for _, names := range holders {
		h.Spans = append(h.Spans, lab.Span{Holders: names})
		h.Max = max(h.Max, len(names))
	}
	return h
}

func TestComplaints(t *testing.T) {
	none, a, b, both := []string(nil), []string{"a"}, []string{"b"}, []string{"a", "b"}
	allowed := limits{gap: time.Second, failed: 1, broken: 1, moves: 1}
	for _, test := range []struct {
		name    string
		outcome outcome
		want    []string
	}{
		{"as expected", outcome{holding: held(a, none, b), report: lab.Report{Gap: time.Second, Failed: 1, Broken: 1}}, nil},
		{"two holders", outcome{holding: held(b, both, a)}, []string{"2 nodes held"}},
		{"no move", outcome{holding: held(a, none, a)}, []string{"changed 0 times, not 1"}},
		{"there and back", outcome{holding: held(a, b, a)}, []string{"changed 2 times"}},
		{"bad for clients", outcome{holding: held(a, b), report: lab.Report{Gap: 2 * time.Second, Failed: 2, Broken: 3}},
			[]string{"gap of 2s", "2 requests failed", "3 streams broke"}},
		{"a long wait", outcome{holding: held(a, b), waits: lab.Waits{Above: []lab.Wait{{Beyond: 3 * time.Second}}}},
			[]string{"ordinary clients waited"}},
		{"not done", outcome{failure: errors.New("no power")}, []string{"no power"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.outcome.expect = allowed
			got := test.outcome.complaints()
			if len(got) != len(test.want) {
				t.Fatalf("got %q, want %q", got, test.want)
			}
			for i := range got {
				if !strings.Contains(got[i], test.want[i]) {
					t.Errorf("got %q, want %q", got[i], test.want[i])
				}
			}
			if err := verdict(io.Discard, []outcome{test.outcome}); (err != nil) != (test.want != nil) {
				t.Errorf("verdict %v", err)
			}
		})
	}
}
