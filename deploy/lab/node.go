//go:build linux

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	roleAgent = "hameshd"
	roleCLI   = "hactl"
)

// Agent registers the agent's main function, which nodes run as "hameshd --config FILE"
// with no capabilities but CAP_NET_ADMIN and CAP_NET_RAW.
func Agent(main func(args []string) int) { Role(roleAgent, confined(main)) }

// CLI registers hactl's main function.
func CLI(main func(args []string) int) { Role(roleCLI, main) }

// Node is one machine of the mesh: a host, a stand-in API server and an agent.
type Node struct {
	Name    string
	Address netip.Addr
	API     *APIServer

	mesh     *Mesh
	prefixes []netip.Prefix // its addresses, the first one is Address
	dir      string         // its disk: outlasts PowerOff

	life sync.Mutex // held while the node's power or agent is switched

	mu    sync.RWMutex // held for moments only: the recorder waits for it
	host  *Host        // nil: powered off
	port  *Port
	agent *process
	// before is what the host had before its first agent; nil: it had none yet.
	before []string

	notices *notices
}

func newNode(m *Mesh, name string, number int) (*Node, error) {
	n := &Node{Name: name, mesh: m, dir: filepath.Join(m.dir, name)}
	for _, p := range m.plans {
		n.prefixes = append(n.prefixes, p.node(number))
	}
	n.Address = n.prefixes[0].Addr()
	n.API = &APIServer{node: n}
	if err := os.MkdirAll(filepath.Join(n.dir, "data"), 0o700); err != nil {
		return nil, fmt.Errorf("make the disk of %s: %w", name, err)
	}
	executable, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.Symlink(executable, n.Program()); err != nil {
		return nil, fmt.Errorf("install the agent of %s: %w", name, err)
	}
	if n.notices, err = listenForNotices(filepath.Join(n.dir, "notify"), n.follow); err != nil {
		return nil, err
	}
	return n, n.plug()
}

// plug gives the node its network.
func (n *Node) plug() error {
	host, err := NewHost(n.Name)
	if err != nil {
		return err
	}
	port, err := n.mesh.Switch.attach(host, hostInterface, n.mac(), n.prefixes)
	if err != nil {
		return errors.Join(fmt.Errorf("connect %s: %w", n.Name, err), host.Close())
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.host, n.port, n.before = host, port, nil
	return nil
}

// mac is the same after PowerOff and PowerOn, as a machine's is; 02 is "locally administered".
func (n *Node) mac() net.HardwareAddr {
	a := n.Address.As16() // that of IPv4 ends with its four bytes
	return net.HardwareAddr{0x02, 0x00, a[12], a[13], a[14], a[15]}
}

// Host is the node's network: another one after each PowerOn, nil while it is off.
func (n *Node) Host() *Host {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.host
}

// Port is the node's cable: another one after each PowerOn, nil while it is off.
func (n *Node) Port() *Port {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.port
}

func (n *Node) socket() string     { return filepath.Join(n.dir, "hameshd.sock") }
func (n *Node) configFile() string { return filepath.Join(n.dir, "agent.yaml") }

// LogFile is where the agent's log is, over all its lives.
func (n *Node) LogFile() string { return filepath.Join(n.dir, "agent.log") }

// Log returns the end of the agent's log, over all its lives.
func (n *Node) Log() string { return tail(n.LogFile()) }

// Program is the file that the agent is started from, a link. What is there instead is what
// an upgrade starts.
func (n *Node) Program() string { return filepath.Join(n.dir, "hameshd") }

// AgentPID is the agent's process id; 0: it does not run.
func (n *Node) AgentPID() int {
	if p := n.process(); p.running() {
		return p.cmd.Process.Pid
	}
	return 0
}

// follow takes another process for the agent's: the agent says that it goes on there.
func (n *Node) follow(pid int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, err := n.agent.follow(pid); err == nil { // else it has ended already
		n.agent = p
	}
}

// StartAgent writes the node's configuration and starts its agent. A running one stays.
func (n *Node) StartAgent() error {
	n.life.Lock()
	defer n.life.Unlock()
	if n.process().running() {
		return nil
	}
	host := n.Host()
	if host == nil {
		return fmt.Errorf("start the agent of %s: it is powered off", n.Name)
	}
	if n.before == nil {
		before, err := host.traces()
		if err != nil {
			return fmt.Errorf("start the agent of %s: %w", n.Name, err)
		}
		n.mu.Lock()
		n.before = before
		n.mu.Unlock()
	}
	config, err := n.mesh.config(n)
	if err != nil {
		return err
	}
	b, err := yaml.Marshal(config)
	if err != nil {
		return fmt.Errorf("encode the configuration of %s: %w", n.Name, err)
	}
	if err := os.WriteFile(n.configFile(), b, 0o600); err != nil {
		return fmt.Errorf("write the configuration of %s: %w", n.Name, err)
	}
	cmd := Command(roleAgent, "--config", n.configFile())
	cmd.Args[0] = n.Program()
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+n.notices.path())
	p, err := launch(host, cmd, n.LogFile())
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.agent = p
	return nil
}

// StopAgent asks the agent to end (SIGTERM) and waits until it has.
func (n *Node) StopAgent() error {
	p := n.process()
	if err := p.end(unix.SIGTERM); err != nil || p == nil {
		return err
	}
	if p.err != nil {
		return fmt.Errorf("agent of %s: %w\n%s", n.Name, p.err, n.Log())
	}
	return nil
}

