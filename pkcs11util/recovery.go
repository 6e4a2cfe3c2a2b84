package pkcs11util

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// Pauses between attempts to recover: they double, from the first to the last, and each is
// shortened at random by up to half.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// connection is what one login gave: handles that are valid until the session is closed, the user
// logged out, or the module finalised. It is never changed, but for the sessions moving in and out
// of idle.
type connection struct {
	incarnation uint64 // of the module, to which all handles belong
	slot        uint
	anchor      session      // never used by calls: it keeps the login while sessions are dropped
	idle        chan session // those that no call uses; its capacity is their number
	gone        chan struct{}
	spoiled     *atomic.Bool // a session was lost that is not replaced

	keys   map[KeyName]*key
	known  map[KeyName]knownAnswer
	newest map[string]uint32
}

// connect logs in, opens the sessions, and finds and proves the keys.
//
// The token must hold a key for every purpose, and the same keys as before, if there
// was a before: an older generation may be gone, the newest may not.
func (k *Keyset) connect(ctx context.Context) (*connection, error) {
	incarnation, release, err := k.module.Current(ctx)
	if err != nil {
		return nil, err
	}
	defer release()

	k.module.Objects.Lock()
	slot, info, err := k.module.FindToken(k.config.Label)
	k.module.Objects.Unlock()
	if err != nil {
		return nil, err
	}
	if info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0 {
		return nil, fmt.Errorf("token %q: %w: by its own account the PIN is locked", k.config.Label, ErrPINRefused)
	}
	c := &connection{
		incarnation: incarnation, slot: slot,
		idle: make(chan session, k.config.Sessions), gone: make(chan struct{}), spoiled: new(atomic.Bool),
		known: map[KeyName]knownAnswer{}, newest: map[string]uint32{},
	}
	if c.anchor, err = openSession(k.module, slot, 0); err != nil {
		return nil, err
	}
	c.anchor = c.anchor.under(k.config.Profile)
	if err := k.fill(c); err != nil {
		c.closeIdle()
		c.anchor.close()
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.choose(c)
	k.serial = info.SerialNumber
	k.model = fmt.Sprintf("%s %s", info.ManufacturerID, info.Model)
	return c, nil
}

func (k *Keyset) fill(c *connection) error {
	err := c.anchor.login(pkcs11.CKU_USER, k.config.PIN)
	if refusedPIN(err) {
		return fmt.Errorf("token %q: %w: %w", k.config.Label, ErrPINRefused, err)
	}
	if err != nil {
		return err
	}
	if c.keys, err = c.anchor.findKeys(k.module); err != nil {
		return fmt.Errorf("token %q: %w", k.config.Label, err)
	}

	k.mu.Lock()
	before, newest := k.known, k.newest
	c.newest = k.inUse(c.keys)
	k.mu.Unlock()
	for name, key := range c.keys {
		known, err := c.anchor.prove(key)
		if err == nil {
			err = c.anchor.examine(key)
		} else {
			err = fmt.Errorf("token check, line %q: %w", provingLine(name.Purpose), err)
		}
		if err != nil {
			return fmt.Errorf("proving %s: %w", name, err)
		}
		if old, ok := before[name]; ok {
			if err := c.anchor.confirm(key, old); err != nil {
				return fmt.Errorf("proving that %s is the key that it was: %w", name, err)
			}
			known = old
		}
		c.known[name] = known
	}
	for _, purpose := range Purposes() {
		if name := (KeyName{purpose, max(1, c.newest[purpose])}); c.keys[name] == nil {
			return fmt.Errorf("token %q: %s: %w", k.config.Label, name, ErrNoKey)
		}
		if c.newest[purpose] < newest[purpose] {
			return fmt.Errorf("token %q: %s, which was there before: %w", k.config.Label, KeyName{purpose, newest[purpose]}, ErrNoKey)
		}
	}

	for range cap(c.idle) {
		s, err := openSession(k.module, c.slot, 0)
		if err != nil {
			return err
		}
		c.idle <- s.under(k.config.Profile)
	}
	return nil
}

// probe is a short check of a session, the login, and each purpose's newest key: that it is the key
// that it was, and can do what it is for. It asks the generator, too.
func (c *connection) probe(s session) error {
	if err := s.loggedIn(); err != nil {
		return err
	}
	for _, purpose := range Purposes() {
		name := KeyName{purpose, c.newest[purpose]}
		if err := s.confirm(c.keys[name], c.known[name]); err != nil {
			return err
		}
		if _, err := s.prove(c.keys[name]); err != nil {
			return err
		}
	}
	_, err := s.random(1)
	return err
}

// fault says whether err, from a call, is the token's: not the caller's.
func fault(err error) bool {
	var code pkcs11.Error
	return errors.As(err, &code) || errors.Is(err, errFaulty)
}

// mend handles a fault that a call met in its session, and returns the fault. The
// first level: another session takes the failed one's place, if it works. The caller is
// inside the module.
func (k *Keyset) mend(c *connection, s session, cause error) error {
	s.close()
	// Wrong answers are not the session's doing.
	if !errors.Is(cause, errFaulty) {
		if fresh, err := openSession(k.module, c.slot, 0); err == nil {
			fresh = fresh.under(k.config.Profile)
			if c.probe(fresh) == nil {
				k.counts.sessionsReplaced.Add(1)
				k.log.Warn("token session replaced", "error", cause)
				c.put(fresh)
				return cause
			}
			fresh.close()
		}
	}
	return k.giveUp(c, cause)
}

// giveUp ends a connection, unless that has happened already, and starts the recovery. It returns
// an error that is ErrUnavailable and wraps the cause.
func (k *Keyset) giveUp(c *connection, cause error) error {
	cause = fmt.Errorf("%w: %w", ErrUnavailable, cause)
	k.mu.Lock()
	defer k.mu.Unlock()
	c.spoiled.Store(true)
	if !k.isCurrent(c) {
		return cause // somebody else met a fault first, or the Keyset was closed
	}
	k.counts.lost.Add(1)
	k.log.Error("token lost", "error", cause)
	k.connection, k.down = nil, cause
	close(c.gone)
	ctx, cancel := context.WithCancel(context.Background())
	k.stop = cancel
	k.calls.Add(1)
	go func() {
		defer k.calls.Done()
		defer cancel()
		k.recover(ctx, c)
	}()
	return cause
}

// isCurrent says whether c is the connection in use; a copy of it with other keys is still c. The caller holds mu.
func (k *Keyset) isCurrent(c *connection) bool {
	return k.connection != nil && k.connection.gone == c.gone
}

// history is what the recovery remembers from one time to the next.
type history struct {
	ended time.Time // of the last one
	pause time.Duration
}

// recover tries until there is a connection again, the PIN is refused, or the Keyset is
// closed. There is one at a time, as it is started with the connection's end only.
//
// The first attempt is made at once, unless the connection did not last since the
// recovery before: then this goes on with the pauses where that one ended, so that a token which
// proves well and works badly is not logged in to all the time.
func (k *Keyset) recover(ctx context.Context, lost *connection) {
	if lost != nil {
		k.discard(lost)
	}
	h := &k.history
	if time.Since(h.ended) < 2*lastPause {
		k.pause(ctx)
	} else {
		h.pause = 0
	}
	for {
		c, err := k.reconnect(ctx)
		h.ended = time.Now()
		if k.settle(c, err) {
			if err == nil {
				k.log.Info("token recovered")
			}
			return
		}
		k.counts.failed.Add(1)
		k.log.Warn("token recovery failed", "error", err)
		k.pause(ctx)
	}
}

// pause waits, each time longer, or until ctx ends.
func (k *Keyset) pause(ctx context.Context) {
	p := min(max(2*k.history.pause, firstPause), lastPause)
	k.history.pause = p
	timer := time.NewTimer(p/2 + rand.N(p/2))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// settle takes over what an attempt at a new connection gave, and lets the calls go on that
// wait for it. done is false if there has to be another attempt.
func (k *Keyset) settle(c *connection, err error) (done bool) {
	k.mu.Lock()
	closed := k.closed
	switch {
	case closed:
		done = true
	case err == nil:
		k.choose(c)
		k.connection, k.down, done = c, nil, true
		k.scheduleRecycling()
	case errors.Is(err, ErrPINRefused):
		k.down, done = err, true
		k.log.Error("token recovery ended", "error", err)
	default:
		k.down = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	k.release()
	k.mu.Unlock()
	if closed && c != nil {
		k.discard(c)
	}
	return done
}

// release lets calls go on that wait for a new connection. The caller holds mu.
func (k *Keyset) release() {
	if k.renewed != nil {
		close(k.renewed)
		k.renewed = nil
	}
}

// reconnect is the second level, a new login, and, if that does not help, the
// third: the module finalised and initialised, then a new login.
func (k *Keyset) reconnect(ctx context.Context) (*connection, error) {
	incarnation, err := k.module.Incarnation(ctx)
	if err != nil {
		return nil, err
	}
	c, err := k.connect(ctx)
	if err == nil {
		k.counts.loggedIn.Add(1)
	}
	if err == nil || errors.Is(err, ErrPINRefused) || ctx.Err() != nil {
		return c, err
	}
	if err := k.module.Reinitialise(ctx, incarnation); err != nil {
		return nil, err
	}
	if c, err = k.connect(ctx); err == nil {
		k.counts.reinitialised.Add(1)
	}
	return c, err
}

// discard closes the sessions of a connection that is not in use any more, if
// their handles still mean anything. Calls that are still running put theirs back, which closes them.
func (k *Keyset) discard(c *connection) {
	release, err := k.module.Enter(context.Background(), c.incarnation)
	if err != nil {
		return
	}
	defer release()
	c.closeIdle()
	c.anchor.close()
}

// put makes a session available to the next call. The caller is inside the module.
func (c *connection) put(s session) {
	c.idle <- s
	if c.ended() {
		c.closeIdle()
	}
}

func (c *connection) ended() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

func (c *connection) closeIdle() {
	for {
		select {
		case s := <-c.idle:
			s.close()
		default:
			return
		}
	}
}
