package pkcs11util

import (
	"crypto/subtle"
	"fmt"

	"filippo.io/nistec"
)

// Sizes for P-256 (SEC 1 version 2.0, sections 2.3.3 and 2.3.5; FIPS 186-5 section 6.4 for r and s).
const (
	fieldBytes        = 32
	pointBytes        = 1 + fieldBytes
	uncompressedBytes = 1 + 2*fieldBytes
	signatureBytes    = 2 * fieldBytes
	macBytes          = 32 // HMAC-SHA-256
)

// shifted decodes a compressed point P and returns P and P+G, uncompressed. It
// refuses what is no point, and −G, where P+G is the identity.
func shifted(point [pointBytes]byte) (p, pPlusG []byte, err error) {
	decoded, err := nistec.NewP256Point().SetBytes(point[:])
	if err != nil {
		return nil, nil, ErrInvalidPoint
	}
	sum := nistec.NewP256Point().SetGenerator()
	sum.Add(sum, decoded)
	if sum.IsInfinity() == 1 {
		return nil, nil, ErrInvalidPoint
	}
	return decoded.Bytes(), sum.Bytes(), nil
}

// fullPoint finds k·P from x1 = x(k·P) and x2 = x(k·(P+G)), given Q = k·G: of the two
// points ±R with the x-coordinate x1, exactly one satisfies x(R+Q) = x2, as
// k·P + Q = k·(P+G). Both are looked at in constant time. Anything but exactly one
// match, a sum that is the identity included, means that x1 and x2 were not computed
// with the k whose public key is Q.
//
// It cannot see that a token answered for other points under the right key: x1 and
// x2 exchanged, for one, are right for −P−G in place of P.
func fullPoint(x1, x2 [fieldBytes]byte, q *nistec.P256Point) ([pointBytes]byte, error) {
	var even [pointBytes]byte // the candidate whose y is even
	even[0] = 2
	copy(even[1:], x1[:])
	r, err := nistec.NewP256Point().SetBytes(even[:])
	if err != nil {
		return [pointBytes]byte{}, fmt.Errorf("%w: an x-coordinate of no point", errFaulty)
	}
	matchEven := sumHasX(r, q, x2)
	matchOdd := sumHasX(r.Negate(r), q, x2)
	if matchEven^matchOdd != 1 {
		return [pointBytes]byte{}, fmt.Errorf("%w: two x-coordinates that do not belong together", errFaulty)
	}
	even[0] += byte(matchOdd)
	return even, nil
}

// sumHasX returns 1 if x(a+b) = x, and else, also if the sum is the identity, 0.
func sumHasX(a, b *nistec.P256Point, x [fieldBytes]byte) int {
	got, err := nistec.NewP256Point().Add(a, b).BytesX()
	if err != nil {
		return 0
	}
	return subtle.ConstantTimeCompare(got, x[:])
}
