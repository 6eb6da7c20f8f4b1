//go:build linux

package load

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// edges are the events of connections that are read until there is nothing more.
const edges = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET

const gone = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR

func (e *engine) churn(c Churn) (Churned, error) {
	if c.Rate < 0 || c.Most < 1 {
		return Churned{}, fmt.Errorf("short connections: out of range: %+v", c)
	}
	var due []time.Duration
	if c.Rate > 0 {
		due = schedule(c.Rate, c.For)
	}
	var t tally
	begun, inTime := 0, 0
	underway := make(map[int]struct{}, c.Most)
	start := time.Now()
	for {
		now := time.Since(start)
		next := c.For // when the next one is due, if there is one
		for len(underway) < c.Most {
			at := now
			if c.Rate > 0 {
				if begun == len(due) {
					break
				}
				at = due[begun]
			}
			if next = at; at > now || at >= c.For {
				break
			}
			begun++
			fd, err := e.dial(conn{use: short, due: at}, edges)
			if err != nil {
				t.fail(err)
				if c.Rate == 0 {
					return Churned{}, fmt.Errorf("connect: %w", err)
				}
				continue
			}
			underway[fd] = struct{}{}
			now = time.Since(start)
		}
		all := c.Rate == 0 && now >= c.For || c.Rate > 0 && begun == len(due)
		if all && len(underway) == 0 {
			break
		}
		if now >= c.For+grace {
			for fd := range underway {
				t.fail(errNoAnswer)
				e.close(fd)
			}
			for range len(due) - begun { // due, but there was never a place for them
				t.fail(errNoAnswer)
			}
			break
		}
		wake := c.For + grace
		if !all && len(underway) < c.Most {
			wake = next
		}
		events, err := e.epoll.wait(max(wake-now, 0))
		if err != nil {
			return Churned{}, err
		}
		for _, ev := range events {
			fd := int(ev.Fd)
			if e.conns[fd].use != short {
				e.other(fd, ev.Events)
				continue
			}
			if ended, err := e.exchange(fd); ended {
				now := time.Since(start)
				if err != nil {
					t.fail(err)
				} else {
					t.took = append(t.took, now-e.conns[fd].due)
					if now <= c.For {
						inTime++
					}
				}
				delete(underway, fd)
				e.close(fd)
			}
		}
	}
	return Churned{Latency: t.latency(), Rate: float64(inTime) / c.For.Seconds()}, nil
}

// exchange goes on with a short connection, until it has ended.
func (e *engine) exchange(fd int) (ended bool, err error) {
	c := &e.conns[fd]
	if !c.asked {
		if _, err := unix.Write(fd, e.requests[:]); err != nil {
			return !again(err), err
		}
		c.asked = true
		return false, nil
	}
	n, err := unix.Read(fd, e.buf[:])
	switch {
	case again(err):
		return false, nil
	case err != nil:
		return true, err
	case n == 0:
		return true, errors.New("closed")
	}
	c.got += n
	return c.got >= frame, nil
}

// other takes an event of a connection that the load at hand is not about.
func (e *engine) other(fd int, events uint32) {
	if e.conns[fd].use == held && events&gone != 0 {
		e.lose(fd)
	}
}

// lose gives up a connection that was held.
func (e *engine) lose(fd int) {
	e.lost++
	last := len(e.held) - 1
	place := e.conns[fd].place
	e.held[place] = e.held[last]
	e.conns[e.held[place]].place = place
	e.held = e.held[:last]
	e.close(fd)
}

// openEach is the time from opening one connection to the next. A listener's queue takes
// 4096 at most (net.core.somaxconn). Of what comes while it is full the client's kernel
// does not learn: to it, the connection is established.
const openEach = 200 * time.Microsecond

func (e *engine) hold(n int) (lost int, err error) {
	if err := e.sweep(); err != nil {
		return 0, err
	}
	lost, e.lost = e.lost, 0
	wanted := n - len(e.held)
	start, begun := time.Now(), 0
	for opened := 0; opened < wanted; {
		now := time.Since(start)
		for ; begun < wanted && time.Duration(begun)*openEach <= now; begun++ {
			if _, err := e.dial(conn{use: opening}, edges); err != nil {
				return lost, fmt.Errorf("open a connection beside %d others: %w", len(e.held), err)
			}
		}
		if now > slack/2 {
			return lost, fmt.Errorf("only %d of %d connections could be opened in %s", opened, wanted, slack/2)
		}
		events, err := e.epoll.wait(openEach)
		if err != nil {
			return lost, err
		}
		for _, ev := range events {
			fd := int(ev.Fd)
			if e.conns[fd].use != opening {
				e.other(fd, ev.Events)
				continue
			}
			if ev.Events&gone != 0 {
				return lost, fmt.Errorf("open a connection beside %d others: %w", len(e.held), outcome(fd))
			}
			opened++
			e.conns[fd].use, e.conns[fd].place = held, len(e.held)
			e.held = append(e.held, fd)
		}
	}
	return lost, nil
}

