// Package agent puts one node's agent together: configuration in, tasks out, Run until
// the context ends. Everything that decides lives in pure packages (ownership, health);
// everything that acts lives in packages of its own (store, vip, announce, probe, proxy,
// peer) that know nothing of each other; this package is where they meet.
//
// What it is not: a place for decisions. Where a file here has an if that is about who
// should own what, it is in the wrong room.
package agent
