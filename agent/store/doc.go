// Package store is the mesh's shared memory: it runs the embedded etcd member, or talks
// to an external etcd, keeps the lease of this boot, reads all records again and again,
// and turns what the store says into events for package ownership.
//
// What it is not: it decides nothing. It neither retries a write nor draws conclusions
// from one that was not answered, it revokes no lease unless told to, and it does not
// watch: a poll that is answered also proves that the store answers.
//
// # Keys
//
// Below PREFIX/MESH/ (PREFIX is /hamesh unless configured):
//
//	identity            the mesh's random id, written once
//	boot/MEMBER         the member's newest boot id, decimal
//	vips/VIP/record     JSON, attached to the owner's lease
//	vips/VIP/fence      JSON, permanent, written in the same transaction as the record
//	orders/backends/PROXY/BACKEND, orders/nodes/NODE
//	                    JSON, permanent: an operator's order, until it is taken back
//	orders/requests     JSON: the newest requests, written in the same transaction as
//	                    an order, which compares its mod revision: one order at a time
//
// A record whose mod revision is not the fence's is an older write's and counts as gone.
package store
