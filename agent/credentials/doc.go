// Package credentials is the agent's own TLS identity, read from files: mutual TLS 1.3
// for gRPC in both directions. Each handshake looks whether the files have changed, so
// that renewed certificates, and a new CA, need no restart; connections that are open
// already stay as they are.
//
// What it is not: an issuer of certificates (see hactl pki; any other CA will do), nor
// the place where roles are read (see package server).
package credentials
