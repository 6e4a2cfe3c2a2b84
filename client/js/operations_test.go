package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// The operations are the same on every platform; here they run without a browser, against
// a real vault's handler. The worker, the messages and fetch are tested in one.

const (
	vaultID = "vault.example"
	tenant  = "chat"
	keyID   = "1"
)

type tenants struct{ signer ed25519.PrivateKey }

func (s tenants) Tenants(context.Context) ([]vault.Tenant, error) {
	public, err := x509.MarshalPKIXPublicKey(s.signer.Public())
	if err != nil {
		return nil, err
	}
	delays := []time.Duration{0, 0, time.Hour}
	return []vault.Tenant{{
		ID: tenant, Policy: vault.Policy{MaxAttempts: 3, Grace: time.Hour, Delays: delays},
		Keys: []vault.TenantKey{{ID: keyID, PublicKey: public}},
	}}, nil
}

// lossy is a transport that can lose answers.
type lossy struct {
	client.Transport
	left atomic.Int64 // how many answers still arrive
	skew atomic.Int64 // added to the server's clock, in seconds
}

func (l *lossy) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	response, err := l.Transport.RoundTrip(ctx, r)
	if l.left.Add(-1) < 0 {
		return nil, errors.New("lost")
	}
	if err == nil {
		response.Header["date"] = time.Now().UTC().Add(time.Duration(l.skew.Load()) * time.Second).Format(httpDate)
	}
	return response, err
}

type phone struct {
	t    *testing.T
	sdk  *sdk
	wire *lossy
}

func newPhone(t *testing.T) (*phone, int) {
	t.Helper()
	v, err := vault.New(vault.Config{ID: vaultID, Token: vaulttest.NewSoftToken(), Store: vaulttest.NewMemoryStore(time.Now)})
	if err != nil {
		t.Fatal(err)
	}
	_, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	handler, err := httpapi.New(httpapi.Config{Vault: v, VaultID: vaultID, Tenants: tenants{signer}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.StripPrefix("/vault", handler))
	t.Cleanup(server.Close)
	p := &phone{t: t, wire: &lossy{}}
	p.wire.left.Store(math.MaxInt64)
	p.sdk = newSDK(func(base string) client.Transport {
		if p.wire.Transport, err = httpclient.New(httpclient.Config{BaseURL: server.URL + base}); err != nil {
			t.Fatal(err)
		}
		return p.wire
	}, func(context.Context, int) (string, error) {
		token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
			Issuer: tenant, Subject: "alice", Audience: jwt.ClaimStrings{vaultID}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Minute)),
		})
		token.Header["kid"] = keyID
		return token.SignedString(signer)
	})
	identity, err := v.Identity(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var o opened
	p.must("open", map[string]any{"base": "/vault", "fingerprint": identity.Fingerprint.String(), "tenant": tenant, "user": "alice"}, &o)
	return p, o.Vault
}

