package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// lockWithin is how long a new agent waits for the old one of the same node to end.
const lockWithin = 10 * time.Second

// lockNode takes the node's lock, so that at most one agent speaks for the node. The
// kernel gives it up when every process that has the file open has closed it or ended,
// however it ended (flock(2)); a guard has it open too.
func lockNode(dataDir string) (*os.File, error) {
	path := filepath.Join(dataDir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the node's lock: %w", err)
	}
	for deadline := time.Now().Add(lockWithin); ; time.Sleep(20 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("lock %s: another hameshd runs on this data directory: %w", path, err)
		}
	}
}

// nextBoot returns the id of this start, higher than that of every earlier start on this
// node, and remembers it. The wall clock is only where counting begins after the data
// directory was lost; where it went back too, the store refuses the id as too old.
func nextBoot(dataDir string, wall time.Time) (uint64, error) {
	path := filepath.Join(dataDir, "boot")
	boot := uint64(max(wall.UnixMilli(), 1))
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		last, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the last boot id from %s: %w; delete the file if it is damaged", path, err)
		}
		boot = max(boot, last+1)
	case !errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("read the last boot id: %w", err)
	}
	if err := renameio.WriteFile(path, []byte(strconv.FormatUint(boot, 10)+"\n"), 0o600); err != nil {
		return 0, fmt.Errorf("remember the boot id: %w", err)
	}
	return boot, nil
}
