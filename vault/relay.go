package vault

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/mlkem"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"filippo.io/nistec"

	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/transcript"
)

// This file keeps the keys of the relay channel: Oblivious HTTP (RFC 9458), by which an app's back
// end carries requests that it can neither read nor answer.
//
// Each generation of the relay key is offered twice. DHKEM(P-256), for plain clients, has its private
// key in the token alone. The hybrid with ML-KEM-768, which keeps recorded traffic closed to a later
// quantum computer, has its P-256 half there too, and the ML-KEM half, which no token of today computes, as a
// seed that lies in the store, sealed under the master key. A thief of store and process memory thereby
// has nothing: both halves are needed.
//
// The first instance that lists a generation makes its seed, and all others take that. A seed is moved to a
// new master key as records are (Rewrap), and erased when its generation is destroyed. One that does not
// open any more, because its master key is gone, is made anew: clients that hold the older key are then told
// so, and fetch the list again.

const labelRelaySeed = "bkv/v1/relay-seed"

const (
	// relaySeedsFresh is how long seeds are kept in memory before the store is asked whether they changed.
	relaySeedsFresh = time.Minute
	// relaySeedsPause is the least time between two such questions for a generation that has none.
	relaySeedsPause = time.Second
)

// Suites, in the order of preference. The hybrid is for traffic that stays secret for decades, and is not
// offered with a 128-bit key.
var (
	hybridSuites = []ohttp.Suite{
		{KDF: ohttp.HKDFSHA256, AEAD: ohttp.AES256GCM}, {KDF: ohttp.HKDFSHA256, AEAD: ohttp.ChaCha20Poly1305},
	}
	plainSuites = []ohttp.Suite{
		{KDF: ohttp.HKDFSHA256, AEAD: ohttp.AES128GCM}, {KDF: ohttp.HKDFSHA256, AEAD: ohttp.AES256GCM},
		{KDF: ohttp.HKDFSHA256, AEAD: ohttp.ChaCha20Poly1305},
	}
)

// Key ids of a generation: two after each other, so that 128 generations follow one another before any id comes back.
func hybridKeyID(generation uint32) uint8 { return uint8(2 * generation) }
func plainKeyID(generation uint32) uint8  { return uint8(2*generation + 1) }

// relaySeeds remembers the seeds.
type relaySeeds struct {
	mu   sync.Mutex // guards all below; not held over a call
	read time.Time  // when the store was asked last
	rows map[uint32]relaySeed
}

type relaySeed struct {
	sealed []byte
	key    *mlkem.DecapsulationKey768 // nil: not opened yet
}

// RelayConfigs returns the configurations of the relay key in use, the hybrid first.
//
// Errors: ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) RelayConfigs(ctx context.Context) ([]ohttp.KeyConfig, error) {
	generation := v.token.Newest(purposeRelay)
	exchanger, err := v.relayExchanger(ctx, generation)
	if err != nil {
		return nil, err
	}
	seed, err := v.relaySeed(ctx, generation, exchanger.compressed, true)
	if err != nil {
		return nil, err
	}
	hybrid, err := hpke.NewHybridPublicKey(seed.EncapsulationKey(), exchanger.public)
	if err != nil {
		return nil, fmt.Errorf("joining the relay key's halves: %w", err)
	}
	plain, err := hpke.NewDHKEMPublicKey(exchanger.public)
	if err != nil {
		return nil, fmt.Errorf("reading the relay key: %w", err)
	}
	first, err := ohttp.NewKeyConfig(hybridKeyID(generation), hybrid, hybridSuites...)
	if err != nil {
		return nil, err
	}
	second, err := ohttp.NewKeyConfig(plainKeyID(generation), plain, plainSuites...)
	if err != nil {
		return nil, err
	}
	return []ohttp.KeyConfig{first, second}, nil
}

