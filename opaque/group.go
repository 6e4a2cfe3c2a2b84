package opaque

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"filippo.io/bigmod"
	"filippo.io/nistec"
)

// ElementSize is Noe and Npk of RFC 9807 for P-256: a compressed point in the
// encoding of SEC 1, version 2.0, section 2.3.3.
const ElementSize = 33

// ScalarSize is Ns of RFC 9497 section 4.3: a scalar, big endian.
const ScalarSize = 32

// Element is a P-256 point other than the identity, compressed. One that came
// from elsewhere goes through [ParseElement] first.
type Element [ElementSize]byte

// PublicKey is a Diffie-Hellman public key, encoded like an [Element].
type PublicKey [ElementSize]byte

// Scalar is a secret number in [1, n−1], where n is the order of P-256, big
// endian. It prints as "[redacted]".
type Scalar [ScalarSize]byte

// order is n, the order of the P-256 group (SP 800-186 section 3.2.1.3).
var order = mustModulus([]byte{
	0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
	0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
})

// wide is 2^384, a bound above every 48-byte number: hash_to_field reduces
// such numbers modulo n, and bigmod reads none without a modulus above it.
var wide = mustModulus(append([]byte{1}, make([]byte, uniformSize)...))

// minusGenerator is −G, compressed.
var minusGenerator = nistec.NewP256Point().Negate(nistec.NewP256Point().SetGenerator()).BytesCompressed()

func mustModulus(b []byte) *bigmod.Modulus {
	m, err := bigmod.NewModulus(b)
	if err != nil {
		panic(err) // the constants above are valid moduli
	}
	return m
}

var errNotAPoint = errors.New("not a compressed point of P-256")

// ParseElement accepts exactly the 33-byte compressed encodings of points on
// the curve. Any other input is an [ErrInvalidMessage].
func ParseElement(b []byte) (Element, error) {
	if err := checkPoints("element", b, ElementSize, field{"point", 0}); err != nil {
		return Element{}, err
	}
	return Element(b), nil
}

// ParsePublicKey is [ParseElement] for a public key.
func ParsePublicKey(b []byte) (PublicKey, error) {
	if err := checkPoints("public key", b, ElementSize, field{"point", 0}); err != nil {
		return PublicKey{}, err
	}
	return PublicKey(b), nil
}

// decodePoint takes the 33-byte compressed form alone: of that length, nistec
// knows no other. It would take the identity and the uncompressed form in
// theirs. It refuses x ≥ p, so that every point has one accepted encoding.
func decodePoint(b []byte) (*nistec.P256Point, error) {
	if len(b) != ElementSize {
		return nil, errNotAPoint
	}
	p, err := nistec.NewP256Point().SetBytes(b)
	if err != nil {
		return nil, errNotAPoint
	}
	return p, nil
}

// RandomScalar draws a scalar by rejection sampling: 32 bytes from rand, and
// 32 more when those are no number in [1, n−1] (RFC 9497 section 4.7.1). It
// fails with the reader's error, or when the reader is plainly broken.
func RandomScalar(rand io.Reader) (Scalar, error) {
	// A draw is refused with probability 2^-32, eight in a row with 2^-256.
	for range 8 {
		var s Scalar
		if _, err := io.ReadFull(rand, s[:]); err != nil {
			return Scalar{}, fmt.Errorf("drawing a scalar: %w", err)
		}
		if s.valid() {
			return s, nil
		}
	}
	return Scalar{}, errors.New("drawing a scalar: the random source gives no usable bytes")
}

// ParseScalar accepts 32 bytes that encode a number in [1, n−1]. The error
// does not contain the input.
func ParseScalar(b []byte) (Scalar, error) {
	if len(b) != ScalarSize {
		return Scalar{}, fmt.Errorf("scalar of %d bytes, want %d", len(b), ScalarSize)
	}
	s := Scalar(b)
	if !s.valid() {
		return Scalar{}, errors.New("scalar out of range")
	}
	return s, nil
}

// valid says whether s lies in [1, n−1]. It leaks the answer and no more.
func (s Scalar) valid() bool {
	x, err := bigmod.NewNat().SetBytes(s[:], order)
	return err == nil && x.IsZero() == 0
}

// Multiply returns s·e in constant time. It fails if e is no valid point
// ([ErrInvalidMessage]) or s is out of range, which a Scalar from this
// package never is.
func (s Scalar) Multiply(e Element) (Element, error) {
	p, err := decodePoint(e[:])
	if err != nil {
		return Element{}, fmt.Errorf("%w: element: %w", ErrInvalidMessage, err)
	}
	return s.multiply(p)
}

