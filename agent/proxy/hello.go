package proxy

import (
	"encoding/binary"

	"golang.org/x/crypto/cryptobyte"
)

// helloMost is the most that is kept of a client's first bytes. A ClientHello takes 300
// bytes to 2 kB, with a client's hybrid key shares too.
const helloMost = 16 << 10

// Of TLS (RFC 8446): section 5.1, 4 and 4.2.10.
const (
	recordHeader    = 5
	recordHandshake = 22
	recordMost      = 1 << 14
	clientHello     = 1
	earlyData       = 42
)

// flight is what the first bytes of a client are.
type flight uint8

// The zero flight: there are none.
const (
	_ flight = iota
	// partial: the beginning of a ClientHello, maybe.
	partial
	// whole: a ClientHello, all of it, and nothing else. A server does nothing for it
	// that anybody could notice, other than to answer.
	whole
	// other: anything else, such as a ClientHello that announces a request already
	// (RFC 8446, section 2.3).
	other
)

// judge says what a client's bytes so far are. There is one at least.
func judge(sent []byte) flight {
	var message []byte // of the handshake
	more := false      // of the last record is to come
	for rest := sent; len(rest) > 0; {
		if rest[0] != recordHandshake || len(rest) > 1 && rest[1] != 3 {
			return other
		}
		if len(rest) < recordHeader {
			more = true
			break
		}
		size := int(binary.BigEndian.Uint16(rest[3:]))
		if size == 0 || size > recordMost {
			return other
		}
		rest = rest[recordHeader:]
		more = len(rest) < size
		piece := rest[:min(size, len(rest))]
		if rest = rest[len(piece):]; message == nil {
			message = piece[:len(piece):len(piece)]
		} else {
			message = append(message, piece...) // a message in several records is rare
		}
	}
	switch {
	case len(message) > 0 && message[0] != clientHello:
		return other
	case len(message) < 4:
		return partial
	}
	size := 4 + int(message[1])<<16 + int(message[2])<<8 + int(message[3])
	switch {
	case size > helloMost, len(message) > size, len(message) == size && more:
		return other
	case len(message) < size:
		return partial
	case mayCarryMore(message[4:]):
		return other
	}
	return whole
}

// mayCarryMore reports whether a ClientHello is one that early data may follow, or that
// cannot be read (RFC 8446, section 4.1.2).
func mayCarryMore(hello cryptobyte.String) bool {
	var session, ciphers, compressions, extensions cryptobyte.String
	if !hello.Skip(2+32) || // version and random
		!hello.ReadUint8LengthPrefixed(&session) ||
		!hello.ReadUint16LengthPrefixed(&ciphers) ||
		!hello.ReadUint8LengthPrefixed(&compressions) {
		return true
	}
	if hello.Empty() {
		return false // TLS 1.2 without extensions
	}
	if !hello.ReadUint16LengthPrefixed(&extensions) || !hello.Empty() {
		return true
	}
	for !extensions.Empty() {
		var kind uint16
		var content cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&content) || kind == earlyData {
			return true
		}
	}
	return false
}
