package opaque

import "crypto/sha256"

// What follows shows intermediate values to the tests with the specification's
// vectors, which cannot lie in this package: opaquetest imports it.

func (c *ClientLogin) RandomizedPassword(evaluated Element, ksf KSF) ([32]byte, error) {
	return c.blinding.randomizedPassword(evaluated, ksf)
}

func AuthKey(r [32]byte, envelopeNonce []byte) ([32]byte, error) {
	k, err := randomizedPassword(r).envelopeKeys(envelopeNonce)
	return k.authKey, err
}

var (
	DeriveDiffieHellmanKeyPair = deriveDiffieHellmanKeyPair
	HashToScalar               = hashToScalar
	ExpandMessageXMD           = expandMessageXMD
	ReduceModOrder             = reduceModOrder
)

const DSTDeriveKeyPair = dstDeriveKeyPair

type Keys struct {
	HandshakeSecret, Km2, Km3 [32]byte
	SessionKey                SessionKey
}

func DeriveKeys(dh1, dh2, dh3 Element, s Session, server, client PublicKey, ke1 KE1, ke2 KE2) Keys {
	preambleHash := sha256.Sum256(s.preamble(server, client, ke1, ke2))
	k := deriveKeys(concat(dh1[:], dh2[:], dh3[:]), preambleHash[:])
	return Keys{k.handshakeSecret, k.km2, k.km3, k.sessionKey}
}
