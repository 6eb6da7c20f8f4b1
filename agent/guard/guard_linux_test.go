package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/credentials"
	"github.com/hamesh/hamesh/agent/vip"
	"github.com/hamesh/hamesh/cli/pki"
	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

const boot = 1_700_000_000_042

var vips = []vip.Address{
	{VIP: "kube-api", Addr: netip.MustParseAddr("10.77.0.100"), Interface: "eth0", Lifetime: time.Minute},
	{VIP: "kube-api-6", Addr: netip.MustParseAddr("fd77::100"), Interface: "eth0", Lifetime: time.Minute},
}

// network is three hosts on one switch: the agent's, cp-1, and those of two members.
type network struct {
	t     *testing.T
	hosts map[string]*lab.Host
	ports map[string]*lab.Port
	cfg   Config // insecure
	lock  string
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{
		t: t, hosts: map[string]*lab.Host{}, ports: map[string]*lab.Port{}, lock: filepath.Join(t.TempDir(), "lock"),
		cfg: Config{Member: "cp-1", Boot: boot, VIPs: vips, Insecure: true},
	}
	sw, err := lab.NewSwitch("sw")
	must(t, err)
	t.Cleanup(func() { must(t, sw.Close()) })
	for i, name := range []string{"cp-1", "cp-2", "cp-3"} {
		h, err := lab.NewHost(name)
		must(t, err)
		t.Cleanup(func() { must(t, h.Close()) })
		addr := netip.AddrFrom4([4]byte{10, 77, 0, byte(11 + i)})
		n.ports[name], err = sw.Attach(h, "eth0", netip.PrefixFrom(addr, 24))
		must(t, err)
		n.hosts[name] = h
		if i > 0 {
			n.cfg.Peers = append(n.cfg.Peers, Peer{name, netip.AddrPortFrom(addr, 7443)})
		}
	}
	return n
}

// held lists the VIPs that the agent's kernel has.
func (n *network) held() (held []string) {
	n.t.Helper()
	list, err := n.hosts["cp-1"].Netlink().AddrList(nil, netlink.FAMILY_ALL)
	for errors.Is(err, netlink.ErrDumpInterrupted) {
		list, err = n.hosts["cp-1"].Netlink().AddrList(nil, netlink.FAMILY_ALL)
	}
	must(n.t, err)
	for _, v := range vips {
		if slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.IP.String() == v.Addr.String() }) {
			held = append(held, v.VIP)
		}
	}
	return held
}

func (n *network) awaitHeld(limit time.Duration, want ...string) {
	n.t.Helper()
	await(n.t, limit, fmt.Sprintf("the kernel has %v", want), func() bool { return slices.Equal(n.held(), want) })
}

// tryLock takes the node's lock as a new agent would, and gives it back.
func (n *network) tryLock() error {
	f, err := os.OpenFile(n.lock, os.O_RDWR, 0)
	must(n.t, err)
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}

// word is what a member heard, and when.
type word struct {
	from string
	*hameshv1.WithdrawnRequest
	at time.Time
}

// member is a stand-in for another member behind the real server.
type member struct {
	server.StatusSource // nil, as are the next ones: never asked for, but for Withdrawn
	server.EventSource
	server.ControlSink
	server.MeshPeer

	mu    sync.Mutex
	words []word
}

func (m *member) Withdrawn(_ context.Context, from string, w *hameshv1.WithdrawnRequest) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.words = append(m.words, word{from, w, time.Now()})
	return nil
}

func (m *member) heard() []word {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.words)
}

func (m *member) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.words = nil
}

// join starts the real server of a member on its host.
func (n *network) join(name string, options server.Options) *member {
	n.t.Helper()
	m := &member{}
	options.Mesh, options.Node, options.Members = "prod", name, []string{"cp-1", "cp-2", "cp-3"}
	options.Log = hclog.NewNullLogger()
	s, err := server.New(options, m, m, m, m)
	must(n.t, err)
	l, err := n.hosts[name].Listen("tcp", ":7443")
	must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	n.t.Cleanup(func() {
		cancel()
		must(n.t, <-served)
	})
	return m
}

