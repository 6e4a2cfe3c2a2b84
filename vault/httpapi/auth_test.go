package httpapi_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// bring asks for anna's status with an Authorization header. A request that was let in is
// answered not-enrolled.
func (s *service) bring(authorization ...string) reply {
	s.t.Helper()
	r := s.newRequest(http.MethodGet, pathOf("anna", ""), "anna", nil)
	r.Header["Authorization"] = authorization
	return s.send(r)
}

// raw signs header and claims as they are written with the service's key.
func (s *service) raw(header, claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	text := encode([]byte(header)) + "." + encode([]byte(claims))
	return text + "." + encode(ed25519.Sign(s.signer, []byte(text)))
}

func TestAlgorithms(t *testing.T) {
	s := newService(t, nil)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	t.Setenv("GODEBUG", "rsa1024min=0") // to make the key that must be refused
	rsa1024, err := rsa.GenerateKey(rand.Reader, 1024)
	must(t, err)

	keys := s.tenants.tenants[0].Keys
	add := func(id string, der []byte) { keys = append(keys, vault.TenantKey{ID: id, PublicKey: der}) }
	add("p256", pkix(t, &p256.PublicKey))
	add("p384", pkix(t, &p384.PublicKey))
	add("rsa2048", pkix(t, &rsa2048.PublicKey))
	add("rsa1024", pkix(t, &rsa1024.PublicKey))
	add("garbage", []byte("not DER"))
	s.tenants.set(nil, vault.Tenant{ID: tenant, DirectEnrolment: true, Policy: noDelays(), Keys: keys})

	edPublic := pkix(t, s.signer.Public())
	good := s.claimsFor("anna")
	for _, c := range []struct {
		name   string
		method jwt.SigningMethod
		key    any
		kid    string
		want   string
	}{
		{"EdDSA", jwt.SigningMethodEdDSA, s.signer, kid, api.NotEnrolled},
		{"ES256", jwt.SigningMethodES256, p256, "p256", api.NotEnrolled},
		{"RS256", jwt.SigningMethodRS256, rsa2048, "rsa2048", api.NotEnrolled},

		{"none", jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, kid, api.Unauthenticated},
		{"HS256 with the public key as its secret", jwt.SigningMethodHS256, edPublic, kid, api.Unauthenticated},
		{"HS256 with the RSA public key as its secret", jwt.SigningMethodHS256, pkix(t, &rsa2048.PublicKey), "rsa2048", api.Unauthenticated},
		{"ES384", jwt.SigningMethodES384, p384, "p384", api.Unauthenticated},
		{"RS384 with a known key", jwt.SigningMethodRS384, rsa2048, "rsa2048", api.Unauthenticated},
		{"RS512 with a known key", jwt.SigningMethodRS512, rsa2048, "rsa2048", api.Unauthenticated},
		{"PS256 with a known key", jwt.SigningMethodPS256, rsa2048, "rsa2048", api.Unauthenticated},
		{"RS256 with 1024 bits", jwt.SigningMethodRS256, rsa1024, "rsa1024", api.Unauthenticated},
		{"a key that is no DER", jwt.SigningMethodEdDSA, s.signer, "garbage", api.Unauthenticated},
		{"an algorithm that is not its key's", jwt.SigningMethodES256, p256, "rsa2048", api.Unauthenticated},
		{"another key's kid", jwt.SigningMethodEdDSA, s.signer, "p256", api.Unauthenticated},
		{"an unknown kid", jwt.SigningMethodEdDSA, s.signer, "key-9", api.Unauthenticated},
		{"no kid", jwt.SigningMethodEdDSA, s.signer, "", api.Unauthenticated},
		{"a key of nobody", jwt.SigningMethodEdDSA, newEd25519(t), kid, api.Unauthenticated},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantProblem(t, s.in(t).bring("Bearer "+signed(t, c.method, c.key, c.kid, good)), c.want)
		})
	}
	for _, unusable := range []string{"p384", "rsa1024", "garbage"} {
		if n := strings.Count(s.log.String(), `"kid":"`+unusable+`"`); n != 1 {
			t.Errorf("key %s was reported %d times, want once", unusable, n)
		}
	}
}

