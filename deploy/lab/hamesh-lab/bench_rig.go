//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
	"github.com/hamesh/hamesh/deploy/lab/load"
)

const benchBackendPort = 6443

var (
	benchClient   = netip.MustParsePrefix("10.77.1.1/16")
	benchProxy    = netip.MustParsePrefix("10.77.0.11/16")
	benchVIP      = netip.MustParsePrefix("10.77.0.100/32")
	benchBackends = []netip.Prefix{
		netip.MustParsePrefix("10.77.0.21/16"), netip.MustParsePrefix("10.77.0.22/16"), netip.MustParsePrefix("10.77.0.23/16"),
	}
	benchSources = netip.MustParsePrefix("10.99.0.0/16") // of which benchMany are used
)

const benchMany = 1000

// rival is one way from clients to backends.
type rival struct {
	name    string
	targets []netip.AddrPort
	// command makes ready what is between them and returns how it is started; nil:
	// there is nothing between.
	command func(r *rig) (*exec.Cmd, error)
	parts   string // those of a turn that it plays; empty: all
}

func throughVIP() []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(benchVIP.Addr(), 16443)}
}

func toBackends() (all []netip.AddrPort) {
	for _, b := range benchBackends {
		all = append(all, netip.AddrPortFrom(b.Addr(), benchBackendPort))
	}
	return all
}

// The names are of the table's columns too.
const (
	direct        = "direct"
	haproxyName   = "HAProxy"
	haproxyForced = "HAProxy, splicing all"
	hameshRelayed = "hamesh"
)

// haproxyWith starts HAProxy with its options of splicing: with splice-auto it guesses
// which streams are worth it, and the others make it splice whatever it can.
func haproxyWith(splice ...string) func(r *rig) (*exec.Cmd, error) {
	return func(r *rig) (*exec.Cmd, error) {
		if err := r.proxy.AddAddress("eth0", benchVIP); err != nil {
			return nil, err
		}
		r.splice = splice
		file, err := r.write("haproxy.cfg", benchHAProxy)
		return exec.Command("haproxy", "-db", "-f", file), err
	}
}

var rivals = []rival{
	{name: direct, targets: toBackends()},
	{name: haproxyName, targets: throughVIP(), command: haproxyWith("splice-auto")},
	{name: haproxyForced, targets: throughVIP(), command: haproxyWith("splice-request", "splice-response"), parts: "streams"},
	{name: hameshRelayed, targets: throughVIP(), command: func(r *rig) (*exec.Cmd, error) {
		file, err := r.write("agent.yaml", benchAgent)
		return lab.Command("hameshd", "--config", file), err
	}},
}

// The checks are the same for both, every 500 ms. HAProxy counts the descriptors of all
// its pipes beforehand, a quarter as many as connections where it is not told how many.
var benchHAProxy = template.Must(template.New("").Parse(`global
  nbthread 2
  maxconn {{.Most}}
  maxpipes 64
defaults
  mode tcp
{{- range .Splice}}
  option {{.}}
{{- end}}
  timeout connect 3s
  timeout client 1h
  timeout server 1h
  timeout check 400ms
listen api
  bind :16443
  balance source
  hash-type consistent
  default-server inter 500ms fall 2 rise 2 check
{{- range $i, $b := .Backends}}
  server b{{$i}} {{$b}}
{{- end}}
`))

var benchAgent = template.Must(template.New("").Parse(`apiVersion: hamesh/v1
kind: Agent
mesh: bench
node: {name: cp-1, address: {{.Proxy}}}
members:
  - {name: cp-1, address: {{.Proxy}}}
dataDir: {{.Dir}}
api: {socket: {{.Dir}}/hameshd.sock}
tls: {insecure: true}
vips:
  - {name: kube-api, address: {{.VIP}}, interface: eth0}
proxies:
  - name: kube-api
    port: 16443
    backends:
{{- range $i, $b := .Backends}}
      - {name: b{{$i}}, address: "{{$b}}"}
{{- end}}
    healthCheck: {scheme: tcp, interval: 500ms, timeout: 400ms, fall: 2, rise: 2}
`))

// rig is three machines on one segment: a client, the backends, and one between them. A
// turn has it new, so that nobody meets what others have left in the kernel.
type rig struct {
	sw                     *lab.Switch
	client, proxy, backend *lab.Host
	server                 *load.Backend
	generators             []*load.Generator
	dir                    string
	rival                  rival
	most                   int       // connections through what is between
	between                *exec.Cmd // nil: nothing
	splice                 []string  // HAProxy's options
}