// multiply is also DiffieHellman of RFC 9807 section 6.4.1.2: its result is
// the whole point, compressed, and not the x-coordinate that other protocols
// use. The order of the group is prime and s is not 0 modulo n, so the result
// is the identity for no p that decodePoint returns.
func (s Scalar) multiply(p *nistec.P256Point) (Element, error) {
	if !s.valid() {
		return Element{}, errors.New("scalar out of range")
	}
	q, err := nistec.NewP256Point().ScalarMult(p, s[:])
	if err != nil {
		return Element{}, fmt.Errorf("multiplying a point: %w", err)
	}
	return encodePoint(q)
}

// encodePoint is SerializeElement (RFC 9497 section 4.3).
func encodePoint(p *nistec.P256Point) (Element, error) {
	b := p.BytesCompressed()
	if len(b) != ElementSize { // SEC 1 writes the identity in one byte
		return Element{}, errors.New("result is the identity")
	}
	return Element(b), nil
}

// deriveDiffieHellmanKeyPair is DeriveDiffieHellmanKeyPair (RFC 9807 sections
// 6.4.1.1 and 6.4.1.2): DeriveKeyPair of RFC 9497 section 3.2.1.
func deriveDiffieHellmanKeyPair(seed [seedSize]byte) (Scalar, PublicKey, error) {
	deriveInput := append([]byte{}, seed[:]...)
	deriveInput = binary.BigEndian.AppendUint16(deriveInput, uint16(len(infoDiffieHellman)))
	deriveInput = append(deriveInput, infoDiffieHellman...)
	for counter := range 256 {
		s := hashToScalar(append(deriveInput, byte(counter)), dstDeriveKeyPair)
		if !s.valid() { // zero, with probability 2^-256
			continue
		}
		p, err := nistec.NewP256Point().ScalarBaseMult(s[:])
		if err != nil {
			return Scalar{}, PublicKey{}, fmt.Errorf("deriving a key pair: %w", err)
		}
		e, err := encodePoint(p)
		return s, PublicKey(e), err
	}
	return Scalar{}, PublicKey{}, errors.New("deriving a key pair: no seed counter gives a scalar")
}

// uniformSize is L of hash_to_field for the order of P-256: ⌈(256+128)/8⌉
// (RFC 9380 section 5.1, RFC 9497 section 4.3).
const uniformSize = 48

// hashToScalar is HashToScalar of P256-SHA256 (RFC 9497 section 4.3):
// hash_to_field of RFC 9380 section 5.2 into the integers modulo n. The
// result may be zero. Constant time in msg.
func hashToScalar(msg []byte, dst string) Scalar {
	return reduceModOrder(expandMessageXMD(msg, dst))
}

// reduceModOrder returns b mod n in constant time.
func reduceModOrder(b [uniformSize]byte) Scalar {
	x, err := bigmod.NewNat().SetBytes(b[:], wide)
	if err != nil {
		panic(err) // 48 bytes are below 2^384
	}
	return Scalar(bigmod.NewNat().Mod(x, order).Bytes(order))
}

// expandMessageXMD is expand_message_xmd with SHA-256 (RFC 9380 section 5.3.1)
// for a length of 48 bytes, hence two blocks. dst is at most 255 bytes.
func expandMessageXMD(msg []byte, dst string) [uniformSize]byte {
	dstPrime := append([]byte(dst), byte(len(dst)))

	h := sha256.New()
	h.Write(make([]byte, sha256.BlockSize)) // Z_pad
	h.Write(msg)
	h.Write([]byte{0, uniformSize, 0}) // l_i_b_str, I2OSP(0, 1)
	h.Write(dstPrime)
	b0 := h.Sum(nil)

	h.Reset()
	h.Write(b0)
	h.Write([]byte{1})
	h.Write(dstPrime)
	b1 := h.Sum(nil)

	h.Reset()
	for i := range b0 {
		b0[i] ^= b1[i]
	}
	h.Write(b0)
	h.Write([]byte{2})
	h.Write(dstPrime)
	b2 := h.Sum(nil)

	return [uniformSize]byte(append(b1, b2...))
}

// isMinusGenerator says whether the valid encoding b is −G.
func isMinusGenerator(b []byte) bool { return bytes.Equal(b, minusGenerator) }
