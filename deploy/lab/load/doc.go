// Package load is cheap traffic: a generator of connections and a backend that answers
// them, each one event loop of plain system calls in a process of its own. On a machine
// that both share with what is between them, little of what is measured is theirs.
//
// A request and its answer are 64 bytes each. The load comes from many addresses (Sources),
// and what is due at an instant is due whether or not anything before it was answered.
//
// What it is not: a client of the Kubernetes API, or of anything that speaks TLS (that is
// the lab's Client), or a judge of what it measures.
package load
