package page

import (
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/html"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var now = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

func at(ago time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-ago)) }

// sick is a mesh in which something is wrong everywhere, and in a name too.
func sick() Data {
	return Data{
		Now: now, Version: "v1.2.3", Unanswered: []string{"cp-3"}, RightFor: map[string]time.Duration{"kube-api": 287 * time.Millisecond},
		Status: &hameshv1.GetStatusResponse{
			Mesh: "prod", ReportedBy: "cp-1", State: hameshv1.State_STATE_DOWN,
			Vips: []*hameshv1.Vip{
				{
					Name: "kube-api", Address: "10.77.0.100", Owner: "cp-1", Holders: []string{"cp-1"}, Epoch: 12,
					Right: hameshv1.Right_RIGHT_FAILSAFE.Enum(), Since: at(42 * time.Second), Transitions: 2, Reason: "cp-3 was not heard for 400ms",
				},
				{Name: "second", Address: "fd77::100"},
			},
			Nodes: []*hameshv1.Node{
				{Name: "cp-1", Address: "10.77.0.11", Role: hameshv1.Role_ROLE_CANDIDATE, State: hameshv1.NodeState_NODE_STATE_READY, Eligible: true, Version: "v1.2.3"},
				{Name: "cp-2", Address: "10.77.0.12", Role: hameshv1.Role_ROLE_CANDIDATE, State: hameshv1.NodeState_NODE_STATE_DRAINED, Reason: "drained by alice", KeptConnections: 17, Version: "v1.2.2"},
				{Name: "cp-3", Address: "10.77.0.13", Role: hameshv1.Role_ROLE_WITNESS, State: hameshv1.NodeState_NODE_STATE_DOWN, Reason: "not heard for 1m0s"},
			},
			Links: []*hameshv1.Link{
				{From: "cp-2", To: "cp-1", Heard: durationpb.New(75 * time.Second), Lost: true}, {From: "cp-3", To: "cp-1", Lost: true},
				{From: "cp-1", To: "cp-2", Heard: durationpb.New(43 * time.Millisecond), Unconnected: true},
			},
			Proxies: []*hameshv1.Proxy{{Name: "kube-api", Port: 16443}, {Name: "other", Port: 9345}},
			Backends: []*hameshv1.Backend{
				{Name: "cp-1", Proxy: "kube-api", Address: "10.77.0.11:6443", State: hameshv1.BackendState_BACKEND_STATE_UP, Connections: 41, SeenUpBy: []string{"cp-1", "cp-2"}},
				{Name: "cp-2", Proxy: "kube-api", Address: "10.77.0.12:6443", State: hameshv1.BackendState_BACKEND_STATE_DRAINING, Connections: 3, SeenUpBy: []string{"cp-1"}, SeenDownBy: []string{"cp-2"}},
				{Name: "cp-3", Proxy: "kube-api", Address: "10.77.0.13:6443", State: hameshv1.BackendState_BACKEND_STATE_DOWN, NotReady: true, Connections: 7, Reason: "not ready: shutdown failed (HTTP 500)"},
				{Name: "cp-3", Proxy: "other", Address: "10.77.0.13:9345", State: hameshv1.BackendState_BACKEND_STATE_DOWN, Reason: `/readyz answered 500: <script>alert("x")</script>`},
			},
			Store:    &hameshv1.Store{Kind: "embedded", Members: []string{"cp-1", "cp-2", "cp-3"}},
			Problems: []*hameshv1.Problem{{Code: "STORE_UNAVAILABLE", Message: "the embedded store does not answer cp-1", Fix: "see that a majority of its members runs"}},
		},
		Events: []*hameshv1.Event{
			{Time: at(42 * time.Second), Node: "cp-1", Kind: hameshv1.EventKind_EVENT_KIND_VIP_GAINED, Vip: "kube-api", Message: "cp-1 owns kube-api", Reason: "cp-3 was not heard for 400ms"},
			{Time: at(time.Hour), Node: "cp-1", Kind: hameshv1.EventKind_EVENT_KIND_RIGHT_CHANGED, Vip: "kube-api", Message: "cp-1 holds kube-api by right failsafe"},
			{Time: at(26 * time.Hour), Node: "cp-2", Kind: hameshv1.EventKind_EVENT_KIND_NODE_DRAINED, Peer: "cp-2", By: "alice <admin>", Message: "cp-2 is drained"},
			{Time: at(27 * time.Hour), Node: "cp-2", Kind: hameshv1.EventKind_EVENT_KIND_BACKEND_DOWN, Proxy: "other", Backend: "cp-3", Message: "API server cp-3 is down"},
		},
	}
}

func well() Data {
	return Data{Now: now, Version: "v1.2.3", Status: &hameshv1.GetStatusResponse{
		Mesh: "prod", ReportedBy: "cp-1", State: hameshv1.State_STATE_HEALTHY,
		Vips: []*hameshv1.Vip{{
			Name: "kube-api", Address: "10.77.0.100", Owner: "cp-2", Holders: []string{"cp-2"}, Epoch: 3,
			Right: hameshv1.Right_RIGHT_CONFIRMED.Enum(), Since: at(76 * time.Hour), Reason: "moved by an operator",
		}},
		Nodes: []*hameshv1.Node{{Name: "cp-1", Address: "10.77.0.11", Role: hameshv1.Role_ROLE_CANDIDATE, State: hameshv1.NodeState_NODE_STATE_READY, Eligible: true, Version: "v1.2.3"}},
		Store: &hameshv1.Store{Kind: "external", Available: true, Members: []string{"https://10.0.0.5:2379"}},
	}}
}

func TestPage(t *testing.T) {
	for name, d := range map[string]Data{"sick": sick(), "well": well(), "empty": {Now: now}} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			Handler(func() Data { return d }).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
			if w.Code != http.StatusOK {
				t.Fatalf("status %d: %s", w.Code, w.Body)
			}
			if got := w.Header().Get("Content-Security-Policy"); got != policy {
				t.Errorf("Content-Security-Policy is %q", got)
			}
			got := w.Body.String()
			checkElements(t, got)
			file := filepath.Join("testdata", name+".html")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got, -update rewrites):\n%s", file, diff)
			}
		})
	}
}

// checkElements checks that elements close in the order in which they open, and that none
// acts or brings anything from elsewhere, whatever the names in the status are.
func checkElements(t *testing.T, text string) {
	t.Helper()
	var open []string
	z := html.NewTokenizer(strings.NewReader(text))
	for {
		kind := z.Next()
		token := z.Token()
		switch kind {
		case html.ErrorToken:
			if len(open) > 0 {
				t.Errorf("%v are not closed", open)
			}
			return
		case html.StartTagToken:
			for _, a := range token.Attr {
				if a.Key == "src" || a.Key == "href" || strings.HasPrefix(a.Key, "on") {
					t.Errorf("%s has %s=%q", token.Data, a.Key, a.Val)
				}
			}
			switch token.Data {
			case "script", "link", "img", "iframe":
				t.Errorf("the page has a %s", token.Data)
			case "meta", "br":
			default:
				open = append(open, token.Data)
			}
		case html.EndTagToken:
			if len(open) == 0 || open[len(open)-1] != token.Data {
				t.Fatalf("%s closes where %v are open", token.Data, open)
			}
			open = open[:len(open)-1]
		}
	}
}
