package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/backup-key-vault/bkv/store/storetest"
)

// app is the back end on a real database, with a vault that answers what the test says.
type app struct {
	t      *testing.T
	url    string
	log    *bytes.Buffer
	public ed25519.PublicKey
}

func newApp(t *testing.T, vault http.Handler) *app {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), storetest.Empty(t).OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	for range 2 { // a start, and the next one
		if _, err := pool.Exec(t.Context(), schema); err != nil {
			t.Fatal(err)
		}
	}
	behind := httptest.NewServer(vault)
	t.Cleanup(behind.Close)
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &app{t: t, log: &bytes.Buffer{}, public: public}
	server := httptest.NewServer(newServer(config{
		db: pool, log: slog.New(slog.NewJSONHandler(a.log, nil)), vaultURL: behind.URL, fingerprint: "print",
		sdk:    fstest.MapFS{"bkv.wasm": {Data: []byte("plain")}, "bkv.wasm.gz": {Data: []byte("compressed")}},
		tokens: tokens{vault: "the.vault", tenant: "chat", kid: "1", key: private},
	}))
	t.Cleanup(server.Close)
	a.url = server.URL
	return a
}

// user is a browser.
type user struct {
	*app
	http http.Client
}

func (a *app) user(name string) *user {
	a.t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		a.t.Fatal(err)
	}
	u := &user{app: a, http: http.Client{Jar: jar}}
	if name != "" {
		u.want(200, "POST", "/api/accounts", credentials{name, "an account password"})
		u.want(200, "PUT", "/api/device-key", map[string]any{"key": make([]byte, 65)})
	}
	return u
}

func (u *user) want(status int, method, path string, body any, header ...string) []byte {
	u.t.Helper()
	raw, ok := body.([]byte)
	if !ok && body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			u.t.Fatal(err)
		}
	}
	r, err := http.NewRequestWithContext(u.t.Context(), method, u.url+path, bytes.NewReader(raw))
	if err != nil {
		u.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	response, err := u.http.Do(r)
	if err != nil {
		u.t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	out, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != status {
		u.t.Fatalf("%s %s: %d, want %d (%v): %s", method, path, response.StatusCode, status, err, out)
	}
	if csp := response.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe-inline") {
		u.t.Errorf("%s %s: the policy is %q", method, path, csp)
	}
	return out
}

func nothing(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }

func TestAccounts(t *testing.T) {
	t.Parallel()
	a := newApp(t, http.HandlerFunc(nothing))
	alice := a.user("Alice")
	alice.want(200, "GET", "/api/me", nil)
	a.user("").want(409, "POST", "/api/accounts", credentials{"alice", "another password"})
	for _, c := range []credentials{{"a", "an account password"}, {"alice 2", "an account password"}, {"carol", "short"}, {"", ""}} {
		a.user("").want(400, "POST", "/api/accounts", c)
	}
	stranger := a.user("")
	stranger.want(403, "POST", "/api/session", credentials{"alice", "a wrong password"})
	stranger.want(403, "POST", "/api/session", credentials{"nobody", "a wrong password"})
	stranger.want(400, "POST", "/api/session", []byte(`{"name":"alice","password":"x","more":1}`))
	for _, path := range []string{"/api/me", "/api/backup", "/api/backup/blob", "/api/messages?after=0", "/vault/v1/vault"} {
		stranger.want(401, "GET", path, nil)
	}
	stranger.want(200, "POST", "/api/session", credentials{" ALICE ", "an account password"})
	stranger.want(200, "DELETE", "/api/session", nil)
	stranger.want(401, "GET", "/api/me", nil)
	// Guessing is slowed, and another page cannot act for the user.
	l := logins{}
	for range 20 {
		if !l.allow("carol") {
			t.Fatal("a sign-in is refused too early")
		}
	}
	if l.allow("carol") || !l.allow("dora") {
		t.Error("after 20 sign-ins at once another is allowed, or another user's is not")
	}
	alice.want(403, "DELETE", "/api/backup", nil, "Sec-Fetch-Site", "cross-site")
}

func TestMessagesArriveOnce(t *testing.T) {
	t.Parallel()
	a := newApp(t, http.HandlerFunc(nothing))
	alice, bob := a.user("alice"), a.user("bob")
	m := envelope{ClientID: "0123456789abcdef", To: "bob", SenderKey: make([]byte, 65), RecipientKey: make([]byte, 65), Sealed: make([]byte, 40)}
	alice.want(200, "POST", "/api/messages", m)
	alice.want(200, "POST", "/api/messages", m)
	var got []envelope
	if err := json.Unmarshal(bob.want(200, "GET", "/api/messages?after=0", nil), &got); err != nil || len(got) != 1 || got[0].From != "alice" {
		t.Fatalf("%v, %v", got, err)
	}
	if out := bob.want(200, "GET", "/api/messages?after="+strconv.FormatInt(got[0].ID, 10), nil); string(out) != "[]" {
		t.Errorf("after it: %s", out)
	}
	m.To = "nobody"
	alice.want(404, "POST", "/api/messages", m)
	alice.want(400, "GET", "/api/messages?after=x", nil)
	alice.want(413, "POST", "/api/messages", bytes.Repeat([]byte(" "), maxMessageBody+1))
}

