package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// Recovered is a backup key as the vault gave it back.
type Recovered struct {
	Key        backup.Key
	Generation api.GenerationID
	// FailuresSince counts the attempts on this generation since its last success,
	// FailuresTotal all that failed ever, this one in neither. Show the user those
	// that are not his own: somebody guesses.
	FailuresSince, FailuresTotal uint32
}

// Recover gets the backup key by its password. It makes one attempt at the active
// generation, which the vault counts before it answers; success forgives it and all before it.
//
// Errors without an attempt: ErrInvalidPassword, ErrNotEnrolled, ErrFrozen, *TooEarlyError,
// opaque.ErrArgon2idBounds, and those of Status. ErrConflict: somebody else made an attempt at
// the same time; this one was not charged, or a later success has forgiven it, or its time
// ran out before it was finished. *WrongPasswordError: the attempt failed.
// ErrKeyDestroyed: it was the last one, or the key was gone before. *PendingRecovery: it is
// not known how the attempt ended. ErrWrongVault, ErrBadResponse and opaque.ErrArgon2idBounds
// can also come up after the attempt was charged; it then counts as failed.
func (c *Client) Recover(ctx context.Context, password string) (Recovered, error) {
	return c.recover(ctx, password, active)
}

// RecoverGeneration is Recover for one generation by its id, frozen or active.
func (c *Client) RecoverGeneration(ctx context.Context, password string, id api.GenerationID) (Recovered, error) {
	return c.recover(ctx, password, func(s *api.Status) (*api.Generation, error) {
		for i := range s.Generations {
			g := &s.Generations[i]
			switch {
			case g.ID != id:
			case g.State == stateDestroyed:
				return nil, ErrKeyDestroyed
			case g.State == stateActive, g.State == stateFrozen:
				return g, nil
			}
		}
		return nil, fmt.Errorf("%w: there is no such generation that could be recovered", ErrConflict)
	})
}

func (c *Client) recover(ctx context.Context, password string, choose func(*api.Status) (*api.Generation, error)) (Recovered, error) {
	normal, err := normalise(password)
	if err != nil {
		return Recovered{}, err
	}
	status, err := c.Status(ctx)
	if err != nil {
		return Recovered{}, err
	}
	g, err := choose(status)
	if err != nil {
		return Recovered{}, err
	}
	if g.ID.IsZero() || g.NextAttempt == 0 {
		return Recovered{}, fmt.Errorf("%w: a generation without id or next attempt", ErrBadResponse)
	}
	// What could not be stretched is not worth an attempt.
	if _, err := stretching(g.KSF); err != nil {
		return Recovered{}, err
	}
	ke1, login, err := opaque.StartLogin(c.random, normal)
	if err != nil {
		return Recovered{}, err
	}
	// Generation and number go with it, so that the same bytes can never be charged as
	// another attempt, not even when they arrive after the first one has expired.
	start, err := json.Marshal(api.StartRecoveryRequest{KE1: ke1[:], Generation: &g.ID, Attempt: &g.NextAttempt})
	if err != nil {
		return Recovered{}, err
	}
	p := &pendingRecovery{client: c, login: login, generation: g.ID, attempt: g.NextAttempt, start: start}
	return p.run(ctx)
}

// stretching accepts a record's KSF between the fixed floor and the fixed ceiling.
func stretching(k api.KSF) (opaque.Argon2id, error) {
	if k.Algorithm != api.Argon2id || k.Threads > math.MaxUint8 {
		return opaque.Argon2id{}, fmt.Errorf("the vault asks for key stretching that is refused: %w: not Argon2id, or over %d threads",
			opaque.ErrArgon2idBounds, math.MaxUint8)
	}
	a := opaque.Argon2id{Time: k.Time, MemoryKiB: k.MemoryKiB, Threads: uint8(k.Threads)}
	if err := a.Validate(); err != nil {
		return opaque.Argon2id{}, fmt.Errorf("the vault asks for key stretching that is refused: %w", err)
	}
	return a, nil
}

// PendingRecovery is the error of a recovery that was begun and whose end is not known.
// Resume goes on with the same bytes, which costs no further attempt; a new Recover
// would make another one. An attempt that is not finished within the vault's time
// (five minutes) counts as failed.
type PendingRecovery struct {
	cause    error
	recovery *pendingRecovery
}

func (e *PendingRecovery) Error() string { return "the recovery is not finished: " + e.cause.Error() }

// Format prints the error alone: fmt would else go down to the keys.
func (e PendingRecovery) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, e.Error()) }

// Unwrap returns what stopped it.
func (e *PendingRecovery) Unwrap() error { return e.cause }

// Resume goes on with the recovery. It can be called at any time, as often as it takes, and
// concurrently. It charges the attempt if the vault has not, and never another one.
//
// Errors: as Recover. ErrConflict: the attempt is over, by its time or by a
// later success.
func (e *PendingRecovery) Resume(ctx context.Context) (Recovered, error) { return e.recovery.run(ctx) }

// pendingRecovery is an attempt: first the start, then, once that was answered, the finish.
type pendingRecovery struct {
	client     *Client
	login      *opaque.ClientLogin
	generation api.GenerationID
	attempt    uint32
	start      []byte

	mu     sync.Mutex // held over the requests: one run at a time
	vault  *vaultIdentity
	finish []byte // nil until the start was answered; then never changed
	opened opaque.Login
	failed error // why nothing was opened; the finish then carries random bytes
}

