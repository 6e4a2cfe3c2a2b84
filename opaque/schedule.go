package opaque

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// Labels. The first group goes to HKDF-Expand as it is, the second through
// Expand-Label, which puts labelPrefix in front.
const (
	labelMaskingKey            = "MaskingKey"            // RFC 9807 section 4.1.2
	labelAuthKey               = "AuthKey"               // section 4.1.2
	labelExportKey             = "ExportKey"             // section 4.1.2
	labelPrivateKey            = "PrivateKey"            // section 4.1.2
	labelCredentialResponsePad = "CredentialResponsePad" // section 6.3.2.2

	labelPrefix          = "OPAQUE-"         // section 6.4.2.1
	labelHandshakeSecret = "HandshakeSecret" // section 6.4.2.2
	labelSessionKey      = "SessionKey"      // section 6.4.2.2
	labelServerMAC       = "ServerMAC"       // section 6.4.2.2
	labelClientMAC       = "ClientMAC"       // section 6.4.2.2

	preamblePrefix = "OPAQUEv1-" // section 6.4.2.1

	infoDiffieHellman = "OPAQUE-DeriveDiffieHellmanKeyPair" // section 6.4.1.1

	// "DeriveKeyPair" ‖ contextString, the latter of mode 0x00 (OPRF) and
	// suite P256-SHA256 (RFC 9497 sections 3.1, 3.2.1 and 4.3).
	dstDeriveKeyPair = "DeriveKeyPair" + "OPRFV1-" + "\x00" + "-P256-SHA256"
)

// Session is what client and server must agree on outside of the messages.
// Both put it into the transcript, and a difference makes the login fail.
type Session struct {
	// Context is the shared context of RFC 9807 section 6.4.2.1: up to 65535
	// bytes, or none.
	Context []byte
	// ServerIdentity is up to 65535 bytes. Empty means the server's public
	// key (section 4).
	ServerIdentity []byte
	// ClientIdentity is up to 65535 bytes. Empty means the client's public
	// key (section 4).
	ClientIdentity []byte
}

// maxVector is the most that a two-byte length prefix can say.
const maxVector = 1<<16 - 1

func (s Session) check() error {
	if len(s.Context) > maxVector || len(s.ServerIdentity) > maxVector || len(s.ClientIdentity) > maxVector {
		return errors.New("context or identity longer than 65535 bytes")
	}
	return nil
}

// identities puts the public keys in the place of identities that are not
// given (CreateCleartextCredentials, RFC 9807 section 4).
func (s Session) identities(server, client PublicKey) (serverIdentity, clientIdentity []byte) {
	serverIdentity, clientIdentity = s.ServerIdentity, s.ClientIdentity
	if len(serverIdentity) == 0 {
		serverIdentity = server[:]
	}
	if len(clientIdentity) == 0 {
		clientIdentity = client[:]
	}
	return serverIdentity, clientIdentity
}

// preamble is the transcript (Preamble, RFC 9807 section 6.4.2.1): all of KE2
// but its MAC, which is why ke2 may still lack that.
func (s Session) preamble(server, client PublicKey, ke1 KE1, ke2 KE2) []byte {
	serverIdentity, clientIdentity := s.identities(server, client)
	b := []byte(preamblePrefix)
	b = appendVector(b, s.Context)
	b = appendVector(b, clientIdentity)
	b = append(b, ke1[:]...)
	b = appendVector(b, serverIdentity)
	// credential_response, server_nonce and server_public_keyshare lie in KE2
	// in this order.
	return append(b, ke2[:ke2ServerMAC]...)
}

// appendVector appends I2OSP(len(v), 2) ‖ v. Session.check has bounded v.
func appendVector(b, v []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(v))), v...)
}

// handshake is what the key exchange yields (RFC 9807 sections 6.4.3 and
// 6.4.4). Either end computes the whole of it.
type handshake struct {
	serverMAC  [macSize]byte
	clientMAC  ClientMAC
	sessionKey SessionKey
}

// newHandshake makes the two MACs and the session key from the three shared
// points and the transcript.
func newHandshake(dh1, dh2, dh3 Element, preamble []byte) handshake {
	ikm := concat(dh1[:], dh2[:], dh3[:])
	transcript := sha256.New()
	transcript.Write(preamble)
	k := deriveKeys(ikm, transcript.Sum(nil))

	var h handshake
	h.sessionKey = k.sessionKey
	h.serverMAC = mac(k.km2[:], transcript.Sum(nil))
	transcript.Write(h.serverMAC[:])
	h.clientMAC = mac(k.km3[:], transcript.Sum(nil))
	return h
}

// keys are the outputs of DeriveKeys, and the handshake secret between.
type keys struct {
	handshakeSecret [hashSize]byte
	km2, km3        [hashSize]byte // Km2 and Km3: the server's and client's MAC keys
	sessionKey      SessionKey
}

// deriveKeys is DeriveKeys (RFC 9807 section 6.4.2.2) with Hash(preamble).
func deriveKeys(ikm, preambleHash []byte) keys {
	prk := extract(ikm)
	var k keys
	k.handshakeSecret = deriveSecret(prk, labelHandshakeSecret, preambleHash)
	k.sessionKey = deriveSecret(prk, labelSessionKey, preambleHash)
	k.km2 = deriveSecret(k.handshakeSecret, labelServerMAC, nil)
	k.km3 = deriveSecret(k.handshakeSecret, labelClientMAC, nil)
	return k
}

// deriveSecret is Derive-Secret over Expand-Label (RFC 9807 section 6.4.2.1).
func deriveSecret(secret [hashSize]byte, label string, transcriptHash []byte) [hashSize]byte {
	label = labelPrefix + label
	info := binary.BigEndian.AppendUint16(nil, hashSize)
	info = append(info, byte(len(label)))
	info = append(info, label...)
	info = append(info, byte(len(transcriptHash)))
	info = append(info, transcriptHash...)
	return [hashSize]byte(expand(secret[:], string(info), hashSize))
}

// extract is Extract("", ikm) (RFC 9807 section 2.2): HKDF-Extract.
func extract(ikm []byte) [hashSize]byte {
	prk, err := hkdf.Extract(sha256.New, ikm, nil)
	if err != nil {
		panic(fmt.Sprintf("hkdf: %v", err)) // refuses hashes other than SHA-256, in FIPS mode
	}
	return [hashSize]byte(prk)
}

// expand is Expand (RFC 9807 section 2.2): HKDF-Expand.
func expand(prk []byte, info string, size int) []byte {
	b, err := hkdf.Expand(sha256.New, prk, info, size)
	if err != nil {
		panic(fmt.Sprintf("hkdf: %v", err)) // refuses sizes above 255·32; ours are constants below
	}
	return b
}

// mac is MAC (RFC 9807 section 2.2): HMAC-SHA-256.
func mac(key, msg []byte) [macSize]byte {
	m := hmac.New(sha256.New, key)
	m.Write(msg)
	return [macSize]byte(m.Sum(nil))
}

func concat(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}
