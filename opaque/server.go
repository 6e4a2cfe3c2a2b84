package opaque

import (
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"io"
)

// ErrWrongClientMAC says that a KE3 is not the expected one: the client does
// not know the password (ClientAuthenticationError, RFC 9807 section 9.3).
var ErrWrongClientMAC = errors.New("wrong client MAC")

// Evaluator multiplies a blinded element by the OPRF key of one credential
// (BlindEvaluate, RFC 9497 section 3.3.1). It is called with valid elements
// only. It returns a guess: see the package documentation.
type Evaluator interface {
	Evaluate(ctx context.Context, blinded Element) (Element, error)
}

// StaticKey is the server's static Diffie-Hellman key. Multiply is called with
// valid elements other than −G only, and returns the whole point, compressed
// (DiffieHellman, RFC 9807 section 6.4.1.2).
type StaticKey interface {
	PublicKey() PublicKey
	Multiply(ctx context.Context, p Element) (Element, error)
}

// CreateRegistrationResponse answers a registration request (RFC 9807 section
// 5.2.2). It evaluates once and keeps nothing, so a retry is harmless as far
// as this package goes.
//
// Errors: [ErrInvalidMessage] for a request that is no point, before the
// evaluator is called; the evaluator's own, wrapped.
func CreateRegistrationResponse(ctx context.Context, request RegistrationRequest, serverPublicKey PublicKey, eval Evaluator) (RegistrationResponse, error) {
	if _, err := ParseRegistrationRequest(request[:]); err != nil {
		return RegistrationResponse{}, err
	}
	if _, err := decodePoint(serverPublicKey[:]); err != nil {
		return RegistrationResponse{}, fmt.Errorf("server public key: %w", err)
	}
	evaluated, err := evaluate(ctx, eval, Element(request))
	if err != nil {
		return RegistrationResponse{}, err
	}
	return RegistrationResponse(concat(evaluated[:], serverPublicKey[:])), nil
}

// ExpectedFinish is what the server remembers between KE2 and KE3. Both fields
// are secret, and the session key must not be used before Verify has returned
// it.
type ExpectedFinish struct {
	ClientMAC  ClientMAC
	SessionKey SessionKey
}

// Verify compares KE3 with the expected MAC in constant time and returns the
// session key (AuthServerFinalize, RFC 9807 section 6.4.4), or
// [ErrWrongClientMAC]. It may be repeated.
func (f ExpectedFinish) Verify(ke3 KE3) (SessionKey, error) {
	if !hmac.Equal(f.ClientMAC[:], ke3[:]) {
		return SessionKey{}, ErrWrongClientMAC
	}
	return f.SessionKey, nil
}

// GenerateKE2 answers a KE1 (RFC 9807 section 6.2.2). The KE2 it returns lets
// its receiver test one password against the record, so the attempt must have
// been counted before. Calling it again for the same KE1 gives another KE2,
// which serves that same guess.
//
// It reads masking_nonce, server_nonce and server_keyshare_seed from rand, 32
// bytes each, in this order.
//
// Errors: [ErrInvalidMessage] for a KE1 or record that its Parse function
// would refuse, or a context or identity that is too long, all before the
// evaluator is called; those of rand, evaluator and static key, wrapped. With
// an error comes no part of a KE2.
func GenerateKE2(ctx context.Context, session Session, rand io.Reader, record RegistrationRecord, ke1 KE1, static StaticKey, eval Evaluator) (KE2, ExpectedFinish, error) {
	fail := func(err error) (KE2, ExpectedFinish, error) { return KE2{}, ExpectedFinish{}, err }

	if err := session.check(); err != nil {
		return fail(err)
	}
	if _, err := ParseKE1(ke1[:]); err != nil {
		return fail(err)
	}
	clientKeyshare, err := decodePoint(ke1[ke1ClientKeyshare:])
	if err != nil {
		return fail(err)
	}
	clientPublicKey := PublicKey(record[:ElementSize])
	clientPublicPoint, err := decodePoint(clientPublicKey[:])
	if err != nil {
		return fail(fmt.Errorf("%w: registration record: client_public_key: %w", ErrInvalidMessage, err))
	}
	var maskingNonce, serverNonce [nonceSize]byte
	var keyshareSeed [seedSize]byte
	for _, b := range [][]byte{maskingNonce[:], serverNonce[:], keyshareSeed[:]} {
		if _, err := io.ReadFull(rand, b); err != nil {
			return fail(fmt.Errorf("drawing randomness for KE2: %w", err))
		}
	}
	serverPrivateKeyshare, serverPublicKeyshare, err := deriveDiffieHellmanKeyPair(keyshareSeed)
	if err != nil {
		return fail(err)
	}

	// CreateCredentialResponse, section 6.3.2.2.
	evaluated, err := evaluate(ctx, eval, Element(ke1[:ElementSize]))
	if err != nil {
		return fail(err)
	}
	serverPublicKey := static.PublicKey()
	maskedResponse := mask(record[recordMaskingKey:recordEnvelope], maskingNonce[:],
		concat(serverPublicKey[:], record[recordEnvelope:]))

	// AuthServerRespond, section 6.4.4.
	dh1, err := serverPrivateKeyshare.multiply(clientKeyshare)
	if err != nil {
		return fail(err)
	}
	dh2, err := static.Multiply(ctx, Element(ke1[ke1ClientKeyshare:]))
	if err != nil {
		return fail(fmt.Errorf("multiplying by the static key: %w", err))
	}
	dh3, err := serverPrivateKeyshare.multiply(clientPublicPoint)
	if err != nil {
		return fail(err)
	}

	var ke2 KE2
	copy(ke2[:], evaluated[:])
	copy(ke2[ke2MaskingNonce:], maskingNonce[:])
	copy(ke2[ke2MaskedResponse:], maskedResponse[:])
	copy(ke2[ke2ServerNonce:], serverNonce[:])
	copy(ke2[ke2ServerKeyshare:], serverPublicKeyshare[:])
	h := newHandshake(dh1, dh2, dh3, session.preamble(serverPublicKey, clientPublicKey, ke1, ke2))
	copy(ke2[ke2ServerMAC:], h.serverMAC[:])
	return ke2, ExpectedFinish{ClientMAC: h.clientMAC, SessionKey: h.sessionKey}, nil
}

// evaluate calls the evaluator and makes sure that what goes out is a point: a
// faulty token must not send a client a message that only looks hostile.
func evaluate(ctx context.Context, eval Evaluator, blinded Element) (Element, error) {
	evaluated, err := eval.Evaluate(ctx, blinded)
	if err != nil {
		return Element{}, fmt.Errorf("evaluating the OPRF: %w", err)
	}
	if _, err := decodePoint(evaluated[:]); err != nil {
		return Element{}, fmt.Errorf("evaluating the OPRF: the evaluator's result is %w", err)
	}
	return evaluated, nil
}
