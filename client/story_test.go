package client_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

// story is what a user does over the years; phone and tablet are two devices of hers.
func story(t *testing.T, phone, tablet *client.Client) {
	ctx := t.Context()
	if _, err := tablet.Recover(ctx, "first"); !errors.Is(err, client.ErrNotEnrolled) {
		t.Fatalf("recovering before anything was enrolled: %v", err)
	}
	enrolled, err := phone.Enrol(ctx, "first")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tablet.Enrol(ctx, "other"); !errors.Is(err, client.ErrAlreadyEnrolled) {
		t.Errorf("enrolling over a key: %v", err)
	}

	recovered := mustRecover(t, tablet, "first")
	if recovered.Key != enrolled.Key || recovered.Generation != enrolled.Generation || recovered.FailuresTotal != 0 {
		t.Errorf("recovered another key, or failures: %+v", recovered)
	}
	wantWrong(t, tablet, "frist", 9)
	wantWrong(t, tablet, "firts", 8)
	if recovered = mustRecover(t, tablet, "first"); recovered.FailuresSince != 2 || recovered.FailuresTotal != 2 {
		t.Errorf("two failures came back as %d and %d", recovered.FailuresSince, recovered.FailuresTotal)
	}
	if recovered = mustRecover(t, tablet, "first"); recovered.FailuresSince != 0 || recovered.FailuresTotal != 2 {
		t.Errorf("after a success, failures are %d and %d", recovered.FailuresSince, recovered.FailuresTotal)
	}

	// A new password for the same key, by the phone that has the key.
	changed, err := phone.ChangePassword(ctx, enrolled.Key, "second")
	if err != nil {
		t.Fatal(err)
	}
	if changed.Key != enrolled.Key || changed.Generation == enrolled.Generation {
		t.Error("the password change changed the key, or no generation")
	}
	wantWrong(t, tablet, "first", 9)
	if got := mustRecover(t, tablet, "second"); got.Key != enrolled.Key {
		t.Error("another key under the new password")
	}
	if _, err := tablet.RecoverGeneration(ctx, "first", enrolled.Generation); !errors.Is(err, client.ErrConflict) {
		t.Errorf("recovering what was replaced: %v", err)
	}

	// By a tablet that has only the old password.
	if changed, err = tablet.ChangePasswordWithOld(ctx, "second", "third"); err != nil || changed.Key != enrolled.Key {
		t.Fatalf("changing with the old password: %v", err)
	}
	// And with a new key.
	kept := newKey(t)
	fresh, err := phone.ChangePasswordAndKey(ctx, enrolled.Key, "fourth", kept)
	if err != nil {
		t.Fatal(err)
	}
	if fresh.Key != kept {
		t.Error("the new key is another one than was given")
	}
	if got := mustRecover(t, tablet, "fourth"); got.Key != fresh.Key {
		t.Error("the new key was not recovered")
	}
	status, err := phone.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(status.Generations) != 1 || status.Generations[0].ID != fresh.Generation || status.AttemptsLeft != 10 {
		t.Errorf("status: %+v", status)
	}

	if err := tablet.TurnOff(ctx, enrolled.Key); !errors.Is(err, client.ErrForbidden) {
		t.Errorf("turned off with the old key: %v", err)
	}
	if _, err := tablet.ChangePassword(ctx, enrolled.Key, "fifth"); !errors.Is(err, client.ErrForbidden) {
		t.Errorf("changed with the old key: %v", err)
	}
	if err := tablet.TurnOff(ctx, fresh.Key); err != nil {
		t.Fatal(err)
	}
	if _, err := tablet.Recover(ctx, "fourth"); !errors.Is(err, client.ErrNotEnrolled) {
		t.Errorf("recovering after turning off: %v", err)
	}
	if err := tablet.TurnOff(ctx, fresh.Key); !errors.Is(err, client.ErrNotEnrolled) {
		t.Errorf("turning off twice: %v", err)
	}
	if _, err := phone.Enrol(ctx, "again"); err != nil {
		t.Fatal(err)
	}
	mustRecover(t, tablet, "again")
}

