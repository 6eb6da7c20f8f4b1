package store

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapLog makes etcd log through log, one level lower for what etcd calls info: an
// election or a compaction is no news to the agent's operator. Of one message at most
// five a minute are passed on.
type zapLog struct {
	log hclog.Logger
	// died, if set, is called with the reason where etcd would exit the process or
	// panic; it is made to end the goroutine instead.
	died func(reason string)
	// quiet makes everything a matter of debugging: a member that closes reports each
	// listener it closes as an error, and a client each answer it does not get.
	quiet atomic.Bool
}

func (z *zapLog) logger() *zap.Logger {
	core := zapcore.NewSamplerWithOptions(&zapCore{z, z.log}, time.Minute, 5, 0)
	return zap.New(core, zap.WithFatalHook(z), zap.WithPanicHook(z))
}

// OnWrite implements zapcore.CheckWriteHook.
func (z *zapLog) OnWrite(ce *zapcore.CheckedEntry, fields []zapcore.Field) {
	if z.died != nil {
		reason := ce.Message
		for _, f := range fields {
			if err, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
				reason += ": " + err.Error()
			}
		}
		z.died(reason)
	}
	runtime.Goexit()
}

// zapCore implements zapcore.Core on top of hclog.
type zapCore struct {
	*zapLog
	log hclog.Logger // with the fields of With
}

func (z *zapLog) level(l zapcore.Level) hclog.Level {
	switch {
	case l < zapcore.InfoLevel:
		return hclog.Trace
	case l == zapcore.InfoLevel || z.quiet.Load():
		return hclog.Debug
	case l == zapcore.WarnLevel:
		return hclog.Warn
	}
	return hclog.Error
}

func (c *zapCore) Enabled(l zapcore.Level) bool { return c.level(l) >= c.log.GetLevel() }

func (c *zapCore) With(fields []zapcore.Field) zapcore.Core {
	return &zapCore{c.zapLog, c.log.With(pairs(fields)...)}
}

func (c *zapCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.log.Log(c.level(e.Level), e.Message, pairs(fields)...)
	return nil
}

func (c *zapCore) Sync() error { return nil }

func pairs(fields []zapcore.Field) []any {
	var out []any
	for _, f := range fields {
		enc := zapcore.NewMapObjectEncoder()
		f.AddTo(enc)
		out = append(out, f.Key, enc.Fields[f.Key])
	}
	return out
}
