package ceremony_test

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/ceremony"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// The tests of this file play one side of a ceremony in software, from what the package's documentation says
// and Go's own cryptography, against a token on the other side.

// wrapAES is RFC 3394 section 2.2.1.
func wrapAES(kek, plain []byte) []byte {
	block, err := aes.NewCipher(kek)
	if err != nil || len(plain)%8 != 0 {
		panic("not to be wrapped")
	}
	n := len(plain) / 8
	out := append(bytes.Repeat([]byte{0xa6}, 8), plain...)
	buf := make([]byte, 16)
	for j := range 6 {
		for i := 1; i <= n; i++ {
			copy(buf, out[:8])
			copy(buf[8:], out[8*i:])
			block.Encrypt(buf, buf)
			binary.BigEndian.PutUint64(out, binary.BigEndian.Uint64(buf)^uint64(n*j+i))
			copy(out[8*i:8*i+8], buf[8:])
		}
	}
	return out
}

// unwrapAES is RFC 3394 section 2.2.2.
func unwrapAES(kek, wrapped []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil || len(wrapped)%8 != 0 || len(wrapped) < 24 {
		return nil, errors.New("not wrapped")
	}
	n := len(wrapped)/8 - 1
	out := bytes.Clone(wrapped)
	buf := make([]byte, 16)
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			binary.BigEndian.PutUint64(buf, binary.BigEndian.Uint64(out)^uint64(n*j+i))
			copy(buf[8:], out[8*i:8*i+8])
			block.Decrypt(buf, buf)
			copy(out, buf[:8])
			copy(out[8*i:], buf[8:])
		}
	}
	if !bytes.Equal(out[:8], bytes.Repeat([]byte{0xa6}, 8)) {
		return nil, errors.New("the integrity check failed")
	}
	return out[8:], nil
}

// The vector of RFC 3394 section 4.6.
func TestSoftwareKeyWrap(t *testing.T) {
	kek, _ := hex.DecodeString("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F")
	data, _ := hex.DecodeString("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F")
	want, _ := hex.DecodeString("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21")
	if got := wrapAES(kek, data); !bytes.Equal(got, want) {
		t.Errorf("wrapped to %x", got)
	}
	if got, err := unwrapAES(kek, want); err != nil || !bytes.Equal(got, data) {
		t.Errorf("unwrapped to %x, %v", got, err)
	}
}

func labelled(label string, parts ...[]byte) []byte {
	sum := sha256.Sum256(append([]byte(label+"\x00"), bytes.Join(parts, nil)...))
	return sum[:]
}

// shown is a key of the set as a record shows it, from its plain bytes (32) or private key.
func shown(name pkcs11util.KeyName, secret []byte, private *ecdsa.PrivateKey) ceremony.Key {
	key := ceremony.Key{Purpose: name.Purpose, Generation: name.Generation}
	question := labelled("bkv ceremony key check 1", []byte(name.String()))
	var answer []byte
	switch {
	case private != nil:
		point, err := private.PublicKey.Bytes()
		if err != nil {
			panic(err)
		}
		key.PublicKey = append([]byte{2 | point[64]&1}, point[1:33]...) // SEC 1 section 2.3.3
		answer = key.PublicKey
	case name.Purpose == pkcs11util.MAC:
		h := hmac.New(sha256.New, secret)
		h.Write([]byte("bkv ceremony key check 1\x00"))
		h.Write(question)
		answer = h.Sum(nil)
	default:
		block, err := aes.NewCipher(secret)
		if err != nil {
			panic(err)
		}
		answer = make([]byte, 32)
		block.Encrypt(answer, question)
		block.Encrypt(answer[16:], question[16:])
	}
	key.Fingerprint = labelled("bkv ceremony key fingerprint 1", []byte(name.String()+"\x00"), answer)
	return key
}

// site is a token in software.
type site struct {
	transport *rsa.PrivateKey
	request   ceremony.Request
}

func softwareSite(t testing.TB, like ceremony.Request) site {
	t.Helper()
	s := site{request: like}
	s.transport = must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 3072))
	s.request.TransportKey = must[[]byte](t)(x509.MarshalPKIXPublicKey(s.transport.Public()))
	return s
}

