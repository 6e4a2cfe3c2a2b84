package client

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// MaxPasswordBytes bounds a password, in UTF-8 and after normalisation.
const MaxPasswordBytes = 1024

// CheckPassword reports whether a password can be used, before anything is asked of its user or
// the vault.
//
// Errors: ErrInvalidPassword.
func CheckPassword(password string) error {
	_, err := normalise(password)
	return err
}

// normalise makes one byte string of all the ways in which keyboards spell the same
// password, as OpaqueString of RFC 8265 §4.2 does: every space that is not ASCII
// becomes U+0020, then Unicode normalisation form C. Case and width stay, and
// nothing is trimmed: a space at the end is part of the password.
//
// OpaqueString's list of characters that are not allowed is left out: it depends on the
// version of Unicode, and a device must not refuse what another one enrolled.
func normalise(password string) ([]byte, error) {
	if !utf8.ValidString(password) {
		return nil, fmt.Errorf("%w: it is not valid UTF-8", ErrInvalidPassword)
	}
	spaced := strings.Map(func(r rune) rune {
		if unicode.Is(unicode.Zs, r) {
			return ' '
		}
		return r
	}, password)
	out := norm.NFC.Bytes([]byte(spaced))
	switch {
	case len(out) == 0:
		return nil, fmt.Errorf("%w: it is empty", ErrInvalidPassword)
	case len(out) > MaxPasswordBytes:
		return nil, fmt.Errorf("%w: it has %d bytes, and at most %d are allowed", ErrInvalidPassword, len(out), MaxPasswordBytes)
	}
	return out, nil
}