// OpenCapsule opens a request of the relay channel that is sealed to a generation of the relay key that this token
// holds. It asks the token for one derive. What is no capsule, or is sealed to none of the keys, is refused before.
//
// Errors: ohttp.ErrUnknownKey, ohttp.ErrCapsule, ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) OpenCapsule(ctx context.Context, capsule []byte) ([]byte, *ohttp.Opened, error) {
	header, err := ohttp.ParseHeader(capsule)
	if err != nil {
		return nil, nil, err
	}
	refused := ohttp.ErrUnknownKey
	for _, generation := range slices.Backward(v.token.Generations(purposeRelay)) {
		config := ohttp.KeyConfig{ID: header.KeyID, KEM: header.KEM}
		switch {
		case header.KEM == ohttp.MLKEM768P256 && header.KeyID == hybridKeyID(generation):
			config.Suites = hybridSuites
		case header.KEM == ohttp.DHKEMP256 && header.KeyID == plainKeyID(generation):
			config.Suites = plainSuites
		default:
			continue
		}
		private, err := v.relayPrivate(ctx, header.KEM, generation)
		if err != nil {
			return nil, nil, err
		}
		if private == nil {
			continue
		}
		request, opened, err := config.Open(private, capsule)
		if err == nil || errors.Is(err, ErrTokenUnavailable) {
			return request, opened, err
		}
		refused = err // 128 generations later another key has the same id
	}
	return nil, nil, refused
}

// relayPrivate is the private key of a generation, for one request; nil if it has no such half.
func (v *Vault) relayPrivate(ctx context.Context, kem uint16, generation uint32) (hpke.PrivateKey, error) {
	exchanger, err := v.relayExchanger(ctx, generation)
	if err != nil {
		return nil, err
	}
	if kem == ohttp.DHKEMP256 {
		return hpke.NewDHKEMPrivateKey(exchanger)
	}
	seed, err := v.relaySeed(ctx, generation, exchanger.compressed, false)
	if seed == nil || err != nil {
		return nil, err
	}
	return hpke.NewHybridPrivateKey(seed, exchanger)
}

// relayExchanger is the P-256 half of a relay key, in the token, for one request.
type relayExchanger struct {
	ctx        context.Context
	token      Token
	generation uint32
	compressed [33]byte
	public     *ecdh.PublicKey
}

var _ ecdh.KeyExchanger = (*relayExchanger)(nil)

func (v *Vault) relayExchanger(ctx context.Context, generation uint32) (*relayExchanger, error) {
	compressed, err := v.token.PublicKey(purposeRelay, generation)
	if err != nil {
		return nil, tokenFault("reading the relay key", err)
	}
	point, err := nistec.NewP256Point().SetBytes(compressed[:])
	if err != nil {
		return nil, tokenFault("reading the relay key", err)
	}
	public, err := ecdh.P256().NewPublicKey(point.Bytes())
	if err != nil {
		return nil, tokenFault("reading the relay key", err)
	}
	return &relayExchanger{ctx, v.token, generation, compressed, public}, nil
}

func (k *relayExchanger) PublicKey() *ecdh.PublicKey { return k.public }
func (k *relayExchanger) Curve() ecdh.Curve          { return ecdh.P256() }

// ECDH is the x-coordinate alone, which is all that HPKE uses (RFC 9180 section 4.1).
func (k *relayExchanger) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	if peer.Curve() != ecdh.P256() {
		return nil, errors.New("a public key of another curve")
	}
	x, err := k.token.DeriveX(k.ctx, purposeRelay, k.generation, [65]byte(peer.Bytes()))
	if err != nil {
		return nil, tokenFault("deriving by the relay key", err)
	}
	return x[:], nil
}

