package server_test

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc/credentials/insecure"

	"github.com/hamesh/hamesh/cli/pki"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

func (a *agent) CrashAgent(ctx context.Context, r *hameshv1.CrashAgentRequest) (*hameshv1.CrashAgentResponse, error) {
	if r.GetNode() != "cp-1" {
		return nil, server.ErrNotHealthy
	}
	a.note(ctx, "crash "+r.GetNode())
	return &hameshv1.CrashAgentResponse{Changed: true}, nil
}

func TestCrashAgent(t *testing.T) {
	ca, a := newAuthority(t, "prod"), newAgent()
	s := serve(t, a, server.Options{TLS: ca.issue("cp-1", pki.RoleAgent).Server()})
	viewer := dial(t, s.tcp, ca.issue("grafana", pki.RoleViewer).Client("cp-1"))
	operator := dial(t, s.socket, insecure.NewCredentials())
	if _, err := hameshv1.NewControlServiceClient(viewer).CrashAgent(t.Context(), &hameshv1.CrashAgentRequest{Node: "cp-1", Confirm: true}); outcome(err) != "PermissionDenied ROLE_INSUFFICIENT" {
		t.Errorf("a viewer: %v", err)
	}
	control := hameshv1.NewControlServiceClient(operator)
	if r, err := control.CrashAgent(t.Context(), &hameshv1.CrashAgentRequest{Node: "cp-1", Confirm: true}); err != nil || !r.GetChanged() {
		t.Errorf("an operator: %v, %v", r, err)
	}
	if _, err := control.CrashAgent(t.Context(), &hameshv1.CrashAgentRequest{Node: "cp-2", Confirm: true}); outcome(err) != "FailedPrecondition MESH_NOT_HEALTHY" {
		t.Errorf("where it is refused: %v", err)
	}
	for want, answer := range map[string]error{
		"InvalidArgument CRASH_UNCONFIRMED": server.ErrCrashUnconfirmed,
		"FailedPrecondition NO_MAJORITY":    server.ErrNoMajority,
		"Unavailable NODE_UNREACHABLE":      server.ErrNodeUnreachable,
	} {
		a.move = func(context.Context, func(*hameshv1.MoveVipResponse) error) error { return errors.Join(answer) }
		if err := calls["move"](t.Context(), operator); outcome(err) != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
