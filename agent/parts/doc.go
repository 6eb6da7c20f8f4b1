// Package parts is about those parts of a configuration that all members must have in
// common: a digest of each, to be told all the time, its text, to be told where it differs,
// and what is different between two texts.
package parts
