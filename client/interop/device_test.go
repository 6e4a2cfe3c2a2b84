package interop_test

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"testing"

	"github.com/bytemare/ksf"
	bytemare "github.com/bytemare/opaque"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/transcript"
)

// configuration is the vault's suite, as the other implementation writes it.
func configuration(context []byte, stretch ksf.Identifier) *bytemare.Configuration {
	return &bytemare.Configuration{
		OPRF: bytemare.P256Sha256, AKE: bytemare.P256Sha256,
		KDF: crypto.SHA256, MAC: crypto.SHA256, Hash: crypto.SHA256,
		KSF: stretch, Context: context,
	}
}

// stretching makes the other implementation's Argon2id that of RFC 9807 section 7:
// left alone it has no salt and returns as many bytes as an element has.
func stretching(k api.KSF) *bytemare.ClientOptions {
	return &bytemare.ClientOptions{
		KSFSalt:       make([]byte, 16),
		KSFParameters: []uint64{uint64(k.Time), uint64(k.MemoryKiB), uint64(k.Threads)},
		KSFLength:     32,
	}
}

// foreign is a user's device that speaks OPAQUE by the other implementation.
type foreign struct {
	t       testing.TB
	service *service
	user    string
	vault   api.Vault // as it describes itself
}

func (s *service) foreign(user string) *foreign {
	s.t.Helper()
	d := &foreign{t: s.t, service: s, user: user}
	d.vault = mustCall[api.Vault](d, http.MethodGet, "/v1/vault", nil)
	return d
}

func (d *foreign) opaque() *bytemare.Client {
	d.t.Helper()
	c, err := configuration(d.vault.Context, ksf.Argon2id).Client()
	must(d.t, err)
	return c
}

func (d *foreign) identities() (client, server []byte) {
	return transcript.ClientIdentity(tenant, d.user), []byte(d.vault.ID)
}

// resource is the path of the user's backup key.
func (d *foreign) resource() string { return "/v1/users/" + url.PathEscape(d.user) + "/backup-key" }

// call sends a request. It returns the answer, or the problem if there is one.
func call[T any](d *foreign, method, path string, body any) (*api.Problem, T) {
	d.t.Helper()
	var raw []byte
	if body != nil {
		var err error
		raw, err = json.Marshal(body)
		must(d.t, err)
	}
	request, err := http.NewRequestWithContext(d.t.Context(), method, d.service.url+path, bytes.NewReader(raw))
	must(d.t, err)
	token, err := d.service.jwt(d.user)
	must(d.t, err)
	request.Header.Set("Authorization", "Bearer "+token)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := http.DefaultClient.Do(request)
	must(d.t, err)
	defer response.Body.Close()
	var answer T
	if response.StatusCode != http.StatusOK {
		problem := &api.Problem{}
		must(d.t, json.NewDecoder(response.Body).Decode(problem))
		return problem, answer
	}
	must(d.t, json.NewDecoder(response.Body).Decode(&answer))
	return nil, answer
}

// mustCall is call where a problem fails the test.
func mustCall[T any](d *foreign, method, path string, body any) T {
	d.t.Helper()
	problem, answer := call[T](d, method, path, body)
	if problem != nil {
		d.t.Fatalf("%s %s: %s: %s", method, path, problem.Type, problem.Detail)
	}
	return answer
}

