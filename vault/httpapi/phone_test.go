package httpapi_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"net/http"
	"net/url"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
	"github.com/backup-key-vault/bkv/transcript"
)

// phone is a client, step by step, over any way to reach the handler.
type phone struct {
	t    testing.TB
	user string
	send func(method, user, rest string, body any) reply
}

func (s *service) phone(user string) *phone { return &phone{t: s.t, user: user, send: s.call} }

var defaultKSF = api.KSF{
	Algorithm: api.Argon2id, Time: opaque.DefaultArgon2id.Time,
	MemoryKiB: opaque.DefaultArgon2id.MemoryKiB, Threads: uint32(opaque.DefaultArgon2id.Threads),
}

// config stretches nothing: what is tested here is not Argon2id.
func (p *phone) config() opaque.ClientConfig {
	return opaque.ClientConfig{
		ServerIdentity: []byte(vaultID), ClientIdentity: transcript.ClientIdentity(tenant, p.user), KSF: opaquetest.IdentityKSF{},
	}
}

// enrolment is a generation as its phone knows it.
type enrolment struct {
	key        [32]byte
	owner      ed25519.PrivateKey
	stage      api.StageRequest
	generation api.GenerationID
	follows    api.GenerationID
	digest     [32]byte
}

func (p *phone) statement(action transcript.Action, from, to api.GenerationID, digest [32]byte) transcript.Statement {
	return transcript.Statement{Action: action, Vault: vaultID, Tenant: tenant, User: p.user, Old: from, New: to, Digest: digest}
}

// prepare starts an enrolment and makes what is to be staged.
func (p *phone) prepare(password string) *enrolment {
	p.t.Helper()
	request, registration, err := opaque.StartRegistration(rand.Reader, []byte(password))
	p.must(err)
	started := into[api.StartEnrolmentResponse](p.t,
		p.send(http.MethodPost, p.user, "/enrolment", api.StartEnrolmentRequest{RegistrationRequest: request[:]}))
	response, err := opaque.ParseRegistrationResponse(started.RegistrationResponse)
	p.must(err)
	made, err := registration.Finish(rand.Reader, response, p.config())
	p.must(err)
	e := &enrolment{generation: started.Generation, follows: started.Follows}
	rand.Read(e.key[:])
	var public ed25519.PublicKey
	public, e.owner, err = ed25519.GenerateKey(rand.Reader)
	p.must(err)
	wrapped := aead(p.t, made.ExportKey[:], transcript.WrapKeyInfo).Seal(nil, nil, e.key[:], transcript.WrapContext(vaultID, tenant, p.user))
	e.stage = api.StageRequest{State: started.State, Record: made.Record[:], WrappedKey: wrapped, KSF: defaultKSF, OwnerKey: api.Bytes(public)}
	return e
}

func (p *phone) stage(e *enrolment) {
	p.t.Helper()
	staged := into[api.StageResponse](p.t, p.send(http.MethodPut, p.user, "", e.stage))
	if staged.Generation != e.generation || staged.Follows != e.follows {
		p.t.Fatalf("staged %v after %v, want %v after %v", staged.Generation, staged.Follows, e.generation, e.follows)
	}
	e.digest = [32]byte(staged.Digest)
}

// activation is e's, with previous's proof if there is a previous.
func (p *phone) activation(e, previous *enrolment) api.ActivateRequest {
	out := api.ActivateRequest{
		Generation: e.generation, Signature: p.statement(transcript.Activate, e.follows, e.generation, e.digest).Sign(e.owner),
	}
	if previous != nil {
		out.PreviousSignature = p.statement(transcript.Replace, e.follows, e.generation, e.digest).Sign(previous.owner)
	}
	return out
}

func (p *phone) enrol(password string, previous *enrolment) *enrolment {
	p.t.Helper()
	e := p.prepare(password)
	p.stage(e)
	into[api.Status](p.t, p.send(http.MethodPost, p.user, "/activation", p.activation(e, previous)))
	return e
}

// guess is an attempt as its phone knows it.
type guess struct {
	request api.StartRecoveryRequest
	login   *opaque.ClientLogin
}

func (p *phone) guess(password string) *guess {
	p.t.Helper()
	ke1, login, err := opaque.StartLogin(rand.Reader, []byte(password))
	p.must(err)
	return &guess{request: api.StartRecoveryRequest{KE1: ke1[:]}, login: login}
}

// finish makes the last request of an attempt: a random KE3 if KE2 did not open.
func (p *phone) finish(g *guess, started api.StartRecoveryResponse) (api.FinishRecoveryRequest, opaque.Login) {
	p.t.Helper()
	ke2, err := opaque.ParseKE2(started.KE2)
	p.must(err)
	login, err := g.login.Finish(ke2, p.config())
	if errors.Is(err, opaque.ErrWrongPasswordOrServer) {
		rand.Read(login.KE3[:])
	} else {
		p.must(err)
	}
	return api.FinishRecoveryRequest{KE3: login.KE3[:], State: started.State}, login
}

// attempt makes a whole attempt and returns the last answer, and the key if it succeeded.
func (p *phone) attempt(password string) (reply, [32]byte) {
	p.t.Helper()
	g := p.guess(password)
	r := p.send(http.MethodPost, p.user, "/recovery", g.request)
	if r.status != http.StatusOK {
		return r, [32]byte{}
	}
	request, login := p.finish(g, into[api.StartRecoveryResponse](p.t, r))
	r = p.send(http.MethodPost, p.user, "/recovery/finish", request)
	if r.status != http.StatusOK {
		return r, [32]byte{}
	}
	got := into[api.FinishRecoveryResponse](p.t, r)
	wrapped, err := aead(p.t, login.SessionKey[:], transcript.DeliveryKeyInfo).
		Open(nil, nil, got.SealedKey, transcript.DeliveryContext(vaultID, tenant, p.user, got.Generation))
	p.must(err)
	key, err := aead(p.t, login.ExportKey[:], transcript.WrapKeyInfo).Open(nil, nil, wrapped, transcript.WrapContext(vaultID, tenant, p.user))
	p.must(err)
	return r, [32]byte(key)
}

// turnOff sends a DELETE; signature nil means none.
func (p *phone) turnOff(generation api.GenerationID, signature api.Bytes) reply {
	p.t.Helper()
	q := url.Values{"generation": {generation.String()}}
	if signature != nil {
		text, err := signature.MarshalText()
		p.must(err)
		q.Set("signature", string(text))
	}
	return p.send(http.MethodDelete, p.user, "?"+q.Encode(), nil)
}

func (p *phone) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func aead(t testing.TB, secret []byte, info string) cipher.AEAD {
	t.Helper()
	key, err := hkdf.Key(sha256.New, secret, nil, info, 32)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	return gcm
}
