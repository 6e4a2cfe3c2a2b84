package pkcs11util

import (
	"encoding/binary"
	"fmt"
)

// A sealed value is
//
//	version (1) ‖ key generation (4) ‖ IV scheme (1) ‖ id (16) ‖ IV (12 or 16) ‖ ciphertext ‖ tag (16)
//
// with integers big endian. The first four fields are its header. The associated data of
// AES-GCM (NIST SP 800-38D) is
//
//	header ‖ length of purpose (4) ‖ purpose ‖ the caller's associated data
//
// The IV scheme says who made the IV, in its low four bits, and by how many bytes the IV is
// longer than 12, in its high four. The IV is in its place whatever the token did with it.
const (
	sealedVersion = 1

	idBytes     = 16
	headerBytes = 1 + 4 + 1 + idBytes
	ivBytes     = 12 // SP 800-38D section 8.2; made by this process, all are random (section 8.2.2)
	longIVBytes = 16
	tagBytes    = 16

	// maxPlaintextBytes keeps one operation within what tokens take in one C_Encrypt; AWS CloudHSM
	// 5 takes 16,224 bytes.
	maxPlaintextBytes = 8192
)

// ivSchemes are the numbers of a profile's IV in sealed values.
var ivSchemes = map[string]byte{IVOurs: 1, IVWrittenBack: 2, IVAppended: 3, IVPrepended: 4}

// scheme is the IV scheme of what is sealed under the profile.
func (p Profile) scheme() byte { return byte(p.IVBytes-ivBytes)<<4 | ivSchemes[p.IV] }

// schemeIVBytes is the length of an IV scheme's IVs; ok is false if there is no such scheme.
func schemeIVBytes(scheme byte) (n int, ok bool) {
	maker, longer := scheme&0xf, int(scheme>>4)
	switch {
	case maker < ivSchemes[IVOurs] || maker > ivSchemes[IVPrepended]:
		return 0, false
	case longer == 0, ivBytes+longer == longIVBytes && maker != ivSchemes[IVOurs]:
		return ivBytes + longer, true
	}
	return 0, false
}

// sealedHeader is a sealed value's header, of version 1.
type sealedHeader struct {
	generation uint32
	scheme     byte
	id         [idBytes]byte
}

func (h sealedHeader) append(b []byte) []byte {
	b = append(b, sealedVersion)
	b = binary.BigEndian.AppendUint32(b, h.generation)
	b = append(b, h.scheme)
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
	if len(b) < headerBytes || b[0] != sealedVersion {
		return sealedHeader{}, nil, nil, false
	}
	h.generation = binary.BigEndian.Uint32(b[1:5])
	h.scheme = b[5]
	copy(h.id[:], b[6:headerBytes])
	n, ok := schemeIVBytes(h.scheme)
	b = b[headerBytes:]
	if !ok || len(b) < n+1+tagBytes || len(b) > n+maxPlaintextBytes+tagBytes {
		return sealedHeader{}, nil, nil, false
	}
	return h, b[:n], b[n:], true
}

// seal encrypts under k.
func (s session) seal(k *key, id [idBytes]byte, plaintext, associated []byte) ([]byte, error) {
	if len(plaintext) == 0 || len(plaintext) > s.profile.MaxDataBytes {
		return nil, fmt.Errorf("sealing %d bytes: must be 1 to %d", len(plaintext), s.profile.MaxDataBytes)
	}
	h := sealedHeader{k.name.Generation, s.profile.scheme(), id}
	iv, ciphertext, err := s.encrypt(k, plaintext, h.associated(k.name.Purpose, associated))
	if err != nil {
		return nil, err
	}
	out := h.append(make([]byte, 0, headerBytes+len(iv)+len(ciphertext)))
	return append(append(out, iv...), ciphertext...), nil
}
