package vaulttest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
)

// SoftToken is vault.Token in software, for tests that need thousands of runs or
// faults at chosen calls. The master and the relay key can rotate; the others have one generation. It counts what a real token
// could be asked to reveal: the distinct points that it multiplied by the OPRF key.
type SoftToken struct {
	state    cipher.AEAD
	scalars  map[string]opaque.Scalar
	mac      [32]byte
	identity *ecdsa.PrivateKey

	mu        sync.Mutex
	relay     []*ecdh.PrivateKey // by generation − 1; nil: destroyed
	master    []cipher.AEAD      // by generation − 1; nil: destroyed
	evaluated map[[33]byte]int
	fail      func(operation string) error
}

// NewSoftToken makes a token with fresh keys.
func NewSoftToken() *SoftToken {
	t := &SoftToken{
		scalars: map[string]opaque.Scalar{}, evaluated: map[[33]byte]int{},
		state: newAEAD(), master: []cipher.AEAD{newAEAD()},
	}
	t.RotateRelay()
	for _, purpose := range []string{"oprf", "server"} {
		scalar, err := opaque.RandomScalar(rand.Reader)
		must(err)
		t.scalars[purpose] = scalar
	}
	rand.Read(t.mac[:])
	var err error
	t.identity, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	return t
}

func newAEAD() cipher.AEAD {
	var key [32]byte
	rand.Read(key[:])
	block, err := aes.NewCipher(key[:])
	must(err)
	aead, err := cipher.NewGCMWithRandomNonce(block)
	must(err)
	return aead
}

// RotateMaster makes a new master key and uses it from now on. DestroyMasters
// destroys all older ones.
func (t *SoftToken) RotateMaster() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.master = append(t.master, newAEAD())
}

// DestroyMasters destroys all master keys but the one in use.
func (t *SoftToken) DestroyMasters() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.master[:len(t.master)-1])
}

// RotateRelay makes a new relay key and uses it from now on. DestroyRelays
// destroys all older ones.
func (t *SoftToken) RotateRelay() {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	must(err)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.relay = append(t.relay, key)
}

// DestroyRelays destroys all relay keys but the one in use.
func (t *SoftToken) DestroyRelays() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.relay[:len(t.relay)-1])
}

func (t *SoftToken) relayKey(generation uint32) *ecdh.PrivateKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	if generation < 1 || int(generation) > len(t.relay) {
		return nil
	}
	return t.relay[generation-1]
}

func (t *SoftToken) aead(purpose string, generation uint32) cipher.AEAD {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case purpose == "state" && generation == 1:
		return t.state
	case purpose == "master" && generation >= 1 && int(generation) <= len(t.master):
		return t.master[generation-1]
	}
	return nil
}

func must(err error) {
	if err != nil {
		panic(err) // of this test helper's own making
	}
}

// FailWith has hook asked before every operation ("seal", "open", "multiply",
// "derive", "mac", "sign", "random"); an error that it returns is the operation's. Nil: never.
func (t *SoftToken) FailWith(hook func(operation string) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fail = hook
}

// Evaluated is the number of distinct points multiplied by the OPRF key: the
// distinct guesses (and enrolment starts) that were ever answered.
func (t *SoftToken) Evaluated() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.evaluated)
}

func (t *SoftToken) begin(ctx context.Context, operation string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t.mu.Lock()
	hook := t.fail
	t.mu.Unlock()
	if hook != nil {
		return hook(operation)
	}
	return nil
}

func softAssociated(purpose string, id [16]byte, associated []byte) []byte {
	return transcript.Fields("soft", []byte(purpose), id[:], associated)
}

// Seal implements vault.Token.
func (t *SoftToken) Seal(ctx context.Context, purpose string, id [16]byte, plaintext, associated []byte) ([]byte, error) {
	if err := t.begin(ctx, "seal"); err != nil {
		return nil, err
	}
	generation := t.Newest(purpose)
	header := binary.BigEndian.AppendUint32([]byte{1}, generation)
	return t.aead(purpose, generation).Seal(header, nil, plaintext, softAssociated(purpose, id, associated)), nil
}

// Open implements vault.Token.
func (t *SoftToken) Open(ctx context.Context, purpose string, id [16]byte, sealed, associated []byte) ([]byte, bool, error) {
	if err := t.begin(ctx, "open"); err != nil {
		return nil, false, err
	}
	aead := t.aead(purpose, vault.SealedUnder(sealed))
	if aead == nil || sealed[0] != 1 {
		return nil, false, nil
	}
	plain, err := aead.Open(nil, nil, sealed[5:], softAssociated(purpose, id, associated))
	return plain, err == nil, nil
}

