// Package pki makes the certificates of a mesh: one CA, and with it the certificates of
// agents, operators and viewers. Each certificate carries its bearer's identity as the URI
// spiffe://MESH/ROLE/NAME, which is all that agents look at.
//
// What it is not: an online CA. It only reads and writes files, revokes nothing, and any
// other CA that writes the same URI does as well.
package pki