func TestClaims(t *testing.T) {
	s := newService(t, nil)
	good := s.claimsFor("anna")
	in := func(d time.Duration) int64 { return s.clock.Now().Add(d).Unix() }
	for _, c := range []struct {
		name   string
		claims jwt.MapClaims
		want   string
	}{
		{"good", good, api.NotEnrolled},
		{"several audiences", with(good, "aud", []string{"other", vaultID}), api.NotEnrolled},
		{"claims that the vault does not read", with(good, "jti", "x"), api.NotEnrolled},
		{"exp ten minutes ahead", with(good, "exp", in(10*time.Minute)), api.NotEnrolled},
		{"exp with a fraction", with(good, "exp", float64(in(time.Minute))+0.5), api.NotEnrolled},
		{"expired within the leeway", with(good, "exp", in(-29*time.Second)), api.NotEnrolled},
		{"nbf within the leeway", with(good, "nbf", in(29*time.Second)), api.NotEnrolled},

		{"expired", with(good, "exp", in(-31*time.Second)), api.Unauthenticated},
		{"exp too far", with(good, "exp", in(10*time.Minute+31*time.Second)), api.Unauthenticated},
		{"exp in a year", with(good, "exp", in(365*24*time.Hour)), api.Unauthenticated},
		{"exp beyond all times", with(good, "exp", 1e300), api.Unauthenticated},
		{"exp as text", with(good, "exp", "tomorrow"), api.Unauthenticated},
		{"no exp", with(good, "exp", nil), api.Unauthenticated},
		{"nbf ahead", with(good, "nbf", in(31*time.Second)), api.Unauthenticated},
		{"iat ahead", with(good, "iat", in(31*time.Second)), api.Unauthenticated},
		{"another audience", with(good, "aud", "other"), api.Unauthenticated},
		{"no audience", with(good, "aud", nil), api.Unauthenticated},
		{"an empty list of audiences", with(good, "aud", []string{}), api.Unauthenticated},
		{"an audience that is no text", with(good, "aud", 7), api.Unauthenticated},
		{"another issuer", with(good, "iss", "other"), api.Unauthenticated},
		{"no issuer", with(good, "iss", nil), api.Unauthenticated},
		{"an issuer in another case", with(good, "iss", "APP"), api.Unauthenticated},
		{"no subject", with(good, "sub", nil), api.Unauthenticated},
		{"an empty subject", with(good, "sub", ""), api.Unauthenticated},
		{"a subject that is no text", with(good, "sub", 7), api.Unauthenticated},

		{"another subject", with(good, "sub", "boris"), api.Forbidden},
		{"a subject in another case", with(good, "sub", "Anna"), api.Forbidden},
		{"a subject with a space", with(good, "sub", "anna "), api.Forbidden},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantProblem(t, s.in(t).bring("Bearer "+signed(t, jwt.SigningMethodEdDSA, s.signer, kid, c.claims)), c.want)
		})
	}
}

// TestRawTokens signs what no library writes.
func TestRawTokens(t *testing.T) {
	s := newService(t, nil)
	const header = `{"alg":"EdDSA","kid":"key-1"}`
	exp := `"exp":` + strconv.FormatInt(s.clock.Now().Add(time.Minute).Unix(), 10)
	claims := `{"iss":"app","aud":"vault.test","sub":"anna",` + exp + `}`
	for _, c := range []struct{ name, header, claims, want string }{
		{"good", header, claims, api.NotEnrolled},
		{"sub twice", header, `{"iss":"app","aud":"vault.test","sub":"boris","sub":"anna",` + exp + `}`, api.Unauthenticated},
		{"sub in another case beside it", header, `{"iss":"app","aud":"vault.test","sub":"boris","SUB":"anna",` + exp + `}`, api.Forbidden},
		{"sub in another case alone", header, `{"iss":"app","aud":"vault.test","Sub":"anna",` + exp + `}`, api.Unauthenticated},
		{"invalid UTF-8 in sub", header, `{"iss":"app","aud":"vault.test","sub":"ann` + "\xff" + `",` + exp + `}`, api.Unauthenticated},
		{"claims that are null", header, `null`, api.Unauthenticated},
		{"claims that are a list", header, `[]`, api.Unauthenticated},
		{"claims that are no JSON", header, `{`, api.Unauthenticated},
		{"a header that is null", `null`, claims, api.Unauthenticated},
		{"a header that is no JSON", `{`, claims, api.Unauthenticated},
		{"alg that is no text", `{"alg":7,"kid":"key-1"}`, claims, api.Unauthenticated},
		{"alg in another case", `{"alg":"eddsa","kid":"key-1"}`, claims, api.Unauthenticated},
		{"kid that is no text", `{"alg":"EdDSA","kid":["key-1"]}`, claims, api.Unauthenticated},
		{"an extension that must be understood", `{"alg":"EdDSA","kid":"key-1","crit":["x"],"x":1}`, claims, api.Unauthenticated},
	} {
		t.Run(c.name, func(t *testing.T) { wantProblem(t, s.in(t).bring("Bearer "+s.raw(c.header, c.claims)), c.want) })
	}
}