// do performs an operation as the worker does: JSON in, JSON out.
func (p *phone) do(op string, in map[string]any, out any) *failure {
	p.t.Helper()
	raw, err := json.Marshal(in)
	if err != nil {
		p.t.Fatal(err)
	}
	result, _, f := p.sdk.do(p.t.Context(), op, raw, nil)
	if f == nil && out != nil {
		if raw, err = json.Marshal(result); err == nil {
			err = json.Unmarshal(raw, out)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	return f
}

func (p *phone) must(op string, in map[string]any, out any) {
	p.t.Helper()
	if f := p.do(op, in, out); f != nil {
		p.t.Fatalf("%s: %+v", op, *f)
	}
}

func (p *phone) want(code, op string, in map[string]any) *failure {
	p.t.Helper()
	f := p.do(op, in, nil)
	if f == nil || f.Code != code {
		p.t.Fatalf("%s: %+v, want %s", op, f, code)
	}
	return f
}

func TestOperations(t *testing.T) {
	t.Parallel()
	p, v := newPhone(t)
	in := func(password string) map[string]any { return map[string]any{"vault": v, "password": password} }
	p.want("not-enrolled", "status", in(""))
	p.want("not-enrolled", "recover", in("a password"))
	p.want("invalid-password", "enrol", in(""))
	var enrolled, got keyResult
	p.must("enrol", in("a password"), &enrolled)
	p.want("already-enrolled", "enrol", in("a password"))
	if f := p.want("wrong-password", "recover", in("another")); *f.AttemptsLeft != 2 || *f.WaitSeconds != 0 {
		t.Errorf("%+v", f)
	}
	// The device's clock is a day behind: the wait is the vault's all the same.
	p.wire.skew.Store(24 * 60 * 60)
	p.must("recover", in("a password"), &got)
	if string(got.Key) != string(enrolled.Key) || got.FailuresSince != 1 || *got.Generation != *enrolled.Generation {
		t.Errorf("%+v was recovered, and %+v enrolled", got, enrolled)
	}
	p.wire.skew.Store(0)
	p.want("wrong-password", "recover", in("another"))
	// A server tells its time in whole seconds.
	if f := p.want("wrong-password", "recover", in("another")); *f.AttemptsLeft != 1 || *f.WaitSeconds < 3000 || *f.WaitSeconds > 3601 {
		t.Errorf("%d attempts left, wait %d", *f.AttemptsLeft, *f.WaitSeconds)
	}
	if f := p.want("too-early", "recover", in("another")); *f.WaitSeconds < 3000 {
		t.Errorf("%+v", f)
	}
	var s statusResult
	p.must("status", in(""), &s)
	if s.AttemptsLeft != 1 || *s.WaitSeconds < 3000 || len(s.Generations) != 1 || s.Generations[0].State != "active" {
		t.Errorf("%+v", s)
	}
	key := map[string]any{"vault": v, "key": enrolled.Key, "password": "a new one"}
	other := map[string]any{"vault": v, "key": strings.Repeat("A", 43), "password": "a new one"}
	p.want("forbidden", "changePassword", other)
	p.must("changePassword", key, &got)
	p.want("forbidden", "turnOff", other)
	p.want("invalid-argument", "changePasswordAndKey", key)
	key["newKey"] = strings.Repeat("A", 43)
	p.must("changePasswordAndKey", key, &got)
	p.want("forbidden", "turnOff", key)
	key["key"] = strings.Repeat("B", 42) + "A"
	p.must("replaceWithoutProof", key, &got)
	p.must("recover", in("a new one"), &got)
	if string(got.Key) != strings.Repeat("\x04\x10\x41", 10)+"\x04\x10" {
		t.Errorf("the key is %x", got.Key)
	}
	p.must("turnOff", key, nil)
	p.want("forbidden", "turnOff", key)
	p.must("turnOff", other, nil)
	p.want("not-enrolled", "recover", in("a new one"))
	p.must("close", in(""), nil)
	p.want("invalid-argument", "status", in(""))
}

// An answer that is lost for good leaves something to resume, which costs nothing.
func TestPending(t *testing.T) {
	t.Parallel()
	p, v := newPhone(t)
	in := map[string]any{"vault": v, "password": "a password"}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, c := range []struct {
		op, kind string
		answers  int64
	}{
		{"enrol", "enrolment", 4},  // identity, status, start, stage; the activation's is lost
		{"recover", "recovery", 2}, // status, start; the finish's is lost
	} {
		p.wire.left.Store(c.answers)
		f := p.want("unavailable", c.op, in)
		if f.Pending == 0 || f.Kind != c.kind {
			t.Fatalf("%s: %+v", c.op, f)
		}
		f = p.want("unavailable", "resume", map[string]any{"pending": f.Pending})
		p.wire.left.Store(math.MaxInt64)
		var got keyResult
		p.must("resume", map[string]any{"pending": f.Pending}, &got)
		if len(got.Key) != 32 {
			t.Fatalf("%s: a key of %d bytes", c.op, len(got.Key))
		}
		p.want("invalid-argument", "resume", map[string]any{"pending": f.Pending})
	}
	var got keyResult
	if p.must("recover", in, &got); got.FailuresTotal != 0 {
		t.Errorf("%d failures", got.FailuresTotal)
	}
	// A cancelled operation says so, pending or not.
	cancel()
	raw, _ := json.Marshal(in)
	if _, _, f := p.sdk.do(ctx, "recover", raw, nil); f == nil || f.Code != "cancelled" {
		t.Errorf("cancelled: %+v", f)
	}
}

func TestLocalOperations(t *testing.T) {
	t.Parallel()
	p := &phone{t: t, sdk: newSDK(nil, nil)}
	var made, read keyResult
	var shown text
	p.must("newKey", nil, &made)
	p.must("digits", map[string]any{"key": made.Key}, &shown)
	p.must("parseDigits", map[string]any{"digits": strings.ToUpper(shown.Text)}, &read)
	if string(made.Key) != string(read.Key) {
		t.Error("another key was read than was shown")
	}
	p.want("invalid-digits", "parseDigits", map[string]any{"digits": shown.Text[1:]})

	secret := strings.Repeat("B", 42) + "A"
	var wrapped wrappedResult
	p.must("wrapKey", map[string]any{"key": made.Key, "secret": secret, "context": []string{"chat", "alice"}}, &wrapped)
	p.must("unwrapKey", map[string]any{"wrapped": wrapped.Wrapped, "secret": secret, "context": []string{"chat", "alice"}}, &read)
	if string(made.Key) != string(read.Key) {
		t.Error("another key was unwrapped than was wrapped")
	}
	p.want("wrong-key", "unwrapKey", map[string]any{"wrapped": wrapped.Wrapped, "secret": secret, "context": []string{"chatalice"}})
	p.want("not-a-backup", "unwrapKey", map[string]any{"wrapped": wrapped.Wrapped[1:], "secret": secret})

	for op, in := range map[string]map[string]any{
		"digits": {"key": "AAAA"}, "no such thing": {}, "open": {"fingerprint": "nonsense"}, "resume": {"pending": 7},
	} {
		p.want("invalid-argument", op, in)
	}
	// Malformed parameters are not quoted: they could be a password.
	if _, _, f := p.sdk.do(t.Context(), "enrol", []byte(`{"password": Narwhal`), nil); f.Code != "invalid-argument" || strings.Contains(f.Message, "N") {
		t.Errorf("%+v", f)
	}
}
