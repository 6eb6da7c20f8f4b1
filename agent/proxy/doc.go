// Package proxy accepts TCP connections and relays each to one of several API servers:
// to the same one for the same client, to a healthy one where there is one, and quickly
// to another one where the first does not answer.
//
// What it is not: it does not end TLS, nor look into the bytes, except for whether the first
// ones are a ClientHello and so may be sent to another backend where one does not answer;
// and it does not check backends by itself. It is told their states, and tells of connects that failed.
package proxy
