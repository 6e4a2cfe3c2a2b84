package opaque

import (
	"crypto/hmac"
	"crypto/subtle"
)

// randomizedPassword is the client's secret from which everything else of its
// own is derived: the OPRF output, stretched (RFC 9807 sections 5.2.3 and
// 6.3.2.3).
type randomizedPassword [hashSize]byte

// maskingKey is masking_key (RFC 9807 section 4.1.2).
func (r randomizedPassword) maskingKey() []byte { return expand(r[:], labelMaskingKey, hashSize) }

// envelopeKeys are what Store and Recover of RFC 9807 sections 4.1.2 and 4.1.3
// derive alike.
type envelopeKeys struct {
	authKey         [hashSize]byte
	exportKey       ExportKey
	privateKey      Scalar
	clientPublicKey PublicKey
}

func (r randomizedPassword) envelopeKeys(envelopeNonce []byte) (envelopeKeys, error) {
	derive := func(label string) [hashSize]byte {
		return [hashSize]byte(expand(r[:], string(envelopeNonce)+label, hashSize))
	}
	k := envelopeKeys{authKey: derive(labelAuthKey), exportKey: derive(labelExportKey)}
	var err error
	k.privateKey, k.clientPublicKey, err = deriveDiffieHellmanKeyPair(derive(labelPrivateKey))
	return k, err
}

// authTag is the envelope's auth_tag: a MAC over the nonce and the
// CleartextCredentials (RFC 9807 sections 4 and 4.1.2).
func (k envelopeKeys) authTag(envelopeNonce []byte, server PublicKey, session Session) [macSize]byte {
	serverIdentity, clientIdentity := session.identities(server, k.clientPublicKey)
	msg := concat(envelopeNonce, server[:])
	msg = appendVector(msg, serverIdentity)
	msg = appendVector(msg, clientIdentity)
	return mac(k.authKey[:], msg)
}

// store makes a client's record (Store, RFC 9807 section 4.1.2).
func (r randomizedPassword) store(envelopeNonce [nonceSize]byte, server PublicKey, session Session) (RegistrationRecord, ExportKey, error) {
	k, err := r.envelopeKeys(envelopeNonce[:])
	if err != nil {
		return RegistrationRecord{}, ExportKey{}, err
	}
	authTag := k.authTag(envelopeNonce[:], server, session)
	record := RegistrationRecord(concat(k.clientPublicKey[:], r.maskingKey(), envelopeNonce[:], authTag[:]))
	return record, k.exportKey, nil
}

// recover opens an envelope (Recover, RFC 9807 section 4.1.3). The server's
// public key is trusted once the tag that covers it is found good.
func (r randomizedPassword) recover(envelope [envelopeSize]byte, server PublicKey, session Session) (envelopeKeys, error) {
	envelopeNonce, authTag := envelope[:nonceSize], envelope[nonceSize:]
	k, err := r.envelopeKeys(envelopeNonce)
	if err != nil {
		return envelopeKeys{}, err
	}
	expectedTag := k.authTag(envelopeNonce, server, session)
	if !hmac.Equal(authTag, expectedTag[:]) {
		return envelopeKeys{}, ErrWrongPasswordOrServer
	}
	return k, nil
}

// mask hides or shows the server's public key and the envelope in a KE2
// (RFC 9807 sections 6.3.2.2 and 6.3.2.3): an XOR, its own inverse.
func mask(maskingKey, maskingNonce, text []byte) [maskedSize]byte {
	pad := expand(maskingKey, string(maskingNonce)+labelCredentialResponsePad, maskedSize)
	var out [maskedSize]byte
	subtle.XORBytes(out[:], pad, text)
	return out
}
