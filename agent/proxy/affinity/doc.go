// Package affinity maps a client to the backend it should be connected to, so that a
// client that comes back, through this node or another one, meets the same backend.
//
// What it is not: it knows nothing of health. The caller walks the order and takes the
// first backend that will do.
package affinity
