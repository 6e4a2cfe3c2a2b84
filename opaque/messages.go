package opaque

import (
	"errors"
	"fmt"
)

// Sizes of the messages in bytes (RFC 9807 sections 4.1.1, 5.1, 6.1 and
// 6.3.1, with Nn = Nh = Nm = Nx = 32 and Noe = Npk = 33).
const (
	nonceSize    = 32 // Nn
	seedSize     = 32 // Nseed
	macSize      = 32 // Nm
	hashSize     = 32 // Nh and Nx
	envelopeSize = nonceSize + macSize
	maskedSize   = ElementSize + envelopeSize

	RegistrationRequestSize  = ElementSize
	RegistrationResponseSize = ElementSize + ElementSize
	RecordSize               = ElementSize + hashSize + envelopeSize
	KE1Size                  = ElementSize + nonceSize + ElementSize
	KE2Size                  = ElementSize + nonceSize + maskedSize + nonceSize + ElementSize + macSize
	KE3Size                  = macSize
)

// ErrInvalidMessage is wrapped by every error that means that a message from
// the other side has a wrong length or holds something that is no point of
// the curve. The same bytes fail again.
var ErrInvalidMessage = errors.New("invalid OPAQUE message")

// RegistrationRequest is the client's blinded password:
//
//	blinded_message [33]
type RegistrationRequest [RegistrationRequestSize]byte

// RegistrationResponse is the server's answer:
//
//	evaluated_message [33] ‖ server_public_key [33]
type RegistrationResponse [RegistrationResponseSize]byte

// RegistrationRecord is what the server keeps for a client. It prints as
// "[redacted]".
//
//	client_public_key [33] ‖ masking_key [32] ‖ envelope_nonce [32] ‖ auth_tag [32]
type RegistrationRecord [RecordSize]byte

// KE1 opens a login:
//
//	blinded_message [33] ‖ client_nonce [32] ‖ client_public_keyshare [33]
type KE1 [KE1Size]byte

// KE2 is the server's answer:
//
//	evaluated_message [33] ‖ masking_nonce [32] ‖ masked_response [97] ‖
//	server_nonce [32] ‖ server_public_keyshare [33] ‖ server_mac [32]
type KE2 [KE2Size]byte

// KE3 ends a login:
//
//	client_mac [32]
type KE3 [KE3Size]byte

// Where the fields begin in each message.
const (
	responseServerPublicKey = ElementSize

	recordMaskingKey = ElementSize
	recordEnvelope   = recordMaskingKey + hashSize

	ke1ClientNonce    = ElementSize
	ke1ClientKeyshare = ke1ClientNonce + nonceSize

	ke2MaskingNonce   = ElementSize
	ke2MaskedResponse = ke2MaskingNonce + nonceSize
	ke2ServerNonce    = ke2MaskedResponse + maskedSize
	ke2ServerKeyshare = ke2ServerNonce + nonceSize
	ke2ServerMAC      = ke2ServerKeyshare + ElementSize
)

// ParseRegistrationRequest accepts 33 bytes that are a valid point, and else
// returns an [ErrInvalidMessage].
func ParseRegistrationRequest(b []byte) (RegistrationRequest, error) {
	if err := checkPoints("registration request", b, RegistrationRequestSize, field{"blinded_message", 0}); err != nil {
		return RegistrationRequest{}, err
	}
	return RegistrationRequest(b), nil
}

// ParseRegistrationResponse accepts 66 bytes that are two valid points, and
// else returns an [ErrInvalidMessage].
func ParseRegistrationResponse(b []byte) (RegistrationResponse, error) {
	if err := checkPoints("registration response", b, RegistrationResponseSize,
		field{"evaluated_message", 0}, field{"server_public_key", responseServerPublicKey}); err != nil {
		return RegistrationResponse{}, err
	}
	return RegistrationResponse(b), nil
}

// ParseRegistrationRecord accepts 129 bytes whose client_public_key is a valid
// point, and else returns an [ErrInvalidMessage]. The rest of a record cannot
// be checked without the password.
func ParseRegistrationRecord(b []byte) (RegistrationRecord, error) {
	if err := checkPoints("registration record", b, RecordSize, field{"client_public_key", 0}); err != nil {
		return RegistrationRecord{}, err
	}
	return RegistrationRecord(b), nil
}

// ParseKE1 accepts 98 bytes whose two points are valid, and else returns an
// [ErrInvalidMessage].
//
// The keyshare −G is refused as well. A token that gives only x-coordinates
// finds the whole point k·P by multiplying P and P+G, and for P = −G the
// second is the identity, on which tokens fail. An honest client draws it
// with probability 2^-256.
func ParseKE1(b []byte) (KE1, error) {
	if err := checkPoints("KE1", b, KE1Size,
		field{"blinded_message", 0}, field{"client_public_keyshare", ke1ClientKeyshare}); err != nil {
		return KE1{}, err
	}
	if isMinusGenerator(b[ke1ClientKeyshare:]) {
		return KE1{}, fmt.Errorf("%w: KE1: client_public_keyshare: the generator's negative is refused", ErrInvalidMessage)
	}
	return KE1(b), nil
}

// ParseKE2 accepts 259 bytes whose two visible points are valid, and else
// returns an [ErrInvalidMessage]. The third, the server's public key, is
// masked and checked by [ClientLogin.Finish].
func ParseKE2(b []byte) (KE2, error) {
	if err := checkPoints("KE2", b, KE2Size,
		field{"evaluated_message", 0}, field{"server_public_keyshare", ke2ServerKeyshare}); err != nil {
		return KE2{}, err
	}
	return KE2(b), nil
}

// ParseKE3 accepts any 32 bytes, and else returns an [ErrInvalidMessage].
func ParseKE3(b []byte) (KE3, error) {
	if err := checkPoints("KE3", b, KE3Size); err != nil {
		return KE3{}, err
	}
	return KE3(b), nil
}

// field names a point in a message and says where it begins.
type field struct {
	name   string
	offset int
}

// checkPoints checks the length of a message and every point in it.
func checkPoints(message string, b []byte, size int, points ...field) error {
	if len(b) != size {
		return fmt.Errorf("%w: %s: %d bytes, want %d", ErrInvalidMessage, message, len(b), size)
	}
	for _, f := range points {
		if _, err := decodePoint(b[f.offset : f.offset+ElementSize]); err != nil {
			return fmt.Errorf("%w: %s: %s: %w", ErrInvalidMessage, message, f.name, err)
		}
	}
	return nil
}
