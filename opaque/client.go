package opaque

import (
	"bytes"
	"crypto/hmac"
	"errors"
	"fmt"
	"io"

	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/oprf"
)

var (
	// ErrInvalidPassword says that a password is empty or longer than
	// [MaxPasswordBytes].
	ErrInvalidPassword = errors.New("password is empty or too long")

	// ErrWrongPasswordOrServer says that the envelope did not open
	// (EnvelopeRecoveryError, RFC 9807 section 9.3): the password is not the
	// registered one, the server is not the one of the registration, or the
	// identities or stretching differ from then. The client cannot tell which.
	ErrWrongPasswordOrServer = errors.New("wrong password, or not the server of the registration")

	// ErrServerAuthentication says that the envelope opened, so the password
	// is right, and the key exchange failed all the same
	// (ServerAuthenticationError, RFC 9807 section 9.3): the answer was
	// altered, or its sender has the record and not the server's key, or the
	// two ends have different contexts.
	ErrServerAuthentication = errors.New("server failed to authenticate itself")
)

// MaxPasswordBytes is the longest OPRF input (RFC 9497 section 1.2).
const MaxPasswordBytes = maxVector

// KSF is a key stretching function: slow, collision resistant, and returning
// 32 bytes (Stretch, RFC 9807 section 2.3). [Argon2id] is one.
type KSF interface {
	Stretch(input []byte) ([]byte, error)
}

// ClientConfig is what the client must know besides its password, the same at
// registration and at each login.
type ClientConfig struct {
	// Context, ServerIdentity and ClientIdentity are as in [Session]. The
	// record does not depend on Context.
	Context, ServerIdentity, ClientIdentity []byte
	// KSF stretches the OPRF output. Required.
	KSF KSF
}

func (c ClientConfig) session() (Session, error) {
	s := Session{Context: c.Context, ServerIdentity: c.ServerIdentity, ClientIdentity: c.ClientIdentity}
	if c.KSF == nil {
		return Session{}, errors.New("no key stretching function")
	}
	return s, s.check()
}

// ClientRegistration is a client's state between the registration request and
// the response. It holds the password, and prints as "[redacted]".
type ClientRegistration struct{ blinding blinding }

// StartRegistration blinds a password (CreateRegistrationRequest, RFC 9807
// section 5.2.1). It reads the blind from rand as [RandomScalar] does. The
// password is copied.
//
// Errors: [ErrInvalidPassword]; those of rand, wrapped.
func StartRegistration(rand io.Reader, password []byte) (RegistrationRequest, *ClientRegistration, error) {
	b, blinded, err := blind(rand, password)
	if err != nil {
		return RegistrationRequest{}, nil, err
	}
	return RegistrationRequest(blinded), &ClientRegistration{b}, nil
}

// Registration is the outcome of a registration at the client.
type Registration struct {
	Record          RegistrationRecord // for the server, over a confidential channel
	ExportKey       ExportKey          // for the client alone
	ServerPublicKey PublicKey          // which server the record is for
}

// Finish makes the record (FinalizeRegistrationRequest, RFC 9807 section
// 5.2.3). It reads envelope_nonce, 32 bytes, from rand. A second call gives
// another record, with another export key, for the same password.
//
// The response is not authenticated: whoever can answer in the server's place
// gets a record that it can guess the password from. The caller must have the
// response over a channel to the server itself and know what public key to
// expect in it.
//
// Errors: [ErrInvalidMessage] for a malformed response; those of rand and
// KSF, wrapped.
func (c *ClientRegistration) Finish(rand io.Reader, response RegistrationResponse, config ClientConfig) (Registration, error) {
	session, err := config.session()
	if err != nil {
		return Registration{}, err
	}
	if _, err := ParseRegistrationResponse(response[:]); err != nil {
		return Registration{}, err
	}
	var envelopeNonce [nonceSize]byte
	if _, err := io.ReadFull(rand, envelopeNonce[:]); err != nil {
		return Registration{}, fmt.Errorf("drawing envelope nonce: %w", err)
	}
	r, err := c.blinding.randomizedPassword(Element(response[:ElementSize]), config.KSF)
	if err != nil {
		return Registration{}, err
	}
	server := PublicKey(response[responseServerPublicKey:])
	record, exportKey, err := r.store(envelopeNonce, server, session)
	if err != nil {
		return Registration{}, err
	}
	return Registration{Record: record, ExportKey: exportKey, ServerPublicKey: server}, nil
}

// ClientLogin is a client's state between KE1 and KE2. It holds the password,
// and prints as "[redacted]".
type ClientLogin struct {
	blinding     blinding
	clientSecret Scalar // client_secret, RFC 9807 section 6.4
	ke1          KE1
}

// StartLogin opens a login (GenerateKE1, RFC 9807 section 6.2.1). It reads
// the blind from rand as [RandomScalar] does, then client_nonce and
// client_keyshare_seed, 32 bytes each. The password is copied.
//
// Errors: [ErrInvalidPassword]; those of rand, wrapped.
func StartLogin(rand io.Reader, password []byte) (KE1, *ClientLogin, error) {
	b, blinded, err := blind(rand, password)
	if err != nil {
		return KE1{}, nil, err
	}
	var clientNonce [nonceSize]byte
	var keyshareSeed [seedSize]byte
	for _, p := range [][]byte{clientNonce[:], keyshareSeed[:]} {
		if _, err := io.ReadFull(rand, p); err != nil {
			return KE1{}, nil, fmt.Errorf("drawing randomness for KE1: %w", err)
		}
	}
	clientSecret, clientKeyshare, err := deriveDiffieHellmanKeyPair(keyshareSeed)
	if err != nil {
		return KE1{}, nil, err
	}
	ke1 := KE1(concat(blinded[:], clientNonce[:], clientKeyshare[:]))
	return ke1, &ClientLogin{blinding: b, clientSecret: clientSecret, ke1: ke1}, nil
}