func TestAuthorizationHeader(t *testing.T) {
	s := newService(t, nil)
	token := s.tokenFor("anna")
	header, rest, _ := strings.Cut(token, ".")
	body, signature, _ := strings.Cut(rest, ".")
	for _, c := range []struct {
		name   string
		values []string
		want   string
	}{
		{"good", []string{"Bearer " + token}, api.NotEnrolled},
		{"lower case", []string{"bearer " + token}, api.NotEnrolled},
		{"several spaces", []string{"Bearer   " + token}, api.NotEnrolled},
		{"none", nil, api.Unauthenticated},
		{"empty", []string{""}, api.Unauthenticated},
		{"no token", []string{"Bearer"}, api.Unauthenticated},
		{"an empty token", []string{"Bearer "}, api.Unauthenticated},
		{"another scheme", []string{"Basic " + token}, api.Unauthenticated},
		{"no scheme", []string{token}, api.Unauthenticated},
		{"twice", []string{"Bearer " + token, "Bearer " + token}, api.Unauthenticated},
		{"two tokens", []string{"Bearer " + token + " " + token}, api.Unauthenticated},
		{"a comma", []string{"Bearer " + token + ", Bearer " + token}, api.Unauthenticated},
		{"two parts", []string{"Bearer " + header + "." + body}, api.Unauthenticated},
		{"four parts", []string{"Bearer " + token + ".x"}, api.Unauthenticated},
		{"no signature", []string{"Bearer " + header + "." + body + "."}, api.Unauthenticated},
		{"a signature cut short", []string{"Bearer " + token[:len(token)-2]}, api.Unauthenticated},
		{"a padded signature", []string{"Bearer " + token + "=="}, api.Unauthenticated},
		{"stray bits in the signature's last letter", []string{"Bearer " + header + "." + body + "." + stray(signature)}, api.Unauthenticated},
		{"garbage", []string{"Bearer ......"}, api.Unauthenticated},
		{"too long", []string{"Bearer " + strings.Repeat("a", 4097)}, api.Unauthenticated},
		{"huge", []string{"Bearer " + strings.Repeat("a.", 1<<19)}, api.Unauthenticated},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := s.in(t).bring(c.values...)
			wantProblem(t, r, c.want)
			challenge := r.header.Get("WWW-Authenticate")
			if len(c.values) == 0 && challenge != "Bearer" ||
				len(c.values) > 0 && c.want == api.Unauthenticated && challenge != `Bearer error="invalid_token"` {
				t.Errorf("WWW-Authenticate is %q", challenge)
			}
		})
	}
	// A long token that is good otherwise.
	wantProblem(t, s.bring("Bearer "+signed(t, jwt.SigningMethodEdDSA, s.signer, kid, with(s.claimsFor("anna"), "pad", strings.Repeat("x", 4096)))), api.Unauthenticated)
}

// stray sets a bit that the last letter of a 64-byte signature must not have.
func stray(signature string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, signature[len(signature)-1])
	return signature[:len(signature)-1] + string(alphabet[last|1])
}

