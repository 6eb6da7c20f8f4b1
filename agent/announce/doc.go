// Package announce tells a segment where a VIP is, and hears what it says in return. The
// [Announcer] sends gratuitous ARP for IPv4 (RFC 826, and RFC 5227 section 3) and
// unsolicited neighbour advertisements for IPv6 (RFC 4861, 7.2.6): in a burst when a VIP
// has come to this node, then at long intervals for as long as the VIP is held, and at
// once when asked to. The [Listener] hears whoever else claims a VIP, and [Probe] asks
// whether anybody has one.
//
// What it is not: it does not put addresses on (package vip does), and does not decide
// whether they may be announced, nor whether a foreign claim is to be fought or yielded
// to: it only says who spoke, and how.
package announce
