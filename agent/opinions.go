package agent

import (
	"cmp"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hamesh/hamesh/agent/config"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// viewsSettle is how long members may see an API server differently before that is a
// problem: one that dies or recovers is not seen to do so by all at once.
const viewsSettle = 2 * time.Second

// opinions are what the members' own checks say of one API server.
type opinions struct {
	up, down    []string
	reasons     map[string]string // of those who see it down
	connections uint32            // of members that are known through others alone
}

// opinions puts together what is known of a backend.
func (r *report) opinions(svc *service, b config.Backend) opinions {
	o := opinions{reasons: map[string]string{}}
	for _, m := range r.agent.cfg.Members {
		var reports []*hameshv1.BackendReport
		if m.Name == r.self() {
			reports = *svc.reports.Load()
		} else {
			reports = r.word(m.Name).GetBackends()
		}
		for _, x := range reports {
			if x.GetProxy() != svc.cfg.Name || x.GetBackend() != b.Name {
				continue
			}
			switch x.GetState() {
			case hameshv1.BackendState_BACKEND_STATE_UP:
				o.up = append(o.up, m.Name)
			case hameshv1.BackendState_BACKEND_STATE_DOWN:
				o.down = append(o.down, m.Name)
				o.reasons[m.Name] = x.GetReason()
			}
			if !r.known.Of[m.Name].Heard {
				o.connections += x.GetConnections()
			}
		}
	}
	return o
}

// String says who sees the backend up and who does not, and why.
func (o opinions) String(b config.Backend) string {
	var down []string
	for _, member := range o.down {
		down = append(down, fmt.Sprintf("%s (%s)", member, cmp.Or(o.reasons[member], "no reason told")))
	}
	return fmt.Sprintf("API server %s (%s) is up for %s, and down for %s", b.Name, b.Address, strings.Join(o.up, ", "), strings.Join(down, ", "))
}

// fix says where to look. A node that does not reach its own API server has no network in
// between.
func (o opinions) fix(b config.Backend) string {
	var fixes, far []string
	for _, member := range o.down {
		if member == b.Node {
			fixes = append(fixes, "see the API server's log on "+b.Node)
		} else {
			far = append(far, member)
		}
	}
	if len(far) > 0 {
		fixes = append(fixes, fmt.Sprintf("see the network between %s and %s, firewalls on the nodes included: %s can reach it",
			strings.Join(far, ", "), b.Address, strings.Join(o.up, ", ")))
	}
	return strings.Join(fixes, "; ")
}

// lasting notes since when something has been so.
type lasting struct {
	mu    sync.Mutex
	since map[string]time.Time
}

// look says for how long something has been so without a break, as far as it was looked at;
// 0: it is not, or only now.
func (l *lasting) look(what string, so bool, at time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !so {
		delete(l.since, what)
		return 0
	}
	if l.since == nil {
		l.since = map[string]time.Time{}
	}
	if _, known := l.since[what]; !known {
		l.since[what] = at
	}
	return at.Sub(l.since[what])
}
