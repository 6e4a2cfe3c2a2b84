package ohttp

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/chacha20poly1305"
)

// Labels (RFC 9458 sections 4.3 and 4.4).
const (
	labelRequest       = "message/bhttp request"
	labelResponse      = "message/bhttp response"
	labelResponseKey   = "key"
	labelResponseNonce = "nonce"
)

var (
	// ErrCapsule: too short, too long, or not sealed by who it should be, or for whom. It is not said
	// which, and if it was altered nobody can.
	ErrCapsule = errors.New("the capsule does not open")
	// ErrUnknownKey: sealed to another key, or with a suite that the key does not offer.
	ErrUnknownKey = errors.New("the capsule is sealed to an unknown key")
)

// Header is how a capsule begins, in clear. Nothing of it is authentic before the capsule has been opened.
type Header struct {
	KeyID uint8
	KEM   uint16
	Suite
}

// ParseHeader reads a capsule's header. A capsule that is too short is ErrCapsule.
func ParseHeader(capsule []byte) (Header, error) {
	if len(capsule) < headerSize {
		return Header{}, fmt.Errorf("%w: %d bytes", ErrCapsule, len(capsule))
	}
	return Header{
		KeyID: capsule[0], KEM: binary.BigEndian.Uint16(capsule[1:]),
		Suite: Suite{binary.BigEndian.Uint16(capsule[3:]), binary.BigEndian.Uint16(capsule[5:])},
	}, nil
}

func (h Header) encode() []byte {
	b := binary.BigEndian.AppendUint16([]byte{h.KeyID}, h.KEM)
	b = binary.BigEndian.AppendUint16(b, h.KDF)
	return binary.BigEndian.AppendUint16(b, h.AEAD)
}

// info is HPKE's info: the label, a zero byte, the header.
func (h Header) info() []byte { return append([]byte(labelRequest+"\x00"), h.encode()...) }

// algorithms are the suite's, or ErrUnsupported.
func (s Suite) algorithms() (hpke.KDF, hpke.AEAD, error) {
	if !s.supported() {
		return nil, nil, fmt.Errorf("%w: KDF %#04x, AEAD %#04x", ErrUnsupported, s.KDF, s.AEAD)
	}
	aead, err := hpke.NewAEAD(s.AEAD)
	return hpke.HKDFSHA256(), aead, err
}

// exporter is either end of an HPKE context.
type exporter interface {
	Export(exporterContext string, length int) ([]byte, error)
}

// Sealed is a request on its way: it opens the answer.
type Sealed struct {
	suite    Suite
	enc      []byte
	exporter exporter
}

// Seal encapsulates a request to a gateway's key, with the first suite of its configuration that this package has (RFC 9458
// section 4.3). Fresh randomness is in each capsule, so that two of the same request are not alike.
//
// Errors: ErrUnsupported, ErrKeyConfig.
func (c KeyConfig) Seal(request []byte) (capsule []byte, sealed *Sealed, err error) {
	i := slices.IndexFunc(c.Suites, Suite.supported)
	if i < 0 {
		return nil, nil, fmt.Errorf("%w: none of its suites", ErrUnsupported)
	}
	h := Header{c.ID, c.KEM, c.Suites[i]}
	kem, err := hpke.NewKEM(c.KEM)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: KEM %#04x", ErrUnsupported, c.KEM)
	}
	public, err := kem.NewPublicKey(c.PublicKey)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: its public key is none of its KEM's", ErrKeyConfig)
	}
	kdf, aead, err := h.algorithms()
	if err != nil {
		return nil, nil, err
	}
	enc, sender, err := hpke.NewSender(public, kdf, aead, h.info())
	if err != nil {
		return nil, nil, fmt.Errorf("sealing a request: %w", err)
	}
	ct, err := sender.Seal(nil, request)
	if err != nil {
		return nil, nil, fmt.Errorf("sealing a request: %w", err)
	}
	return slices.Concat(h.encode(), enc, ct), &Sealed{h.Suite, enc, sender}, nil
}

// Open opens the answer to the request. It is ErrCapsule for everything but what the gateway sealed
// to this very request, unaltered; the gateway may have sealed several answers, if the request arrived more than once.
func (s *Sealed) Open(answer []byte) ([]byte, error) {
	n := s.suite.nonceSize()
	if len(answer) < n {
		return nil, fmt.Errorf("%w: %d bytes", ErrCapsule, len(answer))
	}
	aead, nonce, err := s.suite.answerKey(s.exporter, s.enc, answer[:n])
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nonce, answer[n:], nil)
	if err != nil {
		return nil, ErrCapsule
	}
	return plain, nil
}

