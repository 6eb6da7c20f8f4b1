package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lookEvery is how often an interface is looked for that is gone, has been replaced by
// another of its name, or could not be listened on. A subscription to changes would be
// quicker, but messages of it can be lost, so that one would look all the same.
const lookEvery = time.Second

// post is where claims to VIPs of one family are listened for.
type post struct {
	log   hclog.Logger
	ifc   string
	names map[netip.Addr]string
	addrs []netip.Addr
	ear   *ear // nil: deaf
	deaf  bool // and has said so
}

// sound is what came from an ear.
type sound struct {
	post  *post
	ear   *ear
	claim claim
	at    time.Time
	err   error // it is the last
}

// Run listens until ctx ends, and then returns nil. All sockets are opened in the network
// namespace of the thread it runs on, and need CAP_NET_RAW. Where listening fails it says
// so once, and tries again every second, at which pace it also finds an interface that
// has been replaced; only where no netlink socket can be opened does it return an error.
func (l *Listener) Run(ctx context.Context) error {
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open rtnetlink: %w", err)
	}
	defer links.Close()
	posts := l.posts()
	heard := make(chan sound)
	ctx, cancel := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer func() {
		cancel()
		for _, p := range posts {
			p.close()
		}
		readers.Wait()
	}()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		for _, p := range posts {
			opened, err := p.tend(links)
			if opened {
				e := p.ear
				readers.Go(func() { p.pass(ctx, e, heard) })
			}
			p.report(err)
		}
		for looked := false; !looked; {
			select {
			case <-ctx.Done():
				return nil
			case <-look.C:
				looked = true
			case s := <-heard:
				if s.post.ear == s.ear {
					l.heard(links, s)
				}
			}
		}
	}
}

// posts sorts the targets by interface and family.
func (l *Listener) posts() []*post {
	type key struct {
		ifc string
		is4 bool
	}
	var posts []*post
	byKey := make(map[key]*post)
	for _, t := range l.config.Targets {
		k := key{t.Interface, t.Addr.Is4()}
		p := byKey[k]
		if p == nil {
			p = &post{log: l.log.With("interface", t.Interface), ifc: t.Interface, names: make(map[netip.Addr]string)}
			byKey[k] = p
			posts = append(posts, p)
		}
		p.names[t.Addr] = t.VIP
		p.addrs = append(p.addrs, t.Addr)
	}
	return posts
}

// pass passes on what the ear hears, until it is closed.
func (p *post) pass(ctx context.Context, e *ear, heard chan<- sound) {
	for {
		c, err := e.hear()
		if errors.Is(err, unix.ENETDOWN) {
			continue
		}
		select {
		case heard <- sound{p, e, c, time.Now(), err}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// tend gives the post an ear on the interface that has its name now, and reports whether
// it did: no more is needed while that is the same.
func (p *post) tend(links *netlink.Handle) (opened bool, err error) {
	link, err := links.LinkByName(p.ifc)
	if err != nil {
		return false, fmt.Errorf("find interface %s: %w", p.ifc, err)
	}
	index := link.Attrs().Index
	if p.ear != nil && p.ear.index == index {
		return false, nil
	}
	p.close()
	p.ear, err = openEar(index, p.addrs)
	return err == nil, err
}

func (p *post) close() {
	if p.ear != nil {
		p.ear.close()
		p.ear = nil
	}
}

// report says that listening fails, or works again, unless it was said before.
func (p *post) report(err error) {
	switch {
	case err != nil && !p.deaf:
		p.log.Warn("listening for foreign claims fails, trying again every second", "addresses", p.addrs, "error", err)
	case err == nil && p.deaf:
		p.log.Info("listening for foreign claims works again", "addresses", p.addrs)
	}
	p.deaf = err != nil
}

func (l *Listener) heard(links *netlink.Handle, s sound) {
	p := s.post
	if s.err != nil {
		p.close()
		p.report(s.err)
		return
	}
	// The MAC is looked up each time, since it may change. Switches and bonds do send a
	// node its own frames back.
	link, err := links.LinkByIndex(s.ear.index)
	if err != nil || bytes.Equal(link.Attrs().HardwareAddr, s.claim.mac) {
		return // or the interface has gone meanwhile
	}
	if vip, ok := p.names[s.claim.addr]; ok {
		l.config.OnForeign(Foreign{VIP: vip, Interface: p.ifc, MAC: s.claim.mac, Kind: s.claim.kind, At: s.at})
	}
}
