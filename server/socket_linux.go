package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// ListenSocket listens on a unix socket at path for the machine's own operators: its
// directory is made with mode 0750, the socket with 0660. A socket that nobody listens on
// any more, left by an agent that died, is replaced; one that answers is an error, and so
// is a file that is no socket.
func ListenSocket(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("making the directory of socket %s: %w", path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening on socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("setting the mode of socket %s: %w", path, err), listener.Close())
	}
	return listener, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking at socket %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listening on socket %s: the file there is no socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		_ = conn.Close()
		return fmt.Errorf("listening on socket %s: another agent answers there", path)
	// Any other error, such as a full backlog, means that somebody still listens.
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("listening on socket %s: another agent may be there: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("removing stale socket %s: %w", path, err)
	}
	return nil
}

// socketInfo is who connected to the unix socket.
type socketInfo struct {
	credentials.CommonAuthInfo
	uid  uint32
	user string // the name of uid; empty: it has none
}

func (socketInfo) AuthType() string { return "socket" }

func (i socketInfo) String() string {
	if i.user == "" {
		return fmt.Sprintf("uid %d", i.uid)
	}
	return fmt.Sprintf("%s, uid %d", i.user, i.uid)
}

// byListener does the handshake that suits the connection: peer credentials on the unix
// socket, and on TCP whatever the embedded credentials do.
type byListener struct {
	credentials.TransportCredentials
}

func (b byListener) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return b.TransportCredentials.ServerHandshake(conn)
	}
	info, err := identifySocket(socket)
	if err != nil {
		return nil, nil, err
	}
	return conn, info, nil
}

func (b byListener) Clone() credentials.TransportCredentials {
	return byListener{b.TransportCredentials.Clone()}
}

func (b byListener) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}

// identifySocket lets in root, and the owner and the group of the socket file. The
// file's mode says the same, but not once somebody has changed it.
func identifySocket(conn *net.UnixConn) (socketInfo, error) {
	path := conn.LocalAddr().String()
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return socketInfo{}, fmt.Errorf("looking at socket %s: %w", path, err)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return socketInfo{}, err
	}
	var caller *unix.Ucred
	var groups []uint32
	var credErr, groupErr error
	err = raw.Control(func(fd uintptr) {
		caller, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		groups, groupErr = peerGroups(fd)
	})
	if err := errors.Join(err, credErr, groupErr); err != nil {
		return socketInfo{}, fmt.Errorf("asking who connects to socket %s: %w", path, err)
	}
	if caller.Uid != 0 && caller.Uid != file.Uid && caller.Gid != file.Gid && !slices.Contains(groups, file.Gid) {
		return socketInfo{}, fmt.Errorf("uid %d is neither root nor owner nor in the group of socket %s", caller.Uid, path)
	}
	return socketInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		uid:            caller.Uid,
		user:           userName(caller.Uid),
	}, nil
}

func userName(uid uint32) string {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return ""
	}
	return u.Username
}

// maxGroups is NGROUPS_MAX of linux/limits.h.
const maxGroups = 65536

// peerGroups returns the supplementary groups that the peer had when it connected
// (SO_PEERGROUPS, unix(7), Linux 4.13), which SO_PEERCRED leaves out.
func peerGroups(fd uintptr) ([]uint32, error) {
	for groups := make([]uint32, 64); ; groups = make([]uint32, maxGroups) {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno != unix.ERANGE || len(groups) == maxGroups:
			return nil, fmt.Errorf("SO_PEERGROUPS: %w", errno)
		}
	}
}
