package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sync/errgroup"

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
//	go test ./vault/httpapi -run '^$' -bench 'Recovery|EnrolmentStart' -benchtime 30x
//
// µs-handler and µs-bare are processor time for one operation, x-bare is their ratio. The
// client's side and Postgres's own processes are not in it. Eight requests run at a time,
// as in a vault that has something to do; one alone would measure how Go's scheduler waits.
const (
	benchAccounts = 64
	benchAtOnce   = 8
)

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
	devices []*vaulttest.Device
	tokens  []string
	signer  ed25519.PrivateKey
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
	if err := owner.AddTenant(b.Context(), vault.Tenant{ID: tenant, DirectEnrolment: true, Policy: noDelays()}); err != nil {
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
			RequestsPerUser:     httpapi.RateLimit{PerSecond: 1e9, Burst: 1e9},
			RequestsPerTenant:   httpapi.RateLimit{PerSecond: 1e9, Burst: 1e9},
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	x := &bench{b: b, handler: handler, keys: keys, signer: signer}
	for i := range benchAccounts {
		x.tokens = append(x.tokens, signToken(b, signer, userName(i)))
		x.devices = append(x.devices, &vaulttest.Device{Vault: v, VaultID: vaultID,
			Caller: vault.Caller{Account: vault.AccountID{Tenant: tenant, User: userName(i)}, Policy: noDelays()}})
	}
	return x
}

func signToken(b *testing.B, signer ed25519.PrivateKey, user string) string {
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: tenant, Subject: user, Audience: jwt.ClaimStrings{vaultID}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(9 * time.Minute)),
	})
	token.Header["kid"] = kid
	signed, err := token.SignedString(signer)
	if err != nil {
		b.Fatal(err)
	}
	return signed
}

// together runs f for every account, some at a time, and returns their processor time.
func (x *bench) together(f func(i int) error) time.Duration {
	x.b.Helper()
	var group errgroup.Group
	group.SetLimit(benchAtOnce)
	began := processorTime(x.b)
	for i := range benchAccounts {
		group.Go(func() error { return f(i) })
	}
	err := group.Wait()
	took := processorTime(x.b) - began
	if err != nil {
		x.b.Fatal(err)
	}
	return took
}

// request makes a request of an account's user, body and token included.
func (x *bench) request(i int, path string, body any) *http.Request {
	x.b.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		x.b.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/users/"+userName(i)+"/backup-key"+path, bytes.NewReader(raw))
	r.Header.Set("Authorization", "Bearer "+x.tokens[i])
	r.Header.Set("Content-Type", "application/json")
	return r
}

// serve has the handler answer.
func (x *bench) serve(r *http.Request) (*httptest.ResponseRecorder, error) {
	w := httptest.NewRecorder()
	if x.handler.ServeHTTP(w, r); w.Code != http.StatusOK {
		return nil, fmt.Errorf("%s: %d %s", r.URL.Path, w.Code, w.Body)
	}
	return w, nil
}

func userName(i int) string { return fmt.Sprintf("user-%d", i) }