// relaySeed returns the ML-KEM half of a generation; if it has none, nil, or with create a new one.
func (v *Vault) relaySeed(ctx context.Context, generation uint32, public [33]byte, create bool) (*mlkem.DecapsulationKey768, error) {
	const maxTries = 4 // each lost race is another instance's seed, or its rewrap
	for try := range maxTries {
		row, err := v.relaySeedRow(ctx, generation, create || try > 0)
		if err != nil {
			return nil, err
		}
		if row.key != nil {
			return row.key, nil
		}
		if row.sealed != nil {
			key, err := v.openRelaySeed(ctx, generation, public, row.sealed)
			if err != nil {
				return nil, err
			}
			if key != nil {
				v.rememberRelaySeed(generation, relaySeed{row.sealed, key})
				return key, nil
			}
		}
		if !create {
			return nil, nil
		}
		if row.sealed != nil {
			v.log.ErrorContext(ctx, "a relay key's seed does not open and is made anew; clients fetch the key list again", "generation", generation)
		}
		err = v.makeRelaySeed(ctx, generation, public, row.sealed)
		if err != nil && !errors.Is(err, ErrStale) {
			return nil, err
		}
		v.forgetRelaySeeds()
	}
	return nil, fmt.Errorf("%w: relay key %d has no seed, and none could be made; was the key destroyed?", ErrStoreUnavailable, generation)
}

// relaySeedRow answers from memory, or asks the store if that is too old; at once, if a row is missing and soon.
func (v *Vault) relaySeedRow(ctx context.Context, generation uint32, soon bool) (relaySeed, error) {
	v.seeds.mu.Lock()
	row, known := v.seeds.rows[generation]
	age := time.Since(v.seeds.read)
	v.seeds.mu.Unlock()
	if known && age < relaySeedsFresh || !known && !soon && age < relaySeedsPause {
		return row, nil
	}
	read, err := v.store.RelaySeeds(ctx)
	if err != nil {
		if row.key != nil {
			return row, nil // it serves as well while the store is away
		}
		return relaySeed{}, storeFault("reading the relay key's seed", err)
	}
	v.seeds.mu.Lock()
	defer v.seeds.mu.Unlock()
	rows := map[uint32]relaySeed{}
	for generation, sealed := range read {
		fresh := relaySeed{sealed: sealed}
		if old := v.seeds.rows[generation]; bytes.Equal(old.sealed, sealed) {
			fresh.key = old.key
		}
		rows[generation] = fresh
	}
	v.seeds.rows, v.seeds.read = rows, time.Now()
	return rows[generation], nil
}

func (v *Vault) rememberRelaySeed(generation uint32, seed relaySeed) {
	v.seeds.mu.Lock()
	defer v.seeds.mu.Unlock()
	if bytes.Equal(v.seeds.rows[generation].sealed, seed.sealed) {
		v.seeds.rows[generation] = seed
	}
}

// forgetRelaySeeds has the store asked before a seed is used again.
func (v *Vault) forgetRelaySeeds() {
	v.seeds.mu.Lock()
	defer v.seeds.mu.Unlock()
	v.seeds.read = time.Time{}
}

// relaySeedBinding binds a sealed seed to its generation and the key's other half.
func (v *Vault) relaySeedBinding(generation uint32, public [33]byte) (id [16]byte, associated []byte) {
	binary.BigEndian.PutUint32(id[:], generation)
	return id, transcript.Fields(labelRelaySeed, []byte(v.id), id[:4], public[:])
}

// openRelaySeed answers nil, without an error, for a seed that no key of the token opens.
func (v *Vault) openRelaySeed(ctx context.Context, generation uint32, public [33]byte, sealed []byte) (*mlkem.DecapsulationKey768, error) {
	id, associated := v.relaySeedBinding(generation, public)
	plain, authentic, err := v.token.Open(ctx, purposeMaster, id, sealed, associated)
	if err != nil {
		return nil, tokenFault("opening the relay key's seed", err)
	}
	if !authentic {
		if under := SealedUnder(sealed); under > v.token.Newest(purposeMaster) && !slices.Contains(v.token.Generations(purposeMaster), under) {
			return nil, fmt.Errorf("%w: the relay key's seed is sealed under master/%d, which this token does not hold yet", ErrTokenUnavailable, under)
		}
		return nil, nil
	}
	defer clear(plain)
	key, err := mlkem.NewDecapsulationKey768(plain)
	if err != nil {
		return nil, nil // authentic, and of another size: of another version
	}
	return key, nil
}