func softwareRequest(t testing.TB) site {
	return softwareSite(t, ceremony.Request{
		Format: "bkv ceremony request 1", Tool: "software", Nonce: bytes.Repeat([]byte{7}, 16), OAEPHash: ceremony.SHA1,
		Token: ceremony.Token{Serial: "s0", Label: "software"},
	})
}

// source is a set in software.
type source struct {
	names    []pkcs11util.KeyName
	plain    [][]byte // as it is wrapped
	shown    []ceremony.Key
	identity *ecdsa.PrivateKey
}

func newSource(t testing.TB) *source {
	t.Helper()
	s := &source{}
	for _, purpose := range pkcs11util.Purposes() {
		name := pkcs11util.KeyName{Purpose: purpose, Generation: 1}
		var private *ecdsa.PrivateKey
		plain := make([]byte, 32)
		_, _ = rand.Read(plain)
		if _, pair, _, err := pkcs11util.DefaultProfile().Templates(purpose); err != nil {
			t.Fatal(err)
		} else if pair != nil {
			private = must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			plain = must[[]byte](t)(x509.MarshalPKCS8PrivateKey(private))
			plain = append(plain, make([]byte, -len(plain)&7)...)
		}
		if purpose == pkcs11util.Identity {
			s.identity = private
		}
		s.names, s.plain, s.shown = append(s.names, name), append(s.plain, plain), append(s.shown, shown(name, plain, private))
	}
	return s
}

// bundle wraps and signs. change may spoil the record and the plain keys before.
func (s *source) bundle(t testing.TB, requests []ceremony.Request, change func(r *ceremony.Record, plain [][]byte)) ceremony.Bundle {
	t.Helper()
	b := ceremony.Bundle{Format: "bkv ceremony bundle 1", Record: ceremony.Record{
		Format: "bkv ceremony record 1", Time: "2026-11-23T12:00:00Z", Who: "nobody", Tool: "software",
		Requests: requests, Keys: slices.Clone(s.shown),
	}}
	plain := slices.Clone(s.plain)
	for i, name := range s.names {
		if name.Purpose == pkcs11util.Identity {
			b.Record.Identity = s.shown[i]
		}
	}
	if change != nil {
		change(&b.Record, plain)
	}
	for _, r := range requests {
		transport := must[any](t)(x509.ParsePKIXPublicKey(r.TransportKey)).(*rsa.PublicKey)
		kek := make([]byte, 32)
		_, _ = rand.Read(kek)
		share := ceremony.Share{WrappingKey: must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, kek, nil))}
		for _, p := range plain {
			share.Keys = append(share.Keys, wrapAES(kek, p))
		}
		b.Shares = append(b.Shares, share)
	}
	s.sign(t, &b)
	return b
}

// sign makes a bundle of its shares and record, whatever they are.
func (s *source) sign(t testing.TB, b *ceremony.Bundle) {
	t.Helper()
	b.Record.Shares = labelled("bkv ceremony shares 1", sharesJSON(t, b.Shares))
	b.Record.Signature = nil
	digest := labelled("bkv ceremony record signature 1", b.Record.Encode())
	der := must[[]byte](t)(s.identity.Sign(rand.Reader, digest, crypto.SHA256))
	b.Record.Signature = rawSignature(t, der)
}

