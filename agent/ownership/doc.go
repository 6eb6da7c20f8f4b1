// Package ownership decides which member may hold which VIP: never two at the same
// instant, somebody wherever a majority is connected, and nobody moved by an outage of
// the store.
//
// It is pure: no clock, no I/O, no goroutine. A [Machine] is one member; everything that
// happens to it enters by [Machine.Step] as an [Event], everything it wants leaves as an
// [Output]. The same code runs in the agent and in the simulation of the tests.
//
// The idea. The store (etcd) has one record per VIP that names the owner; each write of
// it compares the revision of the one before. The record alone gives no right: an owner
// may hold the address only while a majority of members confirms heartbeats in which it
// claims the VIP (or, where peers are dead, while it keeps rewriting the record). A
// confirmation lasts for the hold window F from the moment the heartbeat was sent. A
// member that has heard no claim for the suspicion time S, which is longer than F plus
// all drift and the time to take an address off, may grant a take-over; a candidate with
// the grants of a majority swaps the record. Two majorities share a member, and that
// member has either granted and then confirms nobody else, or has confirmed and then
// waits until that confirmation is void.
//
// What it is not: an election (no terms, no voting for a member: a grant is about one
// revision of one record), a health checker, or a failure detector that others may use;
// it believes what the events say.
package ownership
