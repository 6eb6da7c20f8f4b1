package agent

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/ownership"
)

// now reads the clock that the protocol counts by: unlike CLOCK_MONOTONIC, which Go's
// own time uses, it goes on while the machine is suspended (clock_getres(2)).
func now() ownership.Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("read CLOCK_BOOTTIME: " + err.Error()) // exists since Linux 2.6.39
	}
	return ownership.Instant(time.Duration(ts.Nano()))
}
