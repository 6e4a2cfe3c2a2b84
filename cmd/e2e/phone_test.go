package e2e_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
	"github.com/backup-key-vault/bkv/transcript"
)

// phone is a device without the SDK's manners: each request is sent when the test says
// so, as often as it says. It stretches nothing, so that it can make a crowd; its
// records say Argon2id, which the vault cannot see.
type phone struct {
	deployment *deployment
	at         *address
	user       string
}

func (d *deployment) phone(at *address, user string) *phone { return &phone{d, at, user} }

// reply is an answer of vaultd.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) String() string { return fmt.Sprintf("%d %s", r.status, r.body) }

// problem returns the type of a problem, without the prefix that all have.
func (r reply) problem() string {
	var p api.Problem
	if json.Unmarshal(r.body, &p) != nil || len(p.Type) < len(api.ProblemPrefix) {
		return ""
	}
	return p.Type[len(api.ProblemPrefix):]
}

// crowd is all phones' way to vaultd. It trusts the tests' authority.
var crowd = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, TLSClientConfig: &tls.Config{RootCAs: trusted}}, Timeout: patience}

// send sends a request, once. An error means that no answer came.
func (p *phone) send(ctx context.Context, method, rest string, body any) (reply, error) {
	var raw []byte
	var err error
	if body != nil {
		if raw, err = json.Marshal(body); err != nil {
			return reply{}, err
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, p.at.String()+"/v1/users/"+url.PathEscape(p.user)+"/backup-key"+rest, bytes.NewReader(raw))
	if err != nil {
		return reply{}, err
	}
	r.GetBody = nil // net/http would send it a second time after some errors
	token, err := p.deployment.mint(p.user)
	if err != nil {
		return reply{}, err
	}
	if raw != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("Authorization", "Bearer "+token)
	response, err := crowd.Do(r)
	if err != nil {
		return reply{}, err
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	return reply{response.StatusCode, response.Header, got}, err
}

// into decodes the answer to a request that must have succeeded.
func into[T any](r reply, err error) (out T, _ error) {
	switch {
	case err != nil:
		return out, err
	case r.status != http.StatusOK:
		return out, &refused{r}
	}
	return out, json.Unmarshal(r.body, &out)
}

// refused is an answer other than success, as an error.
type refused struct{ reply }

func (r *refused) Error() string { return "refused: " + r.String() }

// isRefused reports whether err is vaultd's answer, of this type, or of any if kind is empty.
func isRefused(err error, kind string) bool {
	var r *refused
	return errors.As(err, &r) && (kind == "" || r.problem() == kind)
}

func (p *phone) config() opaque.ClientConfig {
	return opaque.ClientConfig{
		ServerIdentity: []byte(vaultID), ClientIdentity: transcript.ClientIdentity(tenant, p.user), KSF: opaquetest.IdentityKSF{},
	}
}

// enrolment is what a phone has still to send, and the key that is its own when all is answered.
type enrolment struct {
	key      [32]byte
	stage    api.StageRequest
	activate api.ActivateRequest
}

// prepare starts an enrolment and makes every byte of the rest.
func (p *phone) prepare(ctx context.Context, password string) (*enrolment, error) {
	request, registration, err := opaque.StartRegistration(rand.Reader, []byte(password))
	if err != nil {
		return nil, err
	}
	started, err := into[api.StartEnrolmentResponse](p.send(ctx, http.MethodPost, "/enrolment", api.StartEnrolmentRequest{RegistrationRequest: request[:]}))
	if err != nil {
		return nil, err
	}
	response, err := opaque.ParseRegistrationResponse(started.RegistrationResponse)
	if err != nil {
		return nil, err
	}
	made, err := registration.Finish(rand.Reader, response, p.config())
	if err != nil {
		return nil, err
	}
	e := &enrolment{}
	rand.Read(e.key[:])
	public, owner, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	wrap, err := aead(made.ExportKey[:], transcript.WrapKeyInfo)
	if err != nil {
		return nil, err
	}
	wrapped := wrap.Seal(nil, nil, e.key[:], transcript.WrapContext(vaultID, tenant, p.user))
	ksf := opaque.DefaultArgon2id
	e.stage = api.StageRequest{
		State: started.State, Record: made.Record[:], WrappedKey: wrapped, OwnerKey: api.Bytes(public),
		KSF: api.KSF{Algorithm: api.Argon2id, Time: ksf.Time, MemoryKiB: ksf.MemoryKiB, Threads: uint32(ksf.Threads)},
	}
	digest := transcript.Material{
		Record: e.stage.Record, WrappedKey: wrapped, Time: ksf.Time, MemoryKiB: ksf.MemoryKiB, Threads: uint32(ksf.Threads),
		OwnerKey: public, ServerKey: made.ServerPublicKey[:],
	}.Digest()
	e.activate = api.ActivateRequest{Generation: started.Generation, Signature: transcript.Statement{
		Action: transcript.Activate, Vault: vaultID, Tenant: tenant, User: p.user, Old: started.Follows, New: started.Generation, Digest: digest,
	}.Sign(owner)}
	return e, nil
}

// commit sends the rest of an enrolment. It can be repeated until it is answered.
func (p *phone) commit(ctx context.Context, e *enrolment) error {
	if _, err := into[api.StageResponse](p.send(ctx, http.MethodPut, "", e.stage)); err != nil {
		return err
	}
	_, err := into[api.Status](p.send(ctx, http.MethodPost, "/activation", e.activate))
	return err
}

// enrol enrols where nothing goes wrong.
func (p *phone) enrol(ctx context.Context, password string) (key [32]byte, err error) {
	e, err := p.prepare(ctx, password)
	if err == nil {
		err = p.commit(ctx, e)
	}
	if err != nil {
		return key, err
	}
	return e.key, nil
}

// guess is one attempt: a KE1, and what came of it.
type guess struct {
	request api.StartRecoveryRequest
	login   *opaque.ClientLogin
	started *api.StartRecoveryResponse
	finish  api.FinishRecoveryRequest
	opened  opaque.Login
}

func newGuess(password string) (*guess, error) {
	ke1, login, err := opaque.StartLogin(rand.Reader, []byte(password))
	return &guess{request: api.StartRecoveryRequest{KE1: ke1[:]}, login: login}, err
}

// start sends the guess's KE1. It can be repeated.
func (p *phone) start(ctx context.Context, g *guess) error {
	started, err := into[api.StartRecoveryResponse](p.send(ctx, http.MethodPost, "/recovery", g.request))
	if err != nil {
		return err
	}
	ke2, err := opaque.ParseKE2(started.KE2)
	if err != nil {
		return err
	}
	opened, err := g.login.Finish(ke2, p.config())
	if errors.Is(err, opaque.ErrWrongPasswordOrServer) {
		rand.Read(opened.KE3[:])
	} else if err != nil {
		return err
	}
	g.started, g.opened = &started, opened
	g.finish = api.FinishRecoveryRequest{KE3: opened.KE3[:], State: started.State}
	return nil
}

// end sends the guess's KE3 and returns the key that comes for it. It can be repeated.
func (p *phone) end(ctx context.Context, g *guess) (key [32]byte, err error) {
	got, err := into[api.FinishRecoveryResponse](p.send(ctx, http.MethodPost, "/recovery/finish", g.finish))
	if err != nil {
		return key, err
	}
	delivery, err := aead(g.opened.SessionKey[:], transcript.DeliveryKeyInfo)
	if err != nil {
		return key, err
	}
	wrapped, err := delivery.Open(nil, nil, got.SealedKey, transcript.DeliveryContext(vaultID, tenant, p.user, got.Generation))
	if err != nil {
		return key, err
	}
	wrap, err := aead(g.opened.ExportKey[:], transcript.WrapKeyInfo)
	if err != nil {
		return key, err
	}
	plain, err := wrap.Open(nil, nil, wrapped, transcript.WrapContext(vaultID, tenant, p.user))
	if err != nil {
		return key, err
	}
	return [32]byte(plain), nil
}

// recover makes a whole attempt where nothing goes wrong but the password.
func (p *phone) recover(ctx context.Context, password string) (key [32]byte, err error) {
	g, err := newGuess(password)
	if err == nil {
		err = p.start(ctx, g)
	}
	if err != nil {
		return key, err
	}
	return p.end(ctx, g)
}

// aead is AES-256-GCM, its nonce in front, under HKDF-SHA-256 of a secret.
func aead(secret []byte, info string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, info, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
