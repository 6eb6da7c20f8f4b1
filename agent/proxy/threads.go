package proxy

import (
	"runtime"
	"sync"
)

// threads counts the loops of all proxies. Each of them has a thread to itself, awake or
// asleep, and GOMAXPROCS is raised by as many: the rest of the agent runs on the others.
// Were it not, a heartbeat could wait 10 ms until Go takes a processor away from a loop
// that has much to do, or finds out that it sleeps.
var threads struct {
	sync.Mutex
	loops int
}

// addThreads makes room for loops, or takes it away where there are less of them.
func addThreads(loops int) {
	threads.Lock()
	defer threads.Unlock()
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + loops)
	threads.loops += loops
}

// processors returns how many the process may use at once.
func processors() int {
	threads.Lock()
	defer threads.Unlock()
	return runtime.GOMAXPROCS(0) - threads.loops
}
