// Package page shows the status of the mesh, and its last events, as one page of HTML for
// a browser: without scripts, and without anything from elsewhere.
//
// What it is not: a place that knows more than the API tells, or that gives orders.
package page
