// Package metrics names everything the agent tells Prometheus, in one file, and serves it.
//
// What it is not: a place that counts by itself. Packages keep their own counts; most
// of the metrics here are read from them when they are asked for.
package metrics