func TestRotation(t *testing.T) {
	s := newService(t, nil)
	old := s.tenants.tenants[0]
	next := newEd25519(t)
	bring := func(key ed25519.PrivateKey, kid string) reply {
		t.Helper()
		return s.bring("Bearer " + signed(t, jwt.SigningMethodEdDSA, key, kid, s.claimsFor("anna")))
	}
	wantProblem(t, bring(s.signer, kid), api.NotEnrolled)
	wantProblem(t, bring(next, "key-2"), api.Unauthenticated)

	// A new key is found a second later, without waiting for the next refresh.
	both := old
	both.Keys = append(both.Keys[:1:1], vault.TenantKey{ID: "key-2", PublicKey: pkix(t, next.Public())})
	s.tenants.set(nil, both)
	s.clock.advance(time.Second)
	wantProblem(t, bring(next, "key-2"), api.NotEnrolled)
	wantProblem(t, bring(s.signer, kid), api.NotEnrolled)

	// A revoked key is refused after half a minute, however quiet it was.
	both.Keys = both.Keys[1:]
	s.tenants.set(nil, both)
	s.clock.advance(30 * time.Second)
	wantProblem(t, bring(s.signer, kid), api.Unauthenticated)
	wantProblem(t, bring(next, "key-2"), api.NotEnrolled)

	// The same kid with other key material is another key.
	s.tenants.set(nil, old)
	s.clock.advance(30 * time.Second)
	wantProblem(t, bring(next, kid), api.Unauthenticated)
	wantProblem(t, bring(s.signer, kid), api.NotEnrolled)
	reused := old
	reused.Keys = []vault.TenantKey{{ID: kid, PublicKey: pkix(t, next.Public())}}
	s.tenants.set(nil, reused)
	s.clock.advance(30 * time.Second)
	wantProblem(t, bring(next, kid), api.NotEnrolled)
	wantProblem(t, bring(s.signer, kid), api.Unauthenticated)
	s.tenants.set(nil, old)
	s.clock.advance(30 * time.Second)

	// A tenant that is gone.
	s.tenants.set(nil)
	s.clock.advance(30 * time.Second)
	wantProblem(t, bring(s.signer, kid), api.Unauthenticated)
}

func TestAnotherTenantsKey(t *testing.T) {
	s := newService(t, nil)
	other := newEd25519(t)
	s.tenants.set(nil, s.tenants.tenants[0],
		vault.Tenant{ID: "other", DirectEnrolment: true, Policy: noDelays(), Keys: []vault.TenantKey{{ID: kid, PublicKey: pkix(t, other.Public())}, {ID: "other-1", PublicKey: pkix(t, other.Public())}}})
	bring := func(key ed25519.PrivateKey, kid, iss string) reply {
		t.Helper()
		return s.bring("Bearer " + signed(t, jwt.SigningMethodEdDSA, key, kid, with(s.claimsFor("anna"), "iss", iss)))
	}
	wantProblem(t, bring(other, kid, "other"), api.NotEnrolled)
	wantProblem(t, bring(other, kid, tenant), api.Unauthenticated)
	wantProblem(t, bring(other, "other-1", tenant), api.Unauthenticated)
	wantProblem(t, bring(s.signer, kid, "other"), api.Unauthenticated)
}

// TestKeysAreCached counts the questions to the store.
func TestKeysAreCached(t *testing.T) {
	s := newService(t, nil)
	good := func() { t.Helper(); wantProblem(t, s.bring("Bearer "+s.tokenFor("anna")), api.NotEnrolled) }
	unknown := func() {
		t.Helper()
		wantProblem(t, s.bring("Bearer "+signed(t, jwt.SigningMethodEdDSA, s.signer, "key-9", s.claimsFor("anna"))), api.Unauthenticated)
	}
	want := func(questions int) {
		t.Helper()
		if got := s.tenants.questions(); got != questions {
			t.Fatalf("the store was asked %d times, want %d", got, questions)
		}
	}
	for range 5 {
		good()
	}
	want(1)
	for range 5 { // the first question was less than a second ago
		unknown()
	}
	want(1)
	s.clock.advance(time.Second)
	for range 5 {
		unknown()
	}
	want(2)
	s.clock.advance(30 * time.Second)
	good()
	good()
	want(3)
}

// TestOneQuestionForAll has many requests wait for one answer of a slow store.
func TestOneQuestionForAll(t *testing.T) {
	s := newService(t, nil)
	s.tenants.gate = make(chan struct{})
	const n = 20
	replies := make(chan reply, n)
	var begun sync.WaitGroup
	for range n {
		r := s.newRequest(http.MethodGet, pathOf("anna", ""), "anna", nil)
		begun.Add(1)
		go func() {
			begun.Done()
			replies <- s.send(r)
		}()
	}
	begun.Wait()
	close(s.tenants.gate)
	for range n {
		wantProblem(t, <-replies, api.NotEnrolled)
	}
	if got := s.tenants.questions(); got != 1 {
		t.Errorf("the store was asked %d times", got)
	}
}

