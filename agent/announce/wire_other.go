//go:build !linux

package announce

import (
	"context"
	"errors"
	"net"
)

func openWire() (wire, error) { return nil, errors.ErrUnsupported }

// Run returns errors.ErrUnsupported.
func (l *Listener) Run(context.Context) error { return errors.ErrUnsupported }

// Probe returns errors.ErrUnsupported.
func Probe(context.Context, Target) (net.HardwareAddr, error) { return nil, errors.ErrUnsupported }
