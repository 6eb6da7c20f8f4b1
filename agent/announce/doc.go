// Package announce tells a segment where a VIP is: gratuitous ARP for IPv4 (RFC 826, and
// RFC 5227 section 3), unsolicited neighbour advertisements for IPv6 (RFC 4861, 7.2.6).
// It announces in a burst when a VIP has come to this node, then at long intervals for as
// long as the VIP is held, and at once when asked to.
//
// What it is not: it does not put addresses on (package vip does), does not decide
// whether they may be announced, and hears nothing: whoever listens for foreign claims
// asks it to Refresh.
package announce
