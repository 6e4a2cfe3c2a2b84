package pkcs11util

import (
	"crypto/elliptic"
	"crypto/subtle"
	"fmt"

	"filippo.io/bigmod"
	"filippo.io/nistec"
)

// This file is the strategy for tokens that give no x-coordinate away, neither readable nor wrapped
// (ECDHInMemory). The key of a purpose that multiplies is then no key pair but a secret of the token's, of
// 32 bytes and for HMAC alone. The scalar is computed from it for each use, by
//
//	HMAC-SHA-256(secret, "bkv/v1/scalar" ‖ counter in one byte)
//
// with the first counter from 0 on that gives a number in [1, n−1] (all but one in 2^32 do), and lives in this
// process's memory for as long as one multiplication takes.
//
// The secret does not leave the token, and what can be done without the scalar's passing through memory is done so. But the
// scalar itself is the whole key: who sees it once, in this process's memory or by the PIN, can use it ever after without the
// token. That is the profile's weakness, and why it is proposed only to who asks for it.
//
// Rejected: a scalar that lies sealed under the master key. It would need a place of its own, outside the token or in an object
// that cannot be changed, and would have to be sealed anew in each of several tokens when the master key rotates. A secret
// for each key rotates, is destroyed and goes through ceremonies as all others.

// scalarLabel is what a key that multiplies in memory is asked, before the counter. Nothing else is asked of it, but for the
// key check of a ceremony, which begins otherwise.
const scalarLabel = "bkv/v1/scalar"

// order is n, the order of P-256.
var order = mustModulus(elliptic.P256().Params().N.Bytes())

func mustModulus(b []byte) *bigmod.Modulus {
	m, err := bigmod.NewModulus(b)
	if err != nil {
		panic(err) // P-256's order is a valid modulus
	}
	return m
}

// multiplies says whether keys of a purpose multiply points.
func multiplies(purpose string) bool { return purpose == OPRF || purpose == Server || purpose == Relay }

// inMemory says whether keys of a purpose are secrets that scalars are computed from.
func (p Profile) inMemory(purpose string) bool { return p.ECDH == ECDHInMemory && multiplies(purpose) }

// withScalar computes the scalar of k, has f use it, and clears it. It must be that of k's public half, once that is known.
func (s session) withScalar(k *key, f func(scalar []byte) error) error {
	for counter := range byte(8) { // that eight in a row are no scalars has a chance of 2^-256
		scalar, err := s.mac(k, append([]byte(scalarLabel), counter))
		if err != nil {
			return err
		}
		defer clear(scalar[:])
		if !isScalar(scalar[:]) {
			continue
		}
		public, err := nistec.NewP256Point().ScalarBaseMult(scalar[:])
		if err != nil {
			return fmt.Errorf("the public half of %s: %w", k.name, err)
		}
		if k.public.point == nil {
			k.public = publicKey{[pointBytes]byte(public.BytesCompressed()), public}
		}
		if subtle.ConstantTimeCompare(public.BytesCompressed(), k.public.compressed[:]) != 1 {
			return fmt.Errorf("%w: %s gives another scalar than before", errFaulty, k.name)
		}
		return f(scalar[:])
	}
	return fmt.Errorf("%w: %s gives no scalar", errFaulty, k.name)
}

// isScalar says whether b is a number in [1, n−1]. It leaks the answer and no more.
func isScalar(b []byte) bool {
	x, err := bigmod.NewNat().SetBytes(b, order)
	return err == nil && x.IsZero() == 0
}

// product is k·P, for a P that shifted took, in constant time.
func (s session) product(k *key, uncompressed []byte) (product *nistec.P256Point, err error) {
	p, err := nistec.NewP256Point().SetBytes(uncompressed)
	if err != nil {
		return nil, ErrInvalidPoint
	}
	err = s.withScalar(k, func(scalar []byte) error {
		product, err = nistec.NewP256Point().ScalarMult(p, scalar)
		return err
	})
	return product, err
}
