package agent

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

func TestMayCrash(t *testing.T) {
	node := func(name string, eligible bool) *hameshv1.Node {
		return &hameshv1.Node{Name: name, State: hameshv1.NodeState_NODE_STATE_READY, Eligible: eligible}
	}
	well := &hameshv1.GetStatusResponse{
		State: hameshv1.State_STATE_HEALTHY,
		Vips:  []*hameshv1.Vip{{Name: "kube-api", Owner: "cp-1"}},
		Nodes: []*hameshv1.Node{node("cp-1", true), node("cp-2", true), node("w", false)},
	}
	for name, test := range map[string]struct {
		node   string
		change func(*hameshv1.GetStatusResponse)
		want   error
	}{
		"the owner":             {"cp-1", func(*hameshv1.GetStatusResponse) {}, nil},
		"another candidate":     {"cp-2", func(*hameshv1.GetStatusResponse) {}, nil},
		"a witness":             {"w", func(*hameshv1.GetStatusResponse) {}, nil},
		"not healthy":           {"cp-1", func(s *hameshv1.GetStatusResponse) { s.State = hameshv1.State_STATE_DEGRADED }, server.ErrNotHealthy},
		"nobody to take it":     {"cp-1", func(s *hameshv1.GetStatusResponse) { s.Nodes[1].Eligible = false }, server.ErrNoOtherCandidate},
		"nobody has to take it": {"cp-2", func(s *hameshv1.GetStatusResponse) { s.Nodes[0].Eligible = false }, nil},
		"of two":                {"cp-1", func(s *hameshv1.GetStatusResponse) { s.Nodes = s.Nodes[:2] }, server.ErrNoMajority},
		"of four, one is down": {"cp-1", func(s *hameshv1.GetStatusResponse) {
			s.Nodes = append(s.Nodes, &hameshv1.Node{Name: "x", State: hameshv1.NodeState_NODE_STATE_DOWN})
		}, server.ErrNoMajority},
	} {
		t.Run(name, func(t *testing.T) {
			s := proto.CloneOf(well)
			test.change(s)
			if err := mayCrash(s, test.node); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
}

func TestCrashed(t *testing.T) {
	s := &hameshv1.GetStatusResponse{Nodes: []*hameshv1.Node{{Name: "cp-1", Boot: 7}, {Name: "cp-2"}}}
	for claim, want := range map[string]bool{"cp-1 6": true, "cp-1 7": false, "cp-2 6": false, "cp-9 6": false, "cp-1": false, "": false} {
		if got := crashed(s, claim); got != want {
			t.Errorf("%q: %v", claim, got)
		}
	}
}
