package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/probe"
	"github.com/hamesh/hamesh/agent/proxy"
)

// plan is what a configuration makes of a service: all that may fail has been done, and
// nothing is in force yet.
type plan struct {
	cfg    config.Proxy
	relay  proxy.Config
	viewed []health.Backend
	probes []*probe.Probe
	// order is what operators want of a backend.
	order func(config.Backend) health.Order
	done  chan error // gets one when the plan is in force, or cannot be
}

// plan prepares a configuration of the same name and port.
func (s *service) plan(cfg config.Proxy) (*plan, error) {
	p := &plan{cfg: cfg, relay: proxyConfig(cfg), done: make(chan error, 1)}
	checks, connects := map[string]*probe.Probe{}, map[string]prometheus.Observer{}
	p.relay.Log = s.log.Named("proxy")
	p.relay.OnConnectFailure = func(backend string, _ error) {
		if c := checks[backend]; c != nil {
			c.Hurry()
		}
	}
	// A backend that is there no more may still accept what was under way to it.
	p.relay.OnConnect = func(backend string, took time.Duration) {
		if c := connects[backend]; c != nil {
			c.Observe(took.Seconds())
		}
	}
	backends, through := s.known()
	h := cfg.HealthCheck
	server := serverCheck(cfg)
	for _, b := range cfg.Backends {
		viewed := health.Backend{Name: b.Name, Address: b.Address, Node: b.Node}
		p.viewed = append(p.viewed, viewed)
		p.relay.Backends = append(p.relay.Backends, proxy.Backend{Name: b.Name, Address: b.Address, Weight: b.Weight})
		connects[b.Name] = s.metrics.ConnectTimes.WithLabelValues(cfg.Name, b.Name)
		one := server
		one.Address, one.Known, one.Header = b.Address, backends[endpoint(b)], cfg.ProxyProtocol == config.ProxyProtocolV2
		one.Interval, one.Timeout, one.Rise, one.Fall = h.Interval, h.Timeout, h.Rise, h.Fall
		one.OnResult = func(r health.Result) {
			s.metrics.Observe(cfg.Name, b.Name, r.Took)
			s.observe(b.Name, r)
		}
		check, err := probe.New(one)
		if err != nil {
			return nil, fmt.Errorf("backend %s: %w", b.Name, err)
		}
		checks[b.Name] = check
		p.probes = append(p.probes, check)
	}
	// The whole way as a client goes it: through this proxy to whatever backend it chooses. So
	// the certificate is that of any of them, and the proxy says itself whose connection it is.
	whole := server
	whole.Address, whole.Known, whole.OnResult = netip.AddrPortFrom(loopback, cfg.Port), through, s.throughResult
	whole.Interval, whole.Timeout, whole.Rise, whole.Fall = 2*h.Interval, 2*h.Timeout, 1, throughFall
	for _, b := range cfg.Backends {
		whole.Names = append(whole.Names, b.Address.Addr().String())
	}
	check, err := probe.New(whole)
	if err != nil {
		return nil, fmt.Errorf("the way through the proxy: %w", err)
	}
	p.probes = append(p.probes, check)
	return p, nil
}

// serverCheck is what a check asks of a server of the proxy, and how it makes itself known,
// wherever the server is reached.
func serverCheck(cfg config.Proxy) probe.Config {
	h := cfg.HealthCheck
	return probe.Config{
		Scheme: probeSchemes[h.Scheme], Path: h.Path,
		CAFile: h.CAFile, CertFile: h.CertFile, KeyFile: h.KeyFile,
	}
}

// endpoint tells backends apart: with another address it is another one.
func endpoint(b config.Backend) string { return b.Name + " " + b.Address.String() }

// known is what the own checks have found as yet, of each backend and of the way through
// the proxy.
func (s *service) known() (backends map[string]health.State, through health.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	states := map[string]health.State{}
	for _, r := range s.view.Own() {
		states[r.Backend] = r.State
	}
	backends = map[string]health.State{}
	for _, b := range s.cfg.Backends {
		backends[endpoint(b)] = states[b.Name]
	}
	if s.blocked != "" {
		through = health.Down
	}
	return backends, through
}

// backends are those in force.
func (s *service) backends() []config.Backend {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.Backends
}

// replace puts a plan into force and returns when it is, or ctx has ended.
func (s *service) replace(ctx context.Context, p *plan) error {
	select {
	case s.plans <- p:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// check runs the checks of the plan in force until ctx ends. No check of one plan runs
// while another one comes into force: its result could be taken for that of another
// backend of the same name.
func (s *service) check(ctx context.Context) error {
	for {
		checking, stop := context.WithCancel(ctx)
		var tasks sync.WaitGroup
		for _, p := range s.probes {
			tasks.Go(func() { _ = p.Run(checking) }) // it returns nil
		}
		var next *plan
		select {
		case <-ctx.Done():
		case next = <-s.plans:
		}
		stop()
		tasks.Wait()
		if next == nil {
			return nil
		}
		next.done <- s.apply(next)
	}
}

// apply puts a plan into force, all of it at one moment.
func (s *service) apply(p *plan) (err error) {
	s.update(func(time.Duration) {
		if err = s.proxy.Replace(p.relay); err != nil {
			return
		}
		for _, b := range s.cfg.Backends {
			if !slices.ContainsFunc(p.cfg.Backends, func(kept config.Backend) bool { return kept.Name == b.Name }) {
				s.metrics.Forget(s.cfg.Name, b.Name)
			}
		}
		s.cfg.Backends, s.cfg.HealthCheck = p.cfg.Backends, p.cfg.HealthCheck
		s.view.SetBackends(p.viewed)
		for _, b := range s.cfg.Backends {
			s.view.SetOrder(b.Name, p.order(b))
		}
		s.probes = p.probes
		s.statuses = nil // so that the proxy hears of all of them
	})
	return err
}
