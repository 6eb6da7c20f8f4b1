package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// The names, by what they are about.
const (
	BuildInfo = "hamesh_build_info" // 1; label version

	VIPOwner       = "hamesh_vip_owner"             // 1 for the owner by this member's knowledge; labels vip, node
	VIPHeld        = "hamesh_vip_held"              // 1: this node's kernel has the address; label vip
	VIPRight       = "hamesh_vip_right"             // 1 for the right in force on this node; labels vip, right
	VIPEpoch       = "hamesh_vip_epoch"             // fencing token; label vip
	VIPTransitions = "hamesh_vip_transitions_total" // changes of owner seen; label vip
	VIPMoves       = "hamesh_vip_moves_total"       // planned moves given away by this node; labels vip, result
	Announcements  = "hamesh_announcements_total"   // gratuitous ARP or NA bursts' beats sent since the VIP came; label vip

	HeartbeatsSent     = "hamesh_heartbeats_sent_total"     // broadcasts
	HeartbeatsReceived = "hamesh_heartbeats_received_total" // label peer
	HeartbeatSeconds   = "hamesh_heartbeat_rtt_seconds"     // heartbeat to ack; label peer
	HeartbeatBytes     = "hamesh_heartbeat_bytes"           // size of the last one sent
	HeartbeatHearsay   = "hamesh_heartbeat_hearsay"         // words of other members passed on in it; 0 at rest
	PeerUp             = "hamesh_peer_up"                   // 1: heard within the suspicion time; label peer

	LinkHeard = "hamesh_link_heard_seconds" // age of the newest heartbeat that came; labels from, to

	BackendUp          = "hamesh_backend_up"                     // 1: gets new connections; labels proxy, backend
	BackendConnections = "hamesh_backend_connections"            // established through this node
	BackendTotal       = "hamesh_backend_connections_total"      // ever
	BackendFailures    = "hamesh_backend_connect_failures_total" // attempts refused or unanswered
	BackendOutrun      = "hamesh_backend_outrun_total"           // left to another one that answered sooner
	BackendSent        = "hamesh_backend_sent_bytes_total"       // from clients to the backend
	BackendReceived    = "hamesh_backend_received_bytes_total"   // from the backend to clients
	CheckSeconds       = "hamesh_backend_check_seconds"          // duration of own checks
	ConnectSeconds     = "hamesh_backend_connect_seconds"        // duration of connects that succeeded

	ProxyAccepted     = "hamesh_proxy_accepted_total"      // label proxy
	ProxyAcceptErrors = "hamesh_proxy_accept_errors_total" // such as too many open files
	ProxyFailedOpen   = "hamesh_proxy_failed_open_total"   // relayed to a backend that looked down, for want of a better one
	ProxyUnserved     = "hamesh_proxy_unserved_total"      // reset because no backend accepted
	ProxyConnections  = "hamesh_proxy_connections"         // of clients, now
	ProxyLimit        = "hamesh_proxy_connections_limit"   // the most of them
	ProxyEnded        = "hamesh_proxy_ended_total"         // labels proxy, cause: as in the connection log

	StoreAvailable = "hamesh_store_available" // 1: it answers this member
)

// Sample is one value at the time of a scrape.
type Sample struct {
	Name   string
	Help   string
	Total  bool // a counter; else a gauge
	Value  float64
	Labels []string // name, value, name, value …
}

// Metrics is the agent's registry with the few values that are counted here.
type Metrics struct {
	Registry     *prometheus.Registry
	Sent         prometheus.Counter
	Received     *prometheus.CounterVec   // peer
	RTT          *prometheus.HistogramVec // peer
	CheckTimes   *prometheus.HistogramVec // proxy, backend
	ConnectTimes *prometheus.HistogramVec // proxy, backend
	Moves        *prometheus.CounterVec   // vip, result
}

// New makes the registry; samples is asked at each scrape.
func New(version string, samples func() []Sample) *Metrics {
	m := &Metrics{
		Registry: prometheus.NewRegistry(),
		Sent:     prometheus.NewCounter(prometheus.CounterOpts{Name: HeartbeatsSent, Help: "Heartbeats sent, each to every peer."}),
		Received: prometheus.NewCounterVec(prometheus.CounterOpts{Name: HeartbeatsReceived, Help: "Heartbeats received, acks not counted."}, []string{"peer"}),
		RTT: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: HeartbeatSeconds, Help: "Time from a heartbeat to its ack.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 13), // 0.1 ms to 0.4 s
		}, []string{"peer"}),
		CheckTimes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: CheckSeconds, Help: "Duration of this node's own checks.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 13), // 0.5 ms to 2 s
		}, []string{"proxy", "backend"}),
		ConnectTimes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: ConnectSeconds, Help: "Duration of the connects to the backend that succeeded.",
			Buckets: prometheus.ExponentialBuckets(0.00005, 4, 9), // 50 µs to 3.3 s
		}, []string{"proxy", "backend"}),
		Moves: prometheus.NewCounterVec(prometheus.CounterOpts{Name: VIPMoves, Help: "Ordered moves of VIPs that this node owned."}, []string{"vip", "result"}),
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: BuildInfo, Help: "Version of the agent."}, []string{"version"})
	build.WithLabelValues(version).Set(1)
	m.Registry.MustRegister(build, m.Sent, m.Received, m.RTT, m.CheckTimes, m.ConnectTimes, m.Moves, sampler(samples),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Observe notes how long a check took.
func (m *Metrics) Observe(proxy, backend string, took time.Duration) {
	m.CheckTimes.WithLabelValues(proxy, backend).Observe(took.Seconds())
}

// Forget drops what was counted of a backend that is there no more.
func (m *Metrics) Forget(proxy, backend string) {
	m.CheckTimes.DeleteLabelValues(proxy, backend)
	m.ConnectTimes.DeleteLabelValues(proxy, backend)
}

// sampler makes metrics of what is true at the time of a scrape.
type sampler func() []Sample

// Describe sends nothing: which samples there are depends on the configuration, and
// checking them again at each scrape is not worth a second list.
func (sampler) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s sampler) Collect(out chan<- prometheus.Metric) {
	for _, x := range s() {
		var names, values []string
		for i := 0; i+1 < len(x.Labels); i += 2 {
			names, values = append(names, x.Labels[i]), append(values, x.Labels[i+1])
		}
		kind := prometheus.GaugeValue
		if x.Total {
			kind = prometheus.CounterValue
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc(x.Name, x.Help, names, nil), kind, x.Value, values...)
	}
}