func newKey(t *testing.T) backup.Key {
	t.Helper()
	key, err := backup.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func mustRecover(t *testing.T, c *client.Client, password string) client.Recovered {
	t.Helper()
	r, err := c.Recover(t.Context(), password)
	if err != nil {
		t.Fatalf("recovering: %v", err)
	}
	return r
}

func wantWrong(t *testing.T, c *client.Client, password string, left int) {
	t.Helper()
	_, err := c.Recover(t.Context(), password)
	var wrong *client.WrongPasswordError
	if !errors.As(err, &wrong) || wrong.AttemptsLeft != left {
		t.Fatalf("want a wrong password with %d attempts left, got: %v", left, err)
	}
}

func TestStory(t *testing.T) {
	s := newService(t)
	phone, _ := s.device("alice")
	tablet, _ := s.device("alice")
	story(t, phone, tablet)
	phone, wire := s.relayed("bob")
	tablet, _ = s.relayed("bob")
	story(t, phone, tablet)
	for _, sent := range wire.take() {
		if sent.step != "GET /v1/vault" && sent.step != "POST /v1/relay" {
			t.Errorf("over the relay channel %s was sent", sent.step)
		}
	}
}

// The same over TLS, with a token that is a token and a database that is a database.
func TestStoryOnTokenAndPostgres(t *testing.T) {
	database := storetest.New(t)
	store := database.Store(t)
	s := serve(t, tokentest.New(t), store, func(_ *vault.Policy, c *httpapi.Config) { c.Tenants = store })
	tenants, err := s.Tenants(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := database.OwnerStore(t).AddTenant(t.Context(), tenants[0]); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewTLSServer(s.handler)
	defer server.Close()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	transport, err := httpclient.New(httpclient.Config{BaseURL: server.URL, TLS: &tls.Config{RootCAs: roots}})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.CloseIdleConnections()
	user := "Zoë/%2F ?&#\\"
	relayed := s.config(user, transport)
	relayed.Direct = false
	story(t, newClient(t, s.config(user, transport)), newClient(t, relayed))
}

func TestUsersAreByteExact(t *testing.T) {
	s := newService(t)
	keys := map[string]client.Recovered{}
	users := []string{"alice", "Alice", "a/b", "a%2Fb", "..", "Zo\u00eb", "Zoe\u0308", "a+b ?x=1#"}
	for _, user := range users {
		d, _ := s.device(user)
		enrolled, err := d.Enrol(t.Context(), "password")
		if err != nil {
			t.Fatalf("%q: %v", user, err)
		}
		keys[user] = client.Recovered{Key: enrolled.Key, Generation: enrolled.Generation}
	}
	for _, user := range users {
		d, _ := s.device(user)
		status, err := d.Status(t.Context())
		if err != nil || len(status.Generations) != 1 || status.Generations[0].ID != keys[user].Generation {
			t.Errorf("%q: another account: %v", user, err)
		}
	}
}

func TestLastWrongPasswordDestroys(t *testing.T) {
	s := newService(t, func(p *vault.Policy, _ *httpapi.Config) { p.MaxAttempts = 3 })
	d, w := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	wantWrong(t, d, "wrong 1", 2)
	wantWrong(t, d, "wrong 2", 1)
	if _, err := d.Recover(t.Context(), "wrong 3"); !errors.Is(err, client.ErrKeyDestroyed) {
		t.Fatalf("the last attempt: %v", err)
	}
	w.take()
	if _, err := d.Recover(t.Context(), "right"); !errors.Is(err, client.ErrKeyDestroyed) {
		t.Errorf("after destruction: %v", err)
	}
	if _, err := d.ChangePasswordWithOld(t.Context(), "right", "new"); !errors.Is(err, client.ErrKeyDestroyed) {
		t.Errorf("after destruction: %v", err)
	}
	if n := s.store.SealedBytes(); n != 0 {
		t.Errorf("%d sealed bytes are left", n)
	}
	if _, err := d.Enrol(t.Context(), "anew"); err != nil {
		t.Errorf("enrolling after destruction: %v", err)
	}
}

func TestWithoutProof(t *testing.T) {
	s := newService(t)
	ctx := t.Context()
	owner, _ := s.device("alice")
	thief, _ := s.device("alice")
	if _, err := thief.ReplaceWithoutProof(ctx, "mine", newKey(t)); !errors.Is(err, client.ErrNotEnrolled) {
		t.Errorf("replacing nothing: %v", err)
	}
	original, err := owner.Enrol(ctx, "original")
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Reinstate(ctx, original.Key); !errors.Is(err, client.ErrConflict) {
		t.Errorf("reinstating what is active: %v", err)
	}
	kept := newKey(t)
	if _, err := thief.ReplaceWithoutProof(ctx, "mine", kept); err != nil {
		t.Fatal(err)
	}
	// Had its answer been lost, the key that was kept would go on.
	usurper, err := thief.ChangePassword(ctx, kept, "mine after all")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := thief.ReplaceWithoutProof(ctx, "mine again", newKey(t)); !errors.Is(err, client.ErrConflict) {
		t.Errorf("replacing while one is frozen: %v", err)
	}
	// The old one is still there, under its own password.
	got, err := owner.RecoverGeneration(ctx, "original", original.Generation)
	if err != nil || got.Key != original.Key {
		t.Fatalf("recovering what is frozen: %v", err)
	}
	if err := owner.Reinstate(ctx, usurper.Key); !errors.Is(err, client.ErrForbidden) {
		t.Errorf("reinstated by another key: %v", err)
	}
	if err := owner.Reinstate(ctx, original.Key); err != nil {
		t.Fatal(err)
	}
	if got := mustRecover(t, owner, "original"); got.Generation != original.Generation {
		t.Error("another generation is active")
	}
	if _, err := thief.RecoverGeneration(ctx, "mine after all", usurper.Generation); err == nil {
		t.Error("the usurper's generation survived")
	}

	// Turned off without proof: frozen, until its owner says otherwise.
	if err := thief.TurnOffWithoutProof(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := owner.Recover(ctx, "original"); !errors.Is(err, client.ErrFrozen) {
		t.Errorf("recovering without naming what is frozen: %v", err)
	}
	if err := thief.TurnOffWithoutProof(ctx); !errors.Is(err, client.ErrFrozen) {
		t.Errorf("turning off twice: %v", err)
	}
	if err := owner.Reinstate(ctx, original.Key); err != nil {
		t.Fatal(err)
	}
	mustRecover(t, owner, "original")
	if err := thief.TurnOffWithoutProof(ctx); err != nil {
		t.Fatal(err)
	}
	if err := owner.TurnOff(ctx, original.Key); err != nil {
		t.Errorf("the owner turns off what is frozen: %v", err)
	}
	if n := s.store.SealedBytes(); n != 0 {
		t.Errorf("%d sealed bytes are left", n)
	}
}

func TestTooEarly(t *testing.T) {
	s := newService(t, func(p *vault.Policy, _ *httpapi.Config) { p.Delays = []time.Duration{0, time.Hour} })
	d, w := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	_, err := d.Recover(t.Context(), "wrong")
	var wrong *client.WrongPasswordError
	if !errors.As(err, &wrong) || wrong.NextAttempt.IsZero() {
		t.Fatalf("a wrong password with a delay: %v", err)
	}
	w.take()
	_, err = d.Recover(t.Context(), "right")
	var early *client.TooEarlyError
	if !errors.As(err, &early) || early.Wait <= 0 || early.Wait > time.Hour {
		t.Fatalf("too early: %v", err)
	}
	if got := steps(w.take()); len(got) != 2 {
		t.Errorf("a 429 was tried again: %q", got)
	}
	if status, err := d.Status(t.Context()); err != nil || status.AttemptsLeft != 9 {
		t.Errorf("an attempt was charged: %+v, %v", status, err)
	}
}

func TestRateLimited(t *testing.T) {
	s := newService(t, func(_ *vault.Policy, c *httpapi.Config) {
		c.Limits.EnrolmentsPerUser = httpapi.RateLimit{PerSecond: 0.001, Burst: 1}
	})
	d, w := s.device("alice")
	enrolled, err := d.Enrol(t.Context(), "first")
	if err != nil {
		t.Fatal(err)
	}
	w.take()
	_, err = d.ChangePassword(t.Context(), enrolled.Key, "second")
	var limited *client.RateLimitedError
	if !errors.As(err, &limited) || limited.Wait <= 0 {
		t.Fatalf("the second enrolment: %v", err)
	}
	if got := steps(w.take()); len(got) != 2 {
		t.Errorf("a 429 was tried again: %q", got)
	}
}

func TestTokenIsRenewedOnce(t *testing.T) {
	s := newService(t)
	w := &wire{next: inProcess{s.handler}}
	config := s.config("alice", w)
	asked := 0
	valid := []time.Duration{-time.Hour, 5 * time.Minute}
	config.Token = func(context.Context) (string, error) {
		asked++
		return s.jwt("alice", valid[min(asked, len(valid))-1]), nil
	}
	d := newClient(t, config)
	if _, err := d.Enrol(t.Context(), "password"); err != nil {
		t.Fatal(err)
	}
	if asked != 2 {
		t.Errorf("asked for %d tokens, want an expired one and a good one", asked)
	}

	valid = []time.Duration{-time.Hour}
	asked = 0
	d = newClient(t, config)
	w.take()
	if _, err := d.Status(t.Context()); !errors.Is(err, client.ErrUnauthenticated) {
		t.Errorf("with expired tokens alone: %v", err)
	}
	if got := steps(w.take()); asked != 2 || len(got) != 3 {
		t.Errorf("asked for %d tokens and sent %q", asked, got)
	}

	none := errors.New("signed out")
	config.Token = func(context.Context) (string, error) { return "", none }
	d = newClient(t, config)
	if _, err := d.Recover(t.Context(), "password"); !errors.Is(err, none) {
		t.Errorf("without a token: %v", err)
	}
	config.Token = func(context.Context) (string, error) { return s.jwt("bob", time.Minute), nil }
	if _, err := newClient(t, config).Status(t.Context()); !errors.Is(err, client.ErrForbidden) {
		t.Errorf("with another user's token: %v", err)
	}
}

// A client with another tenant's name could have the right password and would prove it under a wrong name: it makes no attempt.
func TestWrongTenant(t *testing.T) {
	s := newService(t)
	config := s.config("alice", inProcess{s.handler})
	alice := newClient(t, config)
	if _, err := alice.Enrol(t.Context(), "password"); err != nil {
		t.Fatal(err)
	}
	config.Tenant += "2"
	other := newClient(t, config)
	if _, err := other.Recover(t.Context(), "password"); !errors.Is(err, client.ErrWrongTenant) || !strings.Contains(err.Error(), config.Tenant) {
		t.Errorf("got %v", err)
	}
	if status, err := alice.Status(t.Context()); err != nil || status.AttemptsLeft != status.MaxAttempts {
		t.Errorf("an attempt was charged: %v %+v", err, status)
	}
}
