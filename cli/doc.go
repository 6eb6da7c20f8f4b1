// Package cli is hactl: it asks any agent of a mesh for the status of the whole, gives
// orders, and makes certificates and deployment files. [Run] is the whole program with its
// streams and exit status handed in, so that tests run it in their own process.
//
// What it is not: a second opinion. It shows what the agent that answers says, in the
// protobuf fields of hamesh.v1, and computes nothing from them but ages.
package cli
