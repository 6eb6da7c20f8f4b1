package agent

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/metrics"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/page"
	"github.com/hamesh/hamesh/server"
)

// stuckAfter is how long the loop may be silent until /healthz calls it stuck: many
// heartbeats, and less than an operator's patience.
const stuckAfter = 2 * time.Second

// samples is what Prometheus sees of this agent's own knowledge.
func (a *Agent) samples() (all []metrics.Sample) {
	gauge := func(name, help string, value float64, labels ...string) {
		all = append(all, metrics.Sample{Name: name, Help: help, Value: value, Labels: labels})
	}
	total := func(name, help string, value uint64, labels ...string) {
		all = append(all, metrics.Sample{Name: name, Help: help, Total: true, Value: float64(value), Labels: labels})
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	ctx, cancel := context.WithTimeout(a.ctx, time.Second)
	defer cancel()
	view, _ := a.loop.view(ctx)
	for _, v := range view.VIPs {
		a.board.mu.Lock()
		transitions := a.board.owners[v.Name].transitions
		a.board.mu.Unlock()
		held := false
		for _, h := range v.Holders {
			held = held || h == a.cfg.Node.Name
		}
		if v.Record.Owner != "" {
			gauge(metrics.VIPOwner, "The owner of the VIP, by this member's knowledge.", 1, "vip", v.Name, "node", v.Record.Owner)
		}
		gauge(metrics.VIPHeld, "Whether this node's kernel has the address.", truth(held), "vip", v.Name)
		if v.Right != ownership.NoRight && v.Record.Owner == a.cfg.Node.Name {
			gauge(metrics.VIPRight, "The right by which this node holds the VIP.", 1, "vip", v.Name, "right", v.Right.String())
		}
		gauge(metrics.VIPEpoch, "Fencing token of the present ownership.", float64(v.Record.Epoch), "vip", v.Name)
		total(metrics.VIPTransitions, "Changes of owner that this agent has seen.", uint64(transitions), "vip", v.Name)
		if st, ok := a.announcer.Stats(v.Name); ok {
			total(metrics.Announcements, "Announcements since the VIP came to this node.", st.Sent, "vip", v.Name)
		}
	}
	for _, p := range view.Peers {
		gauge(metrics.PeerUp, "Whether the peer was heard within the suspicion time.", truth(p.Heard), "peer", p.Name)
	}
	sent := a.words.sent.Load()
	gauge(metrics.HeartbeatBytes, "Size of the last heartbeat that was sent to every peer.", float64(proto.Size(sent)))
	gauge(metrics.HeartbeatHearsay, "Words of other members that were passed on in it.", float64(len(sent.GetHearsay())))
	for _, l := range a.words.view().Links {
		if l.Heard >= 0 {
			gauge(metrics.LinkHeard, "Seconds since the member at the end of a link has last heard the one at its beginning, by this member's knowledge.", l.Heard.Seconds(), "from", l.From, "to", l.To)
		}
	}
	for _, svc := range a.services {
		stats := svc.proxy.Stats()
		name := svc.cfg.Name
		total(metrics.ProxyAccepted, "Client connections accepted.", stats.Accepted, "proxy", name)
		total(metrics.ProxyAcceptErrors, "Failures to accept.", stats.AcceptErrors, "proxy", name)
		total(metrics.ProxyFailedOpen, "Connections relayed to a backend that was not up, for want of a better one.", stats.FailedOpen, "proxy", name)
		total(metrics.ProxyUnserved, "Client connections reset because no backend accepted.", stats.Unserved, "proxy", name)
		gauge(metrics.ProxyConnections, "Client connections now.", float64(stats.Connections), "proxy", name)
		gauge(metrics.ProxyLimit, "The most client connections at a time; more are refused.", float64(stats.Limit), "proxy", name)
		for cause, n := range stats.Ended {
			total(metrics.ProxyEnded, "Client connections that have ended or were refused, by cause.", n, "proxy", name, "cause", cause.String())
		}
		for _, b := range stats.Backends {
			gauge(metrics.BackendUp, "Whether the backend gets new connections.", truth(b.State == health.Up), "proxy", name, "backend", b.Name)
			gauge(metrics.BackendConnections, "Established connections through this node.", float64(b.Established), "proxy", name, "backend", b.Name)
			total(metrics.BackendTotal, "Connections ever relayed to the backend.", b.Total, "proxy", name, "backend", b.Name)
			total(metrics.BackendFailures, "Attempts to connect that failed.", b.Failures, "proxy", name, "backend", b.Name)
			total(metrics.BackendOutrun, "Connections that another backend answered sooner, and got.", b.Outrun, "proxy", name, "backend", b.Name)
			total(metrics.BackendSent, "Bytes from clients to the backend.", b.Sent, "proxy", name, "backend", b.Name)
			total(metrics.BackendReceived, "Bytes from the backend to clients.", b.Received, "proxy", name, "backend", b.Name)
		}
	}
	gauge(metrics.StoreAvailable, "Whether the store answers this member.", truth(a.store.Status().Available))
	return all
}

// stuck says that the ownership loop does not step; empty: it does.
func (a *Agent) stuck() string {
	if silent := time.Since(time.Unix(0, a.beatAt.Load())); silent > stuckAfter {
		return fmt.Sprintf("the ownership loop has not stepped for %v", silent.Round(time.Millisecond))
	}
	return ""
}

// ailments lists what makes this agent unfit to do its work; a store that is away does
// not, since nothing moves for that.
func (a *Agent) ailments() (all []string) {
	if stuck := a.stuck(); stuck != "" {
		return []string{stuck}
	}
	ctx, cancel := context.WithTimeout(a.ctx, stuckAfter)
	defer cancel()
	if view, ok := a.loop.view(ctx); !ok || !view.Ready {
		all = append(all, "the store has not been read yet")
	}
	for _, svc := range a.services {
		if _, _, _, serving := svc.look(func(string) bool { return false }); !serving {
			all = append(all, "proxy "+svc.cfg.Name+" does not accept connections")
		}
	}
	return all
}

// observeHandler serves the status page, metrics, /healthz for who asks whether this agent
// does its work, and /livez for who would start it again if it were stuck: an agent that
// waits for the others to come is not.
func (a *Agent) observeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", page.Handler(a.pageData))
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { tellFit(w, a.ailments()) })
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		var all []string
		if stuck := a.stuck(); stuck != "" {
			all = append(all, stuck)
		}
		tellFit(w, all)
	})
	return mux
}

// tellFit answers a probe.
func tellFit(w http.ResponseWriter, ailments []string) {
	if len(ailments) > 0 {
		http.Error(w, strings.Join(ailments, "\n"), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, "ok")
}

// pageEvents is how many events the status page shows.
const pageEvents = 50

// pageData is what the status page shows now.
func (a *Agent) pageData() page.Data {
	d := page.Data{Now: time.Now(), Version: Version, Status: a.Status(), RightFor: map[string]time.Duration{}}
	ctx, cancel := context.WithTimeout(a.ctx, time.Second)
	defer cancel()
	view, _ := a.loop.view(ctx)
	for _, v := range view.VIPs {
		if v.Until > 0 && v.Right != ownership.NoRight && v.Record.Owner == a.cfg.Node.Name {
			d.RightFor[v.Name] = v.Until
		}
	}
	d.Events, d.Unanswered = a.events.Events(server.EventSelection{})
	d.Events = d.Events[max(0, len(d.Events)-pageEvents):]
	slices.Reverse(d.Events)
	return d
}
