package pkcs11util

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

// Operation is what a call asks of the token.
type Operation string

// Operations.
const (
	OpSeal       Operation = "seal"
	OpOpen       Operation = "open"
	OpMultiply   Operation = "multiply"
	OpMAC        Operation = "mac"
	OpSign       Operation = "sign"
	OpRandom     Operation = "random"
	OpCheck      Operation = "check"
	OpLook       Operation = "look"
	OpMakeKey    Operation = "make-key"
	OpDestroyKey Operation = "destroy-key"
)

// Operations are all of them.
func Operations() []Operation {
	return []Operation{OpSeal, OpOpen, OpMultiply, OpMAC, OpSign, OpRandom, OpCheck, OpLook, OpMakeKey, OpDestroyKey}
}

// Result is how a call ended.
type Result string

// Results.
const (
	ResultOK      Result = "ok"
	ResultRefused Result = "refused" // by this package: no such key, a point that cannot be multiplied
	ResultFault   Result = "fault"   // the token could not answer, or answered wrongly
	ResultGaveUp  Result = "gave-up" // the caller did, before a session was free
)

// Results are all of them.
func Results() []Result { return []Result{ResultOK, ResultRefused, ResultFault, ResultGaveUp} }

// Call is one call to the token, for Config.Observe.
type Call struct {
	Operation Operation
	Result    Result
	// Waited is how long it waited for a session, and Took how long the operation took then.
	Waited, Took time.Duration
}

// observed is call, reported to Config.Observe.
func (k *Keyset) observed(ctx context.Context, op Operation, f func(s session, c *connection) error) error {
	if k.config.Observe == nil {
		return k.call(ctx, f)
	}
	began := time.Now()
	var entered time.Time
	err := k.call(ctx, func(s session, c *connection) error {
		entered = time.Now()
		return f(s, c)
	})
	ended := time.Now()
	done := Call{Operation: op, Result: resultOf(err), Waited: ended.Sub(began)}
	if !entered.IsZero() {
		done.Waited, done.Took = entered.Sub(began), ended.Sub(entered)
	} else if ctx.Err() != nil {
		done.Result = ResultGaveUp
	}
	k.config.Observe(done)
	return err
}

func resultOf(err error) Result {
	switch {
	case err == nil:
		return ResultOK
	case fault(err), errors.Is(err, ErrUnavailable), errors.Is(err, ErrPINRefused), errors.Is(err, ErrClosed):
		return ResultFault
	default:
		return ResultRefused
	}
}

// counts are what Stats counts.
type counts struct {
	lost, sessionsReplaced, loggedIn, reinitialised, recycled, failed atomic.Uint64
}

// Stats is how a Keyset fares. The counts begin with Open.
type Stats struct {
	// Available: there is a login, and calls are not refused.
	Available bool
	// Sessions is how many there are for calls, and Idle how many of them no call uses at present.
	Sessions, Idle int
	// SessionObjects were made since the module was initialised; see Config.RecycleAfter.
	SessionObjects int64
	// Lost counts how often the token was given up for lost.
	Lost uint64
	// Recoveries by level: one session replaced; a new login; the module initialised
	// anew, and a new login. FailedRecoveries counts the attempts at the latter two that failed.
	SessionsReplaced, LoggedIn, Reinitialised, FailedRecoveries uint64
	// Recycled counts how often the module was initialised anew for the memory that it keeps.
	Recycled uint64
}

// Stats answers from memory.
func (k *Keyset) Stats() Stats {
	s := Stats{
		SessionObjects: k.module.SessionObjects.Load(),
		Lost:           k.counts.lost.Load(), SessionsReplaced: k.counts.sessionsReplaced.Load(), LoggedIn: k.counts.loggedIn.Load(),
		Reinitialised: k.counts.reinitialised.Load(), FailedRecoveries: k.counts.failed.Load(), Recycled: k.counts.recycled.Load(),
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	// While the module is recycled there is no connection, and calls wait.
	s.Available = !k.closed && (k.connection != nil || k.renewed != nil)
	if c := k.connection; c != nil {
		s.Sessions, s.Idle = cap(c.idle), len(c.idle)
	}
	return s
}