// What a token wraps is what the documentation says: whoever has the transport key finds the set
// in it. So a swapped transport key is deadly, and a request without its maker's fingerprint is refused.
func TestSharesAreAsDocumented(t *testing.T) {
	tok := tokentest.Empty(t)
	thief := softwareRequest(t)
	cfg := config(thief.request)
	cfg.Confirmed = []ceremony.Fingerprint{softwareRequest(t).request.Fingerprint()}
	if _, err := tryMake(t, tok, cfg); !says(err, "is not confirmed") {
		t.Fatalf("got %v, want the request refused", err)
	}
	if got := contents(t, tok); len(got) != 0 {
		t.Fatalf("the token holds %v", got)
	}

	b := makeSet(t, tok, config(thief.request))
	kek := must[[]byte](t)(rsa.DecryptOAEP(sha1.New(), nil, thief.transport, b.Shares[1].WrappingKey, nil))
	for i, key := range b.Record.Keys {
		plain, err := unwrapAES(kek, b.Shares[1].Keys[i])
		if err != nil {
			t.Fatalf("%v: %v", key.Name(), err)
		}
		var private *ecdsa.PrivateKey
		if key.PublicKey != nil {
			var raw asn1.RawValue
			rest := must[[]byte](t)(asn1.Unmarshal(plain, &raw))
			if len(rest) > 7 || len(bytes.Trim(rest, "\x00")) != 0 {
				t.Errorf("%v: %x follows the key", key.Name(), rest)
			}
			private = must[any](t)(x509.ParsePKCS8PrivateKey(raw.FullBytes)).(*ecdsa.PrivateKey)
		} else if len(plain) != 32 {
			t.Errorf("%v has %d bytes", key.Name(), len(plain))
		}
		want := shown(key.Name(), plain, private)
		if !bytes.Equal(key.Fingerprint, want.Fingerprint) || subtle.ConstantTimeCompare(key.PublicKey, want.PublicKey) != 1 {
			t.Errorf("%v is not the key that the record shows", key.Name())
		}
	}
}

// A bundle made from the documentation is accepted. One whose keys are not those that its record shows
// leaves nothing in the token, which still waits for the right one.
func TestBundleFromTheDocumentation(t *testing.T) {
	tok := tokentest.Empty(t)
	requests := []ceremony.Request{softwareRequest(t).request, join(t, tok)}
	waiting := contents(t, tok)
	s := newSource(t)
	at := func(purpose string) int { return slices.Index(pkcs11util.Purposes(), purpose) }
	swap := func(a, b string) func(*ceremony.Record, [][]byte) {
		return func(_ *ceremony.Record, plain [][]byte) {
			plain[at(a)], plain[at(b)] = plain[at(b)], plain[at(a)]
		}
	}
	for name, c := range map[string]struct {
		change func(*ceremony.Record, [][]byte)
		says   string
	}{
		"AES keys swapped":   {swap(pkcs11util.Master, pkcs11util.State), "bkv/master/1 came out as another key"},
		"AES for MAC":        {swap(pkcs11util.Master, pkcs11util.MAC), "came out as another key"},
		"private keys":       {swap(pkcs11util.OPRF, pkcs11util.Server), "does not belong to its public half"},
		"last private key":   {swap(pkcs11util.Relay, pkcs11util.Audit), "proving bkv/"},
		"no private key":     {func(_ *ceremony.Record, p [][]byte) { p[at(pkcs11util.Audit)] = make([]byte, 72) }, "C_UnwrapKey"},
		"no key of the size": {func(_ *ceremony.Record, p [][]byte) { p[at(pkcs11util.State)] = make([]byte, 16) }, "a wrapped key for state has 24 bytes"},
		"another fingerprint": {func(r *ceremony.Record, _ [][]byte) {
			r.Keys[0].Fingerprint = bytes.Repeat([]byte{1}, 32)
		}, "bkv/master/1 came out as another key"},
	} {
		if _, err := tryAccept(t, tok, s.bundle(t, requests, c.change)); !says(err, c.says) {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		}
		if got := contents(t, tok); !slices.Equal(got, waiting) {
			t.Fatalf("%s: the token holds %v", name, got)
		}
	}

	wrongKey := s.bundle(t, requests, nil)
	wrongKey.Shares[1].WrappingKey[0] ^= 1
	s.sign(t, &wrongKey)
	if _, err := tryAccept(t, tok, wrongKey); !says(err, "C_UnwrapKey with RSA-OAEP") {
		t.Errorf("got %v, want the wrapping key refused", err)
	}
	unsigned := s.bundle(t, requests, nil)
	unsigned.Shares[1].Keys[0][0] ^= 1
	if _, err := tryAccept(t, tok, unsigned); !says(err, "not those that were signed") {
		t.Errorf("got %v, want the share refused", err)
	}
	if got := contents(t, tok); !slices.Equal(got, waiting) {
		t.Fatalf("the token holds %v", got)
	}
	accept(t, tok, s.bundle(t, requests, nil))
	if got := contents(t, tok); !slices.Equal(got, wholeSet()) {
		t.Fatalf("the token holds %v", got)
	}
	tok.OpenKeyset(t, tok.Config())
}
