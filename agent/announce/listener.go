package announce

import (
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Kind is what a foreign frame does with a VIP.
type Kind int

// The zero Kind is invalid.
const (
	_ Kind = iota
	// Announcement tells everybody unasked where the VIP is, which takes an agent: ARP
	// whose sender and target address are the VIP (RFC 5227 section 3), or an unsolicited
	// neighbour advertisement from an address other than the VIP. A kernel announces too
	// where a bond fails over or net.ipv4.conf.*.arp_notify is set.
	Announcement
	// Answer is a kernel speaking as the VIP: it answers for it, or asks for another
	// address in its name. An unsolicited advertisement that comes from the VIP itself is
	// one as well: so does Linux answer duplicate address detection (RFC 4861, 7.2.4).
	Answer
	// Probing is somebody about to take the VIP, who asks whether he may: an ARP request
	// without a sender (RFC 5227, 2.1.1), or a neighbour solicitation from the unspecified
	// address (RFC 4862, 5.4.2).
	Probing
)

// String names the kind.
func (k Kind) String() string {
	switch k {
	case Announcement:
		return "announcement"
	case Answer:
		return "answer"
	case Probing:
		return "probe"
	}
	return fmt.Sprintf("Kind(%d)", int(k))
}

// Foreign is one frame in which another MAC claims a VIP.
type Foreign struct {
	VIP       string
	Interface string // where it was heard
	// MAC is the one that neighbours learn from the frame; the frame's own source address
	// where it names none.
	MAC  net.HardwareAddr
	Kind Kind
	At   time.Time
}

// ListenerConfig is what a Listener needs to know.
type ListenerConfig struct {
	Targets []Target
	// OnForeign is called for each foreign frame, from Run's goroutine: while it blocks,
	// nothing is heard.
	OnForeign func(Foreign)
}

// Listener hears who else claims a VIP, whether or not this node holds it. The kernel
// hands it nothing but frames that speak as a VIP or probe for one; a client that asks
// for a VIP does not wake it.
//
// The interface is not made promiscuous, so of what others say it hears only what is
// meant for everybody or for this node. It does not hear the answers to a client's
// questions: two kernels that both answer show themselves by their announcements, by
// what they ask for in the VIP's name, and to a [Probe].
type Listener struct {
	log    hclog.Logger
	config ListenerConfig
}

// NewListener makes a Listener. It hears nothing until Run runs.
func NewListener(log hclog.Logger, config ListenerConfig) *Listener {
	return &Listener{log, config}
}

// String names the task.
func (l *Listener) String() string { return "listener" }
