package httpapi_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

// TestStory goes over a real connection to a real token and a real database, with the
// tenant and its key in the database too.
func TestStory(t *testing.T) {
	database := storetest.New(t)
	token := tokentest.New(t)
	keyset := token.OpenKeyset(t, token.Config())
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	owner := database.OwnerStore(t)
	if err := owner.AddTenant(t.Context(), vault.Tenant{ID: tenant, DirectEnrolment: true, Policy: noDelays()}); err != nil {
		t.Fatal(err)
	}
	if err := owner.AddTenantKey(t.Context(), tenant, vault.TenantKey{ID: kid, PublicKey: pkix(t, public)}); err != nil {
		t.Fatal(err)
	}
	runtime := database.Store(t)
	v, err := vault.New(vault.Config{ID: vaultID, Store: runtime, Token: keyset})
	if err != nil {
		t.Fatal(err)
	}
	handler, err := httpapi.New(httpapi.Config{Vault: v, VaultID: vaultID, Tenants: runtime, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)

	s := &service{t: t, clock: newClock(), signer: signer}
	call := func(method, user, rest string, body any) reply {
		t.Helper()
		r := s.newRequest(method, server.URL+pathOf(user, rest), user, body)
		r.RequestURI = "" // it was made for a server
		res, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		return read(t, res)
	}
	tellStory(t, &phone{t: t, user: "anna@example.org/ü", send: call}, func() {})
}

// TestStoryInSoftware is the same over a token in software, for where none is installed.
func TestStoryInSoftware(t *testing.T) {
	s := newService(t, nil)
	tellStory(t, s.phone("anna@example.org/ü"), func() { s.clock.advance(time.Microsecond) })
}

// tellStory has time pass by tick, where it does not by itself.
func tellStory(t *testing.T, p *phone, tick func()) {
	status := func() api.Status {
		t.Helper()
		return into[api.Status](t, p.send(http.MethodGet, p.user, "", nil))
	}
	states := func() (out []string) {
		t.Helper()
		for _, g := range status().Generations {
			out = append(out, g.State)
		}
		return out
	}
	wantStates := func(want ...string) {
		t.Helper()
		if got := states(); len(got) != len(want) || !equal(got, want) {
			t.Fatalf("generations are %v, want %v", got, want)
		}
	}
	mustRecover := func(password string, e *enrolment) {
		t.Helper()
		if r, key := p.attempt(password); key != e.key {
			t.Fatalf("did not recover: %v", r)
		}
	}

	wantProblem(t, p.send(http.MethodGet, p.user, "", nil), api.NotEnrolled)
	r, _ := p.attempt("first")
	wantProblem(t, r, api.NotEnrolled)

	// Enrol. Stage and activate twice: harmless.
	first := p.prepare("first")
	p.stage(first)
	p.stage(first)
	wantStates("staged")
	for range 2 {
		got := into[api.Status](t, p.send(http.MethodPost, p.user, "/activation", p.activation(first, nil)))
		if got.Follow != first.generation || got.AttemptsLeft != 10 || got.MaxAttempts != 10 || got.NextAttemptAt != nil {
			t.Fatalf("after activation: %+v", got)
		}
	}
	again := into[api.StageResponse](t, p.send(http.MethodPut, p.user, "", first.stage))
	if again.Generation != first.generation || again.ExpiresAt != nil {
		t.Fatalf("staged again after activation: %+v", again)
	}
	mustRecover("first", first)

	// A wrong password, and the same KE1 sent twice.
	g := p.guess("wrong")
	one := into[api.StartRecoveryResponse](t, p.send(http.MethodPost, p.user, "/recovery", g.request))
	two := into[api.StartRecoveryResponse](t, p.send(http.MethodPost, p.user, "/recovery", g.request))
	if one.Attempt != 2 || two.Attempt != 2 || two.AttemptsLeft != 9 || !one.ExpiresAt.Equal(two.ExpiresAt) || one.KSF != defaultKSF {
		t.Fatalf("the same guess twice: %+v, then %+v", one, two)
	}
	finish, _ := p.finish(g, two)
	for range 2 {
		r := p.send(http.MethodPost, p.user, "/recovery/finish", finish)
		wantProblem(t, r, api.WrongPassword)
		if r.problem.AttemptsLeft == nil || *r.problem.AttemptsLeft != 9 {
			t.Fatalf("attempts left: %v", r)
		}
	}
	// The attempt number that a client expects.
	g = p.guess("first")
	g.request.Attempt = new(uint32(2))
	wantProblem(t, p.send(http.MethodPost, p.user, "/recovery", g.request), api.Conflict)
	g.request.Attempt, g.request.Generation = new(uint32(3)), new(first.generation)
	into[api.StartRecoveryResponse](t, p.send(http.MethodPost, p.user, "/recovery", g.request))
	mustRecover("first", first)
	if got := status(); got.AttemptsLeft != 10 || got.Generations[0].FailuresTotal != 2 || got.Generations[0].NextAttempt != 5 {
		t.Fatalf("after a success: %+v", got)
	}

	// Password change with the owner's proof: the old generation is destroyed at once.
	second := p.prepare("second")
	p.stage(second)
	wantStates("active", "staged")
	wrong := p.activation(second, first)
	wrong.PreviousSignature = wrong.Signature
	wantProblem(t, p.send(http.MethodPost, p.user, "/activation", wrong), api.Forbidden)
	into[api.Status](t, p.send(http.MethodPost, p.user, "/activation", p.activation(second, first)))
	wantStates("active")
	mustRecover("second", second)
	g = p.guess("first")
	g.request.Generation = new(first.generation)
	wantProblem(t, p.send(http.MethodPost, p.user, "/recovery", g.request), api.Conflict)

	// Without proof: it is frozen, and its owner brings it back.
	third := p.enrol("third", nil)
	wantStates("frozen", "active")
	frozen := status()
	if frozen.Generations[0].ExpiresAt == nil || frozen.Generations[1].ExpiresAt != nil {
		t.Fatalf("expiries: %+v", frozen)
	}
	fourth := p.prepare("fourth")
	p.stage(fourth)
	wantProblem(t, p.send(http.MethodPost, p.user, "/activation", p.activation(fourth, nil)), api.Conflict)
	reinstatement := p.statement(transcript.Reinstate, third.generation, second.generation, second.digest)
	reinstatement.FrozenUntil = frozen.Generations[0].ExpiresAt.UnixMicro()
	back := api.ReinstateRequest{
		Generation: second.generation, Replaces: third.generation, FrozenUntil: *frozen.Generations[0].ExpiresAt,
		Signature: reinstatement.Sign(second.owner),
	}
	forged := back
	forged.Signature = reinstatement.Sign(third.owner)
	wantProblem(t, p.send(http.MethodPost, p.user, "/reinstatement", forged), api.Forbidden)
	for range 2 {
		into[api.Status](t, p.send(http.MethodPost, p.user, "/reinstatement", back))
	}
	wantStates("active")
	mustRecover("second", second)

	// Turn off: without proof frozen, with it destroyed.
	tick()
	into[api.Status](t, p.turnOff(second.generation, nil))
	wantStates("frozen")
	r, _ = p.attempt("second")
	wantProblem(t, r, api.Conflict)
	stale := back // what brought it back before does not end this freezing
	stale.Replaces, reinstatement.Old = api.GenerationID{}, api.GenerationID{}
	stale.Signature = reinstatement.Sign(second.owner)
	wantProblem(t, p.send(http.MethodPost, p.user, "/reinstatement", stale), api.Conflict)
	wantStates("frozen")
	wantProblem(t, p.turnOff(second.generation, make(api.Bytes, 64)), api.Forbidden)
	off := p.statement(transcript.TurnOff, second.generation, api.GenerationID{}, second.digest).Sign(second.owner)
	for range 2 {
		into[api.Status](t, p.turnOff(second.generation, off))
	}
	wantStates("destroyed")
	r, _ = p.attempt("second")
	wantProblem(t, r, api.NotEnrolled)

	// Ten wrong passwords, and the key is gone.
	p.enrol("last", nil)
	for left := 9; left > 0; left-- {
		r, _ := p.attempt("wrong")
		wantProblem(t, r, api.WrongPassword)
		if *r.problem.AttemptsLeft != left {
			t.Fatalf("want %d attempts left: %v", left, r)
		}
	}
	r, _ = p.attempt("wrong")
	wantProblem(t, r, api.KeyDestroyed)
	r, _ = p.attempt("last")
	wantProblem(t, r, api.KeyDestroyed)
	if got := status(); got.AttemptsLeft != 0 || got.Generations[len(got.Generations)-1].Reason != string(vault.Exhausted) {
		t.Fatalf("after ten wrong passwords: %+v", got)
	}
}

func equal(a, b []string) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestDelays(t *testing.T) {
	s := newService(t, nil)
	policy := noDelays()
	policy.Delays = []time.Duration{0, time.Hour}
	s.tenants.set(nil, vault.Tenant{ID: tenant, DirectEnrolment: true, Policy: policy, Keys: s.tenants.tenants[0].Keys})
	p := s.phone("anna")
	p.enrol("right", nil)

	r, _ := p.attempt("wrong")
	wantProblem(t, r, api.WrongPassword)
	if r.problem.NextAttemptAt == nil || r.problem.NextAttemptAt.Location() != time.UTC {
		t.Fatalf("no next_attempt_at in UTC: %v", r)
	}
	before := s.token.Evaluated()
	r, _ = p.attempt("right")
	wantProblem(t, r, api.TooEarly)
	if r.problem.NextAttemptAt == nil || r.problem.RetryAfter == nil || *r.problem.RetryAfter < 1 || *r.problem.RetryAfter > 3600 {
		t.Fatalf("too early: %v", r)
	}
	if got := s.status("anna"); s.token.Evaluated() != before || got.Generations[0].NextAttempt != 2 || got.NextAttemptAt == nil {
		t.Fatalf("an attempt that was too early was counted: %+v", got)
	}
}

// TestForeignState sends one user's states as another's, and other tenants' tokens.
func TestForeignState(t *testing.T) {
	s := newService(t, nil)
	anna, boris := s.phone("anna"), s.phone("boris")
	boris.enrol("b", nil)
	e := anna.prepare("a")
	wantProblem(t, s.call(http.MethodPut, "boris", "", e.stage), api.InvalidRequest)
	anna.enrol("a", nil)
	g := anna.guess("a")
	started := into[api.StartRecoveryResponse](t, anna.send(http.MethodPost, "anna", "/recovery", g.request))
	finish, _ := anna.finish(g, started)
	r := s.call(http.MethodPost, "boris", "/recovery/finish", finish)
	wantProblem(t, r, api.InvalidRequest)
	if r.problem.Field != "state" {
		t.Fatalf("field: %v", r)
	}
	// A state of the other step.
	crossed := api.FinishRecoveryRequest{KE3: finish.KE3, State: e.stage.State}
	wantProblem(t, s.call(http.MethodPost, "anna", "/recovery/finish", crossed), api.InvalidRequest)

	// The same user of another tenant is another account, and anna's path is not open to boris.
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s.tenants.set(nil, append(s.tenants.tenants, vault.Tenant{ID: "other", DirectEnrolment: true, Policy: noDelays(), Keys: []vault.TenantKey{{ID: kid, PublicKey: pkix(t, public)}}})...)
	s.clock.advance(time.Minute)
	request := s.newRequest(http.MethodGet, pathOf("anna", ""), "anna", nil)
	request.Header.Set("Authorization", "Bearer "+signed(t, jwt.SigningMethodEdDSA, signer, kid, with(s.claimsFor("anna"), "iss", "other")))
	wantProblem(t, s.send(request), api.NotEnrolled)
	wantProblem(t, s.send(s.newRequest(http.MethodGet, pathOf("anna", ""), "boris", nil)), api.Forbidden)
	if got := s.status("anna"); got.Generations[0].NextAttempt != 2 {
		t.Fatalf("attempts were counted: %+v", got)
	}
	if len(started.KE2) != opaque.KE2Size {
		t.Fatalf("KE2 has %d bytes", len(started.KE2))
	}
}
