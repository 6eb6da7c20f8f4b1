// Package handover lets established TCP connections outlive a planned move of a VIP, and
// tells the clients of a node that has died so ([Tickle]).
//
// The node that gives the VIP away goes on serving the connections it has ([Kernel.Keep]);
// the node that takes it sends the packets of connections it does not know back to the
// former one ([Kernel.Forward]). Answers go from the former node straight to the client.
//
//	client ── SYN, new connections ──────────▶ taker, owner of the VIP
//	client ── packets of old connections ────▶ taker ── forwards ──▶ giver
//	client ◀── answers on old connections ─────────────────────────── giver
//
// Neither node keeps a list of connections: the taker's kernel tells them apart by asking
// whether a packet that opens nothing would end at a listening socket. That is only
// conclusive for a listener bound to the wildcard address (0.0.0.0 or [::]), so the proxy
// has to listen like that.
//
// # The order of a move
//
// Giver: Keep, then the address off. Taker: Forward, then the address on and announced, then
// Unkeep: it may have given the same VIP away moments ago, and until then what is kept leaves
// questions of the segment unanswered. A move that fails is undone by Unkeep and Unforward.
//
// Whoever learns that another node has become the owner, and that the segment knows it too,
// drops its own forward to that node, and only to that one. So in
// A→B→C the packets of A's connections go by way of C and B, in A→B→A those of B's go by
// way of A, and no forwards form a ring. Until that is so, a packet that no node of the
// ring knows is dropped after sixteen nodes.
//
// A drain ends where Established says zero, or at its deadline: then Reset, and after it
// Unkeep, both on the giver, and Unforward on the taker. A forward to a node that has died
// has to go too: the taker's kernel then resets what it does not know, and clients connect
// anew at once.
//
// # What it costs and cannot do
//
// Clients on the nodes themselves: a connection of one on the taker, or behind another
// interface of the taker than the VIP's, is reset at its next packet; one on the giver is
// served by the giver until Unkeep, with new connections too.
//
// A node forwards one VIP to one node: if B takes a VIP again while A is still drained by
// way of B, A's connections are reset. While the taker's kernel sends SYN cookies
// (tcp(7)), new connections are forwarded too, and reset. An old connection breaks whose
// very ports the taker has in TIME_WAIT, from the minute before. ICMP errors are not
// forwarded, so a path whose MTU shrinks during a drain is noticed by probing alone
// (tcp(7), tcp_mtu_probing). ARP is understood for 6-byte hardware addresses only.
//
// # What it is not
//
// It moves no address (package vip does), tells the segment nothing (package announce
// does), decides neither when nor for how long, and moves no connection to another node.
//
// It changes no system setting and needs no file. What it leaves behind when the process
// is killed is one route per kept VIP, and nf_tables tables of its own; Sweep finds them
// by themselves. Unlike an address the route has no lifetime, and until it is swept,
// clients on that node reach the VIP on that node: whoever outlives the process should
// Sweep at once.
package handover
