package httpapi_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

func TestVaultIsPublic(t *testing.T) {
	s := newService(t, nil)
	r := s.send(httptest.NewRequest("GET", "/v1/vault", nil))
	got := into[api.Vault](t, r)
	if r.header.Get("Cache-Control") == "no-store" {
		t.Errorf("Cache-Control is %q", r.header.Get("Cache-Control"))
	}
	list := transcript.KeyList{Vault: got.ID, Serial: got.Keys.Serial, NotBefore: got.Keys.NotBefore.Unix(), Expires: got.Keys.Expires.Unix()}
	for _, k := range got.Keys.Keys {
		list.Keys = append(list.Keys, transcript.ListedKey{Purpose: k.Purpose, Generation: k.Generation, Key: k.PublicKey})
	}
	id, err := s.vault.Identity(t.Context(), s.clock.Now())
	must(t, err)
	if got.ID != vaultID || got.Suite != api.Suite || got.Fingerprint != id.Fingerprint.String() ||
		string(got.IdentityKey) != string(id.IdentityKey[:]) || list.Digest() != id.Keys.Digest() || len(got.Keys.Signature) != 64 {
		t.Errorf("got %+v", got)
	}
	if got.KSFFloor.Time != opaque.MinArgon2id.Time || got.KSFCeiling.MemoryKiB != opaque.MaxArgon2id.MemoryKiB ||
		got.Lifetimes != (api.Lifetimes{EnrolmentState: 3600, StagedGeneration: 86400, Attempt: 300}) {
		t.Errorf("got %+v", got)
	}

	// One list is signed an hour; it outlives a token that is gone meanwhile.
	ask := func() reply { t.Helper(); return s.send(httptest.NewRequest("GET", "/v1/vault", nil)) }
	s.clock.advance(59 * time.Minute)
	s.token.FailWith(func(string) error { return errors.New("pulled out") })
	if again := ask(); string(again.body) != string(r.body) {
		t.Errorf("another list within the hour: %v", again)
	}
	s.clock.advance(time.Minute)
	wantProblem(t, ask(), api.TokenUnavailable)
	s.token.FailWith(nil)
	if later := into[api.Vault](t, ask()); !later.Keys.Expires.After(got.Keys.Expires) {
		t.Errorf("the list was not made anew: %+v", later)
	}
}

func TestRouting(t *testing.T) {
	s := newService(t, nil)
	for _, path := range []string{"/", "/v1", "/v1/", "/v1/vault/", "/v2/vault", "/docs", "/schemas/Status.json", "/openapi.yaml", "/openapi-3.0.json", "/healthz", "/readyz", "/metrics", "/favicon.ico"} {
		wantProblem(t, s.send(httptest.NewRequest("GET", path, nil)), api.NotFound)
	}
	for _, c := range []struct{ method, path, allow string }{
		{"POST", "/v1/vault", "GET"},
		{"HEAD", "/v1/vault", "GET"},
		{"OPTIONS", "/openapi.json", "GET"},
		{"PATCH", pathOf("anna", ""), "GET, PUT, DELETE"},
		{"POST", pathOf("a/b", ""), "GET, PUT, DELETE"},
		{"GET", pathOf("anna", "/enrolment"), "POST"},
		{"GET", pathOf("anna", "/recovery"), "POST"},
		{"TRACE", pathOf("anna", "/recovery/finish"), "POST"},
		{"BREW", pathOf("anna", "/activation"), "POST"},
		{"get", pathOf("anna", "/reinstatement"), "POST"},
	} {
		r := s.send(httptest.NewRequest(c.method, c.path, nil))
		wantProblem(t, r, api.MethodNotAllowed)
		if got := r.header.Get("Allow"); got != c.allow {
			t.Errorf("%s %s: Allow is %q, want %q", c.method, c.path, got, c.allow)
		}
	}
	wantProblem(t, s.send(httptest.NewRequest("BREW", "/nowhere", nil)), api.NotFound)
	r := httptest.NewRequest("OPTIONS", "/", nil)
	r.URL.Path, r.RequestURI = "*", "*"
	wantProblem(t, s.send(r), api.NotFound)
}

