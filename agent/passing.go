package agent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy"
)

const (
	// passedAtOnce is how many descriptors go with one message: the kernel's SCM_MAX_FD
	// (net/scm.h) is 253.
	passedAtOnce = 252
	// passedMost bounds one message, in bytes: sessions may have a pipe's megabyte pending in
	// each direction, and JSON writes bytes as base64.
	passedMost = passedAtOnce / 2 * 3 << 20
)

// passing is one end of the socket between an agent and its successor. A message is its
// length, with which descriptors go, and a value in JSON: what another version has left
// out or added does no harm.
type passing struct{ conn *net.UnixConn }

func newPassing(f *os.File) (*passing, error) {
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("open the socket of an upgrade: %w", err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("what was inherited is no unix socket"), conn.Close())
	}
	return &passing{unixConn}, nil
}

// send sends a value, and duplicates of descriptors.
func (p *passing) send(value any, fds ...int) error {
	body, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode a message: %w", err)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = p.conn.WriteMsgUnix(binary.BigEndian.AppendUint32(nil, uint32(len(body))), rights, nil)
	if err == nil {
		_, err = p.conn.Write(body)
	}
	if err != nil {
		return fmt.Errorf("send a message: %w", err)
	}
	return nil
}

// receive waits for a value, and returns the descriptors that came with it, which are the
// caller's also where there is an error.
func (p *passing) receive(value any) (fds []int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("receive a message: %w", err)
		}
	}()
	head, rights := make([]byte, 4), make([]byte, unix.CmsgSpace(4*passedAtOnce))
	n, rn, flags, _, err := p.conn.ReadMsgUnix(head, rights)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, got...)
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return fds, errors.New("descriptors were lost: too many are open")
	}
	if _, err := io.ReadFull(p.conn, head[n:]); err != nil {
		return fds, err
	}
	length := binary.BigEndian.Uint32(head)
	if length > passedMost {
		return fds, fmt.Errorf("%d bytes, more than %d", length, passedMost)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(p.conn, body); err != nil {
		return fds, err
	}
	return fds, json.Unmarshal(body, value)
}

// word is what is said beside the inheritance. An error ends the conversation.
type word struct {
	Error   string `json:",omitempty"`
	Format  int    `json:",omitempty"`
	Version string `json:",omitempty"`
}

// batch is some sessions of one proxy: in place of its descriptors each has their indices
// among those that come along.
type batch struct {
	Proxy    string
	Listener bool            // the last descriptor is the proxy's listening socket
	Own      []health.Report `json:",omitempty"`
	Sessions []proxy.HandedSession
	Last     bool // of all batches
}

// sendRelays sends duplicates of all that the proxies were.
func (p *passing) sendRelays(relays map[string]*relay) error {
	for name, r := range relays {
		b, fds := batch{Proxy: name, Own: r.own}, []int(nil)
		pass := func(fd int) int {
			if fd < 0 {
				return fd
			}
			fds = append(fds, fd)
			return len(fds) - 1
		}
		pending := 0
		for _, s := range r.handed.Sessions {
			// Two for this session, one for the listener; and a message stays below its bound.
			if len(fds)+3 > passedAtOnce || pending > passedMost/4 {
				if err := p.send(b, fds...); err != nil {
					return err
				}
				b, fds, pending = batch{Proxy: name}, nil, 0
			}
			pending += len(s.Up.Pending) + len(s.Down.Pending)
			s.Client, s.Server = pass(s.Client), pass(s.Server)
			b.Sessions = append(b.Sessions, s)
		}
		b.Listener = pass(r.handed.Listener) >= 0
		if err := p.send(b, fds...); err != nil {
			return err
		}
	}
	return p.send(batch{Last: true})
}

// receiveRelays is the other side of sendRelays.
func (p *passing) receiveRelays() (map[string]*relay, error) {
	relays := map[string]*relay{}
	for {
		var b batch
		fds, err := p.receive(&b)
		if err != nil {
			return nil, err
		}
		if b.Last {
			return relays, nil
		}
		r := relays[b.Proxy]
		if r == nil {
			r = &relay{handed: proxy.Handed{Listener: -1}, own: b.Own}
			relays[b.Proxy] = r
		}
		for _, s := range b.Sessions {
			if s.Client < 0 || s.Client >= len(fds) || s.Server >= len(fds) {
				return nil, fmt.Errorf("a session of proxy %s without its %d descriptors", b.Proxy, len(fds))
			}
			s.Client = fds[s.Client]
			if s.Server >= 0 {
				s.Server = fds[s.Server]
			}
			r.handed.Sessions = append(r.handed.Sessions, s)
		}
		if b.Listener {
			if len(fds) == 0 {
				return nil, fmt.Errorf("proxy %s without its listening socket", b.Proxy)
			}
			r.handed.Listener = fds[len(fds)-1]
		}
	}
}