// checkToken is one JWT check and nothing else.
func (x *bench) checkToken() error {
	_, err := jwt.ParseWithClaims(x.tokens[0], &jwt.RegisteredClaims{}, func(*jwt.Token) (any, error) { return x.signer.Public(), nil },
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

// report turns what rounds of benchAccounts cost into the cost of one.
func report(b *testing.B, rounds int, handler, bare time.Duration) {
	n := float64(rounds * benchAccounts)
	b.ReportMetric(float64(handler.Microseconds())/n, "µs-handler")
	b.ReportMetric(float64(bare.Microseconds())/n, "µs-bare")
	b.ReportMetric(float64(handler)/float64(bare), "x-bare")
	b.ReportMetric(0, "ns/op") // of a round, with the clients' work in it: no figure of the vault
}

func BenchmarkRecovery(b *testing.B) {
	x := newBench(b)
	enrolled := make([]*vaulttest.Enrolment, benchAccounts)
	for i, d := range x.devices {
		enrolled[i] = d.MustEnrol(b, "right", nil)
	}
	share, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	identities := func(i int) opaque.Session {
		return opaque.Session{ServerIdentity: []byte(vaultID), ClientIdentity: transcript.ClientIdentity(tenant, userName(i))}
	}
	associated, secrets, state := make([]byte, 64), make([]byte, 221), make([]byte, 116)
	sealed, err := x.keys.Seal(b.Context(), pkcs11util.Master, [16]byte{1}, secrets, associated)
	if err != nil {
		b.Fatal(err)
	}
	var handler, bare time.Duration
	rounds := 0
	for b.Loop() {
		rounds++
		ke1s, logins := make([]opaque.KE1, benchAccounts), make([]*opaque.ClientLogin, benchAccounts)
		starts, answers := make([]*http.Request, benchAccounts), make([]*httptest.ResponseRecorder, benchAccounts)
		for i := range benchAccounts {
			if ke1s[i], logins[i], err = opaque.StartLogin(rand.Reader, []byte("right")); err != nil {
				b.Fatal(err)
			}
			starts[i] = x.request(i, "/recovery", api.StartRecoveryRequest{KE1: ke1s[i][:]})
		}
		handler += x.together(func(i int) (err error) {
			answers[i], err = x.serve(starts[i])
			return err
		})
		finishes := make([]*http.Request, benchAccounts)
		for i := range benchAccounts {
			var started api.StartRecoveryResponse
			if err := json.Unmarshal(answers[i].Body.Bytes(), &started); err != nil {
				b.Fatal(err)
			}
			ke2, err := opaque.ParseKE2(started.KE2)
			if err != nil {
				b.Fatal(err)
			}
			session := identities(i)
			login, err := logins[i].Finish(ke2, opaque.ClientConfig{
				ServerIdentity: session.ServerIdentity, ClientIdentity: session.ClientIdentity, KSF: vaulttest.NoStretch{},
			})
			if err != nil {
				b.Fatal(err)
			}
			finishes[i] = x.request(i, "/recovery/finish", api.FinishRecoveryRequest{KE3: login.KE3[:], State: started.State})
		}
		handler += x.together(func(i int) error {
			_, err := x.serve(finishes[i])
			return err
		})

		ctx := b.Context()
		bare += x.together(func(i int) error {
			// start: token check, row's MAC verified and made, record opened, KE2, state sealed
			if err := x.checkToken(); err != nil {
				return err
			}
			if _, err := opaque.ParseKE1(ke1s[i][:]); err != nil {
				return err
			}
			if err := x.macs(ctx, 2); err != nil {
				return err
			}
			if _, _, err := x.keys.Open(ctx, pkcs11util.Master, [16]byte{1}, sealed, associated); err != nil {
				return err
			}
			_, _, err := opaque.GenerateKE2(ctx, identities(i), rand.Reader, enrolled[i].Staging.Record, ke1s[i],
				bareKey{x.keys, pkcs11util.Server, nil}, bareKey{x.keys, pkcs11util.OPRF, &share})
			if err != nil {
				return err
			}
			sealedState, err := x.keys.Seal(ctx, pkcs11util.State, [16]byte{1}, state, associated)
			if err != nil {
				return err
			}
			// finish: token check, state opened, row's MAC verified and made, record opened
			if err := x.checkToken(); err != nil {
				return err
			}
			if _, _, err := x.keys.Open(ctx, pkcs11util.State, [16]byte{1}, sealedState, associated); err != nil {
				return err
			}
			if err := x.macs(ctx, 2); err != nil {
				return err
			}
			_, _, err = x.keys.Open(ctx, pkcs11util.Master, [16]byte{1}, sealed, associated)
			return err
		})
	}
	report(b, rounds, handler, bare)
}

func BenchmarkEnrolmentStart(b *testing.B) {
	x := newBench(b)
	request, _, err := opaque.StartRegistration(rand.Reader, []byte("right"))
	if err != nil {
		b.Fatal(err)
	}
	state, associated := make([]byte, 64), make([]byte, 64)
	var handler, bare time.Duration
	rounds := 0
	for b.Loop() {
		rounds++
		requests := make([]*http.Request, benchAccounts)
		for i := range requests {
			requests[i] = x.request(i, "/enrolment", api.StartEnrolmentRequest{RegistrationRequest: request[:]})
		}
		handler += x.together(func(i int) error {
			_, err := x.serve(requests[i])
			return err
		})
		ctx := b.Context()
		bare += x.together(func(int) error {
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
			server := bareKey{x.keys, pkcs11util.Server, nil}
			if _, err := opaque.CreateRegistrationResponse(ctx, request, server.PublicKey(), bareKey{x.keys, pkcs11util.OPRF, &share}); err != nil {
				return err
			}
			_, err = x.keys.Seal(ctx, pkcs11util.State, [16]byte{1}, state, associated)
			return err
		})
	}
	report(b, rounds, handler, bare)
}