// Multiply implements vault.Token.
func (t *SoftToken) Multiply(ctx context.Context, purpose string, generation uint32, point [33]byte) ([33]byte, error) {
	if err := t.begin(ctx, "multiply"); err != nil {
		return [33]byte{}, err
	}
	scalar, ok := t.scalars[purpose]
	if !ok || generation != 1 {
		return [33]byte{}, fmt.Errorf("no key %s/%d", purpose, generation)
	}
	if purpose == "oprf" {
		t.mu.Lock()
		t.evaluated[point]++
		t.mu.Unlock()
	}
	return scalar.Multiply(point)
}

// DeriveX implements vault.Token.
func (t *SoftToken) DeriveX(ctx context.Context, purpose string, generation uint32, point [65]byte) (x [32]byte, err error) {
	if err := t.begin(ctx, "derive"); err != nil {
		return x, err
	}
	key := t.relayKey(generation)
	if purpose != "relay" || key == nil {
		return x, fmt.Errorf("no key %s/%d", purpose, generation)
	}
	peer, err := ecdh.P256().NewPublicKey(point[:])
	if err != nil {
		return x, err
	}
	shared, err := key.ECDH(peer)
	if err != nil {
		return x, err
	}
	return [32]byte(shared), nil
}

// PublicKey implements vault.Token.
func (t *SoftToken) PublicKey(purpose string, generation uint32) ([33]byte, error) {
	if purpose == "relay" {
		key := t.relayKey(generation)
		if key == nil {
			return [33]byte{}, fmt.Errorf("no key %s/%d", purpose, generation)
		}
		uncompressed := key.PublicKey().Bytes() // SEC 1 section 2.3.3: 4, x, y
		return [33]byte(append([]byte{2 + uncompressed[64]&1}, uncompressed[1:33]...)), nil
	}
	if generation != 1 {
		return [33]byte{}, fmt.Errorf("no key %s/%d", purpose, generation)
	}
	if purpose == "identity" {
		return [33]byte(elliptic.MarshalCompressed(elliptic.P256(), t.identity.X, t.identity.Y)), nil
	}
	generator := elliptic.P256().Params()
	return t.scalars[purpose].Multiply(opaque.Element(elliptic.MarshalCompressed(elliptic.P256(), generator.Gx, generator.Gy)))
}

// MAC implements vault.Token.
func (t *SoftToken) MAC(ctx context.Context, generation uint32, message []byte) (out [32]byte, err error) {
	if err := t.begin(ctx, "mac"); err != nil {
		return out, err
	}
	if generation != 1 {
		return out, fmt.Errorf("no key mac/%d", generation)
	}
	h := hmac.New(sha256.New, t.mac[:])
	h.Write(message)
	return [32]byte(h.Sum(nil)), nil
}

// Sign implements vault.Token.
func (t *SoftToken) Sign(ctx context.Context, _ string, _ uint32, digest [32]byte) (out [64]byte, err error) {
	if err := t.begin(ctx, "sign"); err != nil {
		return out, err
	}
	r, s, err := ecdsa.Sign(rand.Reader, t.identity, digest[:])
	if err != nil {
		return out, err
	}
	r.FillBytes(out[:32])
	s.FillBytes(out[32:])
	return out, nil
}

// Newest implements vault.Token.
func (t *SoftToken) Newest(purpose string) uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch purpose {
	case "master":
		return uint32(len(t.master))
	case "relay":
		return uint32(len(t.relay))
	}
	return 1
}

// Generations implements vault.Token.
func (t *SoftToken) Generations(purpose string) (held []uint32) {
	for generation := range t.Newest(purpose) {
		gone := purpose == "master" && t.aead(purpose, generation+1) == nil || purpose == "relay" && t.relayKey(generation+1) == nil
		if !gone {
			held = append(held, generation+1)
		}
	}
	return held
}

// Strategy implements vault.Token.
func (t *SoftToken) Strategy() string { return "derive" }

// Random implements vault.Token.
func (t *SoftToken) Random(ctx context.Context, n int) ([]byte, error) {
	if err := t.begin(ctx, "random"); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	rand.Read(b)
	return b, nil
}
