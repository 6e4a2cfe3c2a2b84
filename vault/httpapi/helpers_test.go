package httpapi_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

const (
	vaultID = "vault.test"
	tenant  = "app"
	kid     = "key-1"
)

// clock is what the handler takes for the time; it moves only by hand.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now().Truncate(time.Second)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// tenantList is a source of tenants whose answer, faults and speed a test sets.
type tenantList struct {
	mu      sync.Mutex
	tenants []vault.Tenant
	err     error
	asked   int
	gate    chan struct{} // if set, answers wait for it
}

func (l *tenantList) Tenants(ctx context.Context) ([]vault.Tenant, error) {
	l.mu.Lock()
	l.asked++
	gate := l.gate
	l.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.tenants), l.err
}

func (l *tenantList) set(err error, tenants ...vault.Tenant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tenants, l.err = tenants, err
}

func (l *tenantList) questions() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.asked
}

// syncBuffer is a log that many goroutines write to.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// service is a handler over a real vault with a token in software and a store in memory:
// their evaluations and writes can be counted, and they can be made to fail.
// TestStory has the real ones.
type service struct {
	t       testing.TB
	handler http.Handler
	vault   *vault.Vault
	token   *vaulttest.SoftToken
	store   *vaulttest.MemoryStore
	tenants *tenantList
	clock   *clock
	log     *syncBuffer
	signer  ed25519.PrivateKey
}

// noDelays is a policy that never makes a test wait.
func noDelays() vault.Policy {
	p := vault.DefaultPolicy()
	p.Delays = nil
	return p
}

// newService makes a service; edit, if any, changes its configuration.
func newService(t testing.TB, edit func(*httpapi.Config)) *service {
	t.Helper()
	token := vaulttest.NewSoftToken()
	return newServiceOver(t, token, token, edit)
}

// newServiceOver is newService with what the vault takes for its token.
func newServiceOver(t testing.TB, soft *vaulttest.SoftToken, token vault.Token, edit func(*httpapi.Config)) *service {
	t.Helper()
	s := &service{t: t, token: soft, tenants: &tenantList{}, clock: newClock(), log: &syncBuffer{}}
	s.store = vaulttest.NewMemoryStore(s.clock.Now)
	var err error
	log := slog.New(slog.NewJSONHandler(s.log, nil))
	if s.vault, err = vault.New(vault.Config{ID: vaultID, Store: s.store, Token: token, Log: log}); err != nil {
		t.Fatal(err)
	}
	var public ed25519.PublicKey
	if public, s.signer, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	s.tenants.set(nil, vault.Tenant{ID: tenant, DirectEnrolment: true, Policy: noDelays(), Keys: []vault.TenantKey{{ID: kid, PublicKey: pkix(t, public)}}})
	config := httpapi.Config{
		Vault: s.vault, VaultID: vaultID, Tenants: s.tenants, Log: log, Now: s.clock.Now,
		Limits: httpapi.Limits{
			EnrolmentsPerUser:   httpapi.RateLimit{PerSecond: 1000, Burst: 1000},
			EnrolmentsPerTenant: httpapi.RateLimit{PerSecond: 1000, Burst: 1000},
			RequestsPerUser:     httpapi.RateLimit{PerSecond: 1e6, Burst: 1e6},
			RequestsPerTenant:   httpapi.RateLimit{PerSecond: 1e6, Burst: 1e6},
		},
	}
	if edit != nil {
		edit(&config)
	}
	if s.handler, err = httpapi.New(config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the service's log:\n%s", s.log)
		}
	})
	return s
}

// in is the same service, for a subtest or a fuzz target.
func (s *service) in(t testing.TB) *service {
	out := *s
	out.t = t
	return &out
}

