package httpapi_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/mlkem"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/pkcs11util"
)

// BenchmarkRelay is what the relay channel adds to a request, in the vault's processor time: the status of
// an account, asked for directly and in a capsule to each of the two keys, beside what a capsule cannot do
// without, one derive in the token and of the hybrid one ML-KEM-768 decapsulation, all in turn, in one run
// (see BenchmarkRecovery):
//
//	go test ./vault/httpapi -run '^$' -bench Relay -benchtime 30x
//
// ms-direct is the request by itself, ms-derive one derive, ms-mlkem one decapsulation; +ms and x-derive of a key are
// all that its capsule adds, in milliseconds and in derives, and rest-ms is that without derive and decapsulation.
// The device's side is in none of them.
func BenchmarkRelay(b *testing.B) {
	x := newBench(b)
	for _, d := range x.devices {
		d.MustEnrol(b, "right", nil)
	}
	w := httptest.NewRecorder()
	x.handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/relay/keys", nil))
	configs, err := ohttp.ParseKeyConfigs(w.Body.Bytes())
	if err != nil || len(configs) != 2 {
		b.Fatalf("%d relay keys: %v", len(configs), err)
	}
	ephemeral, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	point := [65]byte(ephemeral.PublicKey().Bytes())

	decapsulation, err := mlkem.GenerateKey768()
	if err != nil {
		b.Fatal(err)
	}
	_, ciphertext := decapsulation.EncapsulationKey().Encapsulate()

	var direct, derive, decapsulate time.Duration
	relayed := make([]time.Duration, len(configs))
	rounds := 0
	for b.Loop() {
		rounds++
		requests := make([]*http.Request, benchAccounts)
		for i := range requests {
			requests[i] = httptest.NewRequest(http.MethodGet, pathOf(userName(i), ""), nil)
			requests[i].Header.Set("Authorization", "Bearer "+x.tokens[i])
		}
		direct += x.together(func(i int) error {
			_, err := x.serve(requests[i])
			return err
		})
		for k, config := range configs {
			sealed, answers := make([]*ohttp.Sealed, benchAccounts), make([]*httptest.ResponseRecorder, benchAccounts)
			for i := range requests {
				if requests[i], sealed[i], err = x.capsule(i, config); err != nil {
					b.Fatal(err)
				}
			}
			relayed[k] += x.together(func(i int) (err error) {
				answers[i], err = x.serve(requests[i])
				return err
			})
			for i, answer := range answers {
				if err := answeredOK(sealed[i], answer.Body.Bytes()); err != nil {
					b.Fatal(err)
				}
			}
		}
		derive += x.together(func(int) error {
			_, err := x.keys.DeriveX(b.Context(), pkcs11util.Relay, 1, point)
			return err
		})
		decapsulate += x.together(func(int) error {
			_, err := decapsulation.Decapsulate(ciphertext)
			return err
		})
	}
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 / float64(rounds*benchAccounts) }
	b.ReportMetric(ms(direct), "ms-direct")
	b.ReportMetric(ms(derive), "ms-derive")
	b.ReportMetric(ms(decapsulate), "ms-mlkem")
	for k, bare := range []time.Duration{derive + decapsulate, derive} {
		name, added := []string{"hybrid", "p256"}[k], relayed[k]-direct
		b.ReportMetric(ms(added), "+ms-"+name)
		b.ReportMetric(float64(added)/float64(derive), "x-derive-"+name)
		b.ReportMetric(ms(added-bare), "rest-ms-"+name)
	}
	b.ReportMetric(0, "ns/op") // of a round, with the devices' work in it: no figure of the vault
}

// capsule is the request for an account's status, sealed.
func (x *bench) capsule(i int, config ohttp.KeyConfig) (*http.Request, *ohttp.Sealed, error) {
	message, err := inside(http.MethodGet, pathOf(userName(i), ""), nil).Encode()
	if err != nil {
		return nil, nil, err
	}
	capsule, sealed, err := config.Seal(ohttp.Pad(message))
	if err != nil {
		return nil, nil, err
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/relay", bytes.NewReader(capsule))
	r.Header.Set("Authorization", "Bearer "+x.tokens[i])
	r.Header.Set("Content-Type", ohttp.RequestMediaType)
	return r, sealed, nil
}

// answeredOK opens a sealed answer, and says what it is if not a success.
func answeredOK(sealed *ohttp.Sealed, answer []byte) error {
	message, err := sealed.Open(answer)
	if err != nil {
		return err
	}
	r, err := ohttp.DecodeResponse(message)
	if err == nil && r.Status != http.StatusOK {
		err = fmt.Errorf("in the capsule: %d %s", r.Status, r.Content)
	}
	return err
}
