// Package opaquetest helps to test code that uses package opaque: software
// keys in the place of a token's, no key stretching, and the test vectors of
// RFC 9807. It is for tests alone.
package opaquetest

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	_ "embed" // for vectorFile
	"encoding/hex"
	"encoding/json"
	"testing"

	"filippo.io/nistec"
	"github.com/cloudflare/circl/oprf"

	"github.com/backup-key-vault/bkv/opaque"
)

// Key is a private key in memory: an [opaque.Evaluator] and an
// [opaque.StaticKey]. It may be used concurrently.
type Key struct {
	scalar opaque.Scalar
	public opaque.PublicKey
}

var (
	_ opaque.Evaluator = Key{}
	_ opaque.StaticKey = Key{}
)

// NewKey returns the key with this private scalar.
func NewKey(t testing.TB, scalar opaque.Scalar) Key {
	t.Helper()
	p, err := nistec.NewP256Point().ScalarBaseMult(scalar[:])
	if err != nil {
		t.Fatal(err)
	}
	public, err := opaque.ParsePublicKey(p.BytesCompressed())
	if err != nil {
		t.Fatal(err)
	}
	return Key{scalar, public}
}

// RandomKey returns a fresh key.
func RandomKey(t testing.TB) Key {
	t.Helper()
	s, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return NewKey(t, s)
}

// Evaluate multiplies by the key.
func (k Key) Evaluate(ctx context.Context, blinded opaque.Element) (opaque.Element, error) {
	return k.Multiply(ctx, blinded)
}

// Multiply multiplies by the key.
func (k Key) Multiply(ctx context.Context, p opaque.Element) (opaque.Element, error) {
	if err := ctx.Err(); err != nil {
		return opaque.Element{}, err
	}
	return k.scalar.Multiply(p)
}

// PublicKey returns the public key.
func (k Key) PublicKey() opaque.PublicKey { return k.public }

// IdentityKSF stretches nothing. The vectors of RFC 9807 use it, and tests
// that have no time for Argon2id.
type IdentityKSF struct{}

// Stretch returns its input.
func (IdentityKSF) Stretch(input []byte) ([]byte, error) { return bytes.Clone(input), nil }

// Bytes is a byte string that JSON holds in hexadecimal.
type Bytes []byte

// UnmarshalText decodes hexadecimal.
func (b *Bytes) UnmarshalText(text []byte) (err error) {
	*b, err = hex.DecodeString(string(text))
	return err
}

// Vector is one test vector of RFC 9807 for P256-SHA256, under the RFC's own
// names. Fields that a vector does not have are nil.
type Vector struct {
	Config struct {
		Context Bytes
		Group   string
		KSF     string
		Fake    string
	}
	Inputs struct {
		BlindLogin           Bytes `json:"blind_login"`
		BlindRegistration    Bytes `json:"blind_registration"`
		ClientIdentity       Bytes `json:"client_identity"`
		ClientKeyshareSeed   Bytes `json:"client_keyshare_seed"`
		ClientNonce          Bytes `json:"client_nonce"`
		ClientPrivateKey     Bytes `json:"client_private_key"` // fake alone
		ClientPublicKey      Bytes `json:"client_public_key"`  // fake alone
		CredentialIdentifier Bytes `json:"credential_identifier"`
		EnvelopeNonce        Bytes `json:"envelope_nonce"`
		KE1                  Bytes `json:"KE1"`         // fake alone
		MaskingKey           Bytes `json:"masking_key"` // fake alone
		MaskingNonce         Bytes `json:"masking_nonce"`
		OPRFSeed             Bytes `json:"oprf_seed"`
		Password             Bytes `json:"password"`
		ServerIdentity       Bytes `json:"server_identity"`
		ServerKeyshareSeed   Bytes `json:"server_keyshare_seed"`
		ServerNonce          Bytes `json:"server_nonce"`
		ServerPrivateKey     Bytes `json:"server_private_key"`
		ServerPublicKey      Bytes `json:"server_public_key"`
	}
	Intermediates struct {
		AuthKey            Bytes `json:"auth_key"`
		ClientMACKey       Bytes `json:"client_mac_key"`
		ClientPublicKey    Bytes `json:"client_public_key"`
		Envelope           Bytes `json:"envelope"`
		HandshakeSecret    Bytes `json:"handshake_secret"`
		MaskingKey         Bytes `json:"masking_key"`
		OPRFKey            Bytes `json:"oprf_key"`
		RandomizedPassword Bytes `json:"randomized_password"`
		ServerMACKey       Bytes `json:"server_mac_key"`
	}
	Outputs struct {
		KE1                  Bytes `json:"KE1"`
		KE2                  Bytes `json:"KE2"`
		KE3                  Bytes `json:"KE3"`
		ExportKey            Bytes `json:"export_key"`
		RegistrationRequest  Bytes `json:"registration_request"`
		RegistrationResponse Bytes `json:"registration_response"`
		RegistrationUpload   Bytes `json:"registration_upload"`
		SessionKey           Bytes `json:"session_key"`
	}
}