// encSize is Nenc of a KEM (RFC 9180 section 7.1; draft-ietf-hpke-pq section 4).
func encSize(kem uint16) (size int, known bool) {
	const mlkem768 = 1088 // FIPS 203 section 8, table 3
	switch kem {
	case DHKEMP256:
		return 65, true
	case MLKEM768P256:
		return mlkem768 + 65, true
	case DHKEMX25519:
		return 32, true
	}
	return 0, false
}

// tagSize is that of all three AEADs (RFC 5116 section 5, RFC 8439 section 2.8).
const tagSize = 16

// Opened is a request that has arrived: it seals the answer.
type Opened struct {
	suite    Suite
	enc      []byte
	exporter exporter
}

// Open removes a request's encapsulation (RFC 9458 section 4.3), with the private half of the configuration's key, which may
// live elsewhere: see hpke.NewDHKEMPrivateKey and hpke.NewHybridPrivateKey. What a header and a length can tell is refused
// before the private key is used.
//
// Errors: ErrUnknownKey and ErrCapsule. Where the private key could not be used, what it said is joined to the latter.
func (c KeyConfig) Open(private hpke.PrivateKey, capsule []byte) (request []byte, opened *Opened, err error) {
	h, err := ParseHeader(capsule)
	if err != nil {
		return nil, nil, err
	}
	if h.KeyID != c.ID || h.KEM != c.KEM || private.KEM().ID() != c.KEM || !slices.Contains(c.Suites, h.Suite) {
		return nil, nil, ErrUnknownKey
	}
	kdf, aead, err := h.algorithms()
	if err != nil {
		return nil, nil, ErrUnknownKey
	}
	size, known := encSize(c.KEM)
	if !known {
		return nil, nil, ErrUnknownKey
	}
	rest := capsule[headerSize:]
	if len(rest) < size+tagSize {
		return nil, nil, fmt.Errorf("%w: %d bytes", ErrCapsule, len(capsule))
	}
	enc := slices.Clone(rest[:size])
	recipient, err := hpke.NewRecipient(enc, private, kdf, aead, h.info())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrCapsule, err)
	}
	request, err = recipient.Open(nil, rest[size:])
	if err != nil {
		return nil, nil, ErrCapsule
	}
	return request, &Opened{h.Suite, enc, recipient}, nil
}

// Seal encapsulates the answer (RFC 9458 section 4.4). It may be called more than once.
func (o *Opened) Seal(answer []byte) ([]byte, error) {
	nonce := make([]byte, o.suite.nonceSize())
	rand.Read(nonce) // never fails: it ends the process first
	return o.seal(answer, nonce)
}

// seal is Seal with a given response nonce, for the RFC's example.
func (o *Opened) seal(answer, responseNonce []byte) ([]byte, error) {
	aead, nonce, err := o.suite.answerKey(o.exporter, o.enc, responseNonce)
	if err != nil {
		return nil, err
	}
	return aead.Seal(slices.Clone(responseNonce), nonce, answer, nil), nil
}

// keySize and aeadNonceSize are Nk and Nn (RFC 9180 section 7.3).
func (s Suite) keySize() int {
	if s.AEAD == AES128GCM {
		return 16
	}
	return 32
}

const aeadNonceSize = 12

// nonceSize is the size of a response nonce, max(Nn, Nk).
func (s Suite) nonceSize() int { return max(aeadNonceSize, s.keySize()) }

// answerKey derives an answer's key and nonce from the request's HPKE context, its enc and the response
// nonce (RFC 9458 section 4.4, steps 1 to 6). HKDF is used as RFC 5869 has it, without HPKE's labels.
func (s Suite) answerKey(context exporter, enc, responseNonce []byte) (cipher.AEAD, []byte, error) {
	secret, err := context.Export(labelResponse, s.nonceSize())
	if err != nil {
		return nil, nil, fmt.Errorf("deriving an answer's secret: %w", err)
	}
	prk, err := hkdf.Extract(sha256.New, secret, slices.Concat(enc, responseNonce))
	if err != nil {
		return nil, nil, fmt.Errorf("deriving an answer's key: %w", err)
	}
	key, err := hkdf.Expand(sha256.New, prk, labelResponseKey, s.keySize())
	if err != nil {
		return nil, nil, fmt.Errorf("deriving an answer's key: %w", err)
	}
	nonce, err := hkdf.Expand(sha256.New, prk, labelResponseNonce, aeadNonceSize)
	if err != nil {
		return nil, nil, fmt.Errorf("deriving an answer's nonce: %w", err)
	}
	aead, err := s.aead(key)
	return aead, nonce, err
}

func (s Suite) aead(key []byte) (cipher.AEAD, error) {
	if s.AEAD == ChaCha20Poly1305 {
		return chacha20poly1305.New(key)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