// KillAgent ends the agent's process, and it alone, by SIGKILL.
func (n *Node) KillAgent() error { return n.process().end(unix.SIGKILL) }

// KillAll ends every process of the node but its API server by SIGKILL, at once: none
// sees another one's end. That is the agent with whatever it has started, or what runs
// in its place.
func (n *Node) KillAll() error {
	host := n.Host()
	if host == nil {
		return nil
	}
	spared := 0
	if p := n.API.running(); p.running() {
		spared = p.cmd.Process.Pid
	}
	if err := errors.Join(host.signalAll(unix.SIGSTOP, spared), host.killAll(spared)); err != nil {
		return err
	}
	return n.process().end(unix.SIGKILL)
}

// Freeze stops the agent's process (SIGSTOP): its kernel goes on without it.
func (n *Node) Freeze() error { return n.process().signal(unix.SIGSTOP) }

// Thaw ends Freeze.
func (n *Node) Thaw() error { return n.process().signal(unix.SIGCONT) }

// process is the agent's, or nil.
func (n *Node) process() *process {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.agent
}

// PowerOff cuts the node's power: at one instant no frame comes from it any more, then
// every process is killed and the kernel's state goes. Its disk stays.
func (n *Node) PowerOff() error {
	n.life.Lock()
	defer n.life.Unlock()
	host, port, agent := n.Host(), n.Port(), n.process()
	if host == nil {
		return nil
	}
	// First, for a dying process's kernel would still say goodbye to its peers.
	err := port.Isolate()
	n.mu.Lock()
	n.host, n.port = nil, nil
	n.mu.Unlock()
	err = errors.Join(err, host.killAll(0), agent.end(unix.SIGKILL), n.API.Kill(), port.remove(), host.Close())
	if err != nil {
		return fmt.Errorf("power %s off: %w", n.Name, err)
	}
	return nil
}

// PowerOn starts the node again after PowerOff, its API server and agent too.
func (n *Node) PowerOn() error {
	if n.Host() != nil {
		return nil
	}
	if err := n.plug(); err != nil {
		return fmt.Errorf("power %s on: %w", n.Name, err)
	}
	return errors.Join(n.API.Start(), n.StartAgent())
}

// DeleteAddress takes an address off the node's interface by hand, as an operator or
// another daemon would. One that is not there is fine.
func (n *Node) DeleteAddress(address netip.Addr) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.host == nil {
		return nil
	}
	err := n.host.DeleteAddress(hostInterface, netip.PrefixFrom(address, address.BitLen()))
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

// Has reports whether the node's kernel has the address on some interface. A node
// without power has none.
func (n *Node) Has(address netip.Addr) (bool, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.host == nil {
		return false, nil
	}
	family := unix.AF_INET
	if address.Is6() {
		family = unix.AF_INET6
	}
	list, err := n.host.Netlink().AddrList(nil, family)
	if err != nil {
		return false, fmt.Errorf("list the addresses of %s: %w", n.Name, err)
	}
	for _, a := range list {
		if got, ok := netip.AddrFromSlice(a.IP); ok && got.Unmap() == address {
			return true, nil
		}
	}
	return false, nil
}

// Hactl runs hactl on the node, against its own agent's socket, and returns what it
// printed and its exit status.
func (n *Node) Hactl(args ...string) (stdout, stderr string, status int, err error) {
	host := n.Host()
	if host == nil {
		return "", "", 0, fmt.Errorf("run hactl on %s: it is powered off", n.Name)
	}
	cmd := Command(roleCLI, args...)
	cmd.Env = append(cmd.Env, "HACTL_ENDPOINT=unix://"+n.socket())
	return host.run(cmd)
}

// Shell is a command line that runs another one on the node, from outside the lab, by
// the user who started it.
func (n *Node) Shell(command string) string {
	pid := 0
	for _, p := range []*process{n.process(), n.API.running()} {
		if p.running() {
			pid = p.cmd.Process.Pid
		}
	}
	namespaces := "-m -p -n"
	if rootless {
		namespaces = "-U --preserve-credentials " + namespaces
	}
	return fmt.Sprintf("nsenter -t %d %s nsenter -t %d -n %s", outerPID, namespaces, pid, command)
}

// HactlShell is such a command line for a hactl command.
func (n *Node) HactlShell(args string) string {
	return n.Shell(fmt.Sprintf("env %s=%s HACTL_ENDPOINT=unix://%s /proc/1/exe %s", envRole, roleCLI, n.socket(), args))
}

// Status is what the node's agent answers to `hactl status`, the mesh being well or not.
func (n *Node) Status() (*hameshv1.GetStatusResponse, error) {
	stdout, stderr, status, err := n.Hactl("status", "-o", "json")
	if err != nil {
		return nil, err
	}
	if !slices.Contains([]int{0, 3}, status) {
		return nil, fmt.Errorf("hactl status on %s: exit status %d: %s", n.Name, status, stderr)
	}
	var response hameshv1.GetStatusResponse
	if err := protojson.Unmarshal([]byte(stdout), &response); err != nil {
		return nil, fmt.Errorf("read the status of %s: %w", n.Name, err)
	}
	return &response, nil
}

// AgentStatus is what the kernel says of the agent's process: /proc/PID/status, see
// proc_pid_status(5).
func (n *Node) AgentStatus() (string, error) {
	p := n.process()
	if !p.running() {
		return "", fmt.Errorf("the agent of %s does not run", n.Name)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	return string(b), err
}
