//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// pace is how a keepalived with HAProxy is tuned.
type pace struct {
	name   string
	advert string // seconds between keepalived's adverts; below 1 needs VRRP 3
	check  string // between HAProxy's checks, of which three have to fail
	rest   time.Duration
}

var paces = []pace{
	// rest: until a returned backend has passed its checks everywhere, and a returned
	// keepalived has heard the others.
	{name: "keepalived + HAProxy, adverts and checks 1s", advert: "1", check: "1s", rest: 5 * time.Second},
	{name: "keepalived + HAProxy, adverts 100ms, checks 150ms", advert: "0.1", check: "150ms", rest: 3 * time.Second},
}

// No check of HAProxy by keepalived: where a process is killed here, both are.
var keepalivedConfig = template.Must(template.New("").Parse(`global_defs {
  router_id {{.Name}}
  vrrp_version 3
}
vrrp_instance api {
  state BACKUP
  nopreempt
  interface eth0
  virtual_router_id 51
  priority {{.Priority}}
  advert_int {{.Advert}}
  virtual_ipaddress {
    {{.VIP}}/32
  }
}
`))

var haproxyConfig = template.Must(template.New("").Parse(`global
  maxconn 4000
defaults
  mode tcp
  retries 2
  option redispatch 1
  timeout connect 1s
  timeout client 1h
  timeout server 1h
  timeout check 900ms
listen api
  bind :{{.Port}}
  balance source
  option httpchk GET /readyz
  http-check expect status 200
  default-server inter {{.Check}} fall 3 rise 2 check check-ssl verify none
{{- range .Nodes}}
  server {{.Name}} {{.Address}}:6443
{{- end}}
`))

// peersOfDebian are keepalived with HAProxy, found in PATH.
func peersOfDebian() (all []contender, err error) {
	for _, program := range []string{"keepalived", "haproxy"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%w: -peers needs it: apt-get install keepalived haproxy", err)
		}
	}
	for _, p := range paces {
		all = append(all, p.contender())
	}
	return all, nil
}

func (p pace) contender() contender {
	running := make(daemons)
	return contender{
		name: p.name,
		setUp: func() (*lab.Mesh, error) {
			m, err := lab.NewMesh(lab.Options{Agentless: true})
			if err != nil {
				return nil, err
			}
			for i, n := range m.Nodes {
				if err = errors.Join(err, p.configure(m, i), running.start(n)); err != nil {
					return nil, errors.Join(err, m.Close())
				}
			}
			return m, nil
		},
		settled: func(m *lab.Mesh) error {
			return lab.Await(ready, func() error {
				now := time.Now()
				h := m.Recorder.Between(now.Add(-p.rest), now)
				if len(h.Spans) != 1 || h.Min != 1 || h.Spans[0].From.After(now.Add(-p.rest+time.Second)) {
					return fmt.Errorf("wait for one holder for %s: %+v", p.rest, h.Spans)
				}
				return nil
			})
		},
		kill:    running.kill,
		killAll: running.killAll,
		restart: running.start,
		// There is no command that moves a VIP: keepalived is stopped on its owner.
		move: func(_ *lab.Mesh, owner *lab.Node) error { return running.end(owner, "keepalived", unix.SIGTERM) },
	}
}

func directory(n *lab.Node) string { return filepath.Join(lab.Dir(), "peer-"+n.Name) }

// configure writes what the programs of one node read.
func (p pace) configure(m *lab.Mesh, index int) error {
	n := m.Nodes[index]
	dir := directory(n)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("configure %s: %w", n.Name, err)
	}
	values := struct {
		Name, Advert, Check string
		Priority            int
		VIP                 netip.Addr
		Port                uint16
		Nodes               []*lab.Node
	}{n.Name, p.advert, p.check, 150 - 10*index, m.VIP().Addr(), m.VIP().Port(), m.Nodes}
	for name, t := range map[string]*template.Template{"keepalived.conf": keepalivedConfig, "haproxy.cfg": haproxyConfig} {
		var b bytes.Buffer
		if err := t.Execute(&b, values); err != nil {
			return fmt.Errorf("configure %s: %w", n.Name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b.Bytes(), 0o600); err != nil {
			return fmt.Errorf("configure %s: %w", n.Name, err)
		}
	}
	return nil
}

// daemon is a program that runs on a node.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// daemons are those of one mesh by node and name.
type daemons map[string]*daemon

func (d daemons) running(n *lab.Node, program string) bool {
	p := d[n.Name+" "+program]
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// start starts what of the two does not run.
func (d daemons) start(n *lab.Node) error {
	in := func(name string) string { return filepath.Join(directory(n), name) }
	for _, args := range [][]string{
		{"haproxy", "-db", "-f", in("haproxy.cfg")},
		{"keepalived", "--dont-fork", "--log-console", "--no-syslog", "--vrrp", "--use-file", in("keepalived.conf"),
			"--pid", in("keepalived.pid"), "--vrrp_pid", in("vrrp.pid")},
	} {
		if d.running(n, args[0]) {
			continue
		}
		log, err := os.OpenFile(in(args[0]+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("start %s on %s: %w", args[0], n.Name, err)
		}
		// Left by a kill, they would keep keepalived from starting for as long as the process
		// that they name is not reaped.
		for _, pid := range []string{"keepalived.pid", "vrrp.pid"} {
			if err := os.Remove(in(pid)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("start keepalived on %s: %w", n.Name, err)
			}
		}
		p := &daemon{exec.Command(args[0], args[1:]...), make(chan struct{})}
		p.cmd.Stdout, p.cmd.Stderr = log, log
		err = n.Host().Start(p.cmd)
		_ = log.Close() // the child has its own
		if err != nil {
			return fmt.Errorf("start %s on %s: %w", args[0], n.Name, err)
		}
		d[n.Name+" "+args[0]] = p
		go func() {
			_ = p.cmd.Wait() // it ends by a signal, or with the mesh
			close(p.done)
		}()
	}
	return nil
}

// killAll kills both with their children, and waits until they have ended.
func (d daemons) killAll(n *lab.Node) error {
	err := n.KillAll()
	for _, program := range []string{"haproxy", "keepalived"} {
		if d.running(n, program) {
			<-d[n.Name+" "+program].done
		}
	}
	return err
}

// kill kills the two, but not their children.
func (d daemons) kill(n *lab.Node) error {
	return errors.Join(d.end(n, "keepalived", unix.SIGKILL), d.end(n, "haproxy", unix.SIGKILL))
}

// end signals a running program and waits for its end.
func (d daemons) end(n *lab.Node, program string, s os.Signal) error {
	p := d[n.Name+" "+program]
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("end %s on %s: %w", program, n.Name, err)
	}
	<-p.done
	return nil
}