func newRig(name string, v rival, most int) (r *rig, err error) {
	r = &rig{rival: v, most: most}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.dir, err = os.MkdirTemp(lab.Dir(), "bench-"); err != nil {
		return r, fmt.Errorf("make a directory: %w", err)
	}
	if r.sw, err = lab.NewSwitch(name); err != nil {
		return r, err
	}
	for _, h := range []struct {
		host      **lab.Host
		name      string
		addresses []netip.Prefix
	}{
		{&r.client, "client", []netip.Prefix{benchClient}},
		{&r.proxy, "proxy", []netip.Prefix{benchProxy}},
		{&r.backend, "backend", benchBackends},
	} {
		if *h.host, err = lab.NewHost(h.name); err != nil {
			return r, err
		}
		if _, err = r.sw.Attach(*h.host, "eth0", h.addresses...); err != nil {
			return r, err
		}
		// A machine that relays thousands of connections a second would have both:
		// each connection to a backend takes a port, and the kernel keeps it for a minute.
		err = errors.Join(
			(*h.host).Sysctl("net/ipv4/ip_local_port_range", "1024 65535"),
			(*h.host).Sysctl("net/ipv4/tcp_tw_reuse", "1"),
			// Linux's own default. BBR, which some machines have instead, paces what is
			// sent by a guess at the way's bandwidth: then that is measured.
			(*h.host).Sysctl("net/ipv4/tcp_congestion_control", "cubic"),
		)
		if err != nil {
			return r, err
		}
	}
	err = errors.Join(
		load.Own(r.client, benchSources),
		load.Reach(r.proxy, benchSources, benchClient.Addr()),
		load.Reach(r.backend, benchSources, benchClient.Addr()),
	)
	if err != nil {
		return r, err
	}
	if r.server, err = load.StartBackend(r.backend, benchBackendPort); err != nil {
		return r, err
	}
	return r, r.start()
}

// start starts what is between, and waits until an answer comes through it.
func (r *rig) start() error {
	if r.rival.command == nil {
		return nil
	}
	cmd, err := r.rival.command(r)
	if err != nil {
		return err
	}
	var log *os.File
	if log, err = os.Create(filepath.Join(r.dir, "log")); err != nil {
		return fmt.Errorf("start %s: %w", r.rival.name, err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := r.proxy.Start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", r.rival.name, err)
	}
	r.between = cmd
	if err := lab.Await(ready, r.answers); err != nil {
		b, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%s: %w\n%s", r.rival.name, err, b)
	}
	return nil
}

// answers asks once, as a client.
func (r *rig) answers() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn, err := r.client.DialContext(ctx, &net.Dialer{}, "tcp4", r.rival.targets[0].String())
	if err != nil {
		return err
	}
	return conn.Close()
}

func (r *rig) generator() (*load.Generator, error) {
	g, err := load.StartGenerator(r.client, load.Ends{Targets: r.rival.targets, From: benchSources.Addr().Next(), Sources: benchMany})
	if err == nil {
		r.generators = append(r.generators, g)
	}
	return g, err
}

// footprint is what is between costs.
func (r *rig) footprint() (footprint, error) { return footprintOf(r.between.Process.Pid) }

func (r *rig) write(name string, t *template.Template) (string, error) {
	var b bytes.Buffer
	err := t.Execute(&b, struct {
		Dir        string
		Proxy, VIP netip.Addr
		Backends   []netip.AddrPort
		Most       int
		Splice     []string
	}{r.dir, benchProxy.Addr(), benchVIP.Addr(), toBackends(), r.most + 50, r.splice})
	if err != nil {
		return "", fmt.Errorf("write %s: %w", name, err)
	}
	file := filepath.Join(r.dir, name)
	return file, os.WriteFile(file, b.Bytes(), 0o600)
}

// close ends all of it.
func (r *rig) close() error {
	var errs []error
	for _, g := range r.generators {
		errs = append(errs, g.Close())
	}
	if r.server != nil {
		errs = append(errs, r.server.Close())
	}
	if r.between != nil {
		for _, pid := range family(r.between.Process.Pid) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("end %s: %w", r.rival.name, err))
			}
		}
		_ = r.between.Wait() // it was killed
	}
	if r.sw != nil {
		errs = append(errs, r.sw.Close())
	}
	for _, h := range []*lab.Host{r.client, r.proxy, r.backend} {
		if h != nil {
			errs = append(errs, h.Close())
		}
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}
