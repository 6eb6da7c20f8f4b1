// Package health turns checks of API servers into one view of them that the members
// share: it counts the results of this node's own checks, and weighs them against what
// other members say and against the news that a member is dead.
//
// What it is not: it checks nothing itself, keeps no clock and closes no connection.
// Time is a duration since any origin, the same for all calls.
package health
