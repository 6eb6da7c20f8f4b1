package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hamesh/hamesh/agent/proxy"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	envTeller = "HAMESH_TEST_TELLER" // rounds and the listeners' addresses, for the process that tells
	stay      = 10_000               // connections that neither come nor go
	tellEvery = 20 * time.Millisecond
)

func init() {
	if orders := os.Getenv(envTeller); orders != "" {
		if err := teller10k(strings.Fields(orders)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// listeningMember is another member, as far as it takes what is told of clients.
type listeningMember struct {
	hameshv1.UnimplementedMeshServiceServer
	flows *flows
}

func (m *listeningMember) ShareFlows(stream grpc.ClientStreamingServer[hameshv1.ShareFlowsRequest, hameshv1.ShareFlowsResponse]) error {
	for {
		request, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		m.flows.hear(request.GetMember(), request)
	}
}

// counted is a connection of which is counted what would go over the wire, with headers of
// Ethernet, IPv4 and TCP (14, 20 and 32 bytes) for each segment and its acknowledgement.
type counted struct {
	net.Conn
	sent *atomic.Int64
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n) + 2*(14+20+32))
	return n, err
}

// teller10k tells the listeners of 50 connections a second that come and go beside those that
// stay, and prints what that costs its process: in per cent of a core beyond what it takes to
// wake up as often and tell nobody, and in kB/s.
func teller10k(orders []string) error {
	rounds, err := strconv.Atoi(orders[0])
	if err != nil {
		return err
	}
	f := newFlows("cp-1", 7, map[string]netip.Addr{"v4": flowVIP}, []uint16{16443}, hclog.NewNullLogger())
	f.keeps = func(string) bool { return false }
	client := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, byte(1 + i/30_000), 1}), uint16(30_000+i%30_000))
	}
	id := uint64(stay)
	var due []proxy.Flow
	told := make(chan struct{})
	f.take[16443] = func() ([]proxy.Flow, func()) { return due, func() { close(told) } }
	// measure returns the processor time and the wall time of as many rounds.
	measure := func() (busy, took time.Duration, err error) {
		processor := func() (time.Duration, error) {
			var u unix.Rusage
			err := unix.Getrusage(unix.RUSAGE_SELF, &u)
			return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
		}
		before, err := processor()
		if err != nil {
			return 0, 0, err
		}
		began := time.Now()
		for i := range rounds {
			id++
			come := proxy.Flow{Client: client(int(id) % 60_000), Local: flowVIP, Open: true, ID: id}
			gone := proxy.Flow{Client: client(int(id-stay/2) % 60_000), Local: flowVIP, ID: id - stay/2}
			due, told = []proxy.Flow{come, gone}, make(chan struct{})
			f.account()
			<-told
			time.Sleep(time.Until(began.Add(time.Duration(i+1) * tellEvery)))
		}
		after, err := processor()
		return after - before, time.Since(began), err
	}
	var all []proxy.Flow
	for i := range stay {
		all = append(all, proxy.Flow{Client: client(i), Local: flowVIP, Open: true, ID: uint64(i + 1)})
	}
	f.changed(16443, all, nil)
	idle, _, err := measure()
	if err != nil {
		return err
	}
	var sent atomic.Int64
	for _, address := range orders[1:] {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithStaticStreamWindowSize(1<<20), grpc.WithStaticConnWindowSize(1<<20),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
				return counted{c, &sent}, err
			}))
		if err != nil {
			return err
		}
		go f.shareOnce(context.Background(), hameshv1.NewMeshServiceClient(conn))
	}
	time.Sleep(time.Second) // all that stay have been told
	bytes := sent.Load()
	busy, took, err := measure()
	if err != nil {
		return err
	}
	fmt.Println(100*float64(busy-idle)/float64(took), float64(sent.Load()-bytes)/took.Seconds()/1000)
	return nil
}

// BenchmarkTellingOfClients has an owner tell two members of 50 connections a second that come
// and go beside 10,000 that stay. The figures are the owner's, whose threads may sleep as long
// as an agent's:
//
//	go test ./agent -run '^$' -bench TellingOfClients -benchtime 500x
func BenchmarkTellingOfClients(b *testing.B) {
	orders := []string{strconv.Itoa(max(b.N, 50))}
	for _, name := range []string{"cp-2", "cp-3"} {
		to, _ := testFlows(name)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		server := grpc.NewServer(grpc.StaticStreamWindowSize(1<<20), grpc.StaticConnWindowSize(1<<20)) // as package server has it
		hameshv1.RegisterMeshServiceServer(server, &listeningMember{flows: to})
		go func() { _ = server.Serve(l) }() // ends with Stop
		b.Cleanup(server.Stop)
		orders = append(orders, l.Addr().String())
	}
	cmd := exec.CommandContext(b.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), envTeller+"="+strings.Join(orders, " "))
	cmd.Stderr = os.Stderr
	runtime.LockOSThread() // the child has its timer slack from this thread (prctl(2))
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr((93*time.Millisecond)/slackShare), 0, 0, 0); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }() // the thread's own again
	out, err := cmd.Output()
	if err != nil {
		b.Fatal(err)
	}
	var core, rate float64
	if _, err := fmt.Sscan(string(out), &core, &rate); err != nil {
		b.Fatalf("%q: %v", out, err)
	}
	b.ReportMetric(core, "%core")
	b.ReportMetric(rate, "kB/s")
	b.ReportMetric(0, "ns/op") // is the pace
}
