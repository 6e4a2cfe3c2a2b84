package pkcs11util

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Errors of a token's calls wrap the pkcs11.Error with the CKR code, for errors.As.
var (
	// ErrUnavailable: the token is being recovered. The same call may be made again at any time.
	ErrUnavailable = errors.New("the token is not available")
	// ErrPINRefused: the token refused the PIN. It is not tried again; a repeated attempt could
	// lock the token.
	ErrPINRefused = errors.New("the token refused the PIN, which is not tried a second time")
	// ErrClosed: the Keyset is closed.
	ErrClosed = errors.New("the token's keys are closed")
	// ErrNoKey: the token has no such key. Asking again does not help.
	ErrNoKey = errors.New("the token has no such key")
	// ErrInvalidPoint: not a point that a key may multiply. The token has not seen it.
	ErrInvalidPoint = errors.New("not a compressed point of P-256 other than the negated generator")
)

// errFaulty marks answers that cannot be right.
var errFaulty = errors.New("the token computed wrong")

// Explain puts what is wrong and what to do before an error, where its CKR code tells that to those who know the codes.
func Explain(err error) error {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return err
	}
	switch code {
	case pkcs11.CKR_DEVICE_MEMORY:
		return fmt.Errorf("the token is full: make room in it, or use a larger one: %w", err)
	case pkcs11.CKR_TOKEN_WRITE_PROTECTED:
		return fmt.Errorf("the token is write-protected: lift the protection, as keys are made and destroyed in it: %w", err)
	case pkcs11.CKR_USER_PIN_NOT_INITIALIZED:
		return fmt.Errorf("the token is not initialised, as it has no user PIN: run vaultctl token init: %w", err)
	}
	return err
}

// refusedPIN says whether err is a token's answer to a PIN that no repetition will
// make right, and that may count towards a lock.
func refusedPIN(err error) bool {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return false
	}
	switch code {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE:
		return true
	}
	return false
}

// ckrAEADDecryptFailed is CKR_AEAD_DECRYPT_FAILED of PKCS #11 v3.0, which miekg/pkcs11 v1.1.2 does
// not know.
const ckrAEADDecryptFailed = 0x42

// mayBeWrongTag says whether err, from C_Decrypt, may mean that the tag is wrong:
// CKR_ENCRYPTED_DATA_INVALID by the specification, but CKR_GENERAL_ERROR in SoftHSM 2.6.1, and
// other modules have others. None of them is proof; see Keyset.Open.
func mayBeWrongTag(err error) bool {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return false
	}
	switch code {
	case pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, ckrAEADDecryptFailed,
		pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_DATA_LEN_RANGE:
		return true
	}
	return false
}
