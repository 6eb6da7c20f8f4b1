package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/metrics"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/store"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// logText is what was logged.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(line)
}

// take returns what was logged since it was taken last.
func (l *logText) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

// reloadRig is as much of an agent as takes a configuration on: one proxy on loopback, its
// checks, orders and log, and an ownership loop that only remembers what it is told.
type reloadRig struct {
	*reload
	t        *testing.T
	text     string
	logged   *logText
	servers  map[string]string // name → address
	told     *hameshv1.Event   // the last one
	mu       sync.Mutex
	settings []ownership.Settings
}

const rigText = `apiVersion: hamesh/v1
kind: Agent
mesh: lab
node: {name: cp-1, address: 127.0.0.1}
members: [{name: cp-1, address: 127.0.0.1}]
dataDir: %s
tls: {insecure: true}
proxies:
  - name: kube-api
    port: %d
    backends:
      - {name: a, address: "%s"}
      - {name: b, address: "%s"}
    healthCheck: {scheme: http, interval: 50ms}
    onDown: drain
log: {level: info, format: text}
`

func newReloadRig(t *testing.T) *reloadRig {
	r := &reloadRig{t: t, logged: &logText{}, servers: map[string]string{}}
	for _, name := range []string{"a", "b", "c"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) }))
		t.Cleanup(s.Close)
		r.servers[name] = s.Listener.Addr().String()
	}
	free, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	dir := t.TempDir()
	r.text = fmt.Sprintf(rigText, dir, port, r.servers["a"], r.servers["b"])
	path := filepath.Join(dir, "agent.yaml")
	r.write(path, r.text)
	cfg, err := load(path, func(string) {})
	if err != nil {
		t.Fatal(err)
	}

	log := newLogger(r.logged, cfg.Log)
	a := &Agent{cfg: cfg, log: log, board: newBoard(), loop: &loop{inputs: make(chan input), done: make(chan struct{})}}
	a.orders = newOrders(a)
	s, err := newService(cfg.Proxies[0], "cp-1", cfg.Timing, log, metrics.New("test", nil), a.board.notify)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.proxy.Close)
	if err := s.proxy.Listen(); err != nil {
		t.Fatal(err)
	}
	a.services = []*service{s}
	a.teller = newTeller("cp-1", func(e *hameshv1.Event) { r.told = e })
	r.reload = &reload{agent: a, path: path, inForce: cfg, log: log}

	ctx, cancel := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() {
		if err := s.run(ctx); err != nil {
			t.Error(err)
		}
	})
	tasks.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case in := <-a.loop.inputs:
				r.mu.Lock()
				r.settings = append(r.settings, in.event.(ownership.Settings))
				r.mu.Unlock()
			}
		}
	})
	t.Cleanup(func() { cancel(); tasks.Wait() })
	r.eventually("a up, b up")
	return r
}

func (r *reloadRig) write(path, text string) {
	r.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// with reloads the first configuration with pairs of texts replaced.
func (r *reloadRig) with(pairs ...string) {
	r.t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(r.text, pairs[i]) {
			r.t.Fatalf("%q is not in the configuration", pairs[i])
		}
	}
	r.write(r.path, strings.NewReplacer(pairs...).Replace(r.text))
	r.logged.take()
	r.reload.reload(r.t.Context())
}

// backends are those of the service, with their states.
func (r *reloadRig) backends() string {
	_, statuses, _, _ := r.agent.services[0].look(func(string) bool { return false })
	var all []string
	for _, s := range statuses {
		all = append(all, s.Backend+" "+s.State.String())
	}
	return strings.Join(all, ", ")
}

func (r *reloadRig) eventually(backends string) {
	r.t.Helper()
	for end := time.Now().Add(20 * time.Second); r.backends() != backends; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("backends are %s, not %s", r.backends(), backends)
		}
	}
}

// answers returns which servers answer through the proxy, and fails if a request does.
func (r *reloadRig) answers() string {
	r.t.Helper()
	var names []string
	for i := range 20 {
		client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i))}}).DialContext,
		}}
		response, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", r.agent.services[0].proxy.Port()))
		if err != nil {
			r.t.Fatal(err)
		}
		var b bytes.Buffer
		_, err = b.ReadFrom(response.Body)
		if err = errors.Join(err, response.Body.Close()); err != nil {
			r.t.Fatal(err)
		}
		names = append(names, b.String())
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), " ")
}

func (r *reloadRig) taken(changes ...string) {
	r.t.Helper()
	text := r.logged.take()
	for _, c := range changes {
		if !strings.Contains(text, c) {
			r.t.Errorf("%q is not in the log:\n%s", c, text)
		}
	}
	if p := r.problems(); len(p) > 0 {
		r.t.Errorf("problems %v", p)
	}
	if r.told.GetKind() != hameshv1.EventKind_EVENT_KIND_CONFIG_RELOADED || r.told.GetReason() == "" {
		r.t.Errorf("the event is %v", r.told)
	}
}

