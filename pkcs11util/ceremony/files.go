package ceremony

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"filippo.io/nistec"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// What files begin with. A change of their contents is a change of these.
const (
	requestFormat = "bkv ceremony request 1"
	bundleFormat  = "bkv ceremony bundle 1"
	recordFormat  = "bkv ceremony record 1"
)

// Labels of hashes. A zero byte follows each.
const (
	requestHashLabel    = "bkv ceremony request fingerprint 1"
	recordHashLabel     = "bkv ceremony record fingerprint 1"
	sharesHashLabel     = "bkv ceremony shares 1"
	signatureLabel      = "bkv ceremony record signature 1"
	keyCheckLabel       = "bkv ceremony key check 1"
	keyFingerprintLabel = "bkv ceremony key fingerprint 1"
)

const (
	nonceBytes     = 16
	signatureBytes = 64 // r and s
	// MaxFileBytes bounds the files that are worth parsing; a bundle for a hundred sites stays below it.
	MaxFileBytes = 1 << 20
	maxTextBytes = 255
	// minTransportBits is the size of a transport key: 128 bits of security (NIST SP 800-57 part 1, table 2).
	minTransportBits = 3072
	maxTransportBits = 8192
	wrappedSecret    = 40  // RFC 3394: 32 bytes and 8 of integrity check
	maxWrappedKey    = 512 // PKCS #8 of a P-256 key is 67 to 150 bytes
)

func hash(label string, parts ...[]byte) [32]byte {
	h := sha256.New()
	h.Write([]byte(label + "\x00"))
	for _, p := range parts {
		h.Write(p)
	}
	return [32]byte(h.Sum(nil))
}

// A Fingerprint is what people read to each other, of a request or of a record: a
// hash cut to 160 bits.
type Fingerprint [20]byte

var base32Lower = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// String is eight groups of four letters and digits.
func (f Fingerprint) String() string {
	letters := base32Lower.EncodeToString(f[:])
	var groups []string
	for g := range slices.Chunk([]byte(letters), 4) {
		groups = append(groups, string(g))
	}
	return strings.Join(groups, "-")
}

// ParseFingerprint reads what String wrote, in either case and with any hyphens and spaces.
func ParseFingerprint(s string) (Fingerprint, error) {
	letters := strings.ToLower(strings.Map(func(r rune) rune {
		if r == '-' || unicode.IsSpace(r) {
			return -1
		}
		return r
	}, s))
	raw, err := base32Lower.DecodeString(letters)
	if err != nil || len(letters) != 32 || len(raw) != len(Fingerprint{}) {
		return Fingerprint{}, errors.New("a fingerprint is 32 letters a to z and digits 2 to 7")
	}
	return Fingerprint(raw), nil
}

// An OAEPHash is the hash that a token uses in RSAES-OAEP, for MGF1 too.
type OAEPHash string

// The hashes that tokens are asked for.
const (
	SHA256 OAEPHash = "sha256"
	SHA1   OAEPHash = "sha1"
)