func (p *pendingRecovery) run(ctx context.Context) (Recovered, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.finish == nil {
		if err := p.begin(ctx); err != nil {
			return Recovered{}, p.stopped(err)
		}
	}
	var answer api.FinishRecoveryResponse
	err := p.client.call(ctx, "POST", p.client.resource+"/recovery/finish", p.finish, &answer)
	switch {
	case err == nil:
		return p.delivered(&answer)
	case refused(err):
		return Recovered{}, p.verdict(err)
	default:
		return Recovered{}, p.stopped(fmt.Errorf("finishing the recovery: %w", err))
	}
}

func (p *pendingRecovery) stopped(err error) error {
	if refused(err) {
		return err
	}
	return &PendingRecovery{cause: err, recovery: p}
}

// begin makes the attempt and the finish that answers it: a right one, or a random one
// where failed says why.
func (p *pendingRecovery) begin(ctx context.Context) error {
	c := p.client
	v, err := c.identity(ctx)
	if err != nil {
		return err
	}
	var started api.StartRecoveryResponse
	if err := c.call(ctx, "POST", c.resource+"/recovery", p.start, &started); err != nil {
		return fmt.Errorf("starting the recovery: %w", err)
	}
	if err := checkState(started.State); err != nil {
		return err // there is nothing that a finish could name
	}
	if err := ctx.Err(); err != nil { // stretching cannot be interrupted
		return err
	}
	login, failed := p.open(v, &started)
	if failed == nil {
		failed = c.vouches(ctx, v, login.ServerPublicKey)
		if failed != nil && !errors.Is(failed, ErrWrongVault) && !errors.Is(failed, ErrStaleKeys) {
			return failed // not known yet
		}
	}
	ke3 := login.KE3
	if failed != nil {
		if _, err := io.ReadFull(c.random, ke3[:]); err != nil {
			return fmt.Errorf("drawing a random KE3: %w", err)
		}
	}
	finish, err := json.Marshal(api.FinishRecoveryRequest{KE3: ke3[:], State: started.State})
	if err != nil {
		return err
	}
	p.vault, p.opened, p.failed, p.finish = v, login, failed, finish
	return nil
}

// open answers KE2. Its bounds on key stretching are checked before anything is stretched.
func (p *pendingRecovery) open(v *vaultIdentity, started *api.StartRecoveryResponse) (opaque.Login, error) {
	if started.Generation != p.generation || started.Attempt != p.attempt {
		return opaque.Login{}, fmt.Errorf("%w: the answer is to another attempt", ErrBadResponse)
	}
	ksf, err := stretching(started.KSF)
	if err != nil {
		return opaque.Login{}, err
	}
	ke2, err := opaque.ParseKE2(started.KE2)
	if err != nil {
		return opaque.Login{}, fmt.Errorf("%w: %w", ErrBadResponse, err)
	}
	login, err := p.login.Finish(ke2, p.client.opaqueConfig(v, ksf))
	switch {
	case errors.Is(err, opaque.ErrInvalidMessage):
		return opaque.Login{}, fmt.Errorf("%w: %w", ErrBadResponse, err)
	case errors.Is(err, opaque.ErrServerAuthentication):
		return opaque.Login{}, fmt.Errorf("%w: the password is right: %w", ErrWrongVault, err)
	}
	return login, err
}

// verdict is the error of an attempt whose finish the vault refused with err.
func (p *pendingRecovery) verdict(err error) error {
	var wrong *WrongPasswordError
	isWrong := errors.As(err, &wrong)
	switch {
	case p.failed == nil && isWrong:
		return fmt.Errorf("%w: the proof was refused though the password is right", ErrBadResponse)
	case p.failed == nil:
		return fmt.Errorf("finishing the recovery: %w", err)
	case errors.Is(p.failed, opaque.ErrWrongPasswordOrServer):
		if isWrong || errors.Is(err, ErrKeyDestroyed) {
			return err
		}
		return fmt.Errorf("the password is wrong, and the attempt could not be finished: %w", err)
	case errors.Is(err, ErrKeyDestroyed):
		return fmt.Errorf("%w; it was the last attempt: %w", p.failed, err)
	default:
		return p.failed
	}
}

// delivered opens what a finish was answered with.
func (p *pendingRecovery) delivered(answer *api.FinishRecoveryResponse) (Recovered, error) {
	c := p.client
	if p.failed != nil {
		return Recovered{}, fmt.Errorf("%w: a random proof was accepted, after: %w", ErrBadResponse, p.failed)
	}
	if answer.Generation != p.generation {
		return Recovered{}, fmt.Errorf("%w: another generation's key was delivered", ErrBadResponse)
	}
	key, err := unwrap(p.opened.SessionKey, p.opened.ExportKey, answer.SealedKey,
		transcript.DeliveryContext(p.vault.id, c.tenant, c.user, p.generation),
		transcript.WrapContext(p.vault.id, c.tenant, c.user))
	if err != nil {
		return Recovered{}, fmt.Errorf("%w: %w", ErrBadResponse, err)
	}
	return Recovered{
		Key: key, Generation: p.generation,
		FailuresSince: answer.FailuresSince, FailuresTotal: answer.FailuresTotal,
	}, nil
}