// refusedFor checks that the last reload was refused, and said why.
func (r *reloadRig) refusedFor(finding, fix string) {
	r.t.Helper()
	text, problems := r.logged.take(), r.problems()
	if !strings.Contains(text, "[ERROR]") || !strings.Contains(text, finding) {
		r.t.Errorf("%q is not in the log:\n%s", finding, text)
	}
	if len(problems) != 1 || problems[0].GetCode() != "CONFIG_REFUSED" ||
		!strings.Contains(problems[0].GetMessage(), finding) || !strings.Contains(problems[0].GetFix(), fix) {
		r.t.Errorf("problems %v; want one of %q, %q", problems, finding, fix)
	}
	if r.told.GetKind() != hameshv1.EventKind_EVENT_KIND_CONFIG_REFUSED || !strings.Contains(r.told.GetReason(), finding) {
		r.t.Errorf("the event is %v, want one for %q", r.told, finding)
	}
	if got := r.backends(); got != "a up, b up" {
		r.t.Errorf("backends %s", got)
	}
	if len(r.settings) > 0 {
		r.t.Errorf("ownership was told %+v", r.settings)
	}
}

func TestReload(t *testing.T) {
	r := newReloadRig(t)
	listB := fmt.Sprintf("      - {name: b, address: %q}\n", r.servers["b"])
	listC := fmt.Sprintf("      - {name: c, address: %q}\n", r.servers["c"])

	r.with(listB, listC, "level: info", "level: debug", "node: {", "node: {priority: 7, ")
	r.taken("proxies[0].backends[1]: c is added", "proxies[0].backends: b is removed", "log.level: is debug, was info", "node.priority: is 7, was 100")
	r.eventually("a up, c up")
	if got := r.answers(); got != "a c" {
		t.Errorf("answered by %s", got)
	}
	r.mu.Lock()
	if len(r.settings) != 1 || r.settings[0].Priority != 7 {
		t.Errorf("ownership was told %+v", r.settings)
	}
	r.mu.Unlock()
	r.log.Named("vip").Debug("at length")
	r.taken("[DEBUG] hameshd.vip: at length")

	// The same name at another address is another backend, whatever was known of the first.
	closed := httptest.NewServer(nil)
	closed.Close()
	r.with(r.servers["a"], closed.Listener.Addr().String(), "text", "json")
	r.taken("log.level: is info, was debug", `"@message":"configuration: log.format: is json, was text"`)
	r.eventually("a down, b up")
	if got := r.answers(); got != "b" {
		t.Errorf("answered by %s", got)
	}
	r.with(r.servers["a"], r.servers["c"], "interval: 50ms", "interval: 60ms", "onDown: drain", "onDown: close")
	r.eventually("a up, b up")
	if got := r.answers(); got != "b c" {
		t.Errorf("answered by %s", got)
	}
}

// TestReloadOrders checks that a backend that is added is what operators have ordered of it.
func TestReloadOrders(t *testing.T) {
	r := newReloadRig(t)
	order := func(state string) {
		r.agent.orders.mu.Lock()
		defer r.agent.orders.mu.Unlock()
		r.agent.orders.inForce = map[store.Subject]store.Order{{Proxy: "kube-api", Backend: "c"}: {State: state}}
	}
	order(backendDisabled)
	r.with("name: b,", "name: c,")
	if got := r.backends(); got != "a up, c disabled" {
		t.Errorf("backends %s", got)
	}
	r.with()
	order("")
	r.with("name: b,", "name: c,")
	r.eventually("a up, c up")
}

// TestReloadKeepsStates checks that new checks go on where the old ones were.
func TestReloadKeepsStates(t *testing.T) {
	r := newReloadRig(t)
	for i := range 10 {
		r.with("interval: 50ms", fmt.Sprintf("interval: %dms", 51+i))
		if got := r.backends(); got != "a up, b up" {
			t.Fatalf("backends %s", got)
		}
		if text := r.logged.take(); strings.Contains(text, "backend is") {
			t.Fatalf("a state has changed:\n%s", text)
		}
	}
	backends, through := r.agent.services[0].known()
	for b, state := range backends {
		if state != health.Up {
			t.Errorf("%s is %v", b, state)
		}
	}
	if through != health.Unknown {
		t.Errorf("the way through the proxy is %v", through)
	}
}

