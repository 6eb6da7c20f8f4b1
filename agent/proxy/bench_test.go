package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/hamesh/hamesh/agent/health"
)

// benchmarked runs a proxy in front of one server on loopback, and returns its address.
func benchmarked(b *testing.B, handle func(net.Conn)) string {
	b.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				handle(conn)
				conn.Close()
			}()
		}
	}()
	p, err := New(Config{Name: "bench", OnDown: OnDownClose, Backends: []Backend{
		{Name: "a", Address: netip.MustParseAddrPort(listener.Addr().String())},
		{Name: "spare", Address: netip.MustParseAddrPort("127.0.0.1:1")},
	}})
	if err != nil {
		b.Fatal(err)
	}
	if err := p.Listen(); err != nil {
		b.Fatal(err)
	}
	p.SetBackends(map[string]health.State{"a": health.Up, "spare": health.Disabled})
	ended := make(chan error, 1)
	go func() { ended <- p.Run(context.Background()) }()
	b.Cleanup(func() {
		p.Close()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	})
	return fmt.Sprintf("127.0.0.1:%d", p.Port())
}

func answer(conn net.Conn) { io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}) }

// processor reports the processor time of the whole process, client and server included,
// for each of the benchmark's rounds.
func processor(b *testing.B) func() {
	now := func() int64 {
		var usage syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
			b.Fatal(err)
		}
		return usage.Utime.Nano() + usage.Stime.Nano()
	}
	began := now()
	return func() { b.ReportMetric(float64(now()-began)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkConnection makes a connection, asks, is answered, and ends it.
func BenchmarkConnection(b *testing.B) {
	b.Run("64 bytes", func(b *testing.B) { benchmarkConnection(b, make([]byte, 64)) })
	// Kept in case the server does not answer.
	b.Run("ClientHello", func(b *testing.B) { benchmarkConnection(b, hello(b, nil)) })
}

func benchmarkConnection(b *testing.B, first []byte) {
	address := benchmarked(b, answer)
	b.ReportAllocs()
	defer processor(b)()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		buf := bytes.Clone(first)
		for pb.Next() {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				b.Error(err)
				return
			}
			conn.Write(buf)
			if _, err := io.ReadFull(conn, buf); err != nil {
				b.Error(err)
			}
			conn.(*net.TCPConn).SetLinger(0) // no port is left waiting
			conn.Close()
		}
	})
}

// BenchmarkEcho sends a message through one connection, and gets it back.
func BenchmarkEcho(b *testing.B) {
	for _, size := range []int{1 << 10, 128 << 10} {
		b.Run(fmt.Sprintf("%d bytes", size), func(b *testing.B) {
			conn, err := net.Dial("tcp", benchmarked(b, answer))
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			out, in := slices.Repeat([]byte("x"), size), make([]byte, size)
			b.SetBytes(int64(2 * size))
			b.ReportAllocs()
			defer processor(b)()
			for b.Loop() {
				sent := make(chan error, 1)
				go func() {
					_, err := conn.Write(out)
					sent <- err
				}()
				if _, err := io.ReadFull(conn, in); err != nil || <-sent != nil {
					b.Fatal("echo failed")
				}
			}
		})
	}
}

// BenchmarkDownload reads a stream, a megabyte at a time.
func BenchmarkDownload(b *testing.B) {
	conn, err := net.Dial("tcp", benchmarked(b, func(conn net.Conn) {
		for buf := make([]byte, 1<<18); ; {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(buf)))
	defer processor(b)()
	for b.Loop() {
		if _, err := io.ReadFull(conn, buf); err != nil {
			b.Fatal(err)
		}
	}
}
