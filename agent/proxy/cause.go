package proxy

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Cause is why a session has ended.
type Cause int

// The zero Cause is invalid.
const (
	_ Cause = iota
	// ClientClosed and ServerClosed: both directions have ended in good order, and this
	// side's first.
	ClientClosed
	ServerClosed
	// ClientReset and ServerReset: this side has reset its connection.
	ClientReset
	ServerReset
	// ClientTimeout and ServerTimeout: this side has not answered the kernel for 30 s,
	// or the network says that it cannot be reached.
	ClientTimeout
	ServerTimeout
	// Destroyed: somebody on this node has ended one of the connections, as a move of
	// the VIP does that leaves none behind, or ss(8) with --kill.
	Destroyed
	// NoBackend: none has accepted.
	NoBackend
	// Limit and ClientLimit: the proxy, or this client, has as many connections as allowed.
	Limit
	ClientLimit
	// BackendDown: its backend went down.
	BackendDown
	// BackendDisabled: an operator has disabled its backend.
	BackendDisabled
	// BackendRemoved: its backend is not in the configuration any more.
	BackendRemoved
	// DrainTimeout: it has outlived what its backend was given to drain.
	DrainTimeout
	// HalfClosedTimeout: one direction had ended, and the other one has not within an hour.
	HalfClosedTimeout
	// Shutdown: the proxy was closed.
	Shutdown
	// Failed: this node lacks descriptors or memory.
	Failed

	causes
)

var causeNames = [causes]string{
	ClientClosed: "client-closed", ServerClosed: "server-closed",
	ClientReset: "client-reset", ServerReset: "server-reset",
	ClientTimeout: "client-timeout", ServerTimeout: "server-timeout",
	Destroyed: "destroyed", NoBackend: "no-backend", Limit: "limit", ClientLimit: "client-limit",
	BackendDown: "backend-down", BackendDisabled: "backend-disabled", BackendRemoved: "backend-removed", DrainTimeout: "drain-timeout",
	HalfClosedTimeout: "half-closed-timeout", Shutdown: "shutdown", Failed: "failed",
}

// String names the cause as logs and metrics do.
func (c Cause) String() string {
	if c <= 0 || c >= causes {
		return fmt.Sprintf("Cause(%d)", int(c))
	}
	return causeNames[c]
}

// inOrder reports whether nothing of the session was lost.
func (c Cause) inOrder() bool { return c == ClientClosed || c == ServerClosed }

// causesOf are the causes of one side's errors.
type causesOf struct{ reset, timeout Cause }

var (
	causesOfClient = causesOf{ClientReset, ClientTimeout}
	causesOfServer = causesOf{ServerReset, ServerTimeout}
)

// causeOf returns the cause that a connection's error makes.
func causeOf(errno syscall.Errno, of causesOf) Cause {
	switch errno {
	case unix.ETIMEDOUT, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN:
		return of.timeout
	case unix.ECONNABORTED: // net/ipv4/tcp.c, tcp_abort
		return Destroyed
	case unix.ENOMEM, unix.ENOBUFS:
		return Failed
	}
	return of.reset
}
