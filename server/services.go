package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// GetStatus implements StatusService.
func (s *Server) GetStatus(context.Context, *hameshv1.GetStatusRequest) (*hameshv1.GetStatusResponse, error) {
	return s.status.Status(), nil
}

// WatchStatus implements StatusService. Each message is the newest status at the time
// that it is sent, at most one every 50 ms.
func (s *Server) WatchStatus(_ *hameshv1.WatchStatusRequest, stream grpc.ServerStreamingServer[hameshv1.WatchStatusResponse]) error {
	pace := time.NewTicker(watchInterval)
	defer pace.Stop()
	look := time.NewTimer(watchLook)
	defer look.Stop()
	var last *hameshv1.GetStatusResponse
	for {
		// Asked for before the status is read, so that no change is missed in between.
		changed := s.status.Changed()
		if status := s.status.Status(); last == nil || !proto.Equal(ageless(status), ageless(last)) {
			if err := stream.Send(&hameshv1.WatchStatusResponse{Status: status}); err != nil {
				return err
			}
			last = status
		}
		pace.Reset(watchInterval)
		look.Reset(watchLook)
		if err := wait(stream.Context(), s.stopping, changed, look.C); err != nil {
			return err
		}
		if err := wait(stream.Context(), s.stopping, pace.C, nil); err != nil {
			return err
		}
	}
}

// ageless is a status without what changes at every moment: how long ago members have heard
// each other.
func ageless(s *hameshv1.GetStatusResponse) *hameshv1.GetStatusResponse {
	s = proto.CloneOf(s)
	for _, l := range s.GetLinks() {
		l.Heard, l.Told = nil, nil
	}
	return s
}

// wait returns nil at an event or at the latest instant, and an error when the caller
// leaves or the server stops.
func wait[T any](ctx context.Context, stopping <-chan struct{}, event <-chan T, latest <-chan time.Time) error {
	select {
	case <-event:
		return nil
	case <-latest:
		return nil
	case <-stopping:
		return errStopping
	case <-ctx.Done():
		return ctx.Err()
	}
}

// MoveVip implements ControlService.
func (s *Server) MoveVip(request *hameshv1.MoveVipRequest, stream grpc.ServerStreamingServer[hameshv1.MoveVipResponse]) error {
	s.log.Info("a move is asked for", "vip", request.GetVip(), "to", request.GetTo(),
		"request_id", request.GetRequestId(), "caller", Caller(stream.Context()))
	return s.control.MoveVip(stream.Context(), request, stream.Send)
}

// DrainNode implements ControlService.
func (s *Server) DrainNode(ctx context.Context, request *hameshv1.DrainNodeRequest) (*hameshv1.DrainNodeResponse, error) {
	return s.control.DrainNode(ctx, request)
}

// UndrainNode implements ControlService.
func (s *Server) UndrainNode(ctx context.Context, request *hameshv1.UndrainNodeRequest) (*hameshv1.UndrainNodeResponse, error) {
	return s.control.UndrainNode(ctx, request)
}

// SetBackendState implements ControlService.
func (s *Server) SetBackendState(ctx context.Context, request *hameshv1.SetBackendStateRequest) (*hameshv1.SetBackendStateResponse, error) {
	return s.control.SetBackendState(ctx, request)
}

// CrashAgent implements ControlService.
func (s *Server) CrashAgent(ctx context.Context, request *hameshv1.CrashAgentRequest) (*hameshv1.CrashAgentResponse, error) {
	return s.control.CrashAgent(ctx, request)
}

// Exchange implements MeshService.
func (s *Server) Exchange(stream grpc.BidiStreamingServer[hameshv1.ExchangeRequest, hameshv1.ExchangeResponse]) error {
	from := identityFrom(stream.Context()).name
	if from != "" && !slices.Contains(s.peers, from) {
		return fmt.Errorf("heartbeats from %q: %w", from, errNotAPeer)
	}
	for {
		request, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		// Recv cannot be interrupted, and heartbeats never end by themselves.
		case <-s.stopping:
			return errStopping
		default:
		}
		heartbeat := request.GetHeartbeat()
		if heartbeat == nil {
			return errEmptyHeartbeat
		}
		if from == "" {
			from = heartbeat.GetMember()
			if !slices.Contains(s.peers, from) {
				return fmt.Errorf("heartbeats from %q: %w", from, errNotAPeer)
			}
		}
		if heartbeat.GetMember() != from {
			return fmt.Errorf("heartbeat of %q from %q: %w", heartbeat.GetMember(), from, errForeignMember)
		}
		ack, err := s.peer.Heartbeat(stream.Context(), from, heartbeat)
		if err != nil {
			return err
		}
		if ack == nil {
			continue
		}
		if err := stream.Send(ack); err != nil {
			return err
		}
	}
}

// Withdrawn implements MeshService.
func (s *Server) Withdrawn(ctx context.Context, request *hameshv1.WithdrawnRequest) (*hameshv1.WithdrawnResponse, error) {
	from := cmp.Or(identityFrom(ctx).name, request.GetMember())
	if !slices.Contains(s.peers, from) {
		return nil, fmt.Errorf("a guard's word from %q: %w", from, errNotAPeer)
	}
	if request.GetMember() != from {
		return nil, fmt.Errorf("a guard's word for %q from %q: %w", request.GetMember(), from, errForeignMember)
	}
	if err := s.peer.Withdrawn(ctx, from, request); err != nil {
		return nil, err
	}
	return &hameshv1.WithdrawnResponse{}, nil
}

// ShareFlows implements MeshService.
func (s *Server) ShareFlows(stream grpc.ClientStreamingServer[hameshv1.ShareFlowsRequest, hameshv1.ShareFlowsResponse]) error {
	// Recv cannot be interrupted while nothing changes, but fails once this has returned.
	ended := make(chan error, 1)
	go func() { ended <- s.takeFlows(stream) }()
	select {
	case err := <-ended:
		return err
	case <-s.stopping:
		return errStopping
	}
}

// RecallFlows implements MeshService.
func (s *Server) RecallFlows(request *hameshv1.RecallFlowsRequest, stream grpc.ServerStreamingServer[hameshv1.RecallFlowsResponse]) error {
	for _, m := range s.peer.Recall(request.GetMember()) {
		if err := stream.Send(&hameshv1.RecallFlowsResponse{Flows: m}); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) takeFlows(stream grpc.ClientStreamingServer[hameshv1.ShareFlowsRequest, hameshv1.ShareFlowsResponse]) (err error) {
	defer func() {
		if panicked := recover(); panicked != nil {
			err = s.answer(panicked, nil)
		}
	}()
	from := identityFrom(stream.Context()).name
	for {
		request, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&hameshv1.ShareFlowsResponse{})
		}
		if err != nil {
			return err
		}
		from = cmp.Or(from, request.GetMember())
		if !slices.Contains(s.peers, from) {
			return fmt.Errorf("connections of %q: %w", from, errNotAPeer)
		}
		if request.GetMember() != from {
			return fmt.Errorf("connections of %q from %q: %w", request.GetMember(), from, errForeignMember)
		}
		s.peer.Flows(from, request)
	}
}
