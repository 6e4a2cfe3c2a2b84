package pkcs11util

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
)

// A sealed value is
//
//	version (1) ‖ key generation (4) ‖ IV scheme (1) ‖ id (16) ‖ IV (12) ‖ ciphertext ‖ tag (16)
//
// with integers big endian. The first four fields are its header. The associated data of
// AES-GCM (NIST SP 800-38D) is
//
//	header ‖ length of purpose (4) ‖ purpose ‖ the caller's associated data
const (
	sealedVersion = 1
	// ivOurs: 12 random bytes, made by this process, before the ciphertext (SP 800-38D section 8.2.2).
	ivOurs = 1

	idBytes     = 16
	headerBytes = 1 + 4 + 1 + idBytes
	ivBytes     = 12
	tagBytes    = 16

	// maxPlaintextBytes keeps one operation within what tokens take in one C_Encrypt; AWS CloudHSM
	// 5 takes 16,224 bytes.
	maxPlaintextBytes = 8192
	minSealedBytes    = headerBytes + ivBytes + 1 + tagBytes
	maxSealedBytes    = headerBytes + ivBytes + maxPlaintextBytes + tagBytes
)

// sealedHeader is a sealed value's header, of version 1 and IV scheme ours.
type sealedHeader struct {
	generation uint32
	id         [idBytes]byte
}

func (h sealedHeader) append(b []byte) []byte {
	b = append(b, sealedVersion)
	b = binary.BigEndian.AppendUint32(b, h.generation)
	b = append(b, ivOurs)
	return append(b, h.id[:]...)
}

func (h sealedHeader) associated(purpose string, associated []byte) []byte {
	b := make([]byte, 0, headerBytes+4+len(purpose)+len(associated))
	b = h.append(b)
	b = binary.BigEndian.AppendUint32(b, uint32(len(purpose)))
	b = append(b, purpose...)
	return append(b, associated...)
}

// parseSealed takes a sealed value apart. ok is false for whatever seal cannot have made.
func parseSealed(b []byte) (h sealedHeader, iv, ciphertext []byte, ok bool) {
	if len(b) < minSealedBytes || len(b) > maxSealedBytes || b[0] != sealedVersion || b[5] != ivOurs {
		return sealedHeader{}, nil, nil, false
	}
	h.generation = binary.BigEndian.Uint32(b[1:5])
	copy(h.id[:], b[6:headerBytes])
	b = b[headerBytes:]
	return h, b[:ivBytes], b[ivBytes:], true
}

// seal encrypts under k.
func (s session) seal(k *key, id [idBytes]byte, plaintext, associated []byte) ([]byte, error) {
	if len(plaintext) == 0 || len(plaintext) > maxPlaintextBytes {
		return nil, fmt.Errorf("sealing %d bytes: must be 1 to %d", len(plaintext), maxPlaintextBytes)
	}
	h := sealedHeader{k.name.Generation, id}
	out := h.append(make([]byte, 0, headerBytes+ivBytes+len(plaintext)+tagBytes))
	var iv [ivBytes]byte
	_, _ = rand.Read(iv[:]) // crypto/rand never fails: it ends the process first
	ciphertext, err := s.encrypt(k, iv[:], plaintext, h.associated(k.name.Purpose, associated))
	if err != nil {
		return nil, err
	}
	return append(append(out, iv[:]...), ciphertext...), nil
}
