// Package hearsay puts together what all members say about whom they hear, so that each of
// them knows the mesh as all know it together: also a member that it does not hear itself.
//
// A [Book] keeps the newest word of every member, as it was heard or as another member has
// passed it on, with its age. It is pure. What it says is for people and for the way of
// orders; nobody's right to an address, and no client's connection, may rest on it: a word
// that was passed on proves neither life nor death.
package hearsay
