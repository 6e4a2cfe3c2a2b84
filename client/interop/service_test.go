package interop_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

const (
	vaultID     = "vault.example"
	tenant      = "chat"
	keyID       = "2026-01"
	maxAttempts = 3
)

// service is a running vault: HTTP, a real token, a real database.
type service struct {
	t      *testing.T
	url    string
	pin    transcript.Fingerprint
	signer ed25519.PrivateKey // the tenant's
}

// newService starts a vault with this OPAQUE context, until the test's end.
func newService(t *testing.T, opaqueContext []byte) *service {
	t.Helper()
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	publicDER, err := x509.MarshalPKIXPublicKey(public)
	must(t, err)

	database := storetest.New(t)
	must(t, database.OwnerStore(t).AddTenant(t.Context(), vault.Tenant{
		ID: tenant, DirectEnrolment: true, // the other implementation's device speaks no Oblivious HTTP
		Policy: vault.Policy{MaxAttempts: maxAttempts, Grace: 7 * 24 * time.Hour}, // and no delays
		Keys:   []vault.TenantKey{{ID: keyID, PublicKey: publicDER}},
	}))
	store := database.Store(t)
	v, err := vault.New(vault.Config{ID: vaultID, Context: opaqueContext, Store: store, Token: tokentest.New(t)})
	must(t, err)
	identity, err := v.Identity(t.Context(), time.Now())
	must(t, err)
	handler, err := httpapi.New(httpapi.Config{
		Vault: v, VaultID: vaultID, Tenants: store,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	must(t, err)
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return &service{t: t, url: server.URL, pin: identity.Fingerprint, signer: signer}
}

// jwt is the tenant's token for a user.
func (s *service) jwt(user string) (string, error) {
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: tenant, Subject: user, Audience: jwt.ClaimStrings{vaultID},
		ExpiresAt: jwt.NewNumericDate(time.Now().Add(5 * time.Minute)),
	})
	token.Header["kid"] = keyID
	return token.SignedString(s.signer)
}

// ours is a device of a user that runs our own SDK and enrols with ksf.
func (s *service) ours(user string, ksf opaque.Argon2id) *client.Client {
	s.t.Helper()
	transport, err := httpclient.New(httpclient.Config{BaseURL: s.url})
	must(s.t, err)
	s.t.Cleanup(transport.CloseIdleConnections)
	c, err := client.New(client.Config{
		Transport: transport, Fingerprint: s.pin, Tenant: tenant, User: user, KSF: ksf,
		Token: func(context.Context) (string, error) { return s.jwt(user) },
	})
	must(s.t, err)
	return c
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
