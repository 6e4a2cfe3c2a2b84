package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// What a recovery and an enrolment start cost the vault's process, through the whole handler,
// on a real token and a real Postgres, beside the bare cryptography that they cannot do
// without. Both are measured in processor time (getrusage), in turn, in one run, so that
// the ratio holds on a noisy machine:
//
//	go test ./vault/httpapi -run '^$' -bench 'Recovery|EnrolmentStart' -benchtime 500x
//
// µs-handler and µs-bare are processor time for one operation, x-bare is their ratio. The
// client's side and Postgres's own processes are not in it.

// processorTime is what this process has used, all threads.
func processorTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// bench is a deployment for benchmarks.
type bench struct {
	b       *testing.B
	handler http.Handler
	keys    *pkcs11util.Keyset
	device  *vaulttest.Device
	signer  ed25519.PrivateKey
	token   string
}

func newBench(b *testing.B) *bench {
	keys, db := tokentest.New(b).Keyset, storetest.New(b)
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		b.Fatal(err)
	}
	owner := db.OwnerStore(b)
	if err := owner.AddTenant(b.Context(), vault.Tenant{ID: tenant, Policy: noDelays()}); err != nil {
		b.Fatal(err)
	}
	if err := owner.AddTenantKey(b.Context(), tenant, vault.TenantKey{ID: kid, PublicKey: der}); err != nil {
		b.Fatal(err)
	}
	s := db.Store(b)
	v, err := vault.New(vault.Config{ID: vaultID, Store: s, Token: keys})
	if err != nil {
		b.Fatal(err)
	}
	handler, err := httpapi.New(httpapi.Config{
		Vault: v, VaultID: vaultID, Tenants: s, Log: slog.New(slog.DiscardHandler),
		Limits: httpapi.Limits{
			EnrolmentsPerUser:   httpapi.RateLimit{PerSecond: 1e9, Burst: 1e9},
			EnrolmentsPerTenant: httpapi.RateLimit{PerSecond: 1e9, Burst: 1e9},
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	return &bench{b: b, handler: handler, keys: keys, signer: signer, token: signToken(b, signer),
		device: &vaulttest.Device{Vault: v, VaultID: vaultID,
			Caller: vault.Caller{Account: vault.AccountID{Tenant: tenant, User: "ann"}, Policy: noDelays()}}}
}

func signToken(b *testing.B, signer ed25519.PrivateKey) string {
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: tenant, Subject: "ann", Audience: jwt.ClaimStrings{vaultID}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(9 * time.Minute)),
	})
	token.Header["kid"] = kid
	signed, err := token.SignedString(signer)
	if err != nil {
		b.Fatal(err)
	}
	return signed
}

// call sends one request through the handler and returns its processor time.
func (x *bench) call(path string, body, answer any) time.Duration {
	x.b.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		x.b.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/users/ann/backup-key"+path, bytes.NewReader(raw))
	r.Header.Set("Authorization", "Bearer "+x.token)
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	began := processorTime(x.b)
	x.handler.ServeHTTP(w, r)
	took := processorTime(x.b) - began
	if w.Code != http.StatusOK {
		x.b.Fatalf("%s: %d %s", path, w.Code, w.Body)
	}
	if err := json.Unmarshal(w.Body.Bytes(), answer); err != nil {
		x.b.Fatal(err)
	}
	return took
}

// bare runs f and returns its processor time.
func (x *bench) bare(f func(ctx context.Context) error) time.Duration {
	began := processorTime(x.b)
	if err := f(context.Background()); err != nil {
		x.b.Fatal(err)
	}
	return processorTime(x.b) - began
}

// checkToken is one JWT check and nothing else.
func (x *bench) checkToken() error {
	_, err := jwt.ParseWithClaims(x.token, &jwt.RegisteredClaims{}, func(*jwt.Token) (any, error) { return x.signer.Public(), nil },
		jwt.WithValidMethods([]string{"EdDSA"}), jwt.WithAudience(vaultID), jwt.WithExpirationRequired())
	return err
}

// macs makes n row MACs, of a row's usual size.
func (x *bench) macs(ctx context.Context, n int) error {
	row := make([]byte, 700)
	for range n {
		if _, err := x.keys.MAC(ctx, 1, row); err != nil {
			return err
		}
	}
	return nil
}

// bareKey multiplies by a record's share and then in the token, or in the token alone.
type bareKey struct {
	keys    *pkcs11util.Keyset
	purpose string
	share   *opaque.Scalar
}

func (k bareKey) PublicKey() opaque.PublicKey {
	public, _ := k.keys.PublicKey(k.purpose, 1)
	return opaque.PublicKey(public)
}

