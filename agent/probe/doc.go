// Package probe checks one API server over and over and tells the result of each check.
//
// Each check makes a new connection. That costs a TLS handshake, but a connection kept
// alive goes on working while nobody can make a new one, and new ones are what a
// proxy needs.
//
// What it is not: it decides nothing about connections, and it knows nothing of what
// other members see; that is package health.
package probe