// Token is what a token says of itself.
type Token struct {
	Serial       string `json:"serial"`
	Label        string `json:"label"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
}

// String names the token for people.
func (t Token) String() string { return fmt.Sprintf("%q (serial number %s)", t.Label, t.Serial) }

func (t Token) check() error {
	if t.Serial == "" {
		return errors.New("it names no token")
	}
	return checkTexts(t.Serial, t.Label, t.Manufacturer, t.Model)
}

// A Request asks for a share of the set.
type Request struct {
	Format string `json:"format"`
	Tool   string `json:"tool"` // the program that made it, and its version
	Token  Token  `json:"token"`
	Nonce  []byte `json:"nonce"`
	// TransportKey is the public half of an RSA key in the token, as SubjectPublicKeyInfo (RFC 5280 section 4.1).
	TransportKey []byte   `json:"transport_key"`
	OAEPHash     OAEPHash `json:"oaep_hash"`
}

// ParseRequest reads a request's file. Only the exact bytes that Encode makes are accepted.
func ParseRequest(b []byte) (Request, error) {
	r, err := parse[Request](b)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return Request{}, fmt.Errorf("it is no request for a ceremony, or damaged: %w", err)
	}
	return r, nil
}

// Encode is the request's file.
func (r Request) Encode() []byte { return encode(r) }

// Fingerprint covers the whole request.
func (r Request) Fingerprint() Fingerprint {
	sum := hash(requestHashLabel, r.Encode())
	return Fingerprint(sum[:20])
}

func (r Request) check() error {
	if r.Format != requestFormat {
		return fmt.Errorf("its format is %q, and must be %q", r.Format, requestFormat)
	}
	if len(r.Nonce) != nonceBytes {
		return fmt.Errorf("its nonce has %d bytes", len(r.Nonce))
	}
	if r.OAEPHash != SHA1 && r.OAEPHash != SHA256 {
		return fmt.Errorf("its OAEP hash is %q", r.OAEPHash)
	}
	if _, err := r.publicKey(); err != nil {
		return err
	}
	return errors.Join(r.Token.check(), checkTexts(r.Tool))
}

func (r Request) publicKey() (*rsa.PublicKey, error) {
	any, err := x509.ParsePKIXPublicKey(r.TransportKey)
	if err != nil {
		return nil, errors.New("its transport key cannot be read")
	}
	key, ok := any.(*rsa.PublicKey)
	if !ok {
		return nil, errors.New("its transport key is no RSA key")
	}
	if bits := key.N.BitLen(); bits < minTransportBits || bits > maxTransportBits {
		return nil, fmt.Errorf("its transport key has %d bits, and must have %d to %d", bits, minTransportBits, maxTransportBits)
	}
	return key, nil
}

// A Key of the set, as the record shows it.
type Key struct {
	Purpose    string `json:"purpose"`
	Generation uint32 `json:"generation"`
	// PublicKey of key pairs, compressed; none of secret keys.
	PublicKey []byte `json:"public_key,omitempty"`
	// Fingerprint tells this key from others and cannot be used in its place: a hash of the public key, or
	// of what a secret key makes of a constant that serves nothing else.
	Fingerprint []byte `json:"fingerprint"`
}

// Name is the key's name in tokens.
func (k Key) Name() pkcs11util.KeyName {
	return pkcs11util.KeyName{Purpose: k.Purpose, Generation: k.Generation}
}

// fingerprintOf hashes a public key, or a secret key's answer.
func fingerprintOf(name pkcs11util.KeyName, of []byte) []byte {
	sum := hash(keyFingerprintLabel, []byte(name.String()+"\x00"), of)
	return sum[:]
}

// isPair says whether the key is a pair. Of the purposes that multiply it is one or a secret, as the tokens' profile says.
func (k Key) isPair() bool { return k.PublicKey != nil }

// forms says whether keys of a purpose may be pairs, and whether they may be secrets.
func forms(purpose string) (pair, secret bool) {
	inMemory := pkcs11util.DefaultProfile()
	inMemory.ECDH = pkcs11util.ECDHInMemory
	for _, p := range []pkcs11util.Profile{pkcs11util.DefaultProfile(), inMemory} {
		s, private, _, err := p.Templates(purpose)
		pair, secret = pair || err == nil && private != nil, secret || err == nil && s != nil
	}
	return pair, secret
}

func (k Key) check() error {
	pair, secret := forms(k.Purpose)
	if !pair && !secret || k.Generation == 0 {
		return fmt.Errorf("%s is no name of a key", k.Name())
	}
	if len(k.Fingerprint) != 32 {
		return fmt.Errorf("the fingerprint of %s has %d bytes", k.Name(), len(k.Fingerprint))
	}
	switch {
	case k.isPair() && !pair:
		return fmt.Errorf("%s has a public key", k.Name())
	case !k.isPair() && secret:
		return nil
	}
	if _, err := uncompressed(k.PublicKey); err != nil {
		return fmt.Errorf("%s: %w", k.Name(), err)
	}
	if !bytes.Equal(k.Fingerprint, fingerprintOf(k.Name(), k.PublicKey)) {
		return fmt.Errorf("the fingerprint of %s is not its public key's", k.Name())
	}
	return nil
}

// uncompressed is the encoding that PKCS #11 wants (SEC 1 section 2.3.3).
func uncompressed(compressed []byte) ([]byte, error) {
	point, err := nistec.NewP256Point().SetBytes(compressed)
	if err != nil || len(compressed) != 33 {
		return nil, errors.New("the public key is no compressed point of P-256")
	}
	return point.Bytes(), nil
}

// order sorts keys as records list them.
func order(a, b pkcs11util.KeyName) int {
	purposes := pkcs11util.Purposes()
	if a.Purpose != b.Purpose {
		return slices.Index(purposes, a.Purpose) - slices.Index(purposes, b.Purpose)
	}
	return int(int64(a.Generation) - int64(b.Generation))
}

// A Record is what remains of a ceremony: who put which keys into which tokens.
type Record struct {
	Format  string `json:"format"`
	Time    string `json:"time"` // RFC 3339, UTC, by the clock of the source's machine
	Who     string `json:"who"`
	Tool    string `json:"tool"`
	VaultID string `json:"vault_id,omitempty"`
	// Requests of all tokens that get the set. The first is the source's own.
	Requests []Request `json:"requests"`
	Keys     []Key     `json:"keys"`
	// Identity is the key that signs the record: of the set, or one that all tokens held before.
	Identity Key `json:"identity"`
	// Shares is a hash over all that is wrapped.
	Shares []byte `json:"shares"`
	// Signature by Identity over the record without it: r and s.
	Signature []byte `json:"signature,omitempty"`
}

// ParseRecord reads a record's file and verifies its signature, by the identity key that the record itself names.
// Only the exact bytes that Encode makes are accepted.
func ParseRecord(b []byte) (Record, error) {
	r, err := parse[Record](b)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return Record{}, fmt.Errorf("it is no record of a ceremony, or it was changed: %w", err)
	}
	return r, nil
}

// Encode is the record's file.
func (r Record) Encode() []byte { return encode(r) }

// unsigned is what the signature and the fingerprint cover.
func (r Record) unsigned() []byte {
	r.Signature = nil
	return encode(r)
}

// Fingerprint covers the whole record but its signature.
func (r Record) Fingerprint() Fingerprint {
	sum := hash(recordHashLabel, r.unsigned())
	return Fingerprint(sum[:20])
}

func (r Record) digest() [32]byte { return hash(signatureLabel, r.unsigned()) }

// find returns the key of a name.
func (r Record) find(name pkcs11util.KeyName) (Key, bool) {
	i := slices.IndexFunc(r.Keys, func(k Key) bool { return k.Name() == name })
	if i < 0 {
		return Key{}, false
	}
	return r.Keys[i], true
}

// first says whether the set came with the identity that signs for it, so that it was the first of its tokens.
func (r Record) first() bool {
	_, ok := r.find(r.Identity.Name())
	return ok
}

func (r Record) check() error {
	if r.Format != recordFormat {
		return fmt.Errorf("its format is %q, and must be %q", r.Format, recordFormat)
	}
	if t, err := time.Parse(time.RFC3339, r.Time); err != nil || t.UTC().Format(time.RFC3339) != r.Time {
		return fmt.Errorf("its time is %q", r.Time)
	}
	if err := checkWho(r.Who, r.Tool, r.VaultID); err != nil {
		return err
	}
	if len(r.Keys) == 0 || len(r.Shares) != 32 {
		return errors.New("it lists no keys")
	}
	for i, k := range r.Keys {
		if err := k.check(); err != nil {
			return err
		}
		if i > 0 && order(r.Keys[i-1].Name(), k.Name()) >= 0 {
			return errors.New("its keys are not in order")
		}
	}
	if len(r.Requests) < 2 {
		return errors.New("it is of fewer than two tokens")
	}
	if err := checkRequests(r.Requests); err != nil {
		return err
	}
	if r.Identity.Purpose != pkcs11util.Identity {
		return errors.New("it is not signed by an identity key")
	}
	if err := r.Identity.check(); err != nil {
		return err
	}
	if k, ok := r.find(r.Identity.Name()); ok && !bytes.Equal(k.PublicKey, r.Identity.PublicKey) {
		return errors.New("its identity key is not that of the set")
	}
	return verify(r.Identity.PublicKey, r.digest(), r.Signature)
}

func checkWho(who, tool, vaultID string) error {
	if who == "" {
		return errors.New("it is not said who holds the ceremony")
	}
	return checkTexts(who, tool, vaultID)
}

// checkRequests refuses requests that are damaged or do not go together.
func checkRequests(requests []Request) error {
	for i, r := range requests {
		if err := r.check(); err != nil {
			return err
		}
		for _, other := range requests[:i] {
			if r.Token.Serial == other.Token.Serial {
				return fmt.Errorf("two of the tokens are %v: each takes part once", r.Token)
			}
			if bytes.Equal(r.Nonce, other.Nonce) || bytes.Equal(r.TransportKey, other.TransportKey) {
				return fmt.Errorf("the requests of %v and %v name one transport key or nonce: one is a copy of the other", other.Token, r.Token)
			}
		}
	}
	return nil
}

// verify checks an ECDSA signature.
func verify(compressed []byte, digest [32]byte, signature []byte) error {
	point, err := uncompressed(compressed)
	if err != nil {
		return err
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return errors.New("the identity key cannot be read")
	}
	if len(signature) != signatureBytes ||
		!ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])) {
		return errors.New("its signature is not the identity key's")
	}
	return nil
}

// A Bundle is a record and the set itself, wrapped for each token.
type Bundle struct {
	Format string `json:"format"`
	Record Record `json:"record"`
	// Shares are in the order of the record's requests.
	Shares []Share `json:"shares"`
}

// A Share is the set, wrapped for one token. It is of use only with that token's transport key.
type Share struct {
	WrappingKey []byte   `json:"wrapping_key"` // an AES-256 key, by RSAES-OAEP
	Keys        [][]byte `json:"keys"`         // in the order of the record's keys, by AES Key Wrap
}

// ParseBundle reads a bundle's file and checks that it is whole: the record's signature covers every byte. Only the exact
// bytes that Encode makes are accepted.
func ParseBundle(b []byte) (Bundle, error) {
	bundle, err := parse[Bundle](b)
	if err == nil {
		err = bundle.check()
	}
	if err != nil {
		return Bundle{}, fmt.Errorf("it is no bundle of a ceremony, or it was changed: %w", err)
	}
	return bundle, nil
}

// Encode is the bundle's file.
func (b Bundle) Encode() []byte { return encode(b) }

func hashShares(shares []Share) []byte {
	sum := hash(sharesHashLabel, encode(shares))
	return sum[:]
}

func (b Bundle) check() error {
	if b.Format != bundleFormat {
		return fmt.Errorf("its format is %q, and must be %q", b.Format, bundleFormat)
	}
	if err := b.Record.check(); err != nil {
		return err
	}
	if !bytes.Equal(hashShares(b.Shares), b.Record.Shares) {
		return errors.New("its shares are not those that were signed")
	}
	if len(b.Shares) != len(b.Record.Requests) {
		return errors.New("it has not one share for each request")
	}
	for i, share := range b.Shares {
		key, err := b.Record.Requests[i].publicKey()
		if err != nil {
			return err
		}
		if len(share.WrappingKey) != key.Size() || len(share.Keys) != len(b.Record.Keys) {
			return errors.New("a share is not of the size that it must have")
		}
		for j, wrapped := range share.Keys {
			if err := checkWrapped(b.Record.Keys[j], wrapped); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkWrapped checks the size of what AES Key Wrap made.
func checkWrapped(key Key, wrapped []byte) error {
	n := len(wrapped)
	if key.isPair() && n >= wrappedSecret && n <= maxWrappedKey && n%8 == 0 || !key.isPair() && n == wrappedSecret {
		return nil
	}
	return fmt.Errorf("a wrapped key for %s has %d bytes", key.Purpose, n)
}

// checkTexts refuses what would not come out of JSON as it went in, or would deceive whoever reads it on a terminal.
func checkTexts(texts ...string) error {
	for _, s := range texts {
		if len(s) > maxTextBytes {
			return fmt.Errorf("a text has %d bytes, and may have %d", len(s), maxTextBytes)
		}
		if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("%q holds more than printable characters", s)
		}
	}
	return nil
}

func encode(v any) []byte {
	b, _ := json.MarshalIndent(v, "", "  ") // strings, bytes and numbers: nothing that could fail
	return append(b, '\n')
}

// parse accepts exactly what encode makes, so that no byte of a file goes uncovered by its hash.
func parse[T any](b []byte) (v T, err error) {
	if len(b) > MaxFileBytes {
		return v, fmt.Errorf("it has more than %d bytes", MaxFileBytes)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return v, errors.New("it is no JSON of the right kind")
	}
	if !bytes.Equal(encode(v), b) {
		return v, errors.New("it is not byte for byte what this program writes")
	}
	return v, nil
}
