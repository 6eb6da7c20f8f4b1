//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// rolling are the times of a rolling restart of API servers.
const (
	rollingClients = 30
	rollingEvery   = time.Second     // from one request of a client to its next one
	rollingDelay   = time.Second     // for which a server that stops says that it is not ready
	rollingPause   = 3 * time.Second // from one server's start to the next one's stop
	rollingLook    = 15 * time.Second
)

func rollingCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	chances := []float64{0, 0.02}
	flags.Func("goaway", "chances of a request to be its connection's last one, one run each (default 0,0.02)", func(s string) error {
		chances = nil
		for field := range strings.SplitSeq(s, ",") {
			chance, err := strconv.ParseFloat(field, 64)
			if err != nil || !(chance >= 0 && chance <= 1) {
				return fmt.Errorf("no chance %q", field)
			}
			chances = append(chances, chance)
		}
		return nil
	})
	watch := flags.Duration("watch", time.Minute, "how long to look on after the last restart")
	err := flags.Parse(args)
	return func() error {
		fmt.Fprintf(out, "%d clients, each with one HTTP/2 connection that it keeps and a request every %v; three API servers are\nrestarted one after the other, with %v between.\n", rollingClients, rollingEvery, rollingPause)
		for _, chance := range chances {
			if err := rolling(out, chance, *watch); err != nil {
				return err
			}
		}
		return nil
	}, err
}

// rolling restarts all API servers under clients that keep their connections, and prints who
// is served where.
func rolling(out io.Writer, chance float64, watch time.Duration) (err error) {
	m, err := lab.NewMesh(lab.Options{Clients: rollingClients})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := m.WaitHealthy(time.Minute); err != nil {
		return err
	}
	for _, n := range m.Nodes {
		if err := n.API.SetGoaway(chance); err != nil {
			return err
		}
	}
	clients, err := m.Client.StartOrdinary(lab.Ordinary{Target: m.VIP(), Connections: rollingClients, Delay: time.Millisecond, Every: rollingEvery})
	if err != nil {
		return err
	}
	spread := func(when string) {
		var shares []string
		now := lab.Spread(clients.Samples())
		for _, n := range m.Nodes {
			shares = append(shares, fmt.Sprint(now[n.Name]))
		}
		fmt.Fprintf(out, "  %-14s %s\n", when, strings.Join(shares, "/"))
	}
	fmt.Fprintf(out, "goaway-chance %g\n", chance)
	time.Sleep(5 * rollingEvery)
	spread("before")
	for i, n := range m.Nodes {
		if i > 0 {
			time.Sleep(rollingPause)
		}
		if err := errors.Join(n.API.Stop(rollingDelay), n.API.Start()); err != nil {
			return err
		}
	}
	ended := time.Now()
	time.Sleep(2 * rollingEvery) // so that every client has asked
	for spread("just after"); time.Since(ended) < watch; spread(fmt.Sprintf("after %.0f s", time.Since(ended).Seconds())) {
		time.Sleep(min(rollingLook, watch-time.Since(ended)))
	}
	samples, err := clients.Stop()
	failed, calls := 0, lab.Finished(samples, lab.Kept)
	for _, c := range calls {
		if c.Error != "" {
			failed++
		}
	}
	fmt.Fprintf(out, "  %d requests, %d failed\n", len(calls), failed)
	return err
}