func TestRequestIDs(t *testing.T) {
	s := newService(t, nil)
	seen := map[string]bool{}
	for _, c := range []struct {
		given string
		kept  bool
	}{
		{"a", true}, {"A-z_0.9", true}, {strings.Repeat("x", 64), true},
		{"", false}, {strings.Repeat("x", 65), false}, {"a b", false}, {"a\"b", false}, {"ü", false}, {"a/b", false}, {"a\tb", false},
	} {
		r := httptest.NewRequest("GET", "/nowhere", nil)
		r.Header.Set("X-Request-Id", c.given)
		got := s.send(r).header.Get("X-Request-Id")
		if (got == c.given) != c.kept || got == "" || seen[got] {
			t.Errorf("%q became %q", c.given, got)
		}
		seen[got] = true
	}
	// It reaches the vault's own record of what happened.
	r := s.newRequest("PUT", pathOf("anna", ""), "anna", s.phone("anna").prepare("x").stage)
	r.Header.Set("X-Request-Id", "stage-1")
	into[api.StageResponse](t, s.send(r))
	if events := s.store.Events(); len(events) != 1 || events[0].RequestID != "stage-1" {
		t.Errorf("events: %+v", events)
	}
}

// TestLog looks at what is logged of each request, and for what must not be.
func TestLog(t *testing.T) {
	s := newService(t, nil)
	const user = "secret-user-id"
	s.phone(user).enrol("right", nil)
	g := s.phone(user).guess("right")
	s.call("POST", user, "/recovery", g.request)
	s.call("PATCH", user, "", nil)
	s.call("VERYLONGMETHODNAME", user, "", nil)
	s.send(httptest.NewRequest("GET", "/no/"+user, nil))
	s.bring("Bearer nonsense")

	var got []string
	for _, r := range s.records() {
		if r["request_id"] == "" || r["duration"] == nil {
			t.Errorf("record without its id or duration: %v", r)
		}
		got = append(got, fmt.Sprint(r["level"], " ", r["method"], " ", r["route"], " ", r["tenant"], " ", r["status"], " ", r["problem"]))
	}
	const users = "/v1/users/{user}/backup-key"
	want := []string{
		"INFO POST " + users + "/enrolment app 200 <nil>",
		"INFO PUT " + users + " app 200 <nil>",
		"INFO POST " + users + "/activation app 200 <nil>",
		"INFO POST " + users + "/recovery app 200 <nil>",
		"INFO PATCH " + users + " <nil> 405 method-not-allowed",
		"INFO <nil> " + users + " <nil> 405 method-not-allowed",
		"INFO GET  <nil> 404 not-found",
		"INFO GET " + users + " <nil> 401 unauthenticated",
	}
	if len(got) != len(want) || !equal(got, want) {
		t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, secret := range []string{user, "nonsense", base64.RawURLEncoding.EncodeToString(g.request.KE1)} {
		if strings.Contains(s.log.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

// faultyToken gives results that no token gives.
type faultyToken struct {
	*vaulttest.SoftToken
	multiply func() ([33]byte, error)
}

func (f *faultyToken) Multiply(ctx context.Context, purpose string, generation uint32, point [33]byte) ([33]byte, error) {
	if f.multiply != nil {
		return f.multiply()
	}
	return f.SoftToken.Multiply(ctx, purpose, generation, point)
}

// TestUnknownErrors: what nobody foresaw is a 500 that says nothing, and is logged once.
func TestUnknownErrors(t *testing.T) {
	soft := vaulttest.NewSoftToken()
	token := &faultyToken{SoftToken: soft}
	s := newServiceOver(t, soft, token, nil)
	p := s.phone("anna")
	p.enrol("right", nil)
	request := bodyRoutes(t, p, p.prepare("x"))[0].body

	for name, multiply := range map[string]func() ([33]byte, error){
		"a result that is no point": func() ([33]byte, error) { return [33]byte{}, nil },
		"a panic":                   func() ([33]byte, error) { panic("secret-panic-text") },
	} {
		token.multiply = multiply
		r := s.newRequest("POST", pathOf("anna", "/enrolment"), "anna", request)
		r.Header.Set("X-Request-Id", "look-me-up")
		got := s.send(r)
		wantProblem(t, got, api.Internal)
		if got.problem.Instance != "look-me-up" {
			t.Errorf("%s: %v", name, got)
		}
		for _, ours := range []string{"evaluat", "OPRF", "point", "panic", "token", ".go"} {
			if strings.Contains(string(got.body), ours) {
				t.Errorf("%s: our error's text %q is in %v", name, ours, got)
			}
		}
	}
	log := s.log.String()
	if strings.Count(log, "secret-panic-text") != 1 || strings.Count(log, "evaluator's result") != 1 || !strings.Contains(log, "faultyToken") {
		t.Errorf("the log does not have each error once, and the panic's stack:\n%s", log)
	}
}

// TestAbort leaves net/http's own way out open.
func TestAbort(t *testing.T) {
	soft := vaulttest.NewSoftToken()
	s := newServiceOver(t, soft, &faultyToken{SoftToken: soft, multiply: func() ([33]byte, error) { panic(http.ErrAbortHandler) }}, nil)
	request, _, err := opaque.StartRegistration(strings.NewReader(strings.Repeat("x", 64)), []byte("x"))
	must(t, err)
	defer func() {
		if p := recover(); p != http.ErrAbortHandler {
			t.Errorf("recovered %v", p)
		}
	}()
	s.call("POST", "anna", "/enrolment", api.StartEnrolmentRequest{RegistrationRequest: request[:]})
}

// TestFaults: with token or store failing at any operation, every route is 503 with
// Retry-After, says nothing of the cause, and the same bytes succeed afterwards.
func TestFaults(t *testing.T) {
	s := newService(t, nil)
	p := s.phone("anna")
	first := p.enrol("right", nil)
	cause := errors.New("CKR_DEVICE_ERROR in slot 7")
	// Every read makes a MAC in the token, so failing them all fails every route that has an account.
	for _, operation := range []string{"mac", "random", "seal", "open", "multiply"} {
		t.Run(operation, func(t *testing.T) {
			s := s.in(t)
			s.token.FailWith(func(op string) error {
				if op == operation {
					return cause
				}
				return nil
			})
			failed := 0
			second := first
			for _, route := range bodyRoutes(t, s.phone("anna"), second) {
				r := s.call(route.method, "anna", route.rest, route.body)
				if r.status < 500 {
					continue
				}
				failed++
				wantProblem(t, r, api.TokenUnavailable)
				if r.header.Get("Retry-After") != "2" || strings.Contains(string(r.body), "slot 7") {
					t.Errorf("got %v", r)
				}
			}
			s.token.FailWith(nil)
			if failed == 0 {
				t.Errorf("no route failed")
			}
		})
	}

	// A write that fails, persisted or not: the attempt stays charged or was not, and the
	// same bytes are answered.
	for name, fault := range map[string]vaulttest.Fault{"not persisted": vaulttest.NotPersisted, "persisted": vaulttest.Persisted} {
		before := s.status("anna").Generations[0].NextAttempt
		g := p.guess("right")
		s.store.OnWrite(func(vault.Change) vaulttest.Fault { return fault })
		r := p.send("POST", "anna", "/recovery", g.request)
		wantProblem(t, r, api.StoreUnavailable)
		s.store.OnWrite(nil)
		started := into[api.StartRecoveryResponse](t, p.send("POST", "anna", "/recovery", g.request))
		if started.Attempt != before {
			t.Errorf("%s: the attempt has number %d, want %d", name, started.Attempt, before)
		}
		finish, _ := p.finish(g, started)
		into[api.FinishRecoveryResponse](t, p.send("POST", "anna", "/recovery/finish", finish))
	}
	if got := s.status("anna"); got.AttemptsLeft != 10 {
		t.Errorf("after all: %+v", got)
	}
	if strings.Contains(s.log.String(), `"status":500`) {
		t.Errorf("a fault was taken for an unknown error:\n%s", s.log)
	}
}

// TestTimeout has the token hang until the request's time is over.
func TestTimeout(t *testing.T) {
	soft := vaulttest.NewSoftToken()
	token := &hangingToken{SoftToken: soft}
	s := newServiceOver(t, soft, token, func(c *httpapi.Config) { c.RequestTimeout = 300 * time.Millisecond })
	r := s.call("POST", "anna", "/enrolment", bodyRoutes(t, s.phone("anna"), &enrolment{})[0].body)
	wantProblem(t, r, api.TokenUnavailable)
}

// hangingToken multiplies only when the caller has given up.
type hangingToken struct{ *vaulttest.SoftToken }

func (h *hangingToken) Multiply(ctx context.Context, _ string, _ uint32, _ [33]byte) ([33]byte, error) {
	<-ctx.Done()
	return [33]byte{}, ctx.Err()
}

// Beyond the requests that are worked on, others are refused at once, in capsules and without, and nothing is charged or
// kept of them. Requests that have not arrived whole hold nobody up.
func TestBusy(t *testing.T) {
	soft := vaulttest.NewSoftToken()
	token := &gatedToken{SoftToken: soft, entered: make(chan struct{}), gate: make(chan struct{})}
	s := newServiceOver(t, soft, token, func(c *httpapi.Config) {
		c.Limits.RequestsAtOnce = 1
		c.Limits.EnrolmentsPerUser = httpapi.RateLimit{PerSecond: 0.001, Burst: 2}
	})
	body := bodyRoutes(t, s.phone("anna"), &enrolment{})[0].body
	start := func() reply { return s.call("POST", "anna", "/enrolment", body) }
	capsule, _ := s.capsuled(s.relayConfigs()[0], "anna", inside("GET", pathOf("anna", ""), nil))
	unfinished, half := io.Pipe()
	slow := make(chan struct{})
	go func() {
		defer close(slow)
		r := s.newRequest("POST", pathOf("anna", "/enrolment"), "anna", body)
		r.Body, r.ContentLength = unfinished, 100
		s.send(r)
	}()
	_, _ = half.Write([]byte("{")) // it is being read

	first := make(chan reply)
	go func() { first <- start() }()
	<-token.entered
	r := start()
	wantProblem(t, r, api.Busy)
	if r.status != 503 || r.header.Get("Retry-After") != "1" {
		t.Errorf("got %v", r)
	}
	wantProblem(t, s.send(capsule), api.Busy)

	close(token.gate)
	into[api.StartEnrolmentResponse](t, <-first)
	into[api.StartEnrolmentResponse](t, start()) // the second of two: the one that was refused was not counted
	half.CloseWithError(io.ErrUnexpectedEOF)
	<-slow
}

// gatedToken multiplies when its gate opens.
type gatedToken struct {
	*vaulttest.SoftToken
	entered, gate chan struct{}
}

func (g *gatedToken) Multiply(ctx context.Context, purpose string, generation uint32, p [33]byte) ([33]byte, error) {
	select {
	case g.entered <- struct{}{}:
	case <-g.gate:
	}
	<-g.gate
	return g.SoftToken.Multiply(ctx, purpose, generation, p)
}

// TestClientGone: a client that left is no fault of the token's.
func TestClientGone(t *testing.T) {
	soft := vaulttest.NewSoftToken()
	s := newServiceOver(t, soft, &hangingToken{SoftToken: soft}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	r := s.newRequest("POST", pathOf("anna", "/enrolment"), "anna", bodyRoutes(t, s.phone("anna"), &enrolment{})[0].body)
	cancel()
	s.send(r.WithContext(ctx))
	records := s.records()
	if last := records[len(records)-1]; last["status"] != float64(499) || last["level"] != "INFO" {
		t.Errorf("logged %v", last)
	}
}

func TestEnrolmentLimits(t *testing.T) {
	s := newService(t, func(c *httpapi.Config) {
		c.Limits = httpapi.Limits{EnrolmentsPerTenant: httpapi.RateLimit{PerSecond: 1, Burst: 25}}
	})
	start := func(user string) reply {
		t.Helper()
		return s.call("POST", user, "/enrolment", bodyRoutes(t, s.phone(user), &enrolment{})[0].body)
	}
	for range 10 {
		into[api.StartEnrolmentResponse](t, start("anna"))
	}
	before := s.token.Evaluated()
	r := start("anna")
	wantProblem(t, r, api.RateLimited)
	if r.header.Get("Retry-After") != "360" {
		t.Errorf("ten an hour are one in 360 seconds: got %v", r)
	}
	// Another user has an allowance of his own; a malformed request takes nothing of it.
	for range 20 {
		wantProblem(t, s.call("POST", "boris", "/enrolment", `{}`), api.InvalidRequest)
	}
	for range 10 {
		into[api.StartEnrolmentResponse](t, start("boris"))
	}
	// All users of a tenant together.
	for i := range 5 {
		into[api.StartEnrolmentResponse](t, start(fmt.Sprint("user", i)))
	}
	r = start("clara")
	wantProblem(t, r, api.RateLimited)
	if r.header.Get("Retry-After") != "1" {
		t.Errorf("got %v", r)
	}
	if got := s.token.Evaluated() - before; got != 15 {
		t.Errorf("%d were evaluated, want 15", got)
	}
	// Time gives them back. What was refused has taken nothing.
	s.clock.advance(6 * time.Minute)
	into[api.StartEnrolmentResponse](t, start("anna"))
	wantProblem(t, start("anna"), api.RateLimited)
	// Nothing else is limited by this.
	wantProblem(t, s.call("GET", "anna", "", nil), api.NotEnrolled)
}

func TestNewRefusesBadConfiguration(t *testing.T) {
	good := func() httpapi.Config {
		v, err := vault.New(vault.Config{ID: vaultID, Store: vaulttest.NewMemoryStore(time.Now), Token: vaulttest.NewSoftToken()})
		must(t, err)
		return httpapi.Config{Vault: v, VaultID: vaultID, Tenants: &tenantList{}, Log: slog.New(slog.DiscardHandler)}
	}
	if _, err := httpapi.New(good()); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*httpapi.Config){
		"no vault":      func(c *httpapi.Config) { c.Vault = nil },
		"no id":         func(c *httpapi.Config) { c.VaultID = "" },
		"no tenants":    func(c *httpapi.Config) { c.Tenants = nil },
		"no log":        func(c *httpapi.Config) { c.Log = nil },
		"negative rate": func(c *httpapi.Config) { c.Limits.EnrolmentsPerUser = httpapi.RateLimit{PerSecond: -1, Burst: 1} },
		"no burst":      func(c *httpapi.Config) { c.Limits.EnrolmentsPerTenant = httpapi.RateLimit{PerSecond: 1} },
		"no time":       func(c *httpapi.Config) { c.RequestTimeout = -time.Second },
	} {
		c := good()
		spoil(&c)
		if _, err := httpapi.New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestAdmin(t *testing.T) {
	ok := func(context.Context) error { return nil }
	down := error(nil)
	log := &syncBuffer{}
	stuck := make(chan struct{})
	t.Cleanup(func() { close(stuck) })
	hang := false
	admin, err := httpapi.NewAdmin(slog.New(slog.NewTextHandler(log, nil)),
		httpapi.Check{Name: "token", Run: ok},
		httpapi.Check{Name: "store", Run: func(context.Context) error { return down }},
		httpapi.Check{Name: "schema", Run: func(context.Context) error {
			if hang {
				<-stuck
			}
			return nil
		}},
	)
	must(t, err)
	ask := func(ctx context.Context, method, path string, status int, body string) {
		t.Helper()
		w := httptest.NewRecorder()
		admin.ServeHTTP(w, httptest.NewRequest(method, path, nil).WithContext(ctx))
		if got, _ := io.ReadAll(w.Result().Body); w.Code != status || body != "" && string(got) != body {
			t.Errorf("%s: got %d %s, want %d %s", path, w.Code, got, status, body)
		}
	}
	ask(t.Context(), "GET", "/healthz", 200, `{"alive":true}`)
	ask(t.Context(), "HEAD", "/healthz", 200, "")
	ask(t.Context(), "GET", "/readyz", 200, `{"ready":true,"failing":[]}`)
	ask(t.Context(), "POST", "/readyz", 405, "")
	ask(t.Context(), "GET", "/v1/vault", 404, "")

	down = errors.New("connection refused to 10.0.0.7")
	ask(t.Context(), "GET", "/readyz", 503, `{"ready":false,"failing":["store"]}`)
	ask(t.Context(), "GET", "/healthz", 200, `{"alive":true}`)
	if strings.Count(log.String(), "10.0.0.7") != 1 {
		t.Errorf("the log has %q", log)
	}
	// A check that does not come back does not hold the answer up.
	down, hang = nil, true
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	ask(gone, "GET", "/readyz", 503, "")

	if _, err := httpapi.NewAdmin(nil); err == nil {
		t.Error("no log: accepted")
	}
}

// A user's and a tenant's requests are limited on every route, together; what is refused is not charged, and
// nobody without a token has a bucket.
func TestRequestLimits(t *testing.T) {
	s := newService(t, func(c *httpapi.Config) {
		c.Limits.RequestsPerUser = httpapi.RateLimit{PerSecond: 0.1, Burst: 3}
		c.Limits.RequestsPerTenant = httpapi.RateLimit{PerSecond: 1, Burst: 5}
	})
	get := func(user string) reply { return s.call("GET", user, "", nil) }
	for range 20 {
		r := s.newRequest("GET", pathOf("ann", ""), "bob", nil) // bob's token, ann's path
		wantProblem(t, s.send(r), api.Forbidden)
		r.Header.Del("Authorization")
		wantProblem(t, s.send(r), api.Unauthenticated)
	}
	wantProblem(t, get("ann"), api.NotEnrolled)
	wantProblem(t, s.call("POST", "ann", "/recovery", "{}"), api.InvalidRequest)
	wantProblem(t, s.call("DELETE", "ann", "?generation=0", nil), api.InvalidRequest)
	r := get("ann")
	wantProblem(t, r, api.RateLimited)
	if r.header.Get("Retry-After") != "10" {
		t.Errorf("Retry-After is %q, want 10", r.header.Get("Retry-After"))
	}
	for range 20 { // what ann is refused is not charged to her tenant
		wantProblem(t, get("ann"), api.RateLimited)
	}
	capsule := s.newRequest("POST", "/v1/relay", "ann", "not even a capsule")
	capsule.Header.Set("Content-Type", "message/ohttp-req")
	wantProblem(t, s.send(capsule), api.RateLimited)
	wantProblem(t, get("bob"), api.NotEnrolled)
	wantProblem(t, get("carl"), api.NotEnrolled)
	r = get("dora")
	wantProblem(t, r, api.RateLimited)
	if r.header.Get("Retry-After") != "1" || !strings.Contains(r.problem.Detail, "tenant") {
		t.Errorf("the tenant's limit: %v", r)
	}
	if r := s.send(httptest.NewRequest("GET", "/v1/vault", nil)); r.status != 200 {
		t.Errorf("who the vault is, past the limits: %v", r)
	}
	s.clock.advance(10 * time.Second)
	wantProblem(t, get("ann"), api.NotEnrolled)
	wantProblem(t, get("ann"), api.RateLimited)
}

// Each request is observed once, by its route's pattern and what was answered, and by nothing that its client chose.
func TestObserve(t *testing.T) {
	var seen []httpapi.Exchange
	s := newService(t, func(c *httpapi.Config) { c.Observe = func(x httpapi.Exchange) { seen = append(seen, x) } })
	s.call("GET", "ann", "", nil)
	s.send(httptest.NewRequest("GET", "/v1/vault", nil))
	s.send(httptest.NewRequest("FROBNICATE", "/nowhere/ann", nil))
	bad := s.newRequest("GET", pathOf("ann", ""), "ann", nil)
	bad.Header.Set("Authorization", "Bearer e30.e30.e30")
	s.send(bad)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	s.send(s.newRequest("GET", pathOf("ann", ""), "ann", nil).WithContext(gone))
	for i := range seen {
		if seen[i].Took <= 0 {
			t.Errorf("%+v took no time", seen[i])
		}
		seen[i].Took = 0
	}
	want := []httpapi.Exchange{
		{Route: "/v1/users/{user}/backup-key", Method: "GET", Status: 404, Problem: "not-enrolled", Tenant: tenant},
		{Route: "/v1/vault", Method: "GET", Status: 200},
		{Status: 404, Problem: "not-found"},
		{Route: "/v1/users/{user}/backup-key", Method: "GET", Status: 401, Problem: "unauthenticated"},
	}
	if len(seen) != 5 || !slices.Equal(seen[:4], want) {
		t.Errorf("observed %+v", seen)
	}
	if last := seen[len(seen)-1]; last.Status != 404 && last.Status != httpapi.StatusClientGone {
		t.Errorf("a client that left: %+v", last)
	}
}

func BenchmarkTrivialGet(b *testing.B) {
	s := newService(b, nil)
	b.Run("not-found", func(b *testing.B) {
		r := httptest.NewRequest("GET", "/nowhere", nil)
		w := &discard{header: http.Header{}}
		b.ReportAllocs()
		for b.Loop() {
			s.handler.ServeHTTP(w, r)
		}
	})
	b.Run("openapi", func(b *testing.B) {
		r := httptest.NewRequest("GET", "/openapi.json", nil)
		w := &discard{header: http.Header{}}
		b.ReportAllocs()
		for b.Loop() {
			s.handler.ServeHTTP(w, r)
		}
	})
	b.Run("vault", func(b *testing.B) {
		r := httptest.NewRequest("GET", "/v1/vault", nil)
		w := &discard{header: http.Header{}}
		b.ReportAllocs()
		for b.Loop() {
			s.handler.ServeHTTP(w, r)
		}
	})
}
