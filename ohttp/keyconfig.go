package ohttp

import (
	"crypto/hpke"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// KEM ids (RFC 9180 section 7.1; 0x0050 is of draft-ietf-hpke-pq).
const (
	// DHKEMP256 is DHKEM(P-256, HKDF-SHA256).
	DHKEMP256 uint16 = 0x0010
	// DHKEMX25519 is DHKEM(X25519, HKDF-SHA256), which RFC 9458's example has.
	DHKEMX25519 uint16 = 0x0020
	// MLKEM768P256 is ML-KEM-768 (FIPS 203) and P-256 together: what is sealed to it stays
	// closed unless both are broken.
	MLKEM768P256 uint16 = 0x0050
)

// HKDFSHA256 is the one KDF of this package (RFC 9180 section 7.2).
const HKDFSHA256 uint16 = 0x0001

// AEAD ids (RFC 9180 section 7.3).
const (
	AES128GCM        uint16 = 0x0001
	AES256GCM        uint16 = 0x0002
	ChaCha20Poly1305 uint16 = 0x0003
)

// Suite is a pair of symmetric algorithms.
type Suite struct{ KDF, AEAD uint16 }

// supported reports whether this package can seal and open with the suite.
func (s Suite) supported() bool {
	return s.KDF == HKDFSHA256 && (s.AEAD == AES128GCM || s.AEAD == AES256GCM || s.AEAD == ChaCha20Poly1305)
}

// KeyConfig is a gateway's key configuration (RFC 9458 section 3.1).
type KeyConfig struct {
	ID        uint8
	KEM       uint16
	PublicKey []byte  // as the KEM's SerializePublicKey has it
	Suites    []Suite // in the order of preference
}

// NewKeyConfig describes a key. It fails with ErrUnsupported for a KEM or a suite that this package does not have.
func NewKeyConfig(id uint8, public hpke.PublicKey, suites ...Suite) (KeyConfig, error) {
	c := KeyConfig{ID: id, KEM: public.KEM().ID(), PublicKey: public.Bytes(), Suites: suites}
	if _, known := publicKeySize(c.KEM); !known {
		return KeyConfig{}, fmt.Errorf("%w: KEM %#04x", ErrUnsupported, c.KEM)
	}
	for _, s := range suites {
		if !s.supported() {
			return KeyConfig{}, fmt.Errorf("%w: KDF %#04x, AEAD %#04x", ErrUnsupported, s.KDF, s.AEAD)
		}
	}
	return c, c.check()
}

var (
	// ErrKeyConfig is what no key configuration, or list of some, may be.
	ErrKeyConfig = errors.New("not a valid key configuration")
	// ErrUnsupported is a key configuration of an algorithm that this package does not have.
	ErrUnsupported = errors.New("a key configuration of an unknown algorithm")
)

const (
	suiteSize  = 4
	headerSize = 7 // key id, KEM, KDF, AEAD
)

// Encode writes the key configuration: key id, KEM, public key, the length of the suites and
// the suites. It fails with ErrKeyConfig for what ParseKeyConfig would refuse.
func (c KeyConfig) Encode() ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint16([]byte{c.ID}, c.KEM)
	b = append(b, c.PublicKey...)
	b = binary.BigEndian.AppendUint16(b, uint16(suiteSize*len(c.Suites)))
	for _, s := range c.Suites {
		b = binary.BigEndian.AppendUint16(b, s.KDF)
		b = binary.BigEndian.AppendUint16(b, s.AEAD)
	}
	return b, nil
}

func (c KeyConfig) check() error {
	kem, err := hpke.NewKEM(c.KEM)
	if err != nil {
		return fmt.Errorf("%w: KEM %#04x", ErrUnsupported, c.KEM)
	}
	if _, err := kem.NewPublicKey(c.PublicKey); err != nil {
		return fmt.Errorf("%w: its public key is none of its KEM's", ErrKeyConfig)
	}
	if len(c.Suites) == 0 || len(c.Suites) > 0xffff/suiteSize {
		return fmt.Errorf("%w: it has no suites, or too many", ErrKeyConfig)
	}
	return nil
}

// ParseKeyConfig reads one key configuration, to its last byte. Its errors are ErrKeyConfig and
// ErrUnsupported, for a KEM that crypto/hpke does not have. Suites may be among those it names that
// this package does not have; Seal passes over them.
func ParseKeyConfig(b []byte) (KeyConfig, error) {
	const shortest = 1 + 2 + 2 + suiteSize
	if len(b) < shortest {
		return KeyConfig{}, fmt.Errorf("%w: %d bytes", ErrKeyConfig, len(b))
	}
	c := KeyConfig{ID: b[0], KEM: binary.BigEndian.Uint16(b[1:])}
	size, known := publicKeySize(c.KEM)
	if !known {
		return KeyConfig{}, fmt.Errorf("%w: KEM %#04x", ErrUnsupported, c.KEM)
	}
	b = b[3:]
	if len(b) < size+2 {
		return KeyConfig{}, fmt.Errorf("%w: it ends within its public key", ErrKeyConfig)
	}
	c.PublicKey = slices.Clone(b[:size])
	n, suites := int(binary.BigEndian.Uint16(b[size:])), b[size+2:]
	if n != len(suites) || n%suiteSize != 0 {
		return KeyConfig{}, fmt.Errorf("%w: the length of its suites does not fit", ErrKeyConfig)
	}
	for ; len(suites) > 0; suites = suites[suiteSize:] {
		c.Suites = append(c.Suites, Suite{binary.BigEndian.Uint16(suites), binary.BigEndian.Uint16(suites[2:])})
	}
	if err := c.check(); err != nil {
		return KeyConfig{}, err
	}
	return c, nil
}

// publicKeySize is Npk of a KEM (RFC 9180 section 7.1; draft-ietf-hpke-pq section 4).
func publicKeySize(kem uint16) (size int, known bool) {
	const mlkem768 = 1184 // FIPS 203 section 8, table 3
	switch kem {
	case DHKEMP256:
		return 65, true
	case MLKEM768P256:
		return mlkem768 + 65, true
	case DHKEMX25519:
		return 32, true
	}
	return 0, false
}

// EncodeKeyConfigs writes a list of the media type application/ohttp-keys: each key configuration after its length
// in two bytes (RFC 9458 section 3.2).
func EncodeKeyConfigs(configs []KeyConfig) (list []byte, err error) {
	for _, c := range configs {
		b, err := c.Encode()
		if err != nil {
			return nil, err
		}
		if len(b) > 0xffff {
			return nil, fmt.Errorf("%w: %d bytes", ErrKeyConfig, len(b))
		}
		list = append(binary.BigEndian.AppendUint16(list, uint16(len(b))), b...)
	}
	return list, nil
}

// ParseKeyConfigs reads a list of the media type application/ohttp-keys and passes over the configurations of
// unknown KEMs, as RFC 9458 section 3.2 demands. Any other fault of any of them is ErrKeyConfig; so is an
// empty list.
func ParseKeyConfigs(list []byte) (configs []KeyConfig, err error) {
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: the list is empty", ErrKeyConfig)
	}
	for len(list) > 0 {
		if len(list) < 2 || len(list)-2 < int(binary.BigEndian.Uint16(list)) {
			return nil, fmt.Errorf("%w: the list ends within one", ErrKeyConfig)
		}
		n := 2 + int(binary.BigEndian.Uint16(list))
		c, err := ParseKeyConfig(list[2:n])
		switch {
		case err == nil:
			configs = append(configs, c)
		case !errors.Is(err, ErrUnsupported):
			return nil, err
		}
		list = list[n:]
	}
	return configs, nil
}
