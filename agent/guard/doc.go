// Package guard is the small process beside the agent that outlives it by moments. When
// the kernel reports that the agent has ended, the guard takes the VIPs off, reads back
// that they are absent, and tells every member so: nobody has to wait for a silence.
//
// [Start] and [Guard] are the agent's side, [Main] is the guard itself: the same program,
// executed once more as "hameshd guard". Until the agent ends, the guard sleeps in one
// poll(2); it dials nobody, and no time-out, signal or closed pipe makes it act.
//
// What it is not: a supervisor (it starts nothing), a health check (an agent that hangs is
// left to the lifetime of its addresses), or of use where its agent is the first process of
// a pid namespace, whose end ends every other process in it (pid_namespaces(7)).
package guard
