package agent

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/hamesh/hamesh/agent/health"
)

// ailing says for people what is wrong with a backend that is down or not ready.
func ailing(st health.Status) string {
	if st.State == health.NotReady {
		return "not ready: " + strings.TrimPrefix(st.Reason, "not ready: ")
	}
	return "down: " + st.Reason
}

// says reports whether a backend's reason is an answer of that HTTP status (package probe).
func says(st health.Status, statuses ...int) bool {
	return slices.ContainsFunc(statuses, func(status int) bool {
		return strings.Contains(st.Reason, fmt.Sprintf("HTTP %d", status))
	})
}

// denied reports whether a backend answers, and only refuses whoever checks it.
func denied(st health.Status) bool { return says(st, http.StatusUnauthorized, http.StatusForbidden) }

// remedy says what to do about a backend that is down or not ready; certified: its checks
// show a certificate.
func remedy(st health.Status, certified bool) string {
	switch {
	case denied(st) && certified:
		return "the server refuses the certificate of the check: let healthCheck.certFile be of an authority in its --client-ca-file, of a user who may get /readyz (ClusterRole system:public-info-viewer)"
	case denied(st):
		return "the server refuses anonymous checks: set healthCheck.certFile and keyFile, or allow /readyz to anonymous users in its AuthenticationConfiguration"
	case strings.Contains(st.Reason, "shutdown failed"):
		return "it is being stopped: start it again if it does not start by itself"
	case strings.Contains(st.Reason, " failed (HTTP "):
		return "see what the API server's log on that node says of the check that has failed"
	}
	return "see the API server's log on that node"
}

// noBackend says what it means for clients that no backend of a proxy is up, and what to do.
// It is grave unless all of them answer and only refuse whoever checks them: such servers
// serve those who may ask.
func noBackend(proxy string, all []health.Status, certified bool) (message, fix string, grave bool) {
	out := slices.DeleteFunc(slices.Clone(all), func(st health.Status) bool { return st.State != health.Down && st.State != health.NotReady })
	i := slices.IndexFunc(out, denied)
	switch {
	case len(out) == len(all) && !slices.ContainsFunc(out, func(st health.Status) bool { return !denied(st) }) && i >= 0:
		return "proxy " + proxy + " has no API server that lets itself be checked; clients are served all the same, by any that accepts", remedy(out[i], certified), false
	case i >= 0:
		fix = remedy(out[i], certified)
	case slices.ContainsFunc(out, func(st health.Status) bool { return st.State == health.NotReady }):
		fix = "see why the API servers say that they are not ready"
	case len(out) == 0:
		fix = "take the orders back: hactl backend NAME --state active"
	default:
		fix = "start an API server"
	}
	return "proxy " + proxy + " has no healthy API server; clients are sent to any that accepts", fix, true
}
