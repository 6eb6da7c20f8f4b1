// Package peer is the dialling half of the mesh: one link per other member carries this
// member's heartbeats there and brings the acks back. It connects again whatever
// happens, and it never queues: what is sent is the newest heartbeat, because an old one
// confirms nothing.
//
// What it is not: it does not decide who is dead (package ownership does, by claims) and
// it hears no heartbeats of others (package server does).
package peer