// Of two devices that replace a backup, one is told; a version never comes back.
func TestBackupVersions(t *testing.T) {
	t.Parallel()
	alice := newApp(t, http.HandlerFunc(nothing)).user("alice")
	if out := alice.want(200, "GET", "/api/backup", nil); string(out) != `{"backup":null}` {
		t.Errorf("before the first: %s", out)
	}
	alice.want(404, "GET", "/api/backup/blob", nil)
	put := func(status int, version int64, b backup) int64 {
		t.Helper()
		var answer struct{ Backup backup }
		out := alice.want(status, "PUT", "/api/backup", b, "If-Match", strconv.FormatInt(version, 10))
		if status == 200 {
			if err := json.Unmarshal(out, &answer); err != nil || answer.Backup.Version <= version || answer.Backup.Blob != nil {
				t.Fatalf("%s (%v)", out, err)
			}
		}
		return answer.Backup.Version
	}
	b := backup{Mode: "password", Blob: []byte("first")}
	put(409, 7, b)
	first := put(200, 0, b)
	put(409, 0, b)
	b.Blob, b.Passkeys = []byte("second"), []passkey{{ID: []byte{1}, Wrapped: []byte{2}}}
	second := put(200, first, b)
	put(409, first, b)
	if out := alice.want(200, "GET", "/api/backup/blob", nil); string(out) != "second" {
		t.Errorf("stored: %q", out)
	}
	put(400, second, backup{Mode: "nonsense", Blob: []byte("x")})
	put(400, second, backup{Mode: "password"})
	put(400, second, backup{Mode: "passkey", Blob: []byte("x")})
	alice.want(428, "PUT", "/api/backup", b)
	alice.want(200, "DELETE", "/api/backup", nil)
	alice.want(200, "DELETE", "/api/backup", nil)
	put(409, second, b)
	if third := put(200, 0, b); third == first || third == second {
		t.Errorf("version %d came back", third)
	}
}

// What the page sends goes to the vault as it is, but for the token, and back.
func TestForward(t *testing.T) {
	t.Parallel()
	seen := make(chan *http.Request, 10)
	a := newApp(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- r
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Retry-After", "7")
		w.Header().Set("Set-Cookie", "no=no")
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = w.Write(append([]byte("echo "), body...))
	}))
	alice := a.user("alice")
	var me map[string]string
	if err := json.Unmarshal(alice.want(200, "GET", "/api/me", nil), &me); err != nil {
		t.Fatal(err)
	}
	out := alice.want(429, "POST", "/vault"+forwardedPath, []byte("capsule"), "Authorization", "Bearer mine", "Content-Type", "message/ohttp-req", "X-Other", "1")
	r := <-seen
	if string(out) != "echo capsule" || r.URL.Path != forwardedPath || r.Header.Get("Content-Type") != "message/ohttp-req" || r.Header.Get("X-Other") != "" || r.Header.Get("Cookie") != "" {
		t.Errorf("%q; the vault saw %v", out, r)
	}
	claims := jwt.RegisteredClaims{}
	token, err := jwt.ParseWithClaims(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), &claims,
		func(*jwt.Token) (any, error) { return a.public, nil }, jwt.WithAudience("the.vault"), jwt.WithIssuer("chat"), jwt.WithSubject(me["user"]), jwt.WithExpirationRequired())
	if err != nil || token.Header["kid"] != "1" {
		t.Errorf("the token: %v", err)
	}
	alice.want(413, "POST", "/vault"+forwardedPath, make([]byte, maxForwardBytes+1))
	alice.want(404, "GET", "/vault/metrics", nil)
	alice.want(404, "GET", "/vault/v1/users/"+me["user"]+"/backup-key", nil)
	alice.want(404, "GET", "/vault/v1/../metrics", nil)
	if strings.Contains(a.log.String(), me["user"]) || strings.Contains(a.log.String(), "capsule") || !strings.Contains(a.log.String(), "request") {
		t.Errorf("the log:\n%s", a.log)
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	u := newApp(t, http.HandlerFunc(nothing)).user("")
	for _, path := range []string{"/", "/app.css", "/js/app.js", "/icon.svg"} {
		u.want(200, "GET", path, nil)
	}
	u.want(404, "GET", "/schema.sql", nil)
	u.want(404, "GET", "/sdk/nothing", nil)
	if out := u.want(200, "GET", "/sdk/bkv.wasm", nil, "Accept-Encoding", "gzip"); string(out) != "compressed" {
		t.Errorf("%q", out)
	}
	if out := u.want(200, "GET", "/sdk/bkv.wasm", nil, "Accept-Encoding", "identity"); string(out) != "plain" {
		t.Errorf("%q", out)
	}
	// The page loads nothing from elsewhere, and has no script or style of its own in it.
	html := string(u.want(200, "GET", "/", nil))
	for _, forbidden := range []string{"http://", "https://", "<style", "style=", "onclick"} {
		if strings.Contains(html, forbidden) {
			t.Errorf("%q is in the page", forbidden)
		}
	}
}

// forwardedPath is the one that sealed requests take.
const forwardedPath = "/v1/relay"
