package interop_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	foreign "github.com/openpcc/ohttp"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

const (
	vaultID = "vault.example"
	tenant  = "chat"
	user    = "Zoë/7 %2F"
)

// backEnd puts the app's token on what it forwards.
type backEnd struct {
	next  http.RoundTripper
	token string
}

func (b backEnd) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

type tenants []vault.Tenant

func (t tenants) Tenants(context.Context) ([]vault.Tenant, error) { return t, nil }

// newClient is the other implementation's client, over a running vault with a real token.
func newClient(t *testing.T) *http.Client {
	t.Helper()
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(public)
	must(t, err)
	v, err := vault.New(vault.Config{ID: vaultID, Store: vaulttest.NewMemoryStore(time.Now), Token: tokentest.New(t)})
	must(t, err)
	handler, err := httpapi.New(httpapi.Config{
		Vault: v, VaultID: vaultID, Log: slog.New(slog.DiscardHandler),
		Tenants: tenants{{ID: tenant, Policy: vault.DefaultPolicy(), Keys: []vault.TenantKey{{ID: "1", PublicKey: der}}}},
	})
	must(t, err)
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)

	response, err := http.Get(server.URL + "/v1/relay/keys")
	must(t, err)
	defer response.Body.Close()
	list, err := io.ReadAll(response.Body)
	must(t, err)
	ours, err := ohttp.ParseKeyConfigs(list)
	must(t, err)
	plain, err := ohttp.EncodeKeyConfigs(ours[1:])
	must(t, err)
	var configs foreign.KeyConfigs
	must(t, configs.UnmarshalBinary(plain))
	if again, err := configs.MarshalBinary(); err != nil || !bytes.Equal(again, plain) {
		t.Fatalf("the other implementation writes the configuration differently: %v", err)
	}
	if err := (&foreign.KeyConfigs{}).UnmarshalBinary(list); err == nil {
		t.Log("the other implementation takes the whole list by now: give it to it")
	}

	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: tenant, Subject: user, Audience: jwt.ClaimStrings{vaultID}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(5 * time.Minute)),
	})
	token.Header["kid"] = "1"
	text, err := token.SignedString(signer)
	must(t, err)
	transport, err := foreign.NewTransport(configs[0], server.URL+"/v1/relay",
		foreign.WithHTTPClient(&http.Client{Transport: backEnd{http.DefaultTransport, text}}))
	must(t, err)
	return &http.Client{Transport: transport}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A client of the other implementation asks, enrols (on a route that is refused outside of a capsule) and is refused.
func TestOtherImplementationAsClient(t *testing.T) {
	c := newClient(t)
	do := func(method, path, body string) (int, http.Header, []byte) {
		t.Helper()
		var reader io.Reader
		if body != "" {
			reader = strings.NewReader(body)
		}
		r, err := http.NewRequestWithContext(t.Context(), method, "https://vault.example"+path, reader)
		must(t, err)
		if body != "" {
			r.Header.Set("Content-Type", "application/json")
		}
		response, err := c.Do(r)
		must(t, err)
		defer response.Body.Close()
		got, err := io.ReadAll(response.Body)
		must(t, err)
		return response.StatusCode, response.Header, got
	}
	const resource = "/v1/users/Zo%C3%AB%2F7%20%252F/backup-key"
	status, header, body := do("GET", "/v1/vault", "")
	var v api.Vault
	must(t, json.Unmarshal(body, &v))
	if status != 200 || v.ID != vaultID || header.Get("Content-Type") != "application/json" {
		t.Fatalf("%d %v %s", status, header, body)
	}
	var p api.Problem
	status, _, body = do("GET", resource, "")
	must(t, json.Unmarshal(body, &p))
	if status != 404 || p.Type != api.NotEnrolled {
		t.Fatalf("%d %s", status, body)
	}
	request, _, err := opaque.StartRegistration(rand.Reader, []byte("password"))
	must(t, err)
	start, err := json.Marshal(api.StartEnrolmentRequest{RegistrationRequest: request[:]})
	must(t, err)
	var started api.StartEnrolmentResponse
	status, _, body = do("POST", resource+"/enrolment", string(start))
	must(t, json.Unmarshal(body, &started))
	if status != 200 || started.Generation.IsZero() {
		t.Fatalf("%d %s", status, body)
	}
	status, _, body = do("GET", "/v1/users/another/backup-key", "")
	must(t, json.Unmarshal(body, &p))
	if status != 403 || p.Type != api.Forbidden {
		t.Fatalf("another user: %d %s", status, body)
	}
}
