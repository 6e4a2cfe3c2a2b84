package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/backup-key-vault/bkv/api"
)

// What can go wrong, for errors.Is. Each text says what to do. Those that come from
// the vault also carry its [Problem], for errors.As.
var (
	// ErrWrongVault: not the pinned vault, or keys that it does not vouch for.
	ErrWrongVault = errors.New("this is not the pinned vault: send it nothing, and check address and fingerprint")
	// ErrStaleKeys: the vault's signed key list is not of now.
	ErrStaleKeys = errors.New("the vault's key list is not valid now: check the device's clock; if that is right, somebody replays an old list")
	// ErrInvalidPassword: a password that cannot be used. Nothing was sent.
	ErrInvalidPassword = errors.New("the password cannot be used: choose another")
	// ErrNotEnrolled: the vault keeps no key for this user.
	ErrNotEnrolled = errors.New("no backup key is enrolled: enrol one")
	// ErrAlreadyEnrolled: Enrol would replace a key.
	ErrAlreadyEnrolled = errors.New("a backup key is enrolled already: recover it, or change its password")
	// ErrFrozen: no generation is active; one was turned off without its owner's proof.
	ErrFrozen = errors.New("the backup key was turned off and is frozen: recover that generation by its id, or reinstate it, before its time is over")
	// ErrKeyDestroyed: the key is gone for good.
	ErrKeyDestroyed = errors.New("the backup key was destroyed and cannot be recovered: enrol a new one")
	// ErrConflict: the account is not as this operation expected it; nothing was changed.
	ErrConflict = errors.New("the account changed meanwhile: look at its status and try again")
	// ErrForbidden: the proof is not by the owner of the generation, or the token is
	// for another user.
	ErrForbidden = errors.New("the vault refused: this key does not own the generation, or the token is another user's")
	// ErrWrongTenant: the token is of another tenant than Config.Tenant, under whose name no password would be right.
	// Nothing was charged.
	ErrWrongTenant = errors.New("the token is of another tenant than this client is set up for: set the tenant's name right")
	// ErrUnauthenticated: the vault takes no token that Config.Token returns.
	ErrUnauthenticated = errors.New("the vault does not accept the token: sign in to the app again")
	// ErrRelayRequired: an enrolment or a password change on the direct route (Config.Direct), which the vault does
	// not take from this app.
	ErrRelayRequired = errors.New("the vault takes enrolments of this app over the relay channel alone: leave the direct route, or have its operator declare the app's back end trusted with passwords")
	// ErrNoRelayKey: the vault's signed list has no relay key that this version takes.
	ErrNoRelayKey = errors.New("the vault offers no hybrid relay key: update the app or the vault")
	// ErrRelay: a request was refused outside of its capsule, so perhaps not by the vault. An operation that has
	// begun can be resumed.
	ErrRelay = errors.New("the request was refused on its way: whoever forwards it must pass POST /v1/relay on as it is")
	// ErrUnavailable: the vault could not be reached, or not in time, after several tries.
	ErrUnavailable = errors.New("the vault is unavailable: try again later")
	// ErrBadResponse: an answer that no vault of this version gives.
	ErrBadResponse = errors.New("the vault's answer is malformed: something between alters it, or the app needs an update")
)

// WrongPasswordError says that an attempt failed. It was charged.
type WrongPasswordError struct {
	// AttemptsLeft is rarely 0: when an attempt that somebody else began decides
	// whether the key is destroyed. If it is already, the error is ErrKeyDestroyed.
	AttemptsLeft int
	NextAttempt  time.Time // by the vault's clock; zero: at once
}

func (e *WrongPasswordError) Error() string {
	s := fmt.Sprintf("wrong password: %d attempts left", e.AttemptsLeft)
	if e.AttemptsLeft == 1 {
		s = "wrong password: 1 attempt left"
	}
	if !e.NextAttempt.IsZero() {
		s += ", the next one from " + e.NextAttempt.UTC().Format(time.RFC3339)
	}
	return s
}

// TooEarlyError says that no attempt is answered yet. It was not charged.
type TooEarlyError struct {
	Wait time.Duration
}

func (e *TooEarlyError) Error() string {
	return fmt.Sprintf("too early for another attempt: wait %v", e.Wait)
}

