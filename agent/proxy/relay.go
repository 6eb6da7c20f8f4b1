package proxy

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

// buffers are taken only while there is something to relay, so that an idle connection
// costs no buffer. 32 KiB holds two full TLS records.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// relay copies between two connections until both directions have ended, and has then
// closed both. The end of one direction is passed on while the other goes on; a reset or
// an error of one connection resets the other. It adds to the counts as it goes.
func relay(client, server *net.TCPConn, sent, received *atomic.Uint64) {
	var ended atomic.Int32
	half := func(dst, src *net.TCPConn, count *atomic.Uint64) {
		err := pump(dst, src, count)
		if err == nil {
			err = dst.CloseWrite()
		}
		if err == nil && ended.Add(1) == 1 {
			// The other direction may be silent for long, and would not see that
			// this peer has gone away altogether.
			err = awaitReset(src)
		}
		switch {
		case errors.Is(err, net.ErrClosed):
			// Whoever has closed one of the two closes the other one too.
		case err != nil:
			abort(client)
			abort(server)
		default:
			client.Close()
			server.Close()
		}
	}
	var upstream sync.WaitGroup
	upstream.Go(func() { half(server, client, sent) })
	half(client, server, received)
	upstream.Wait()
}

// pump copies from src to dst until the end of the stream; then it returns nil.
func pump(dst, src *net.TCPConn, count *atomic.Uint64) error {
	r, err := newReceiver(src)
	if err != nil {
		return err
	}
	for {
		n, err := r.receive()
		if err != nil {
			return err
		}
		if n > 0 {
			_, err = dst.Write(r.buf[:n])
		}
		buffers.Put(r.buf)
		if n == 0 || err != nil {
			return err
		}
		count.Add(uint64(n))
	}
}

// receiver reads from a connection into a buffer that it holds only while there is data.
type receiver struct {
	raw syscall.RawConn
	try func(fd uintptr) bool // made once, since a closure for each read would be garbage
	buf *[32 << 10]byte
	n   int
	err error
}

func newReceiver(conn *net.TCPConn) (*receiver, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &receiver{raw: raw}
	r.try = func(fd uintptr) bool {
		r.buf = buffers.Get().(*[32 << 10]byte)
		r.n, r.err = read(int(fd), r.buf[:])
		if r.err == nil {
			return true
		}
		buffers.Put(r.buf)
		r.n, r.buf = 0, nil
		return !errors.Is(r.err, syscall.EAGAIN)
	}
	return r, nil
}

// receive waits for data and reads it into r.buf, which the caller gives back to
// buffers. 0 means the end of the stream. With an error there is no buffer.
func (r *receiver) receive() (int, error) {
	if err := r.raw.Read(r.try); err != nil {
		return 0, err
	}
	return r.n, r.err
}

// awaitReset waits until a connection whose incoming stream has ended breaks, or is
// closed by this side; then the error is net.ErrClosed.
func awaitReset(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var broken error
	err = raw.Read(func(fd uintptr) bool {
		broken = pendingError(int(fd))
		return broken != nil
	})
	return errors.Join(err, broken)
}
