package opaque

import (
	"errors"
	"fmt"

	"golang.org/x/crypto/argon2"
)

// Argon2id is a KSF: Argon2id (RFC 9106), version 0x13, with a salt of 16 zero
// bytes and a tag of 32 bytes (RFC 9807 section 7). The OPRF key is the real
// salt (section 10.11).
//
// The client chooses the parameters when it registers, and gets them back from
// the server when it logs in. A hostile server must gain nothing by changing
// them, neither a cheap guess nor a device without memory, so they count only
// between a floor and a ceiling that are fixed here.
type Argon2id struct {
	Time      uint32 // passes over the memory
	MemoryKiB uint32 // memory in KiB
	Threads   uint8  // lanes
}

// DefaultArgon2id is the second recommendation of RFC 9106 section 4: three
// passes, 64 MiB, four lanes.
var DefaultArgon2id = Argon2id{Time: 3, MemoryKiB: 64 * 1024, Threads: 4}

// MinArgon2id and MaxArgon2id are the floor and the ceiling, each inclusive.
// The floor has the passes and the memory of the default; fewer lanes make an
// attacker's work no cheaper.
var (
	MinArgon2id = Argon2id{Time: 3, MemoryKiB: 64 * 1024, Threads: 1}
	MaxArgon2id = Argon2id{Time: 16, MemoryKiB: 1024 * 1024, Threads: 16}
)

// ErrArgon2idBounds says that parameters lie below the floor or above the
// ceiling.
var ErrArgon2idBounds = errors.New("Argon2id parameters out of bounds")

// Validate returns nil or an [ErrArgon2idBounds] that names the parameter.
func (a Argon2id) Validate() error {
	for _, p := range []struct {
		name            string
		value, min, max uint32
	}{
		{"time", a.Time, MinArgon2id.Time, MaxArgon2id.Time},
		{"memory in KiB", a.MemoryKiB, MinArgon2id.MemoryKiB, MaxArgon2id.MemoryKiB},
		{"threads", uint32(a.Threads), uint32(MinArgon2id.Threads), uint32(MaxArgon2id.Threads)},
	} {
		if p.value < p.min || p.value > p.max {
			return fmt.Errorf("%w: %s is %d, want %d to %d", ErrArgon2idBounds, p.name, p.value, p.min, p.max)
		}
	}
	return nil
}

// Stretch validates the parameters and runs Argon2id. It allocates MemoryKiB.
func (a Argon2id) Stretch(input []byte) ([]byte, error) {
	if err := a.Validate(); err != nil {
		return nil, err
	}
	var salt [16]byte
	return argon2.IDKey(input, salt[:], a.Time, a.MemoryKiB, a.Threads, hashSize), nil
}
