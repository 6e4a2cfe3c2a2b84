package client_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

const (
	vaultID = "vault.example"
	tenant  = "chat"
	keyID   = "2026-01"
)

// service is a real vault behind its real HTTP handler.
type service struct {
	t       testing.TB
	vault   *vault.Vault
	handler http.Handler
	pin     transcript.Fingerprint
	signer  ed25519.PrivateKey // the tenant's
	policy  vault.Policy
	strict  bool // the tenant does not trust its back end with passwords

	// Of a service in memory only.
	store *vaulttest.MemoryStore
	token *vaulttest.SoftToken
}

// Tenants has the one tenant.
func (s *service) Tenants(context.Context) ([]vault.Tenant, error) {
	public, err := x509.MarshalPKIXPublicKey(s.signer.Public())
	if err != nil {
		return nil, err
	}
	return []vault.Tenant{{ID: tenant, DirectEnrolment: !s.strict, Policy: s.policy, Keys: []vault.TenantKey{{ID: keyID, PublicKey: public}}}}, nil
}

// newService is a service with a software token and a store in memory.
func newService(t testing.TB, change ...func(*vault.Policy, *httpapi.Config)) *service {
	t.Helper()
	token, store := vaulttest.NewSoftToken(), vaulttest.NewMemoryStore(time.Now)
	s := serve(t, token, store, change...)
	s.token, s.store = token, store
	return s
}

func serve(t testing.TB, token vault.Token, store vault.Store, change ...func(*vault.Policy, *httpapi.Config)) *service {
	t.Helper()
	v, err := vault.New(vault.Config{ID: vaultID, Token: token, Store: store})
	if err != nil {
		t.Fatal(err)
	}
	_, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := v.Identity(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s := &service{
		t: t, vault: v, signer: signer, pin: identity.Fingerprint,
		policy: vault.Policy{MaxAttempts: 10, Grace: 7 * 24 * time.Hour},
	}
	config := httpapi.Config{Vault: v, VaultID: vaultID, Tenants: s, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))}
	for _, f := range change {
		f(&s.policy, &config)
	}
	if s.handler, err = httpapi.New(config); err != nil {
		t.Fatal(err)
	}
	return s
}

// jwt makes a token for a user, valid for some time.
func (s *service) jwt(user string, valid time.Duration) string {
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: tenant, Subject: user, Audience: jwt.ClaimStrings{vaultID}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(valid)),
	})
	token.Header["kid"] = keyID
	text, err := token.SignedString(s.signer)
	if err != nil {
		s.t.Fatal(err)
	}
	return text
}

// config is that of a user's device.
func (s *service) config(user string, transport client.Transport) client.Config {
	return client.Config{
		Transport: transport, Direct: true, Fingerprint: s.pin, Tenant: tenant, User: user,
		Token: func(context.Context) (string, error) { return s.jwt(user, 5*time.Minute), nil },
	}
}

// device is a client of a user, on a wire of its own.
func (s *service) device(user string) (*client.Client, *wire) {
	s.t.Helper()
	w := &wire{next: inProcess{s.handler}}
	return newClient(s.t, s.config(user, w)), w
}

// relayed is device over the relay channel.
func (s *service) relayed(user string) (*client.Client, *wire) {
	s.t.Helper()
	w := &wire{next: inProcess{s.handler}}
	config := s.config(user, w)
	config.Direct = false
	return newClient(s.t, config), w
}

func newClient(t testing.TB, c client.Config) *client.Client {
	t.Helper()
	d, err := client.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// inProcess hands requests to a handler, without a network between.
type inProcess struct{ handler http.Handler }

func (p inProcess) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	request := httptest.NewRequestWithContext(ctx, r.Method, r.Path, bytes.NewReader(r.Body))
	for name, value := range r.Header {
		request.Header.Set(name, value)
	}
	if len(r.Body) == 0 {
		request.Body = http.NoBody
	}
	answer := httptest.NewRecorder()
	p.handler.ServeHTTP(answer, request)
	out := &client.Response{Status: answer.Code, Header: map[string]string{}, Body: answer.Body.Bytes()}
	for name, values := range answer.Header() {
		out.Header[strings.ToLower(name)] = values[0]
	}
	return out, nil
}

// sent is one request as it left the device, and the answer as it arrived there (nil: none did).
type sent struct {
	step    string // method and last part of the path, without the user
	request client.Request
	answer  *client.Response
}

// fault is what becomes of one request.
type fault string

const (
	dropRequest fault = "request lost"
	dropReply   fault = "reply lost"
	duplicate   fault = "request doubled"
	busyBefore  fault = "503 and not done"
	busyAfter   fault = "503 and done"
	gateway     fault = "502 by a proxy, done"
)

// wire records what goes over it, and breaks where it is told to.
type wire struct {
	next client.Transport

	mu     sync.Mutex
	sent   []sent
	faults func(n int, step string) fault        // n counts from 0; "": none
	tamper func(step string, r *client.Response) // changes answers
	before func(step string)                     // runs before each request
}

var errLost = errors.New("the network is gone")

func stepOf(r *client.Request) string {
	path, _, _ := strings.Cut(r.Path, "?")
	if _, after, found := strings.Cut(path, "/backup-key"); found {
		path = "backup-key" + after
	}
	return r.Method + " " + path
}

func (w *wire) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	step := stepOf(r)
	copied := client.Request{Method: r.Method, Path: r.Path, Body: bytes.Clone(r.Body), Header: map[string]string{}}
	for k, v := range r.Header {
		copied.Header[k] = v
	}
	w.mu.Lock()
	n := len(w.sent)
	w.sent = append(w.sent, sent{step: step, request: copied})
	faults, tamper, before := w.faults, w.tamper, w.before
	w.mu.Unlock()
	if before != nil {
		before(step)
	}
	var f fault
	if faults != nil {
		f = faults(n, step)
	}
	busy := &client.Response{Status: 503, Header: map[string]string{"retry-after": "1"}, Body: []byte(`{"type":"urn:bkv:problem:store-unavailable","status":503}`)}
	switch f {
	case dropRequest:
		return nil, errLost
	case busyBefore:
		return busy, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	answer, err := w.next.RoundTrip(ctx, r)
	switch f {
	case dropReply:
		return nil, errLost
	case duplicate:
		answer, err = w.next.RoundTrip(ctx, r)
	case busyAfter:
		return busy, nil
	case gateway:
		return &client.Response{Status: 502, Body: []byte("<html>Bad Gateway</html>")}, nil
	}
	if err == nil && tamper != nil {
		tamper(step, answer)
	}
	w.mu.Lock()
	w.sent[n].answer = answer
	w.mu.Unlock()
	return answer, err
}

// set changes the wire's behaviour.
func (w *wire) set(f func(w *wire)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w)
}

// take returns what was sent since it was last called, and forgets it.
func (w *wire) take() []sent {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.sent
	w.sent = nil
	return out
}

func steps(all []sent) (out []string) {
	for _, s := range all {
		out = append(out, s.step)
	}
	return out
}

// vaultFault is what becomes of a write in the vault's store.
type vaultFault string

const (
	failedNotPersisted vaultFault = "failed, not persisted"
	failedPersisted    vaultFault = "failed, but persisted"
)

// failNextWrite breaks one write of the vault's.
func (s *service) failNextWrite(f vaultFault) {
	broken := false
	s.store.OnWrite(func(vault.Change) vaulttest.Fault {
		switch {
		case broken:
			return vaulttest.NoFault
		case f == failedPersisted:
			broken = true
			return vaulttest.Persisted
		default:
			broken = true
			return vaulttest.NotPersisted
		}
	})
}