// Login is the outcome of a login at the client: the server has proved that
// it holds record and static key, and KE3 will prove that the client knows
// the password.
type Login struct {
	KE3             KE3
	SessionKey      SessionKey
	ExportKey       ExportKey
	ServerPublicKey PublicKey
}

// Finish answers a KE2 (GenerateKE3, RFC 9807 section 6.2.3). It may be called
// again, with another KE2 for the same KE1.
//
// Errors: [ErrInvalidMessage] for a malformed KE2, which says nothing about
// the password; [ErrWrongPasswordOrServer]; [ErrServerAuthentication]; the
// KSF's, wrapped.
func (c *ClientLogin) Finish(ke2 KE2, config ClientConfig) (Login, error) {
	session, err := config.session()
	if err != nil {
		return Login{}, err
	}
	if _, err := ParseKE2(ke2[:]); err != nil {
		return Login{}, err
	}

	// RecoverCredentials, section 6.3.2.3.
	r, err := c.blinding.randomizedPassword(Element(ke2[:ElementSize]), config.KSF)
	if err != nil {
		return Login{}, err
	}
	unmasked := mask(r.maskingKey(), ke2[ke2MaskingNonce:ke2MaskedResponse], ke2[ke2MaskedResponse:ke2ServerNonce])
	server := PublicKey(unmasked[:ElementSize])
	k, err := r.recover([envelopeSize]byte(unmasked[ElementSize:]), server, session)
	if err != nil {
		return Login{}, err
	}

	// AuthClientFinalize, section 6.4.3.
	serverKeyshare := Element(ke2[ke2ServerKeyshare:ke2ServerMAC])
	dh1, err := c.clientSecret.Multiply(serverKeyshare)
	if err != nil {
		return Login{}, err
	}
	dh2, err := c.clientSecret.Multiply(Element(server))
	if err != nil {
		return Login{}, err
	}
	dh3, err := k.privateKey.Multiply(serverKeyshare)
	if err != nil {
		return Login{}, err
	}
	h := newHandshake(dh1, dh2, dh3, session.preamble(server, k.clientPublicKey, c.ke1, ke2))
	if !hmac.Equal(h.serverMAC[:], ke2[ke2ServerMAC:]) {
		return Login{}, ErrServerAuthentication
	}
	return Login{
		KE3:             KE3(h.clientMAC),
		SessionKey:      h.sessionKey,
		ExportKey:       k.exportKey,
		ServerPublicKey: server,
	}, nil
}

// blinding is the client's OPRF state (Blind and Finalize, RFC 9497 section
// 3.3.1), which circl computes.
type blinding struct{ data *oprf.FinalizeData }

func blind(rand io.Reader, password []byte) (blinding, Element, error) {
	if len(password) == 0 || len(password) > MaxPasswordBytes {
		return blinding{}, Element{}, fmt.Errorf("%w: %d bytes", ErrInvalidPassword, len(password))
	}
	s, err := RandomScalar(rand)
	if err != nil {
		return blinding{}, Element{}, err
	}
	scalar := group.P256.NewScalar()
	if err := scalar.UnmarshalBinary(s[:]); err != nil {
		return blinding{}, Element{}, fmt.Errorf("blinding the password: %w", err)
	}
	data, request, err := oprf.NewClient(oprf.SuiteP256).DeterministicBlind(
		[][]byte{bytes.Clone(password)}, []oprf.Blind{scalar})
	if err != nil {
		return blinding{}, Element{}, fmt.Errorf("blinding the password: %w", err)
	}
	blinded, err := request.Elements[0].MarshalBinaryCompress()
	if err != nil {
		return blinding{}, Element{}, fmt.Errorf("blinding the password: %w", err)
	}
	e, err := ParseElement(blinded)
	return blinding{data}, e, err
}

// randomizedPassword unblinds and stretches (RFC 9807 sections 5.2.3 and
// 6.3.2.3).
func (b blinding) randomizedPassword(evaluated Element, ksf KSF) (randomizedPassword, error) {
	e := group.P256.NewElement()
	if err := e.UnmarshalBinary(evaluated[:]); err != nil {
		return randomizedPassword{}, fmt.Errorf("%w: evaluated_message: %w", ErrInvalidMessage, err)
	}
	outputs, err := oprf.NewClient(oprf.SuiteP256).Finalize(b.data, &oprf.Evaluation{Elements: []oprf.Evaluated{e}})
	if err != nil {
		return randomizedPassword{}, fmt.Errorf("unblinding: %w", err)
	}
	stretched, err := ksf.Stretch(outputs[0])
	if err != nil {
		return randomizedPassword{}, fmt.Errorf("stretching: %w", err)
	}
	if len(stretched) != hashSize {
		return randomizedPassword{}, fmt.Errorf("stretching: %d bytes, want %d", len(stretched), hashSize)
	}
	return extract(concat(outputs[0], stretched)), nil
}
