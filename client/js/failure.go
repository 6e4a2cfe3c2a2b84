package main

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/opaque"
)

// failure is an error as JavaScript gets it. Code is one of those that bkv.d.ts lists.
type failure struct {
	Code         string `json:"code"`
	Message      string `json:"message"` // for developers: an app words its own
	AttemptsLeft *int   `json:"attemptsLeft,omitempty"`
	// WaitSeconds is relative, so that the device's clock does not matter.
	WaitSeconds *int64 `json:"waitSeconds,omitempty"`
	// Pending names an operation that resume can take up; its code says what stopped it.
	Pending int    `json:"pending,omitempty"`
	Kind    string `json:"kind,omitempty"` // of the pending operation: recovery or enrolment
}

// errUnusable is of calls that a page should not have made.
var errUnusable = errors.New("invalid argument")

// codes are the errors that carry nothing, in the order in which they are looked for: where
// an error is two of them, the first decides.
var codes = []struct {
	err  error
	code string
}{
	{context.Canceled, "cancelled"},
	{client.ErrInvalidPassword, "invalid-password"},
	{client.ErrKeyDestroyed, "key-destroyed"},
	{client.ErrWrongVault, "wrong-vault"},
	{client.ErrStaleKeys, "stale-keys"},
	{client.ErrNotEnrolled, "not-enrolled"},
	{client.ErrAlreadyEnrolled, "already-enrolled"},
	{client.ErrFrozen, "frozen"},
	{client.ErrConflict, "conflict"},
	{client.ErrForbidden, "forbidden"},
	{client.ErrUnauthenticated, "unauthenticated"},
	{client.ErrRelay, "not-forwarded"},
	{client.ErrNoRelayKey, "outdated"},
	{client.ErrUnavailable, "unavailable"},
	{client.ErrBadResponse, "bad-response"},
	{opaque.ErrArgon2idBounds, "bad-response"},
	{errToken, "no-token"},
	{backup.ErrNotSealed, "not-a-backup"},
	{backup.ErrWrongKey, "wrong-key"},
	{client.ErrWrongTenant, "invalid-argument"},
	{errUnusable, "invalid-argument"},
}

// describe makes a failure of an error. vaultNow is the vault's clock.
func describe(err error, vaultNow time.Time) failure {
	f := failure{Code: "internal", Message: err.Error()}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			f.Code = c.code
			break
		}
	}
	var wrong *client.WrongPasswordError
	var early *client.TooEarlyError
	var limited *client.RateLimitedError
	var digits *backup.DigitsError
	switch {
	case errors.As(err, &wrong):
		f.Code, f.AttemptsLeft = "wrong-password", &wrong.AttemptsLeft
		f.WaitSeconds = untilSeconds(wrong.NextAttempt, vaultNow)
	case errors.As(err, &early):
		f.Code, f.WaitSeconds = "too-early", seconds(early.Wait)
	case errors.As(err, &limited):
		f.Code, f.WaitSeconds = "rate-limited", seconds(limited.Wait)
	case errors.As(err, &digits):
		f.Code = "invalid-digits"
	}
	return f
}

// seconds rounds up: after them the wait is over.
func seconds(d time.Duration) *int64 {
	s := int64(math.Ceil(d.Seconds()))
	return &s
}

// untilSeconds is how long it is until then; at least 0, which it also is for no time at all.
func untilSeconds(then, now time.Time) *int64 {
	if then.IsZero() {
		return new(int64)
	}
	return seconds(max(0, then.Sub(now)))
}
