//go:build linux

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/sys/unix"
)

const (
	storeMembers    = 3
	storeClientPort = 2379 // and the next ones, one a member
	storePeerPort   = 2479
)

var storeAddress = netip.MustParseAddr("10.77.0.5")

// Store is an external store: three etcd members, without TLS, on a host of their own.
type Store struct {
	Host *Host
	Port *Port

	dir string

	mu      sync.Mutex
	members [storeMembers]*process
}

func newStore(m *Mesh) (*Store, error) {
	host, err := NewHost("store")
	if err != nil {
		return nil, err
	}
	s := &Store{Host: host, dir: filepath.Join(m.dir, "store")}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, errors.Join(fmt.Errorf("make the store's disk: %w", err), host.Close())
	}
	s.Port, err = m.Switch.Attach(host, hostInterface, netip.PrefixFrom(storeAddress, subnetBits))
	if err != nil {
		return nil, errors.Join(err, host.Close())
	}
	return s, nil
}

// Endpoints are what the agents are told.
func (s *Store) Endpoints() []string {
	var all []string
	for i := range storeMembers {
		u := storeURL(storeClientPort, i)
		all = append(all, u.String())
	}
	return all
}

func storeURL(port, member int) url.URL {
	a := netip.AddrPortFrom(storeAddress, uint16(port+member))
	return url.URL{Scheme: "http", Host: a.String()}
}

// Start has every member run, whether it was stopped or killed, and does not wait until
// they have a leader.
func (s *Store) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for i := range s.members {
		if s.members[i].running() {
			errs = append(errs, s.members[i].signal(unix.SIGCONT))
			continue
		}
		arg, err := json.Marshal(storeMember{i, s.dir})
		if err != nil {
			return fmt.Errorf("encode a store member: %w", err)
		}
		s.members[i], err = launch(s.Host, Command(roleStore, string(arg)), filepath.Join(s.dir, "store.log"))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Stop freezes every member (SIGSTOP): connections to them stay, nobody answers.
func (s *Store) Stop() error {
	return s.each(func(p *process) error { return p.signal(unix.SIGSTOP) })
}

// Kill ends every member at once. What they have stored stays.
func (s *Store) Kill() error {
	return s.each(func(p *process) error { return p.end(unix.SIGKILL) })
}

func (s *Store) each(f func(*process) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, p := range s.members {
		errs = append(errs, f(p))
	}
	return errors.Join(errs...)
}

func (s *Store) close() error { return errors.Join(s.Host.killAll(0), s.Host.Close()) }

const roleStore = "etcd"

func init() { Role(roleStore, serveStore) }

// storeMember is what a member's process is started with.
type storeMember struct {
	Index int
	Dir   string
}

func serveStore(args []string) int {
	if err := runStore(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func runStore(args []string) error {
	var m storeMember
	if len(args) != 1 {
		return errors.New("want one argument, a store member")
	}
	if err := json.Unmarshal([]byte(args[0]), &m); err != nil {
		return fmt.Errorf("read the store member: %w", err)
	}
	config := embed.NewConfig()
	config.Name = fmt.Sprintf("store-%d", m.Index+1)
	config.Dir = filepath.Join(m.Dir, config.Name)
	config.LogLevel = "warn"
	config.ListenClientUrls = []url.URL{storeURL(storeClientPort, m.Index)}
	config.AdvertiseClientUrls = config.ListenClientUrls
	config.ListenPeerUrls = []url.URL{storeURL(storePeerPort, m.Index)}
	config.AdvertisePeerUrls = config.ListenPeerUrls
	var cluster []string
	for i := range storeMembers {
		peer := storeURL(storePeerPort, i)
		cluster = append(cluster, fmt.Sprintf("store-%d=%s", i+1, peer.String()))
	}
	config.InitialCluster = strings.Join(cluster, ",")
	e, err := embed.StartEtcd(config)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	return <-e.Err()
}