// RateLimitedError says that this user, or the whole app, asks too often. Nothing was
// charged; the same operation can be tried again after Wait. Waits of up to ten seconds are
// waited for before it comes to this.
type RateLimitedError struct {
	Wait time.Duration
}

func (e *RateLimitedError) Error() string {
	return fmt.Sprintf("too many requests: wait %v", e.Wait)
}

// Problem is a refusal as the vault worded it (RFC 9457). An answer that is no
// problem has the status alone. It unwraps to the error of this package that its type
// stands for, if there is one.
type Problem struct {
	api.Problem
}

// maxDetail bounds how much of a vault's text goes into an error.
const maxDetail = 500

// Error quotes what the vault said, so that it cannot play tricks with a terminal or a log.
func (p *Problem) Error() string {
	s := "status " + strconv.Itoa(p.Status)
	if p.Type != "" {
		s += " " + strconv.QuoteToASCII(shorten(p.Type))
	}
	if p.Detail != "" {
		s += ": " + strconv.Quote(shorten(p.Detail))
	}
	if p.Instance != "" {
		s += " (request " + strconv.QuoteToASCII(shorten(p.Instance)) + ")"
	}
	if known := p.Unwrap(); known != nil {
		return known.Error() + " (" + s + ")"
	}
	return "the vault answered with " + s
}

func shorten(s string) string { return s[:min(len(s), maxDetail)] }

// Unwrap returns the sentinel for the problem's type, or nil.
func (p *Problem) Unwrap() error {
	switch p.Type {
	case api.NotEnrolled:
		return ErrNotEnrolled
	case api.KeyDestroyed:
		return ErrKeyDestroyed
	case api.Conflict:
		return ErrConflict
	case api.RelayRequired:
		return ErrRelayRequired
	case api.Forbidden:
		return ErrForbidden
	case api.Unauthenticated:
		return ErrUnauthenticated
	}
	return nil
}

// problemOf reads an answer that is no success, as far as it is a problem.
func problemOf(r *Response) *Problem {
	p := &Problem{}
	if json.Unmarshal(r.Body, &p.Problem) != nil {
		p = &Problem{}
	}
	p.Status = r.Status // and not what the body says
	if p.RetryAfter == nil {
		p.RetryAfter = retryAfter(r)
	}
	return p
}

// refusal makes an error of an answer that is no success.
func refusal(r *Response) error {
	p := problemOf(r)
	switch p.Type {
	case api.WrongPassword:
		if p.AttemptsLeft == nil || *p.AttemptsLeft < 0 {
			return fmt.Errorf("%w: wrong-password without the attempts left", ErrBadResponse)
		}
		e := &WrongPasswordError{AttemptsLeft: *p.AttemptsLeft}
		if p.NextAttemptAt != nil {
			e.NextAttempt = *p.NextAttemptAt
		}
		return e
	case api.TooEarly:
		return &TooEarlyError{Wait: p.wait()}
	case api.RateLimited:
		return &RateLimitedError{Wait: p.wait()}
	}
	return p
}

// retryAfter reads the header Retry-After in seconds (RFC 9110 §10.2.3). A date
// counts as none: the device's clock may be wrong.
func retryAfter(r *Response) *int64 {
	seconds, err := strconv.ParseInt(r.Header["retry-after"], 10, 64)
	if err != nil {
		return nil
	}
	return &seconds
}

// wait is how long the vault wants to be left alone.
func (p *Problem) wait() time.Duration {
	const longest = 365 * 24 * 60 * 60 // far from overflow
	if p.RetryAfter == nil {
		return 0
	}
	return time.Duration(min(max(*p.RetryAfter, 0), longest)) * time.Second
}

// refused reports whether the vault has decided against a request, so that sending the
// same bytes again would change nothing. After every other error it can still succeed.
func refused(err error) bool {
	var p *Problem
	if errors.As(err, &p) {
		return p.Status >= 400 && p.Status < 500 && p.Type != "" && p.Type != api.Unauthenticated
	}
	var wrong *WrongPasswordError
	var early *TooEarlyError
	return errors.As(err, &wrong) || errors.As(err, &early) || errors.Is(err, ErrWrongVault)
}
