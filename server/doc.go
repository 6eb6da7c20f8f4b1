// Package server is the gRPC face that every agent embeds: StatusService and
// ControlService for hactl and platform tooling, the receiving half of MeshService for
// peers, grpc.health.v1 and reflection. It finds out who calls, decides by role what the
// caller may call, and turns errors into codes with a stable reason.
//
// Roles come from the client certificate's URI, spiffe://MESH/ROLE/NAME:
//
//   - viewer: StatusService, health, reflection
//   - operator: also ControlService; callers over the unix socket are operators
//   - agent: everything, but MeshService only under its own name, and only as a
//     configured member other than the one that is called
//
// What it is not: a central server (N agents are N servers), nor a place for decisions:
// what a call means is up to the [StatusSource], [EventSource], [ControlSink] and
// [MeshPeer] it is given.
package server