func (n *network) joinAll() map[string]*member {
	n.t.Helper()
	members := make(map[string]*member)
	for _, p := range n.cfg.Peers {
		members[p.Name] = n.join(p.Name, server.Options{Insecure: true})
	}
	return members
}

func (n *network) start() *agent {
	n.t.Helper()
	a := startAgent(n.t, n.hosts["cp-1"], n.cfg, n.lock)
	n.awaitHeld(time.Second, "kube-api", "kube-api-6")
	return a
}

// checkWord checks that a member has heard the word of cp-1's guard once.
func (n *network) checkWord(m *member) {
	n.t.Helper()
	words := m.heard()
	if len(words) != 1 {
		n.t.Fatalf("heard %d words", len(words))
	}
	w := words[0]
	if w.from != "cp-1" || w.GetMember() != "cp-1" || w.GetBoot() != boot || !slices.Equal(w.GetVips(), []string{"kube-api", "kube-api-6"}) {
		n.t.Errorf("heard %v", w)
	}
}

// TestKilledAgent kills agents, and reports how long after that the kernel had none of
// the addresses any more, and every member had heard.
func TestKilledAgent(t *testing.T) {
	n := newNetwork(t)
	members := n.joinAll()
	var gone, told []time.Duration
	for range 20 {
		a := n.start()
		for _, m := range members {
			m.forget()
		}
		at := time.Now()
		a.signal(unix.SIGKILL)
		n.awaitHeld(5 * time.Second)
		gone = append(gone, time.Since(at))
		if status := a.waitGuard(); status != exitOK {
			t.Errorf("exit status %d", status)
		}
		last := at
		for _, m := range members {
			n.checkWord(m)
			if heard := m.heard()[0].at; heard.After(last) {
				last = heard
			}
		}
		told = append(told, last.Sub(at))
		a.kill()
	}
	for what, took := range map[string][]time.Duration{"addresses gone": gone, "all members told": told} {
		slices.Sort(took)
		t.Logf("%s after SIGKILL: median %v, worst %v of %d", what, took[len(took)/2], took[len(took)-1], len(took))
	}
	if median := gone[len(gone)/2]; median > 50*time.Millisecond {
		t.Errorf("addresses gone after %v, want at most 50ms", median)
	}
}