// sweep takes the events that have come while there was no load.
func (e *engine) sweep() error {
	for {
		events, err := e.epoll.wait(0)
		if err != nil || len(events) == 0 {
			return err
		}
		for _, ev := range events {
			e.other(int(ev.Fd), ev.Events)
		}
	}
}

func (e *engine) ask(a Ask) (Latency, error) {
	if err := e.sweep(); err != nil {
		return Latency{}, err
	}
	if len(e.held) == 0 || a.Rate <= 0 {
		return Latency{}, fmt.Errorf("requests at %v a second over %d connections: out of range", a.Rate, len(e.held))
	}
	// Answers on a connection come in the order of its requests, every len(over)th of all,
	// so counting them is enough to know which one is answered.
	over := slices.Clone(e.held)
	for i, fd := range over {
		e.conns[fd].nth, e.conns[fd].answered = i, 0
	}
	due := schedule(a.Rate, a.For)
	var t tally
	start := time.Now()
	for sent := 0; ; {
		now := time.Since(start)
		for ; sent < len(due) && due[sent] <= now; sent++ {
			fd := over[sent%len(over)]
			if e.conns[fd].use != held {
				continue // lost: without an answer
			}
			if _, err := unix.Write(fd, e.requests[:]); err != nil {
				e.lose(fd)
			}
		}
		if len(t.took) == len(due) || now >= a.For+grace {
			break
		}
		wake := a.For + grace
		if sent < len(due) {
			wake = due[sent]
		}
		events, err := e.epoll.wait(max(wake-now, 0))
		if err != nil {
			return Latency{}, err
		}
		for _, ev := range events {
			fd := int(ev.Fd)
			if err := e.answers(fd); err != nil || ev.Events&gone != 0 {
				e.other(fd, gone)
				continue
			}
			now := time.Since(start)
			for c := &e.conns[fd]; c.got >= frame; c.got -= frame {
				t.took = append(t.took, now-due[c.nth+c.answered*len(over)])
				c.answered++
			}
		}
	}
	for range len(due) - len(t.took) {
		t.fail(errNoAnswer)
	}
	return t.latency(), nil
}

// answers reads what has come on a connection.
func (e *engine) answers(fd int) error {
	for {
		n, err := unix.Read(fd, e.buf[:])
		switch {
		case again(err):
			return nil
		case err != nil:
			return err
		case n == 0:
			return errors.New("closed")
		}
		e.conns[fd].got += n
		if n < len(e.buf) {
			return nil // the next event tells of more (epoll(7), edge-triggered streams)
		}
	}
}

func (e *engine) streams(s Stream) (r Streamed, err error) {
	c, events, op := conn{use: download}, uint32(unix.EPOLLIN), byte(opDownload)
	switch s.Direction {
	case Download:
	case Upload:
		c, events, op = conn{use: upload}, unix.EPOLLOUT, opUpload
	default:
		return r, fmt.Errorf("streams: unknown direction %d", s.Direction)
	}
	var all []int
	defer func() {
		for _, fd := range all {
			e.close(fd)
		}
	}()
	for range s.Connections {
		fd, err := e.dial(c, unix.EPOLLOUT)
		if err != nil {
			return r, fmt.Errorf("open a stream: %w", err)
		}
		all = append(all, fd)
	}
	start := time.Now()
	for {
		if r.Took = time.Since(start); r.Took >= s.For {
			return r, nil
		}
		ready, err := e.epoll.wait(s.For - r.Took)
		if err != nil {
			return r, err
		}
		for _, ev := range ready {
			fd := int(ev.Fd)
			c := &e.conns[fd]
			n, end := 0, false
			switch {
			case c.use != download && c.use != upload:
				e.other(fd, ev.Events)
			case !c.asked:
				c.asked = true
				if _, err = unix.Write(fd, []byte{op}); err == nil {
					err = e.epoll.modify(fd, events)
				}
			case c.use == upload:
				n, err = send(fd, e.stream)
			default:
				n, end, err = drop(fd)
			}
			if err != nil || end {
				return r, fmt.Errorf("a stream broke: %w", errors.Join(err, outcome(fd)))
			}
			r.Bytes += int64(n)
		}
	}
}
