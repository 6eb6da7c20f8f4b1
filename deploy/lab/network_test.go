//go:build linux

package lab_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// pair makes two hosts, a and b, on one switch; b listens on port 80 and answers each
// connection with a greeting.
func pair(t *testing.T) (sw *lab.Switch, a, b *lab.Port) {
	t.Helper()
	sw, err := lab.NewSwitch("sw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, sw) })
	a = plug(t, sw, "a", "10.77.0.1/24", "fd77::1/64")
	b = plug(t, sw, "b", "10.77.0.2/24", "fd77::2/64")
	listener, err := b.Host.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, listener) })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("hello"))
			_ = conn.Close()
		}
	}()
	return sw, a, b
}

func plug(t *testing.T, sw *lab.Switch, name string, prefixes ...string) *lab.Port {
	t.Helper()
	h, err := lab.NewHost(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, h) })
	var parsed []netip.Prefix
	for _, p := range prefixes {
		parsed = append(parsed, netip.MustParsePrefix(p))
	}
	port, err := sw.Attach(h, "eth0", parsed...)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func closed(t *testing.T, c interface{ Close() error }) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// greet connects from the port's host and reads the greeting.
func greet(p *lab.Port, address string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := p.Host.DialContext(ctx, &net.Dialer{}, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	buf := make([]byte, 5)
	if _, err := conn.Read(buf); err != nil {
		return err
	}
	if !bytes.Equal(buf, []byte("hello")) {
		return errors.New("wrong greeting")
	}
	return nil
}

const (
	soon  = 20 * time.Second       // what has to happen does, also on a busy machine
	brief = 300 * time.Millisecond // long enough to call it dropped
)

func reaches(t *testing.T, p *lab.Port, address string) {
	t.Helper()
	if err := greet(p, address, soon); err != nil {
		t.Errorf("%s should reach %s: %v", p.Host.Name, address, err)
	}
}

func misses(t *testing.T, p *lab.Port, address string) {
	t.Helper()
	if greet(p, address, brief) == nil {
		t.Errorf("%s should not reach %s", p.Host.Name, address)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func carrier(t *testing.T, p *lab.Port) bool {
	t.Helper()
	l, err := p.Host.Netlink().LinkByName(p.Interface)
	must(t, err)
	return l.Attrs().RawFlags&0x10000 != 0 // IFF_LOWER_UP, netdevice(7)
}

func TestSwitchJoinsHosts(t *testing.T) {
	_, a, _ := pair(t)
	reaches(t, a, "10.77.0.2:80")
	reaches(t, a, "[fd77::2]:80")
}

func TestCut(t *testing.T) {
	_, a, _ := pair(t)
	must(t, a.Cut())
	if carrier(t, a) {
		t.Error("carrier after the cable was cut")
	}
	misses(t, a, "10.77.0.2:80")
	must(t, a.Mend())
	if !carrier(t, a) {
		t.Error("no carrier after the cable was mended")
	}
	reaches(t, a, "10.77.0.2:80")
}

func TestIsolate(t *testing.T) {
	_, a, _ := pair(t)
	must(t, a.Isolate())
	if !carrier(t, a) {
		t.Error("an isolated host should keep its carrier")
	}
	misses(t, a, "10.77.0.2:80")
	must(t, a.Rejoin())
	reaches(t, a, "10.77.0.2:80")
}

func TestBlock(t *testing.T) {
	sw, a, b := pair(t)
	c := plug(t, sw, "c", "10.77.0.3/24")
	const address = "10.77.0.2:80"

	for _, test := range []struct {
		name     string
		from, to *lab.Port
		frames   lab.Frames
		blocks   bool
	}{
		{"there", a, b, lab.Frames{}, true},
		{"back", b, a, lab.Frames{}, true},
		{"port there", a, b, lab.Frames{TCPPort: 80}, true},
		{"port back", b, a, lab.Frames{TCPPort: 80}, true},
		{"other port", a, b, lab.Frames{TCPPort: 81}, false},
		{"other pair", a, c, lab.Frames{}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			lift, err := sw.Block(test.from, test.to, test.frames)
			must(t, err)
			if test.blocks {
				misses(t, a, address)
			} else {
				reaches(t, a, address)
			}
			reaches(t, c, address)
			must(t, lift())
			must(t, lift())
			reaches(t, a, address)
		})
	}
}

func TestPartition(t *testing.T) {
	sw, a, b := pair(t)
	c := plug(t, sw, "c", "10.77.0.3/24")
	const address = "10.77.0.2:80"

	lift, err := sw.Partition(lab.Frames{}, []*lab.Port{a}, []*lab.Port{b, c})
	must(t, err)
	misses(t, a, address)
	reaches(t, c, address)
	must(t, lift())
	reaches(t, a, address)
}

func TestDoComesBack(t *testing.T) {
	_, a, b := pair(t)
	count := func() int {
		interfaces, err := net.Interfaces()
		must(t, err)
		return len(interfaces)
	}
	before := count()
	must(t, a.Host.Do(func() error {
		if n := count(); n != 2 {
			t.Errorf("%d interfaces in the host, want lo and eth0", n)
		}
		return b.Host.Do(func() error { return nil })
	}))
	if after := count(); after != before {
		t.Errorf("%d interfaces after Do, %d before", after, before)
	}
	if err := a.Host.Do(func() error { return os.ErrInvalid }); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("Do returned %v, want the function's error", err)
	}
}