func TestTLS(t *testing.T) {
	n := newNetwork(t)
	dir := t.TempDir()
	_, err := pki.Init(dir, "prod")
	must(t, err)
	ca := filepath.Join(dir, "ca.crt")
	issue := func(name string) pki.Files {
		files, err := pki.Issue(dir, pki.Request{Name: name, Role: pki.RoleAgent, Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.1")}})
		must(t, err)
		return files
	}
	own := issue("cp-1")
	n.cfg.Insecure, n.cfg.CAFile, n.cfg.CertFile, n.cfg.KeyFile = false, ca, own.Cert, own.Key
	var members []*member
	for _, name := range []string{"cp-2", "cp-3"} {
		files := issue(name)
		identity, err := credentials.Open(ca, files.Cert, files.Key)
		must(t, err)
		members = append(members, n.join(name, server.Options{TLS: identity.Server()}))
	}
	a := n.start()
	a.signal(unix.SIGKILL)
	if status := a.waitGuard(); status != exitOK {
		t.Errorf("exit status %d", status)
	}
	n.awaitHeld(0)
	for _, m := range members {
		n.checkWord(m)
	}
}

// A member that comes a second late hears it too, and one that never comes keeps nobody
// waiting.
func TestLateMember(t *testing.T) {
	n := newNetwork(t)
	must(t, n.ports["cp-3"].Cut())
	a := n.start()
	prompt := n.join("cp-2", server.Options{Insecure: true})
	a.signal(unix.SIGKILL)
	n.awaitHeld(time.Second)
	await(t, time.Second, "the prompt member hears", func() bool { return len(prompt.heard()) == 1 })
	// The VIPs are off: the next agent need not wait for the rest.
	await(t, time.Second, "the lock is free", func() bool { return n.tryLock() == nil })
	must(t, n.ports["cp-3"].Mend())
	late := n.join("cp-3", server.Options{Insecure: true})
	if status := a.waitGuard(); status != exitOK {
		t.Errorf("exit status %d", status)
	}
	n.checkWord(prompt)
	n.checkWord(late)
	must(t, n.tryLock())
}

func TestDeadMember(t *testing.T) {
	n := newNetwork(t)
	m := n.join("cp-2", server.Options{Insecure: true})
	must(t, n.ports["cp-3"].Cut())
	a := n.start()
	a.signal(unix.SIGKILL)
	at := time.Now()
	a.waitGuard()
	if took := time.Since(at); took > tellWithin+time.Second {
		t.Errorf("the guard tried for %v", took)
	}
	n.checkWord(m)
	must(t, n.tryLock())
}

// TestOnlyTheKernelCounts does to a guard what must not move it, and then shows that it
// still watches.
func TestOnlyTheKernelCounts(t *testing.T) {
	n := newNetwork(t)
	members := n.joinAll()
	for name, do := range map[string]func(*agent){
		"agent stopped": func(a *agent) { a.signal(unix.SIGSTOP) },
		"pipe closed":   func(a *agent) { a.tell("close") },
		"signals": func(a *agent) {
			for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
				must(t, unix.Kill(a.guard, s))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := n.start()
			for _, m := range members {
				m.forget()
			}
			do(a)
			for deadline := time.Now().Add(500 * time.Millisecond); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
				if held := n.held(); len(held) != len(vips) {
					t.Fatalf("the kernel has only %v", held)
				}
			}
			for name, m := range members {
				if words := m.heard(); len(words) > 0 {
					t.Errorf("%s heard %v", name, words)
				}
			}
			a.signal(unix.SIGKILL)
			if status := a.waitGuard(); status != exitOK {
				t.Errorf("exit status %d", status)
			}
			n.awaitHeld(0)
			for _, m := range members {
				n.checkWord(m)
			}
		})
	}
}

func TestStop(t *testing.T) {
	n := newNetwork(t)
	members := n.joinAll()
	a := n.start()
	a.tell("stop")
	if err := unix.Kill(a.guard, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the guard after Stop: %v", err)
	}
	// To take them off was up to the agent.
	n.awaitHeld(0, "kube-api", "kube-api-6")
	if err := n.tryLock(); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the lock while the agent lives: %v", err)
	}
	a.tell("sweep")
	a.kill()
	must(t, n.tryLock())
	for name, m := range members {
		if words := m.heard(); len(words) > 0 {
			t.Errorf("%s heard %v", name, words)
		}
	}
}

func TestGuardKilled(t *testing.T) {
	n := newNetwork(t)
	members := n.joinAll()
	a := n.start()
	first := a.guard
	must(t, unix.Kill(first, unix.SIGKILL))
	await(t, 10*time.Second, "another guard watches", func() bool {
		children := childrenOf(t, a.cmd.Process.Pid)
		if len(children) != 1 || children[0] == first {
			return false
		}
		a.guard = children[0]
		return descriptors(a.guard, "[pidfd]") == 1
	})
	n.awaitHeld(0, "kube-api", "kube-api-6")
	a.signal(unix.SIGKILL)
	if status := a.waitGuard(); status != exitOK {
		t.Errorf("exit status %d", status)
	}
	n.awaitHeld(0)
	for _, m := range members {
		n.checkWord(m)
	}
}