func pkix(t testing.TB, public crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// claimsFor are those of a good token.
func (s *service) claimsFor(user string) jwt.MapClaims {
	return jwt.MapClaims{"iss": tenant, "sub": user, "aud": vaultID, "exp": s.clock.Now().Add(5 * time.Minute).Unix()}
}

// signed signs claims as given, whatever they are.
func signed(t testing.TB, method jwt.SigningMethod, key any, kid string, claims jwt.Claims) string {
	t.Helper()
	token := jwt.NewWithClaims(method, claims)
	if kid != "" {
		token.Header["kid"] = kid
	}
	text, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (s *service) tokenFor(user string) string {
	return signed(s.t, jwt.SigningMethodEdDSA, s.signer, kid, s.claimsFor(user))
}

// reply is an answer, read.
type reply struct {
	status  int
	header  http.Header
	body    []byte
	problem api.Problem // if it is one
}

func (r reply) String() string { return fmt.Sprintf("%d %s", r.status, r.body) }

// into decodes a success.
func into[T any](t testing.TB, r reply) (out T) {
	t.Helper()
	if r.status != http.StatusOK {
		t.Fatalf("got %v", r)
	}
	d := json.NewDecoder(bytes.NewReader(r.body))
	d.DisallowUnknownFields()
	if err := d.Decode(&out); err != nil {
		t.Fatalf("%v in %s", err, r.body)
	}
	return out
}

// wantProblem checks status and type.
func wantProblem(t testing.TB, r reply, kind string) {
	t.Helper()
	if r.problem.Type != kind {
		t.Fatalf("want a problem %s, got %v", kind, r)
	}
}

// send serves a request and checks what holds of every answer.
func (s *service) send(r *http.Request) reply {
	s.t.Helper()
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	return read(s.t, w.Result())
}

// problemMembers are those that a problem can have.
var problemMembers = []string{"type", "title", "status", "detail", "instance", "field", "attempts_left", "next_attempt_at", "retry_after"}

var problemStatus = map[string]int{
	api.OHTTPKey: 400, api.RelayRequired: 403,
	api.InvalidRequest: 400, api.Unauthenticated: 401, api.Forbidden: 403, api.WrongPassword: 403, api.NotEnrolled: 404,
	api.NotFound: 404, api.MethodNotAllowed: 405, api.Conflict: 409, api.KeyDestroyed: 410, api.TooLarge: 413, api.MediaType: 415,
	api.TooEarly: 429, api.RateLimited: 429, api.Internal: 500,
	api.TokenUnavailable: 503, api.StoreUnavailable: 503, api.Busy: 503, api.AccountFault: 503,
}

// read reads an answer and checks what holds of every one.
func read(t testing.TB, res *http.Response) reply {
	t.Helper()
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	r := reply{status: res.StatusCode, header: res.Header, body: body}
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("%s: in %v %v", fmt.Sprintf(format, args...), r, r.header)
	}
	if r.header.Get("X-Request-Id") == "" || r.header.Get("X-Content-Type-Options") != "nosniff" || r.header.Get("Cache-Control") == "" {
		fail("a header is missing")
	}
	if r.header.Get("Link") != "" || bytes.Contains(body, []byte(`"$schema":`)) {
		fail("there is a link to a schema")
	}
	if r.status == http.StatusOK {
		if r.header.Get("Content-Type") != "application/json" {
			fail("wrong media type")
		}
		return r
	}
	if r.header.Get("Content-Type") != api.ProblemMediaType || r.header.Get("Cache-Control") != "no-store" {
		fail("wrong headers for a problem")
	}
	var members map[string]any
	if err := json.Unmarshal(body, &members); err != nil {
		fail("%v", err)
	}
	for name := range members {
		if !slices.Contains(problemMembers, name) {
			fail("a problem has no member %q", name)
		}
	}
	if err := json.Unmarshal(body, &r.problem); err != nil {
		fail("%v", err)
	}
	p := r.problem
	if problemStatus[p.Type] != r.status || p.Status != r.status || p.Title == "" || p.Detail == "" {
		fail("the problem does not conform")
	}
	if p.Instance != r.header.Get("X-Request-Id") {
		fail("the instance is not the request id")
	}
	if (p.RetryAfter != nil) != (r.header.Get("Retry-After") != "") || p.RetryAfter != nil && fmt.Sprint(*p.RetryAfter) != r.header.Get("Retry-After") {
		fail("Retry-After and retry_after differ")
	}
	if (r.status == 401) != (r.header.Get("WWW-Authenticate") != "") || (r.status == 405) != (r.header.Get("Allow") != "") {
		fail("a header that belongs to the status is missing")
	}
	return r
}

// pathOf is a user's path; rest begins with a slash or is empty.
func pathOf(user, rest string) string {
	return "/v1/users/" + url.PathEscape(user) + "/backup-key" + rest
}

// newRequest makes a request of a user with a good token. body is sent as it is if it is
// a string, marshalled if it is anything else, and left out if it is nil.
func (s *service) newRequest(method, path, user string, body any) *http.Request {
	s.t.Helper()
	var reader io.Reader
	switch body := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(body)
	default:
		raw, err := json.Marshal(body)
		if err != nil {
			s.t.Fatal(err)
		}
		reader = bytes.NewReader(raw)
	}
	r := httptest.NewRequest(method, path, reader)
	r.Header.Set("Authorization", "Bearer "+s.tokenFor(user))
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	return r
}

func (s *service) call(method, user, rest string, body any) reply {
	s.t.Helper()
	return s.send(s.newRequest(method, pathOf(user, rest), user, body))
}

func (s *service) status(user string) api.Status {
	s.t.Helper()
	return into[api.Status](s.t, s.call(http.MethodGet, user, "", nil))
}

// records returns the log's records of requests.
func (s *service) records() []map[string]any {
	s.t.Helper()
	var out []map[string]any
	for line := range strings.Lines(s.log.String()) {
		var record map[string]any
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			s.t.Fatal(err)
		}
		if record["msg"] == "request" {
			out = append(out, record)
		}
	}
	return out
}

// with returns a copy of m with one entry changed; a nil value removes it.
func with(m jwt.MapClaims, name string, value any) jwt.MapClaims {
	out := maps.Clone(m)
	if out[name] = value; value == nil {
		delete(out, name)
	}
	return out
}