func (k bareKey) Multiply(ctx context.Context, p opaque.Element) (opaque.Element, error) {
	if k.share != nil {
		var err error
		if p, err = k.share.Multiply(p); err != nil {
			return p, err
		}
	}
	return k.keys.Multiply(ctx, k.purpose, 1, p)
}

func (k bareKey) Evaluate(ctx context.Context, p opaque.Element) (opaque.Element, error) {
	return k.Multiply(ctx, p)
}

func report(b *testing.B, handler, bare time.Duration) {
	b.ReportMetric(float64(handler.Microseconds())/float64(b.N), "µs-handler")
	b.ReportMetric(float64(bare.Microseconds())/float64(b.N), "µs-bare")
	b.ReportMetric(float64(handler)/float64(bare), "x-bare")
}

func BenchmarkRecovery(b *testing.B) {
	x := newBench(b)
	e := x.device.MustEnrol(b, "right", nil)
	share, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	session := opaque.Session{ServerIdentity: []byte(vaultID), ClientIdentity: transcript.ClientIdentity(tenant, "ann")}
	config := opaque.ClientConfig{ServerIdentity: session.ServerIdentity, ClientIdentity: session.ClientIdentity, KSF: vaulttest.NoStretch{}}
	associated, secrets, state := make([]byte, 64), make([]byte, 221), make([]byte, 116)
	id := [16]byte(e.Generation)
	sealed, err := x.keys.Seal(b.Context(), pkcs11util.Master, id, secrets, associated)
	if err != nil {
		b.Fatal(err)
	}
	var handler, bare time.Duration
	for b.Loop() {
		ke1, login, err := opaque.StartLogin(rand.Reader, []byte("right"))
		if err != nil {
			b.Fatal(err)
		}
		var started api.StartRecoveryResponse
		handler += x.call("/recovery", api.StartRecoveryRequest{KE1: ke1[:]}, &started)
		ke2, err := opaque.ParseKE2(started.KE2)
		if err != nil {
			b.Fatal(err)
		}
		finish, err := login.Finish(ke2, config)
		if err != nil {
			b.Fatal(err)
		}
		var finished api.FinishRecoveryResponse
		handler += x.call("/recovery/finish", api.FinishRecoveryRequest{KE3: finish.KE3[:], State: started.State}, &finished)

		bare += x.bare(func(ctx context.Context) error {
			// start: token check, row's MAC verified and made, record opened, KE2, state sealed
			if err := x.checkToken(); err != nil {
				return err
			}
			if _, err := opaque.ParseKE1(ke1[:]); err != nil {
				return err
			}
			if err := x.macs(ctx, 2); err != nil {
				return err
			}
			if _, _, err := x.keys.Open(ctx, pkcs11util.Master, id, sealed, associated); err != nil {
				return err
			}
			_, _, err := opaque.GenerateKE2(ctx, session, rand.Reader, e.Staging.Record, ke1,
				bareKey{x.keys, pkcs11util.Server, nil}, bareKey{x.keys, pkcs11util.OPRF, &share})
			if err != nil {
				return err
			}
			sealedState, err := x.keys.Seal(ctx, pkcs11util.State, id, state, associated)
			if err != nil {
				return err
			}
			// finish: token check, state opened, row's MAC verified and made, record opened
			if err := x.checkToken(); err != nil {
				return err
			}
			if _, _, err := x.keys.Open(ctx, pkcs11util.State, id, sealedState, associated); err != nil {
				return err
			}
			if err := x.macs(ctx, 2); err != nil {
				return err
			}
			_, _, err = x.keys.Open(ctx, pkcs11util.Master, id, sealed, associated)
			return err
		})
	}
	report(b, handler, bare)
}

func BenchmarkEnrolmentStart(b *testing.B) {
	x := newBench(b)
	request, _, err := opaque.StartRegistration(rand.Reader, []byte("right"))
	if err != nil {
		b.Fatal(err)
	}
	state := make([]byte, 64)
	var handler, bare time.Duration
	for b.Loop() {
		var started api.StartEnrolmentResponse
		handler += x.call("/enrolment", api.StartEnrolmentRequest{RegistrationRequest: request[:]}, &started)
		bare += x.bare(func(ctx context.Context) error {
			if err := x.checkToken(); err != nil {
				return err
			}
			if _, err := opaque.ParseRegistrationRequest(request[:]); err != nil {
				return err
			}
			share, err := opaque.RandomScalar(rand.Reader)
			if err != nil {
				return err
			}
			key := bareKey{x.keys, pkcs11util.OPRF, &share}
			server := bareKey{x.keys, pkcs11util.Server, nil}
			if _, err := opaque.CreateRegistrationResponse(ctx, request, server.PublicKey(), key); err != nil {
				return err
			}
			_, err = x.keys.Seal(ctx, pkcs11util.State, [16]byte{1}, state, make([]byte, 64))
			return err
		})
	}
	report(b, handler, bare)
}