// makeRelaySeed makes a seed in the place of old (nil: none). ErrStale: another instance was faster.
func (v *Vault) makeRelaySeed(ctx context.Context, generation uint32, public [33]byte, old []byte) error {
	seed, err := v.token.Random(ctx, mlkem.SeedSize)
	if err != nil {
		return tokenFault("choosing the relay key's seed", err)
	}
	defer clear(seed)
	return v.sealRelaySeed(ctx, generation, public, old, seed)
}

func (v *Vault) sealRelaySeed(ctx context.Context, generation uint32, public [33]byte, old, seed []byte) error {
	id, associated := v.relaySeedBinding(generation, public)
	sealed, err := v.token.Seal(ctx, purposeMaster, id, seed, associated)
	if err != nil {
		return tokenFault("sealing the relay key's seed", err)
	}
	return v.swapRelaySeed(ctx, generation, old, sealed)
}

func (v *Vault) swapRelaySeed(ctx context.Context, generation uint32, old, sealed []byte) error {
	var closing *ClosingKey
	switch err := v.store.SwapRelaySeed(ctx, generation, old, sealed); {
	case err == nil, errors.Is(err, ErrStale):
		return err
	case errors.As(err, &closing):
		return tokenFault("writing the relay key's seed", err) // this instance will notice the rotation within seconds
	default:
		return storeFault("writing the relay key's seed", err)
	}
}

// relaySeedsUnder counts the seeds that are sealed under a master key.
func (v *Vault) relaySeedsUnder(ctx context.Context, key Key) (n int64, err error) {
	if key.Purpose != purposeMaster {
		return 0, nil
	}
	seeds, err := v.store.RelaySeeds(ctx)
	if err != nil {
		return 0, storeFault("reading the relay key's seeds", err)
	}
	for _, sealed := range seeds {
		if SealedUnder(sealed) == key.Generation {
			n++
		}
	}
	return n, nil
}

// rewrapRelaySeeds moves the seeds to the master key in use. One that does not open is replaced by a new one, and one of an older
// relay key that is not in this token any more is erased. One of a newer relay key, which this token has yet to be looked into for, waits.
func (v *Vault) rewrapRelaySeeds(ctx context.Context) error {
	seeds, err := v.store.RelaySeeds(ctx)
	if err != nil {
		return storeFault("reading the relay key's seeds", err)
	}
	for generation, sealed := range seeds {
		if SealedUnder(sealed) >= v.token.Newest(purposeMaster) {
			continue
		}
		if err := v.rewrapRelaySeed(ctx, generation, sealed); err != nil && !errors.Is(err, ErrStale) {
			return err
		}
	}
	return nil
}

func (v *Vault) rewrapRelaySeed(ctx context.Context, generation uint32, sealed []byte) error {
	if !slices.Contains(v.token.Generations(purposeRelay), generation) {
		if generation > v.token.Newest(purposeRelay) {
			return nil
		}
		return v.swapRelaySeed(ctx, generation, sealed, nil)
	}
	public, err := v.token.PublicKey(purposeRelay, generation)
	if err != nil {
		return tokenFault("reading the relay key", err)
	}
	id, associated := v.relaySeedBinding(generation, public)
	seed, authentic, err := v.token.Open(ctx, purposeMaster, id, sealed, associated)
	if err != nil {
		return tokenFault("opening the relay key's seed", err)
	}
	if !authentic {
		return v.makeRelaySeed(ctx, generation, public, sealed)
	}
	defer clear(seed)
	return v.sealRelaySeed(ctx, generation, public, sealed, seed)
}

// eraseRelaySeed erases the seed of a relay key that is being destroyed, for good.
func (v *Vault) eraseRelaySeed(ctx context.Context, generation uint32) error {
	seeds, err := v.store.RelaySeeds(ctx)
	if err != nil {
		return storeFault("reading the relay key's seeds", err)
	}
	if sealed := seeds[generation]; sealed != nil {
		return v.swapRelaySeed(ctx, generation, sealed, nil)
	}
	return nil
}
