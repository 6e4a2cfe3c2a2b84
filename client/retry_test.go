package client_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/client"
)

// answering gives prepared answers to everything but GET /v1/vault, the last one again and again.
type answering struct {
	vault   client.Transport
	answers []client.Response
	at      []time.Duration // when each request came, since the first
	began   time.Time
}

func (a *answering) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	if r.Path == "/v1/vault" {
		return a.vault.RoundTrip(ctx, r)
	}
	if len(a.at) == 0 {
		a.began = time.Now()
	}
	a.at = append(a.at, time.Since(a.began))
	answer := a.answers[min(len(a.at), len(a.answers))-1]
	if answer.Status == 0 {
		return nil, errLost
	}
	return &answer, nil
}

func problem(status int, kind, retryAfter string) client.Response {
	r := client.Response{Status: status, Header: map[string]string{}, Body: fmt.Appendf(nil, `{"type":%q,"status":%d,"detail":"d"}`, kind, status)}
	if retryAfter != "" {
		r.Header["retry-after"] = retryAfter
	}
	return r
}

// What is tried again, how often, and what comes of it. The clock is the bubble's.
func TestRetries(t *testing.T) {
	ok := client.Response{Status: 200, Body: []byte(`{"tenant":"chat","generations":[],"unknown_member":1}`)}
	lost := client.Response{}
	for name, test := range map[string]struct {
		answers []client.Response
		sent    int
		err     error // nil: success
		atLeast time.Duration
	}{
		"success":                        {[]client.Response{ok}, 1, nil, 0},
		"lost once":                      {[]client.Response{lost, ok}, 2, nil, 0},
		"lost three times":               {[]client.Response{lost, lost, lost, ok}, 4, nil, 0},
		"lost always":                    {[]client.Response{lost}, client.MaxTries, client.ErrUnavailable, 0},
		"502 without a problem":          {[]client.Response{{Status: 502, Body: []byte("<html>")}, ok}, 2, nil, 0},
		"504":                            {[]client.Response{{Status: 504}, ok}, 2, nil, 0},
		"503 without a problem":          {[]client.Response{{Status: 503}, ok}, 2, nil, 0},
		"503 and Retry-After":            {[]client.Response{problem(503, api.TokenUnavailable, "3"), ok}, 2, nil, 3 * time.Second},
		"503 and a long Retry-After":     {[]client.Response{problem(503, api.StoreUnavailable, "3600"), ok}, 1, client.ErrUnavailable, 0},
		"503 and a Retry-After too long": {[]client.Response{problem(503, api.StoreUnavailable, "9223372036854775807"), ok}, 1, client.ErrUnavailable, 0},
		"503 and a negative Retry-After": {[]client.Response{problem(503, api.StoreUnavailable, "-5"), ok}, 2, nil, 0},
		"503 and a date":                 {[]client.Response{problem(503, api.StoreUnavailable, "Wed, 21 Oct 2026 07:28:00 GMT"), ok}, 2, nil, 0},
		"503 account fault":              {[]client.Response{problem(503, api.AccountFault, ""), ok}, 1, &client.Problem{}, 0},
		"500":                            {[]client.Response{problem(500, api.Internal, ""), ok}, 1, &client.Problem{}, 0},
		"429 for a second":               {[]client.Response{problem(429, api.RateLimited, "1"), ok}, 2, nil, time.Second},
		"429 for long":                   {[]client.Response{problem(429, api.RateLimited, "60"), ok}, 1, &client.RateLimitedError{}, 0},
		"429 too early":                  {[]client.Response{problem(429, api.TooEarly, "1"), ok}, 1, &client.TooEarlyError{}, 0},
		"400":                            {[]client.Response{problem(400, api.InvalidRequest, ""), ok}, 1, &client.Problem{}, 0},
		"404":                            {[]client.Response{problem(404, api.NotEnrolled, ""), ok}, 1, client.ErrNotEnrolled, 0},
		"404 of somebody else's":         {[]client.Response{{Status: 404, Body: []byte("not here")}, ok}, 1, &client.Problem{}, 0},
		"409":                            {[]client.Response{problem(409, api.Conflict, ""), ok}, 1, client.ErrConflict, 0},
		"a redirect":                     {[]client.Response{{Status: 302}, ok}, 1, &client.Problem{}, 0},
		"an unknown problem":             {[]client.Response{problem(418, "urn:bkv:problem:teapot", ""), ok}, 1, &client.Problem{}, 0},
		"success that is no JSON":        {[]client.Response{{Status: 200, Body: []byte("<html>")}, ok}, 1, client.ErrBadResponse, 0},
		"too long":                       {[]client.Response{{Status: 200, Body: make([]byte, client.MaxResponseBytes+1)}, ok}, 1, client.ErrBadResponse, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newService(t)
				transport := &answering{vault: inProcess{s.handler}, answers: test.answers}
				_, err := newClient(t, s.config("alice", transport)).Status(t.Context())
				var p *client.Problem
				var limited *client.RateLimitedError
				var early *client.TooEarlyError
				switch {
				case test.err == nil:
					if err != nil {
						t.Error(err)
					}
				case errors.As(test.err, &p):
					if !errors.As(err, &p) || errors.Is(err, client.ErrUnavailable) || errors.Is(err, client.ErrNotEnrolled) {
						t.Errorf("want a problem, got: %v", err)
					}
				case errors.As(test.err, &limited):
					if !errors.As(err, &limited) || limited.Wait != time.Minute {
						t.Errorf("want a limit, got: %v", err)
					}
				case errors.As(test.err, &early):
					if !errors.As(err, &early) || early.Wait != time.Second {
						t.Errorf("want too early, got: %v", err)
					}
				case !errors.Is(err, test.err):
					t.Errorf("want %v, got: %v", test.err, err)
				}
				if len(transport.at) != test.sent {
					t.Errorf("sent %d times, want %d", len(transport.at), test.sent)
				}
				if last := transport.at[len(transport.at)-1]; last < test.atLeast || last > 15*time.Second {
					t.Errorf("the last try came after %v", last)
				}
				for i := 1; i < len(transport.at); i++ {
					if transport.at[i] <= transport.at[i-1] {
						t.Error("no wait between two tries")
					}
				}
			})
		})
	}
}

func TestContextEndsTheWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		transport := &answering{vault: inProcess{s.handler}, answers: []client.Response{problem(503, api.StoreUnavailable, "9")}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := newClient(t, s.config("alice", transport)).Status(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || len(transport.at) != 1 {
			t.Errorf("after %d requests: %v", len(transport.at), err)
		}
	})
}

// A context that ends during the last try is still the context's end, and no fault of the vault's.
func TestContextEndsTheLastTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		ctx, cancel := context.WithCancel(t.Context())
		tries := 0
		w := &wire{next: inProcess{s.handler}, faults: always("GET backup-key", dropRequest), before: func(step string) {
			if step == "GET backup-key" {
				if tries++; tries == client.MaxTries {
					cancel()
				}
			}
		}}
		_, err := newClient(t, s.config("alice", w)).Status(ctx)
		if !errors.Is(err, context.Canceled) || errors.Is(err, client.ErrUnavailable) || tries != client.MaxTries {
			t.Errorf("after %d tries: %v", tries, err)
		}
	})
}

// What a hostile vault says ends up in terminals and logs.
func TestProblemTextIsTamed(t *testing.T) {
	s := newService(t)
	hostile := problem(400, api.InvalidRequest, "")
	hostile.Body = fmt.Appendf(nil, `{"type":"\u001b[2J","detail":"\u001b]0;x\u0007\n\u202e%s","instance":"\r\n"}`, strings.Repeat("x", 10_000))
	transport := &answering{vault: inProcess{s.handler}, answers: []client.Response{hostile}}
	_, err := newClient(t, s.config("alice", transport)).Status(t.Context())
	var p *client.Problem
	if !errors.As(err, &p) || p.Status != 400 || strings.ContainsAny(err.Error(), "\x1b\x07\n\r\u202e") || len(err.Error()) > 2000 {
		t.Errorf("%q", err)
	}
}

// constant gives one answer to everything.
type constant struct{ answer *client.Response }

func (c constant) RoundTrip(context.Context, *client.Request) (*client.Response, error) {
	return c.answer, nil
}

// roundTripper is a transport made of a function.
type roundTripper func(*client.Request) *client.Response

func (f roundTripper) RoundTrip(_ context.Context, r *client.Request) (*client.Response, error) {
	return f(r), nil
}
