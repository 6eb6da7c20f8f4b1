package server

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// EventSelection says which events are wanted.
type EventSelection struct {
	After   map[string]string // node → only its events with a higher id than this
	Since   time.Time         // of the other nodes, events at or after this time
	OwnOnly bool              // only what the answering member has recorded itself
}

// EventSource remembers what has happened in the mesh.
type EventSource interface {
	// Events returns what is remembered of a selection, in the order of the ids, and the
	// members whose newest events may be missing because they do not answer now.
	Events(EventSelection) (events []*hameshv1.Event, unanswered []string)
	// EventsChanged returns a channel that is closed at the next event.
	EventsChanged() <-chan struct{}
}

// timeDigits is how many hexadecimal digits of an event's id are its time.
const timeDigits = 16

// EventID returns the id of a node's event, which sorts by the time. No two events of one
// node have the same time.
func EventID(at time.Time, node string) string {
	return fmt.Sprintf("%0*x-%s", timeDigits, at.UnixNano(), node)
}

// ParseEventID takes an id apart.
func ParseEventID(id string) (at time.Time, node string, err error) {
	if len(id) < timeDigits+2 || id[timeDigits] != '-' {
		return at, "", fmt.Errorf("%q: %w", id, errEventID)
	}
	nanos, err := strconv.ParseUint(id[:timeDigits], 16, 63)
	if err != nil {
		return at, "", fmt.Errorf("%q: %w", id, errEventID)
	}
	return time.Unix(0, int64(nanos)), id[timeDigits+1:], nil
}

// selection reads what a request asks for.
func selection(request interface {
	GetAfter() []string
	GetSince() *timestamppb.Timestamp
	GetOwnOnly() bool
}) (EventSelection, error) {
	s := EventSelection{After: map[string]string{}, OwnOnly: request.GetOwnOnly()}
	var oldest time.Time
	for _, id := range request.GetAfter() {
		at, node, err := ParseEventID(id)
		if err != nil {
			return s, err
		}
		if oldest.IsZero() || at.Before(oldest) {
			oldest = at
		}
		s.After[node] = max(s.After[node], id)
	}
	s.Since = oldest
	if request.GetSince() != nil {
		s.Since = request.GetSince().AsTime()
	}
	return s, nil
}

// ListEvents implements StatusService.
func (s *Server) ListEvents(_ context.Context, request *hameshv1.ListEventsRequest) (*hameshv1.ListEventsResponse, error) {
	wanted, err := selection(request)
	if err != nil {
		return nil, err
	}
	events, unanswered := s.events.Events(wanted)
	return &hameshv1.ListEventsResponse{Events: events, Unanswered: unanswered}, nil
}

// WatchEvents implements StatusService.
func (s *Server) WatchEvents(request *hameshv1.WatchEventsRequest, stream grpc.ServerStreamingServer[hameshv1.WatchEventsResponse]) error {
	wanted, err := selection(request)
	if err != nil {
		return err
	}
	for {
		// Asked for before the events are read, so that none is missed in between.
		changed := s.events.EventsChanged()
		events, _ := s.events.Events(wanted)
		for _, event := range events {
			if err := stream.Send(&hameshv1.WatchEventsResponse{Event: event}); err != nil {
				return err
			}
			wanted.After[event.GetNode()] = event.GetId()
		}
		// So that the caller knows that the past has been told, where there is none; else
		// it went with the first message, and this fails.
		_ = stream.SendHeader(nil)
		if err := wait(stream.Context(), s.stopping, changed, nil); err != nil {
			return err
		}
	}
}
