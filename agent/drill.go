package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/store"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

const (
	// crashAfter is the time between the answer to an order to crash and the crash: enough
	// for the answer to be on its way.
	crashAfter = 50 * time.Millisecond
	// crashShows is how long after SuspectAfter a crash that was ordered is in every
	// member's status, with a store's leader that crashed as well.
	crashShows = 10 * time.Second
)

// crashes carries out orders to crash an agent, this one or another member's.
type crashes struct{ agent *Agent }

// CrashAgent implements server.ControlSink.
func (c *crashes) CrashAgent(ctx context.Context, r *hameshv1.CrashAgentRequest) (*hameshv1.CrashAgentResponse, error) {
	a, node, id := c.agent, r.GetNode(), cmp.Or(r.GetRequestId(), uuid.NewString())
	if err := a.orders.checkMember(node); err != nil {
		return nil, err
	}
	switch {
	case !r.GetConfirm():
		return nil, fmt.Errorf("crash the agent of %s: %w", node, server.ErrCrashUnconfirmed)
	case len(id) > requestLength:
		return nil, fmt.Errorf("%d bytes, more than %d: %w", len(id), requestLength, server.ErrRequestID)
	}
	told := len(visited(ctx)) > 0 // by the member that was asked
	if node != a.cfg.Node.Name {
		client, ok := a.links[node].Control()
		if !ok || told {
			return nil, fmt.Errorf("crash the agent of %s: %w", node, server.ErrNodeUnreachable)
		}
		answer, err := client.CrashAgent(passingOn(ctx, nil, a.cfg.Node.Name),
			&hameshv1.CrashAgentRequest{RequestId: id, Node: node, Confirm: true})
		if answer.GetChanged() {
			c.tell(ctx, node)
		}
		return answer, err
	}
	file := filepath.Join(a.cfg.DataDir, "crash")
	last, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the last order to crash: %w", err)
	}
	if string(last) == id {
		return &hameshv1.CrashAgentResponse{}, nil
	}
	if err := c.judge(ctx); err != nil {
		return nil, fmt.Errorf("crash the agent of %s: %w", node, err)
	}
	// Written first: a caller whose connection broke by the crash may ask again.
	if err := renameio.WriteFile(file, []byte(id), 0o600); err != nil {
		return nil, fmt.Errorf("remember the order to crash: %w", err)
	}
	if !told {
		c.tell(ctx, node)
	}
	a.log.Warn("killing this agent, as an operator wants", "request_id", id, "caller", server.Caller(ctx))
	// Nothing catches SIGKILL, so it fails only in a process that may not signal itself.
	time.AfterFunc(crashAfter, func() { _ = unix.Kill(unix.Getpid(), unix.SIGKILL) })
	return &hameshv1.CrashAgentResponse{Changed: true}, nil
}

// tell records who wants the agent of a node to crash.
func (c *crashes) tell(ctx context.Context, node string) {
	c.agent.events.record(&hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_CRASH_REQUESTED, Peer: node, By: server.Caller(ctx),
		Message: "the agent of " + node + " is to crash", Reason: "an operator's order",
	})
}

// judge says why this agent may not crash now; nil: it may, and no other member's may
// before everybody knows. Two that were ordered at once would each see a healthy mesh, and
// take the majority together.
func (c *crashes) judge(ctx context.Context) error {
	a := c.agent
	if err := mayCrash(a.Status(), a.cfg.Node.Name); err != nil {
		return err
	}
	err := a.store.Claim(ctx, store.Claim{
		Name: "crash", Value: fmt.Sprint(a.cfg.Node.Name, " ", a.boot), For: a.cfg.Timing.SuspectAfter + crashShows,
		Over: func(other string) bool { return crashed(a.Status(), other) },
	})
	switch {
	case errors.Is(err, store.ErrClaimed):
		return fmt.Errorf("%w: another agent is about to crash: %w", server.ErrNotHealthy, err)
	case err != nil:
		return fmt.Errorf("%w: %w", server.ErrStoreUnavailable, err)
	}
	return mayCrash(a.Status(), a.cfg.Node.Name) // as it was when nobody else could crash any more
}

// crashed says whether the agent that has claimed to crash, by its node and boot, has been
// started anew since.
func crashed(s *hameshv1.GetStatusResponse, claim string) bool {
	var node string
	var boot uint64
	if _, err := fmt.Sscan(claim, &node, &boot); err != nil {
		return false // another version's
	}
	return slices.ContainsFunc(s.GetNodes(), func(n *hameshv1.Node) bool { return n.GetName() == node && n.GetBoot() > boot })
}

// mayCrash says why the agent of a node may not crash now, in a mesh of that status; nil:
// clients would lose no more than a fail-over costs.
func mayCrash(s *hameshv1.GetStatusResponse, node string) error {
	if s.GetState() != hameshv1.State_STATE_HEALTHY {
		var codes []string
		for _, p := range s.GetProblems() {
			codes = append(codes, p.GetCode())
		}
		return fmt.Errorf("%w: %s", server.ErrNotHealthy, strings.Join(codes, ", "))
	}
	stay, takers := 0, 0
	for _, n := range s.GetNodes() {
		if n.GetName() == node || n.GetState() != hameshv1.NodeState_NODE_STATE_READY {
			continue
		}
		stay++
		if n.GetEligible() {
			takers++
		}
	}
	for _, v := range s.GetVips() {
		if v.GetOwner() == node && takers == 0 {
			return fmt.Errorf("%w: %s", server.ErrNoOtherCandidate, v.GetName())
		}
	}
	if total := len(s.GetNodes()); stay <= total/2 {
		return fmt.Errorf("%w: %d of %d", server.ErrNoMajority, stay, total)
	}
	return nil
}
