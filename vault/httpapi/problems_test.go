package httpapi

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

func TestRefusals(t *testing.T) {
	live := t.Context()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	wrap := func(err error) error { return fmt.Errorf("doing this: %w", fmt.Errorf("doing that: %w", err)) }
	both := func(a, b error) error { return fmt.Errorf("doing this: %w: %w", a, b) }
	cause := errors.New("cause")
	next := time.Now().Add(time.Hour)

	for name, c := range map[string]struct {
		ctx    context.Context
		err    error
		kind   string
		field  string
		retry  int64 // 0: none
		gone   bool
		logged bool
	}{
		"invalid":                            {live, &vault.InvalidRequest{Field: "ksf", Reason: "r"}, api.InvalidRequest, "ksf", 0, false, false},
		"our own":                            {live, invalid("ke1", "d"), api.InvalidRequest, "ke1", 0, false, false},
		"signature":                          {live, vault.ErrBadSignature, api.Forbidden, "", 0, false, false},
		"wrong password":                     {live, &vault.WrongPassword{AttemptsLeft: 3}, api.WrongPassword, "", 0, false, false},
		"not enrolled":                       {live, vault.ErrNotEnrolled, api.NotEnrolled, "", 0, false, false},
		"conflict":                           {live, &vault.Conflict{Reason: "r"}, api.Conflict, "", 0, false, false},
		"destroyed":                          {live, vault.ErrKeyDestroyed, api.KeyDestroyed, "", 0, false, false},
		"too early, just":                    {live, &vault.TooEarly{Next: next, Wait: time.Millisecond}, api.TooEarly, "", 1, false, false},
		"too early, rounded up":              {live, &vault.TooEarly{Next: next, Wait: time.Minute + time.Nanosecond}, api.TooEarly, "", 61, false, false},
		"too early, exactly":                 {live, &vault.TooEarly{Next: next, Wait: time.Minute}, api.TooEarly, "", 60, false, false},
		"too early, no wait left":            {live, &vault.TooEarly{Next: next}, api.TooEarly, "", 1, false, false},
		"token":                              {live, both(vault.ErrTokenUnavailable, cause), api.TokenUnavailable, "", 2, false, true},
		"store":                              {live, both(vault.ErrStoreUnavailable, cause), api.StoreUnavailable, "", 2, false, true},
		"token, out of time":                 {live, both(vault.ErrTokenUnavailable, context.DeadlineExceeded), api.TokenUnavailable, "", 2, false, true},
		"store, out of time":                 {live, both(vault.ErrStoreUnavailable, context.DeadlineExceeded), api.StoreUnavailable, "", 2, false, true},
		"out of time":                        {live, context.DeadlineExceeded, api.StoreUnavailable, "", 2, false, true},
		"cancelled, and the client is there": {live, both(vault.ErrTokenUnavailable, context.Canceled), api.TokenUnavailable, "", 2, false, true},
		"cancelled by nobody":                {live, context.Canceled, api.Internal, "", 0, false, true},
		"cancelled, and the client has gone": {gone, both(vault.ErrTokenUnavailable, context.Canceled), api.StoreUnavailable, "", 2, true, true},
		"a fault while the client left":      {gone, both(vault.ErrTokenUnavailable, cause), api.TokenUnavailable, "", 2, false, true},
		"a refusal while the client left":    {gone, vault.ErrKeyDestroyed, api.KeyDestroyed, "", 0, false, false},
		"account fault":                      {live, fmt.Errorf("%w: the MAC", vault.ErrAccountFault), api.AccountFault, "", 0, false, false},
		"unknown":                            {live, cause, api.Internal, "", 0, false, true},
		"a store's own error that got lost":  {live, vault.ErrStale, api.Internal, "", 0, false, true},
		"the law, broken":                    {live, both(vault.ErrStoreUnavailable, vault.ErrLaw), api.StoreUnavailable, "", 2, false, true},
	} {
		for spelling, err := range map[string]error{"plain": c.err, "wrapped": wrap(c.err), "joined": errors.Join(c.err)} {
			r := refusalOf(c.ctx, err)
			p := r.problem
			if p.Type != c.kind || p.Field != c.field || r.gone != c.gone || (r.cause != nil) != c.logged {
				t.Errorf("%s, %s: got %+v, cause %v, gone %v", name, spelling, p, r.cause, r.gone)
			}
			switch {
			case c.retry == 0 && (p.RetryAfter != nil || r.header.Get("Retry-After") != ""):
				t.Errorf("%s: has Retry-After", name)
			case c.retry != 0 && (p.RetryAfter == nil || *p.RetryAfter != c.retry || r.header.Get("Retry-After") != fmt.Sprint(c.retry)):
				t.Errorf("%s: Retry-After is %v, want %d", name, r.header, c.retry)
			}
		}
	}
	r := refusalOf(live, &vault.WrongPassword{AttemptsLeft: 3, NextAttempt: next})
	if *r.problem.AttemptsLeft != 3 || !r.problem.NextAttemptAt.Equal(next) || r.problem.NextAttemptAt.Location() != time.UTC {
		t.Errorf("got %+v", r.problem)
	}
}

// TestBucketsAreBounded fills a limiter beyond its bound, and lets time empty it.
func TestBucketsAreBounded(t *testing.T) {
	now := time.Now()
	l := newLimiter[int](RateLimit{PerSecond: 1, Burst: 2}, "things", func() time.Time { return now })
	for i := range maxBuckets + 10 {
		if err := l.take(i); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.buckets) != maxBuckets || l.order.Len() != maxBuckets {
		t.Fatalf("%d buckets, %d in order, want %d", len(l.buckets), l.order.Len(), maxBuckets)
	}
	// The latest are remembered, and what was used last is kept longest.
	last := maxBuckets + 9
	if l.take(last) != nil || l.take(last) == nil {
		t.Error("the last bucket was forgotten")
	}
	now = now.Add(time.Second)
	if l.take(last) != nil {
		t.Error("a token did not come back")
	}
	now = now.Add(2 * time.Second)
	if err := l.take(-1); err != nil {
		t.Fatal(err)
	}
	if len(l.buckets) != 1 || l.order.Len() != 1 {
		t.Errorf("%d buckets are left, want the one just made", len(l.buckets))
	}
}

// TestUnmarshallable: an answer that does not marshal is a 500, whole, and not half an answer.
// No type of the interface is one, so the test has its own.
func TestUnmarshallable(t *testing.T) {
	s := &server{}
	x := &exchange{id: "x", client: t.Context()}
	w := httptest.NewRecorder()
	s.answer(w, x, func() {})
	if w.Code != 500 || w.Header().Get("Content-Type") != api.ProblemMediaType || x.refused == nil || x.refused.cause == nil {
		t.Errorf("got %+v", w)
	}
}
