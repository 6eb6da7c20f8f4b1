package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"testing"

	"golang.org/x/crypto/cryptobyte"
)

// hello returns what a client of crypto/tls sends first.
func hello(t testing.TB, change func(*tls.Config)) []byte {
	t.Helper()
	cfg := &tls.Config{ServerName: "kubernetes.default.svc", InsecureSkipVerify: true}
	if change != nil {
		change(cfg)
	}
	near, far := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = tls.Client(near, cfg).HandshakeContext(ctx) // nobody answers
	}()
	buf := make([]byte, helloMost)
	n, err := far.Read(buf) // all of it, for it is written at once
	cancel()
	near.Close()
	far.Close()
	<-ended
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// with returns a ClientHello with one more extension at its end, or before its others.
func with(hello []byte, kind uint16, last bool) []byte {
	body := cryptobyte.String(hello[recordHeader+4:])
	var session, ciphers, compressions, extensions cryptobyte.String
	head := body[:34]
	if !body.Skip(34) || !body.ReadUint8LengthPrefixed(&session) || !body.ReadUint16LengthPrefixed(&ciphers) ||
		!body.ReadUint8LengthPrefixed(&compressions) || !body.ReadUint16LengthPrefixed(&extensions) {
		panic("not a ClientHello")
	}
	b := cryptobyte.NewBuilder(nil)
	b.AddBytes(hello[:3])
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint8(clientHello)
		b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddBytes(head)
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(session) })
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(ciphers) })
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(compressions) })
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
				if last {
					b.AddBytes(extensions)
				}
				b.AddUint16(kind)
				b.AddUint16(0)
				if !last {
					b.AddBytes(extensions)
				}
			})
		})
	})
	return b.BytesOrPanic()
}

// records splits a ClientHello of one record into several.
func records(hello []byte, size int) (split []byte) {
	for message := hello[recordHeader:]; len(message) > 0; {
		piece := message[:min(size, len(message))]
		message = message[len(piece):]
		split = append(split, recordHandshake, 3, 1)
		split = binary.BigEndian.AppendUint16(split, uint16(len(piece)))
		split = append(split, piece...)
	}
	return split
}

// early is a ClientHello that announces a request right behind it.
func early(t testing.TB) []byte { return with(hello(t, nil), earlyData, false) }

func TestJudge(t *testing.T) {
	plain := hello(t, nil)
	old := hello(t, func(cfg *tls.Config) { cfg.MaxVersion = tls.VersionTLS12 })
	flip := func(at int, to byte) []byte {
		b := bytes.Clone(plain)
		b[at] = to
		return b
	}
	bare := append([]byte{22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3}, make([]byte, 32)...)
	bare = append(bare, 0, 0, 2, 0xc0, 0x2f, 1, 0)
	tests := []struct {
		name string
		sent []byte
		want flight
	}{
		{"TLS 1.3", plain, whole},
		{"TLS 1.2", old, whole},
		{"without extensions", bare, whole},
		{"in records of 100 bytes", records(plain, 100), whole},
		{"in records of 3 bytes", records(plain, 3), whole},
		{"with an extension nobody knows", with(plain, 0xfafa, true), whole},
		{"with early data", early(t), other},
		{"with early data as the last extension", with(plain, earlyData, true), other},
		{"in records, with early data", records(early(t), 7), other},
		{"and a byte", append(bytes.Clone(plain), 22), other},
		{"and another record", append(bytes.Clone(plain), 20, 3, 3, 0, 1, 1), other},
		{"twice", append(bytes.Clone(plain), plain...), other},
		{"a record longer than it", flip(4, plain[4]+1), other},
		{"a record shorter than it", flip(4, plain[4]-1), other},
		{"an alert", []byte{21, 3, 3, 0, 2, 1, 0}, other},
		{"a ServerHello", flip(5, 2), other},
		{"another version", flip(1, 2), other},
		{"an empty record", []byte{22, 3, 1, 0, 0}, other},
		{"a record that is too long", []byte{22, 3, 1, 0xff, 0xff, 1}, other},
		{"a message that is too long", []byte{22, 3, 1, 0x40, 0, 1, 1, 0, 0}, other},
		{"a session id longer than all", flip(recordHeader+4+34, 255), other},
		{"HTTP", []byte("GET /readyz HTTP/1.1\r\n"), other},
		{"HTTP/2", []byte("PRI * HTTP/2.0\r\n"), other},
		{"its first byte", plain[:1], partial},
	}
	for _, tt := range tests {
		if got := judge(tt.sent); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
	for n := 1; n < len(plain); n++ {
		if got := judge(plain[:n]); got != partial {
			t.Fatalf("the first %d bytes of %d: %d, want %d", n, len(plain), got, partial)
		}
	}
}

// Whatever comes: what is whole becomes something else with one byte more, and was partial
// with one less.
func FuzzJudge(f *testing.F) {
	f.Add(hello(f, nil))
	f.Add(records(hello(f, nil), 50))
	f.Add(early(f))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		if len(sent) < 2 || judge(sent) != whole {
			return
		}
		if got := judge(sent[:len(sent)-1]); got != partial {
			t.Errorf("with a byte less: %d", got)
		}
		if got := judge(append(bytes.Clone(sent), 22)); got != other {
			t.Errorf("with a byte more: %d", got)
		}
	})
}

func BenchmarkJudge(b *testing.B) {
	sent := hello(b, nil)
	b.ReportAllocs()
	for b.Loop() {
		judge(sent)
	}
}
