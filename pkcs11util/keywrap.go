package pkcs11util

import (
	"crypto/aes"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
)

// RFC 3394: AES key wrap, which tokens call CKM_AES_KEY_WRAP.
const (
	wrapBlockBytes = 8 // a semiblock, section 2
	wrapRounds     = 6 // section 2.2.2
)

// wrapIV is RFC 3394's default initial value (section 2.2.3.1).
var wrapIV = []byte{0xa6, 0xa6, 0xa6, 0xa6, 0xa6, 0xa6, 0xa6, 0xa6}

// unwrap undoes AES key wrap (RFC 3394 section 2.2.2). Key data is two semiblocks or more.
func unwrap(key [secretKeyBytes]byte, wrapped []byte) ([]byte, error) {
	n := len(wrapped)/wrapBlockBytes - 1
	if len(wrapped)%wrapBlockBytes != 0 || n < 2 {
		return nil, fmt.Errorf("%w: %d bytes are no wrapped key", errFaulty, len(wrapped))
	}
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, fmt.Errorf("AES: %w", err)
	}
	var b [2 * wrapBlockBytes]byte // A ‖ R[i]
	a := b[:wrapBlockBytes]
	copy(a, wrapped)
	r := append([]byte(nil), wrapped[wrapBlockBytes:]...)
	for j := wrapRounds - 1; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			ri := r[(i-1)*wrapBlockBytes : i*wrapBlockBytes]
			binary.BigEndian.PutUint64(a, binary.BigEndian.Uint64(a)^uint64(n*j+i))
			copy(b[wrapBlockBytes:], ri)
			block.Decrypt(b[:], b[:])
			copy(ri, b[wrapBlockBytes:])
		}
	}
	clear(b[wrapBlockBytes:])
	if subtle.ConstantTimeCompare(a, wrapIV) != 1 {
		clear(r)
		return nil, fmt.Errorf("%w: a wrapped key does not unwrap", errFaulty)
	}
	return r, nil
}
