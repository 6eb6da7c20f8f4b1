package server

import (
	"cmp"
	"context"
	"fmt"
	"net/url"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// role is what a caller may do; each may do what the one before may.
type role int

const (
	_ role = iota
	roleViewer
	roleOperator
	roleAgent
)

var roles = map[string]role{"viewer": roleViewer, "operator": roleOperator, "agent": roleAgent}

// serviceRoles says which role each service needs; what is not here is refused.
var serviceRoles = map[string]role{
	"hamesh.v1.StatusService":                  roleViewer,
	"hamesh.v1.ControlService":                 roleOperator,
	"hamesh.v1.MeshService":                    roleAgent,
	"grpc.health.v1.Health":                    roleViewer,
	"grpc.reflection.v1.ServerReflection":      roleViewer,
	"grpc.reflection.v1alpha.ServerReflection": roleViewer,
}

// identity is who calls. An agent's empty name means that it came without a
// certificate, so that its heartbeats are believed.
type identity struct {
	role role
	name string
}

// authorize returns who calls, if that one may call method ("/service/name").
func (s *Server) authorize(ctx context.Context, method string) (identity, error) {
	id, err := s.identify(ctx)
	if err != nil {
		return identity{}, err
	}
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if need, known := serviceRoles[service]; !known || id.role < need {
		return identity{}, fmt.Errorf("%s by %q: %w", method, id.name, errRole)
	}
	return id, nil
}

func (s *Server) identify(ctx context.Context) (identity, error) {
	caller, _ := peer.FromContext(ctx)
	if caller == nil {
		return identity{}, errUnidentified
	}
	switch info := caller.AuthInfo.(type) {
	case socketInfo:
		return identity{role: roleOperator, name: info.String()}, nil
	case credentials.TLSInfo:
		if len(info.State.VerifiedChains) == 0 {
			return identity{}, errUnidentified
		}
		return identityFromURIs(s.mesh, info.State.VerifiedChains[0][0].URIs)
	}
	if s.insecure {
		return identity{role: roleAgent}, nil
	}
	return identity{}, errUnidentified
}

// identityFromURIs reads the one URI that a workload certificate has (SPIFFE X.509-SVID,
// section 2: more than one is invalid).
func identityFromURIs(mesh string, uris []*url.URL) (identity, error) {
	if len(uris) != 1 {
		return identity{}, fmt.Errorf("%d URIs: %w", len(uris), errUnidentified)
	}
	uri := uris[0]
	roleName, name, _ := strings.Cut(strings.TrimPrefix(uri.Path, "/"), "/")
	r, known := roles[roleName]
	if uri.Scheme != "spiffe" || uri.Host != mesh || !known || name == "" || strings.Contains(name, "/") {
		return identity{}, fmt.Errorf("%s: %w", uri, errUnidentified)
	}
	return identity{role: r, name: name}, nil
}

// Caller returns the name of who makes the call of that context, for people: that of the
// certificate, the local user of the socket, or "anybody" where nobody is authenticated.
func Caller(ctx context.Context) string {
	return cmp.Or(identityFrom(ctx).name, "anybody")
}

// ByAgent says whether another member's agent makes the call of that context, or anybody
// where nobody is authenticated.
func ByAgent(ctx context.Context) bool { return identityFrom(ctx).role == roleAgent }

type identityKey struct{}

func withIdentity(ctx context.Context, id identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

func identityFrom(ctx context.Context) identity {
	id, _ := ctx.Value(identityKey{}).(identity)
	return id
}
