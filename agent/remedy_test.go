package agent

import (
	"strings"
	"testing"

	"github.com/hamesh/hamesh/agent/health"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

func TestRemedy(t *testing.T) {
	down := func(reason string) health.Status { return health.Status{State: health.Down, Reason: reason} }
	for _, tt := range []struct {
		st        health.Status
		certified bool
		ails, fix string // what they have in them
	}{
		{down("HTTP 401"), false, "down: HTTP 401", "set healthCheck.certFile and keyFile, or allow /readyz"},
		{down("HTTP 403 (seen by cp-2)"), false, "down: HTTP 403 (seen by cp-2)", "AuthenticationConfiguration"},
		{down("HTTP 401"), true, "down: HTTP 401", "--client-ca-file"},
		{health.Status{State: health.NotReady, Reason: "not ready: shutdown failed (HTTP 500)"}, false, "not ready: shutdown failed (HTTP 500)", "it is being stopped"},
		{health.Status{State: health.NotReady, Reason: "HTTP 500"}, false, "not ready: HTTP 500", "API server's log"},
		{down("etcd failed (HTTP 500)"), false, "down: etcd failed (HTTP 500)", "the check that has failed"},
		{down("connection refused"), false, "down: connection refused", "API server's log"},
	} {
		if got := ailing(tt.st); got != tt.ails {
			t.Errorf("%+v: is %q, want %q", tt.st, got, tt.ails)
		}
		if got := remedy(tt.st, tt.certified); !strings.Contains(got, tt.fix) {
			t.Errorf("%+v: fix %q, want %q", tt.st, got, tt.fix)
		}
	}
}

func TestNoBackend(t *testing.T) {
	denied, gone := health.Status{State: health.Down, Reason: "HTTP 401"}, health.Status{State: health.Down, Reason: "connection refused"}
	unready := health.Status{State: health.NotReady, Reason: "HTTP 500"}
	disabled := health.Status{State: health.Disabled, Reason: "by an operator's order"}
	for _, tt := range []struct {
		all       []health.Status
		says, fix string
		grave     bool
	}{
		{[]health.Status{denied, denied}, "clients are served all the same", "healthCheck.certFile", false},
		{[]health.Status{denied, gone}, "no healthy API server", "healthCheck.certFile", true},
		{[]health.Status{denied, disabled}, "no healthy API server", "healthCheck.certFile", true},
		{[]health.Status{unready, gone}, "no healthy API server", "not ready", true},
		{[]health.Status{gone, gone}, "no healthy API server", "start an API server", true},
		{[]health.Status{disabled}, "no healthy API server", "hactl backend", true},
	} {
		message, fix, grave := noBackend("kube-api", tt.all, false)
		if !strings.Contains(message, tt.says) || !strings.Contains(fix, tt.fix) || grave != tt.grave {
			t.Errorf("%+v: %q, %q, grave %v", tt.all, message, fix, grave)
		}
	}
}

// A member of an older version does not know what makes DOWN less than that, and one of a
// newer version tells it so that the older one understands.
func TestBackendReports(t *testing.T) {
	const name = "cp-2"
	for _, tt := range []struct {
		report *hameshv1.BackendReport
		want   health.Report
	}{
		{&hameshv1.BackendReport{State: hameshv1.BackendState_BACKEND_STATE_UP}, health.Report{State: health.Up}},
		{&hameshv1.BackendReport{State: hameshv1.BackendState_BACKEND_STATE_DOWN, Reason: "HTTP 500"}, health.Report{State: health.Down, Reason: "HTTP 500"}},
		{&hameshv1.BackendReport{State: hameshv1.BackendState_BACKEND_STATE_DOWN, NotReady: true}, health.Report{State: health.NotReady}},
		{&hameshv1.BackendReport{State: hameshv1.BackendState_BACKEND_STATE_DOWN, Refuses: true}, health.Report{State: health.Down, Refuses: true}},
		{&hameshv1.BackendReport{}, health.Report{}},
		{&hameshv1.BackendReport{State: 99, NotReady: true}, health.Report{}},
	} {
		tt.report.Backend, tt.want.Backend = name, name
		if got := healthReport(tt.report); got != tt.want {
			t.Errorf("%v: %+v, want %+v", tt.report, got, tt.want)
		}
	}
	if got := backendStates[health.NotReady]; got != hameshv1.BackendState_BACKEND_STATE_DOWN {
		t.Errorf("one that is not ready is told to be %v", got)
	}
}

// Each step of an API server's way down and up is told once.
func TestNotReadyIsTold(t *testing.T) {
	const up, down = hameshv1.BackendState_BACKEND_STATE_UP, hameshv1.BackendState_BACKEND_STATE_DOWN
	status := func(s hameshv1.BackendState, notReady bool) *hameshv1.GetStatusResponse {
		return &hameshv1.GetStatusResponse{Backends: []*hameshv1.Backend{{Name: "cp-2", State: s, NotReady: notReady}}}
	}
	was := status(up, false)
	for _, step := range []struct {
		now  *hameshv1.GetStatusResponse
		want string
	}{
		{status(down, true), "API server cp-2 is not ready"},
		{status(down, true), ""},
		{status(down, false), "API server cp-2 is down"},
		{status(down, false), ""},
		{status(down, true), ""},
		{status(up, false), "API server cp-2 is up"},
		{status(down, false), "API server cp-2 is down"},
	} {
		got := ""
		for _, e := range differences(was, step.now) {
			got += e.GetMessage()
		}
		if got != step.want {
			t.Errorf("from %v to %v: %q, want %q", was, step.now, got, step.want)
		}
		was = step.now
	}
}