func TestReloadRefused(t *testing.T) {
	r := newReloadRig(t)
	missing := filepath.Join(t.TempDir(), "none.pem")
	for _, c := range []struct {
		name         string
		edits        []string
		finding, fix string
	}{
		{"a bad file", []string{"onDown: drain", "onDwn: drain"}, "agent.yaml:15: proxies[0].onDwn: is not a known key", "did you mean onDown?"},
		{"no YAML", []string{"kind: Agent", "\tkind"}, "agent.yaml:2: is not YAML", "indent with spaces"},
		{"another host's", []string{"127.0.0.1}", "192.0.2.1}"}, "no interface of this host has 192.0.2.1", "run on that node"},
		{"a key that takes a restart", []string{"mesh: lab", "mesh: other"}, "agent.yaml:3: mesh: is other, was lab", "restart the agent"},
		{"that among others", []string{"mesh: lab", "mesh: other", "name: b,", "name: c,", "level: info", "level: error", "node: {", "node: {priority: 7, "},
			"agent.yaml:3: mesh: is other, was lab", "restart the agent"},
		{"a file that is not there", []string{"scheme: http,", fmt.Sprintf("caFile: %s,", missing), "name: b,", "name: c,", "node: {", "node: {priority: 7, "},
			"proxy kube-api: backend a: reading the certificate authority", "mend"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.t = t
			r.with(c.edits...)
			r.refusedFor(c.finding, c.fix)
		})
	}
	r.t = t
	if err := os.Remove(r.path); err != nil {
		t.Fatal(err)
	}
	r.reload.reload(t.Context())
	r.refusedFor("no such file", "mend")

	r.with()
	r.taken("the configuration was read again")
}

// serviceManager is a socket for what the agent tells its manager.
func serviceManager(t *testing.T) *net.UnixConn {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { manager.Close() })
	t.Setenv("NOTIFY_SOCKET", socket)
	return manager
}

// TestReloadTellsManager checks what the service manager hears.
func TestReloadTellsManager(t *testing.T) {
	r := newReloadRig(t)
	manager := serviceManager(t)
	heard := func() string {
		t.Helper()
		var b [200]byte
		if err := manager.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := manager.Read(b[:])
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	r.with() // not ready yet: nothing to tell
	r.agent.joined.Store(true)
	for _, edit := range []string{"lab", "other"} { // taken on, refused
		r.with("mesh: lab", "mesh: "+edit)
		var usec int64
		if first := heard(); !strings.HasPrefix(first, "RELOADING=1\n") {
			t.Errorf("the manager hears %q first", first)
		} else if _, err := fmt.Sscanf(first, "RELOADING=1\nMONOTONIC_USEC=%d", &usec); err != nil || usec <= 0 {
			t.Errorf("the manager hears %q: %v", first, err)
		}
		if then := heard(); then != "READY=1" {
			t.Errorf("the manager hears %q then", then)
		}
	}
}

// TestWatchdogIsFed checks that an agent that goes on in another one's place feeds systemd's
// watchdog from the start: that does not wait until it is ready.
func TestWatchdogIsFed(t *testing.T) {
	a := &Agent{ctx: t.Context(), loop: &loop{inputs: make(chan input), done: make(chan struct{})}}
	close(a.loop.done) // so that the agent is not ready
	manager := serviceManager(t)
	t.Setenv("WATCHDOG_USEC", "10000000")
	fed := func() bool {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- a.tellReady(ctx) }()
		if err := manager.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		var b [200]byte
		n, err := manager.Read(b[:])
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return string(b[:n]) == "WATCHDOG=1"
	}
	a.beatAt.Store(time.Now().UnixNano())
	if fed() {
		t.Error("it is fed before the agent has told that it is ready")
	}
	a.inheritance = &Inheritance{}
	a.beatAt.Store(time.Now().UnixNano())
	if !fed() {
		t.Error("it is not fed")
	}
}

// TestLogger changes level and format of a log that is in use.
func TestLogger(t *testing.T) {
	out := &logText{}
	log := newLogger(out, config.Log{Level: 3, Format: config.Text})
	named := log.Named("peer").With("peer", "cp-2")
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for range 1000 {
				named.Info("line")
			}
		})
	}
	for i := range 100 {
		log.set(config.Log{Level: 3, Format: []config.Format{config.JSON, config.Text}[i%2]})
	}
	writers.Wait()
	if n := strings.Count(out.take(), "\n"); n != 4000 {
		t.Errorf("%d lines, want 4000", n)
	}
	for _, c := range []struct {
		cfg  config.Log
		want string
	}{
		{config.Log{Level: 2, Format: config.Text}, "[DEBUG] hameshd.peer: line: peer=cp-2\n"},
		{config.Log{Level: 2, Format: config.JSON}, `{"@level":"debug","@message":"line","@module":"hameshd.peer","@timestamp":"`},
		{config.Log{Level: 5, Format: config.JSON}, ""},
	} {
		log.set(c.cfg)
		named.Debug("line")
		got := out.take()
		if !strings.Contains(got, c.want) || (c.want == "") != (got == "") {
			t.Errorf("%+v: logged %q, want %q", c.cfg, got, c.want)
		}
		if named.IsDebug() != (c.want != "") {
			t.Errorf("%+v: the log says otherwise", c.cfg)
		}
	}
}