// enrol puts a key into the vault, in three steps.
func (d *foreign) enrol(password string, key backup.Key, k api.KSF) api.GenerationID {
	d.t.Helper()
	c := d.opaque()
	request, err := c.RegistrationInit([]byte(password))
	must(d.t, err)
	started := mustCall[api.StartEnrolmentResponse](d, http.MethodPost, d.resource()+"/enrolment",
		api.StartEnrolmentRequest{RegistrationRequest: request.Serialize()})

	response, err := c.Deserialize.RegistrationResponse(started.RegistrationResponse)
	must(d.t, err)
	clientIdentity, serverIdentity := d.identities()
	record, exportKey, err := c.RegistrationFinalize(response, clientIdentity, serverIdentity, stretching(k))
	must(d.t, err)

	owner := key.OwnerKey(d.vault.ID, tenant, d.user)
	stage := api.StageRequest{
		State: started.State, Record: record.Serialize(), KSF: k,
		WrappedKey: aead(d.t, exportKey, transcript.WrapKeyInfo).Seal(nil, nil, key[:], transcript.WrapContext(d.vault.ID, tenant, d.user)),
		OwnerKey:   api.Bytes(owner.Public().(ed25519.PublicKey)),
	}
	staged := mustCall[api.StageResponse](d, http.MethodPut, d.resource(), stage)
	digest := transcript.Material{
		Record: stage.Record, WrappedKey: stage.WrappedKey,
		Time: k.Time, MemoryKiB: k.MemoryKiB, Threads: k.Threads,
		OwnerKey: stage.OwnerKey, ServerKey: response.ServerPublicKey,
	}.Digest()
	if !bytes.Equal(staged.Digest, digest[:]) {
		d.t.Fatal("the vault staged something else than was sent")
	}
	mustCall[api.Status](d, http.MethodPost, d.resource()+"/activation", api.ActivateRequest{
		Generation: started.Generation,
		Signature: transcript.Statement{
			Action: transcript.Activate, Vault: d.vault.ID, Tenant: tenant, User: d.user,
			Old: started.Follows, New: started.Generation, Digest: digest,
		}.Sign(owner),
	})
	return started.Generation
}

// recover makes an attempt. It returns the key, or the problem that the vault answered
// with; the other implementation and the vault must agree on whether the password is right.
func (d *foreign) recover(password string, want api.KSF) (backup.Key, *api.Problem) {
	d.t.Helper()
	c := d.opaque()
	ke1, err := c.GenerateKE1([]byte(password))
	must(d.t, err)
	problem, started := call[api.StartRecoveryResponse](d, http.MethodPost, d.resource()+"/recovery",
		api.StartRecoveryRequest{KE1: ke1.Serialize()})
	if problem != nil {
		return backup.Key{}, problem
	}
	if started.KSF != want {
		d.t.Fatalf("the vault asks for %+v, and the record was made with %+v", started.KSF, want)
	}
	ke2, err := c.Deserialize.KE2(started.KE2)
	must(d.t, err)
	clientIdentity, serverIdentity := d.identities()
	ke3, sessionKey, exportKey, failed := c.GenerateKE3(ke2, clientIdentity, serverIdentity, stretching(started.KSF))
	finish := api.FinishRecoveryRequest{State: started.State}
	switch {
	case failed == nil:
		finish.KE3 = ke3.Serialize()
	case errors.Is(failed, bytemare.ErrAuthentication):
		finish.KE3 = make([]byte, 32)
		_, _ = rand.Read(finish.KE3) // never fails
	default:
		d.t.Fatal(failed)
	}
	problem, finished := call[api.FinishRecoveryResponse](d, http.MethodPost, d.resource()+"/recovery/finish", finish)
	if (problem == nil) != (failed == nil) {
		d.t.Fatalf("the other implementation says %v, and the vault %+v", failed, problem)
	}
	if problem != nil {
		return backup.Key{}, problem
	}
	wrapped, err := aead(d.t, sessionKey, transcript.DeliveryKeyInfo).
		Open(nil, nil, finished.SealedKey, transcript.DeliveryContext(d.vault.ID, tenant, d.user, finished.Generation))
	must(d.t, err)
	key, err := aead(d.t, exportKey, transcript.WrapKeyInfo).
		Open(nil, nil, wrapped, transcript.WrapContext(d.vault.ID, tenant, d.user))
	must(d.t, err)
	return backup.Key(key), nil
}

// aead is AES-256-GCM under HKDF-SHA-256 of a secret; the nonce comes first.
func aead(t testing.TB, secret []byte, info string) cipher.AEAD {
	t.Helper()
	key, err := hkdf.Key(sha256.New, secret, nil, info, 32)
	must(t, err)
	block, err := aes.NewCipher(key)
	must(t, err)
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	must(t, err)
	return gcm
}