//go:embed testdata/opaque_3dh_p256_rfc9807.json
var vectorFile []byte

// Vectors returns the vectors of RFC 9807 for P256-SHA256: real are C.1.5 and
// C.1.6, fake is C.2.3.
func Vectors(t testing.TB) (real [2]Vector, fake Vector) {
	t.Helper()
	var file struct {
		Source     string
		Real, Fake []Vector
	}
	d := json.NewDecoder(bytes.NewReader(vectorFile))
	if err := d.Decode(&file); err != nil {
		t.Fatal(err)
	}
	if len(file.Real) != 2 || len(file.Fake) != 1 {
		t.Fatalf("%d real and %d fake vectors, want 2 and 1", len(file.Real), len(file.Fake))
	}
	return [2]Vector(file.Real), file.Fake[0]
}

// OPRFKey is the vector's oprf_key, derived from oprf_seed and
// credential_identifier (RFC 9807 section 5.2.2) by circl.
func (v Vector) OPRFKey(t testing.TB) opaque.Scalar {
	t.Helper()
	seed, err := hkdf.Expand(sha256.New, v.Inputs.OPRFSeed, string(v.Inputs.CredentialIdentifier)+"OprfKey", 32)
	if err != nil {
		t.Fatal(err)
	}
	k, err := oprf.DeriveKey(oprf.SuiteP256, oprf.BaseMode, seed, []byte("OPAQUE-DeriveKeyPair"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return scalar(t, b)
}

// ServerPrivateKey is the vector's server_private_key.
func (v Vector) ServerPrivateKey(t testing.TB) opaque.Scalar {
	t.Helper()
	return scalar(t, v.Inputs.ServerPrivateKey)
}

// Session is what both ends agree on.
func (v Vector) Session() opaque.Session {
	return opaque.Session{
		Context:        v.Config.Context,
		ServerIdentity: v.Inputs.ServerIdentity,
		ClientIdentity: v.Inputs.ClientIdentity,
	}
}

// Record is the record that the server holds at the login: the one uploaded,
// or the one that a fake vector implies (RFC 9807 section 6.3.2.2).
func (v Vector) Record(t testing.TB) opaque.RegistrationRecord {
	t.Helper()
	b := v.Outputs.RegistrationUpload
	if b == nil {
		b = bytes.Join([][]byte{v.Inputs.ClientPublicKey, v.Inputs.MaskingKey, make([]byte, 64)}, nil)
	}
	r, err := opaque.ParseRegistrationRecord(b)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// KE1 is the client's KE1: the real vector's output, the fake one's input.
func (v Vector) KE1(t testing.TB) opaque.KE1 {
	t.Helper()
	b := v.Outputs.KE1
	if b == nil {
		b = v.Inputs.KE1
	}
	ke1, err := opaque.ParseKE1(b)
	if err != nil {
		t.Fatal(err)
	}
	return ke1
}

// ServerRandomness is what [opaque.GenerateKE2] must read for the vector.
func (v Vector) ServerRandomness() *bytes.Reader {
	return bytes.NewReader(bytes.Join([][]byte{
		v.Inputs.MaskingNonce, v.Inputs.ServerNonce, v.Inputs.ServerKeyshareSeed,
	}, nil))
}

func scalar(t testing.TB, b []byte) opaque.Scalar {
	t.Helper()
	s, err := opaque.ParseScalar(b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