// orphan runs a guard that is not its agent's child, with these orders, to its end.
func (n *network) orphan(orders string) (status int, ready []byte) {
	n.t.Helper()
	in, send, err := os.Pipe()
	must(n.t, err)
	out, answer, err := os.Pipe()
	must(n.t, err)
	lock, err := os.Create(n.lock)
	must(n.t, err)
	cmd := lab.Command(roleAgent, "guard")
	cmd.ExtraFiles = []*os.File{in, answer, lock}
	must(n.t, n.hosts["cp-1"].Start(cmd))
	late := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }) // fails where it has ended
	defer late.Stop()
	must(n.t, errors.Join(in.Close(), answer.Close(), lock.Close()))
	_, err = send.WriteString(orders)
	must(n.t, errors.Join(err, send.Close()))
	ready, err = io.ReadAll(out)
	must(n.t, errors.Join(err, out.Close()))
	_ = cmd.Wait()
	return cmd.ProcessState.ExitCode(), ready
}

// An agent that ends before its guard watches is seen to have ended all the same, though
// its process id may be another's by now: here it is a bystander's.
func TestAgentGoneBeforeTheWatch(t *testing.T) {
	n := newNetwork(t)
	members := n.joinAll()
	for _, v := range vips {
		must(t, n.hosts["cp-1"].AddAddress("eth0", netip.PrefixFrom(v.Addr, v.Addr.BitLen())))
	}
	bystander := lab.Command(roleAgent, "idle")
	in, err := bystander.StdinPipe()
	must(t, err)
	must(t, bystander.Start())
	defer func() {
		_ = in.Close()
		_ = bystander.Wait()
	}()
	line, err := json.Marshal(orders{n.cfg, bystander.Process.Pid, "info"})
	must(t, err)

	if status, ready := n.orphan(string(line)); status != exitUsage || len(ready) > 0 {
		t.Errorf("with half its orders: exit status %d, said %q", status, ready)
	}
	n.awaitHeld(0, "kube-api", "kube-api-6")

	if status, ready := n.orphan(string(line) + "\n"); status != exitOK || len(ready) > 0 {
		t.Errorf("exit status %d, said %q", status, ready)
	}
	n.awaitHeld(0)
	for _, m := range members {
		n.checkWord(m)
	}
}

func TestStartFails(t *testing.T) {
	lock, err := os.Create(filepath.Join(t.TempDir(), "lock"))
	must(t, err)
	defer lock.Close()
	t.Setenv("HAMESH_LAB_ROLE", roleAgent)
	cfg := Config{Member: "cp-1", Boot: boot, VIPs: vips, CAFile: "/none", Lock: lock, Log: hclog.NewNullLogger()}
	if _, err := Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("without its TLS files: %v", err)
	}
	cfg.Insecure = true
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Start(ended, cfg); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("in a context that has ended: %v", err)
	}
	if children := childrenOf(t, os.Getpid()); len(children) > 0 {
		t.Errorf("left behind: %v", children)
	}
}

// TestSmall reports what a guard costs while it watches, and that it has dialled nobody.
func TestSmall(t *testing.T) {
	n := newNetwork(t)
	n.joinAll()
	a := n.start()
	for _, table := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", a.guard, table))
		must(t, err)
		if lines := strings.Count(string(b), "\n"); lines > 1 { // the first is the header
			t.Errorf("connections:\n%s", b)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.guard))
	must(t, err)
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "Threads") {
			t.Log(strings.Join(strings.Fields(line), " "))
		}
	}
	t.Logf("%d descriptors, of which %d sockets", descriptors(a.guard, ""), descriptors(a.guard, "socket:"))
}

func childrenOf(t *testing.T, pid int) (children []int) {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	must(t, err)
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for field := range strings.FieldsSeq(string(b)) {
			child, err := strconv.Atoi(field)
			must(t, err)
			children = append(children, child)
		}
	}
	return children
}

// descriptors counts a process's descriptors of one kind; empty: all.
func descriptors(pid int, kind string) (count int) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		to, _ := os.Readlink(filepath.Join(dir, e.Name())) // gone: counted as of no kind
		if strings.Contains(to, kind) {
			count++
		}
	}
	return count
}
