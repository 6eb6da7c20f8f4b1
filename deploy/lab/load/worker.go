//go:build linux

package load

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// worker is a process that does what it is told: an order in JSON on its standard input,
// a result on its standard output.
type worker struct {
	cmd    *exec.Cmd
	orders *json.Encoder
	result *json.Decoder
	stderr bytes.Buffer

	mu sync.Mutex
}

func startWorker(h *lab.Host, role string, settings any) (*worker, error) {
	arg, err := json.Marshal(settings)
	if err != nil {
		return nil, fmt.Errorf("start a %s: %w", role, err)
	}
	w := &worker{cmd: lab.Command(role, string(arg))}
	stdin, err := w.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start a %s: %w", role, err)
	}
	stdout, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start a %s: %w", role, err)
	}
	w.cmd.Stderr = &w.stderr
	w.orders, w.result = json.NewEncoder(stdin), json.NewDecoder(stdout)
	if err := h.Start(w.cmd); err != nil {
		return nil, fmt.Errorf("start a %s: %w", role, err)
	}
	// The first result says that it is ready.
	if err := w.await(nil, slack); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

// slack is how much longer than its work a worker may take to answer.
const slack = 20 * time.Second

// do has an order carried out, which takes about so long, and reads the result.
func (w *worker) do(order, result any, takes time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.orders.Encode(order); err != nil {
		return w.failed(err)
	}
	return w.await(result, takes+slack)
}

// answer is what a worker prints.
type answer struct {
	Error  string `json:",omitempty"`
	Result json.RawMessage
}

func (w *worker) await(result any, limit time.Duration) error {
	late := time.AfterFunc(limit, func() { _ = w.cmd.Process.Kill() }) // fails only if it has ended
	defer late.Stop()
	var a answer
	if err := w.result.Decode(&a); err != nil {
		return w.failed(err)
	}
	if a.Error != "" {
		return fmt.Errorf("%s: %s", w.cmd.Args[0], a.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(a.Result, result)
}

// failed explains an error of the pipes: the process has ended, mostly.
func (w *worker) failed(err error) error {
	_ = w.close()
	return fmt.Errorf("%s: %w: %s", w.cmd.Args[0], err, w.stderr.String())
}

// close ends the process, with every connection of it, and waits for that.
func (w *worker) close() error {
	_ = w.cmd.Process.Kill() // fails only if it has ended
	if err := w.cmd.Wait(); w.cmd.ProcessState == nil {
		return fmt.Errorf("wait for a %s: %w", w.cmd.Args[0], err)
	}
	return nil
}

// serve is a worker's own side: each order is carried out, until there are no more.
func serve[O any](in io.Reader, out io.Writer, do func(O) (any, error)) error {
	// There is next to no garbage, and a collection in the middle of a measurement would
	// be a part of it.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(1 << 30)
	e := json.NewEncoder(out)
	if err := e.Encode(answer{}); err != nil {
		return err
	}
	for d := json.NewDecoder(in); ; {
		var o O
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var a answer
		result, err := do(o)
		if err == nil {
			a.Result, err = json.Marshal(result)
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := e.Encode(a); err != nil {
			return err
		}
	}
}