// TestKeysOutliveTheStore: five minutes, and no more.
func TestKeysOutliveTheStore(t *testing.T) {
	s := newService(t, nil)
	good := func() reply { t.Helper(); return s.bring("Bearer " + s.tokenFor("anna")) }
	wantProblem(t, good(), api.NotEnrolled)
	keys := s.tenants.tenants
	s.tenants.set(errors.New("connection refused to 10.0.0.7"))
	for range 9 {
		s.clock.advance(30 * time.Second)
		wantProblem(t, good(), api.NotEnrolled)
	}
	s.clock.advance(30 * time.Second)
	r := good()
	wantProblem(t, r, api.StoreUnavailable)
	if r.header.Get("Retry-After") != "2" || strings.Contains(string(r.body), "10.0.0.7") {
		t.Errorf("got %v", r)
	}
	s.tenants.set(nil, keys...)
	s.clock.advance(time.Second)
	wantProblem(t, good(), api.NotEnrolled)
}

func TestStoreDownFromTheStart(t *testing.T) {
	s := newService(t, nil)
	keys := s.tenants.tenants
	s.tenants.set(errors.New("no route"))
	wantProblem(t, s.bring("Bearer "+s.tokenFor("anna")), api.StoreUnavailable)
	wantProblem(t, s.bring(), api.Unauthenticated)
	s.tenants.set(nil, keys...)
	s.clock.advance(time.Second)
	wantProblem(t, s.bring("Bearer "+s.tokenFor("anna")), api.NotEnrolled)
}

func FuzzAuthorization(f *testing.F) {
	s := newService(f, nil)
	good := s.tokenFor("anna")
	for _, seed := range []string{
		"", "Bearer", "Bearer ", "Bearer " + good, "bearer  " + good, good, "Bearer " + good + good, "Bearer ..", "Bearer a.b.c",
		"Bearer " + s.raw(`{}`, `{}`), "Bearer " + s.raw(`{"alg":"none"}`, `null`), "Bearer " + s.raw(`{"alg":"EdDSA","kid":"key-1"}`, `{"exp":1e999}`),
		"Bearer " + s.raw(`{"alg":"EdDSA","kid":"key-1"}`, `{"iss":"app","aud":["vault.test"],"sub":"anna","exp":-1}`),
		"Basic YTpi", "Bearer " + strings.Repeat("A", 4096),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		r := s.in(t).bring(value)
		if r.problem.Type == api.Unauthenticated {
			return
		}
		// Whoever is let in has brought the good token.
		if r.problem.Type != api.NotEnrolled || !strings.HasSuffix(value, good) {
			t.Fatalf("%q was answered %v", value, r)
		}
	})
}

func BenchmarkToken(b *testing.B) {
	s := newService(b, nil)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(b, err)
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	must(b, err)
	keys := append(s.tenants.tenants[0].Keys,
		vault.TenantKey{ID: "p256", PublicKey: pkix(b, &p256.PublicKey)}, vault.TenantKey{ID: "rsa", PublicKey: pkix(b, &rsa2048.PublicKey)})
	s.tenants.set(nil, vault.Tenant{ID: tenant, DirectEnrolment: true, Policy: noDelays(), Keys: keys})
	for _, c := range []struct {
		method jwt.SigningMethod
		key    any
		kid    string
	}{{jwt.SigningMethodEdDSA, s.signer, kid}, {jwt.SigningMethodES256, p256, "p256"}, {jwt.SigningMethodRS256, rsa2048, "rsa"}} {
		b.Run(c.method.Alg(), func(b *testing.B) {
			// The forbidden answer comes right after the token's check.
			r := s.newRequest(http.MethodGet, pathOf("boris", ""), "anna", nil)
			r.Header.Set("Authorization", "Bearer "+signed(b, c.method, c.key, c.kid, s.claimsFor("anna")))
			w := &discard{header: http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				s.handler.ServeHTTP(w, r)
				if w.status != http.StatusForbidden {
					b.Fatalf("status %d", w.status)
				}
			}
		})
	}
}

// discard is a response that nobody reads.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(status int)      { d.status = status }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }

func newEd25519(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return key
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
