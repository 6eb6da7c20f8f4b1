// Package lab is a mesh on one machine: hosts are network namespaces, joined by a
// bridge; nodes run an agent and a stand-in API server; clients measure what a user
// of the VIP would have seen, a recorder reads from every kernel who held it, and an
// observer hears who speaks for it on the wire.
// The demo, the drills, the benchmarks and the tests with real kernels stand on it.
//
// Everything lives in namespaces that the program enters first of all (Enter), so
// nothing can outlive it: no process, link, namespace or file, however it ends.
//
// What it is not: a simulation (time is real, packets are real), a place for more
// than one program at a time, or part of the product: no agent imports it.
package lab
