package server

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// TestIs checks that an error is known by whom it was said, and as what.
func TestIs(t *testing.T) {
	here := fmt.Errorf("cp-2: %w", ErrOwnerUnreachable)
	elsewhere := statusError(here)
	for name, c := range map[string]struct {
		err, target error
		want        bool
	}{
		"here":           {here, ErrOwnerUnreachable, true},
		"elsewhere":      {elsewhere, ErrOwnerUnreachable, true},
		"another":        {elsewhere, ErrNoOwner, false},
		"wrapped":        {fmt.Errorf("asked cp-3: %w", elsewhere), ErrOwnerUnreachable, true},
		"no reason":      {status.Error(codes.Unavailable, "gone"), ErrOwnerUnreachable, false},
		"nothing of us":  {errors.New("x"), ErrOwnerUnreachable, false},
		"unknown target": {elsewhere, errors.New("x"), false},
	} {
		if got := Is(c.err, c.target); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestAgeless: who watches a mesh at rest is not told how long ago each heartbeat came.
func TestAgeless(t *testing.T) {
	at := func(ms int64, lost bool) *hameshv1.GetStatusResponse {
		return &hameshv1.GetStatusResponse{Links: []*hameshv1.Link{{From: "cp-1", To: "cp-2", Heard: durationpb.New(time.Duration(ms)), Lost: lost}}}
	}
	if !proto.Equal(ageless(at(1, false)), ageless(at(2, false))) {
		t.Error("an age is news")
	}
	if proto.Equal(ageless(at(1, false)), ageless(at(1, true))) {
		t.Error("a lost link is no news")
	}
}
