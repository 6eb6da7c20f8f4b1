package agent_test

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// agreed is how soon all members say the same of a pair that was cut: S of silence, a few
// heartbeats, and etcd's elections where its members are cut.
const agreed = 10 * time.Second

// problemsOf are a status's problems of some kinds, as they are told.
func problemsOf(s *hameshv1.GetStatusResponse, codes ...string) (all []string) {
	for _, p := range s.GetProblems() {
		if slices.Contains(codes, p.GetCode()) {
			all = append(all, p.GetCode()+": "+p.GetMessage())
		}
	}
	slices.Sort(all)
	return all
}

// statuses asks every member.
func statuses(m *lab.Mesh) (all []*hameshv1.GetStatusResponse, err error) {
	for _, n := range m.Nodes {
		s, err := n.Status()
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

// sameTruth says where members differ about owner, holder and what is wrong between them, or
// where one of them calls the mesh down.
func sameTruth(m *lab.Mesh, all []*hameshv1.GetStatusResponse) error {
	kernels := m.Recorder.Now()
	codes := []string{"LINK_DOWN", "LINK_ONE_WAY", "NODE_DOWN", "STORE_UNAVAILABLE", "MEMBER_CUT_OFF", "VIP_NO_HOLDER", "NO_BACKEND"}
	first := problemsOf(all[0], codes...)
	for _, s := range all {
		v := s.GetVips()[0]
		if s.GetState() == hameshv1.State_STATE_DOWN {
			return fmt.Errorf("%s says DOWN: %v", s.GetReportedBy(), s.GetProblems())
		}
		if len(kernels) != 1 || v.GetOwner() != kernels[0] || !slices.Equal(v.GetHolders(), kernels) {
			return fmt.Errorf("%s says owner %q, holders %v; the kernels say %v", s.GetReportedBy(), v.GetOwner(), v.GetHolders(), kernels)
		}
		if got := problemsOf(s, codes...); !slices.Equal(got, first) {
			return fmt.Errorf("%s says %q, %s says %q", s.GetReportedBy(), got, all[0].GetReportedBy(), first)
		}
	}
	return nil
}

// TestPairs cuts each pair of three members in turn: altogether, the members' port alone, the
// store's port alone. All three name the same pair, owner and holder, and none says DOWN.
// What somebody orders then is done, or refused for the right reason, wherever it is asked.
func TestPairs(t *testing.T) {
	m := newMesh(t, lab.Options{})
	owner(t, m)
	healthy(t, m)
	for _, c := range []struct {
		name   string
		frames lab.Frames
	}{{"all frames", lab.Frames{}}, {"7443", lab.Frames{TCPPort: 7443}}, {"7480", lab.Frames{TCPPort: 7480}}} {
		for i := range m.Nodes {
			a, b := m.Nodes[i], m.Nodes[(i+1)%3]
			if a.Name > b.Name {
				a, b = b, a
			}
			t.Run(c.name+" between "+a.Name+" and "+b.Name, func(t *testing.T) { cutPair(t, m, c.frames, a, b) })
		}
	}
	t.Run("an API server and one member", func(t *testing.T) { cutAPIServer(t, m, m.Nodes[0], m.Nodes[1]) })
}

// cutAPIServer cuts an API server off from one member: all say so alike, with the way that is
// broken, and none calls the mesh down.
func cutAPIServer(t *testing.T, m *lab.Mesh, from, of *lab.Node) {
	lift, err := m.Switch.Partition(lab.Frames{TCPPort: 6443}, []*lab.Port{from.Port()}, []*lab.Port{of.Port()})
	if err != nil {
		t.Fatal(err)
	}
	cut := time.Now()
	err = lab.Await(agreed, func() error {
		all, err := statuses(m)
		if err != nil {
			return err
		}
		for _, s := range all {
			got := problemsOf(s, "BACKEND_VIEWS_DIFFER", "BACKEND_DOWN", "NO_BACKEND")
			want := fmt.Sprintf("BACKEND_VIEWS_DIFFER: API server %s (%s:6443) is up for %s, %s, and down for %s (", of.Name, of.Address, of.Name, m.Nodes[2].Name, from.Name)
			// The other direction of the cut is that of the other API server.
			back := fmt.Sprintf("BACKEND_VIEWS_DIFFER: API server %s (%s:6443) is up for %s, %s, and down for %s (", from.Name, from.Address, from.Name, m.Nodes[2].Name, of.Name)
			if len(got) != 2 || !strings.HasPrefix(got[0], back) || !strings.HasPrefix(got[1], want) || s.GetState() != hameshv1.State_STATE_DEGRADED {
				return fmt.Errorf("%s is %v and says %q", s.GetReportedBy(), s.GetState(), got)
			}
		}
		return nil
	})
	t.Logf("all say so after %v", time.Since(cut).Round(10*time.Millisecond))
	if err := errors.Join(err, lift()); err != nil {
		t.Error(err)
	}
	healthy(t, m)
}

// beats says how long heartbeats are, in bytes, and how many words of others are in them.
func beats(t *testing.T, m *lab.Mesh) (bytes, hearsay []string) {
	t.Helper()
	for _, n := range m.Nodes {
		for line := range strings.Lines(get(t, n, "/metrics")) {
			if v, ok := strings.CutPrefix(line, "hamesh_heartbeat_bytes "); ok {
				bytes = append(bytes, strings.TrimSpace(v))
			}
			if v, ok := strings.CutPrefix(line, "hamesh_heartbeat_hearsay "); ok {
				hearsay = append(hearsay, strings.TrimSpace(v))
			}
		}
	}
	return bytes, hearsay
}

// atRest waits until nobody passes on what others say.
func atRest(t *testing.T, m *lab.Mesh) {
	t.Helper()
	if err := lab.Await(5*time.Second, func() error {
		bytes, hearsay := beats(t, m)
		if !slices.Equal(hearsay, []string{"0", "0", "0"}) {
			return fmt.Errorf("at rest %v words are passed on, in %v bytes", hearsay, bytes)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func cutPair(t *testing.T, m *lab.Mesh, frames lab.Frames, a, b *lab.Node) {
	healthy(t, m)
	agree(t, m)
	atRest(t, m)
	rest, _ := beats(t, m)
	lift, err := m.Switch.Partition(frames, []*lab.Port{a.Port()}, []*lab.Port{b.Port()})
	if err != nil {
		t.Fatal(err)
	}
	cut := time.Now()
	if frames.TCPPort == 7443 {
		orderInTheDark(t, m, a, b)
	}
	pair := "LINK_DOWN: " + a.Name + " and " + b.Name + " do not hear each other; "
	err = lab.Await(agreed, func() error {
		all, err := statuses(m)
		if err != nil {
			return err
		}
		if frames.TCPPort != 7480 {
			for _, s := range all {
				if got := problemsOf(s, "LINK_DOWN"); len(got) != 1 || !strings.HasPrefix(got[0], pair) {
					return fmt.Errorf("%s says %q, want %q", s.GetReportedBy(), got, pair)
				}
			}
		}
		return sameTruth(m, all)
	})
	while, hearsay := beats(t, m)
	t.Logf("all agree after %v; heartbeats have %v bytes at rest, %v now, with %v words of others", time.Since(cut).Round(10*time.Millisecond), rest, while, hearsay)
	if err != nil {
		t.Error(err)
	}
	if frames.TCPPort == 0 { // etcd's leader goes to who reaches all
		if err := lab.Await(agreed, func() error {
			all, err := statuses(m)
			for _, s := range all {
				if away := problemsOf(s, "STORE_UNAVAILABLE"); len(away) > 0 {
					err = fmt.Errorf("%s says %q", s.GetReportedBy(), away)
				}
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		t.Logf("the store answers all after %v", time.Since(cut).Round(10*time.Millisecond))
	}
	orderMoves(t, m, frames, a, b)
	if err := lab.Await(agreed, func() error { // also when the store has had time to go
		all, err := statuses(m)
		return cmp.Or(err, sameTruth(m, all))
	}); err != nil {
		t.Error(err)
	}
	if err := lift(); err != nil {
		t.Fatal(err)
	}
	healthy(t, m)
	atRest(t, m)
}

// orderInTheDark asks for a move just after the cut, when nobody has noticed it yet, at one end
// of it and where it can be with the owner at the other: the connection is lost on the way.
func orderInTheDark(t *testing.T, m *lab.Mesh, a, b *lab.Node) {
	t.Helper()
	third := m.Nodes[slices.IndexFunc(m.Nodes, func(n *lab.Node) bool { return n != a && n != b })]
	asked, to, from := a, third, m.Recorder.Now()
	if slices.Equal(from, []string{a.Name}) {
		asked = b
	}
	if slices.Equal(from, []string{third.Name}) {
		to = b
	}
	begun := time.Now()
	stdout, stderr, status, err := asked.Hactl("move-vip", "kube-api", "--to", to.Name, "--wait")
	t.Logf("from %v to %s, asked at %s in the dark: status %d after %v", from, to.Name, asked.Name, status, time.Since(begun).Round(10*time.Millisecond))
	if err != nil || status != 0 {
		t.Errorf("%v\n%s%s", err, stdout, stderr)
	}
	if err := lab.Await(time.Second, func() error {
		if now := m.Recorder.Now(); !slices.Equal(now, []string{to.Name}) {
			return fmt.Errorf("the address is on %v", now)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// orderMoves asks every member to move the VIP to every other one than its owner. Each move
// ends with the VIP on its target and exit status 0, or with the right reason why not.
func orderMoves(t *testing.T, m *lab.Mesh, frames lab.Frames, a, b *lab.Node) {
	t.Helper()
	for _, asked := range m.Nodes {
		for _, to := range m.Nodes {
			before := m.Recorder.Now()
			if len(before) != 1 {
				t.Fatalf("before a move the address is on %v", before)
			}
			if before[0] == to.Name {
				continue
			}
			stdout, stderr, status, err := asked.Hactl("move-vip", "kube-api", "--to", to.Name, "--wait", "--timeout", "15s")
			if err != nil {
				t.Fatal(err)
			}
			what := fmt.Sprintf("from %s to %s, asked at %s", before[0], to.Name, asked.Name)
			cut := (before[0] == a.Name && to == b) || (before[0] == b.Name && to == a)
			t.Logf("%s: status %d %s%s", what, status, stdout[strings.LastIndex(strings.TrimSpace(stdout), "\n")+1:], stderr)
			switch {
			case status == 0:
				if err := lab.Await(time.Second, func() error {
					if now := m.Recorder.Now(); !slices.Equal(now, []string{to.Name}) {
						return fmt.Errorf("%s: status 0, but the address is on %v", what, now)
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
			case cut && strings.Contains(stderr, "NODE_NOT_ELIGIBLE") && strings.Contains(stderr, before[0]+" does not hear "+to.Name):
			case frames.TCPPort == 7480 && strings.Contains(stderr, "STORE_UNAVAILABLE") && strings.Contains(stderr, "the store does not answer to "+before[0]):
			case frames.TCPPort == 7480 && strings.Contains(stderr, "NODE_NOT_ELIGIBLE"): // it has lost its lease
			default:
				t.Errorf("%s: status %d\n%s%s", what, status, stdout, stderr)
			}
			if frames.TCPPort == 7480 {
				break // one of a store that does not answer may take two lease TTLs
			}
		}
	}
}
