package httpapi

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sync/singleflight"

	"github.com/backup-key-vault/bkv/vault"
)

// Tenants is where the tenants and their keys come from.
type Tenants interface {
	// Tenants returns all tenants with the keys that are not revoked.
	Tenants(ctx context.Context) ([]vault.Tenant, error)
}

// Ages of the cached tenants. A key that is revoked in the store is refused after
// keysWaitAge at the latest if the store answers, and after keysMaxAge if it does not.
const (
	// keysFreshAge is how long nobody asks the store again.
	keysFreshAge = 10 * time.Second
	// keysWaitAge is from when a request waits for the store's answer, and does
	// not only have it fetched: it came after a quiet time.
	keysWaitAge = 30 * time.Second
	// keysMaxAge is how long the keys serve if the store does not answer.
	keysMaxAge = 5 * time.Minute
	// keysMinInterval is the least time between two questions to the store, also
	// for keys that are not known, and after a failure.
	keysMinInterval = time.Second
	// keysTimeout bounds one question to the store.
	keysTimeout = 2 * time.Second
)

// minRSABits is the least RSA modulus (NIST SP 800-131A: 112 bits of security).
const minRSABits = 2048

// keyName is how a token names its key. The same kid of another tenant is another key.
type keyName struct{ tenant, kid string }

// verifyingKey verifies the tokens of one tenant, with one algorithm.
type verifyingKey struct {
	der       []byte
	algorithm string // the only alg that its tokens may name (RFC 8725 §3.1)
	public    any    // ed25519.PublicKey, *ecdsa.PublicKey or *rsa.PublicKey; nil: the key is unusable
	policy    vault.Policy
	direct    bool // the tenant's back end is trusted with passwords
}

// keyring caches the tenants' keys. A published map never changes.
type keyring struct {
	source Tenants
	now    func() time.Time
	log    *slog.Logger
	flight singleflight.Group

	// mu guarantees that keys and fetched belong together.
	mu      sync.Mutex
	keys    map[keyName]*verifyingKey
	fetched time.Time // when keys were asked for; zero: never
	asked   time.Time // when the store was last asked, whatever it answered
}

var errKeysTooOld = fmt.Errorf("%w: the tenants' keys cannot be read", vault.ErrStoreUnavailable)

// find returns a tenant's key, or nil if there is none. It fails only with
// ErrStoreUnavailable.
func (k *keyring) find(ctx context.Context, name keyName) (*verifyingKey, error) {
	keys, age := k.state()
	switch key := keys[name]; {
	case key != nil && age < keysFreshAge:
		return key, nil
	case key != nil && age < keysWaitAge:
		k.refresh() // for those who come later
		return key, nil
	}
	select {
	case <-k.refresh(): // its error is logged where it arose
	case <-ctx.Done():
	}
	keys, age = k.state()
	if age >= keysMaxAge {
		return nil, errors.Join(errKeysTooOld, ctx.Err())
	}
	return keys[name], nil
}

func (k *keyring) state() (keys map[keyName]*verifyingKey, age time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.keys, k.now().Sub(k.fetched)
}

// refresh asks the store, once for all who wait, and not more often than every
// keysMinInterval. It outlives the request that began it, by keysTimeout at most.
func (k *keyring) refresh() <-chan singleflight.Result {
	return k.flight.DoChan("", func() (any, error) {
		k.mu.Lock()
		now, before, soon := k.now(), k.keys, k.now().Sub(k.asked) < keysMinInterval
		if !soon {
			k.asked = now
		}
		k.mu.Unlock()
		if soon {
			return nil, nil
		}
		ctx, cancel := context.WithTimeout(context.Background(), keysTimeout)
		defer cancel()
		tenants, err := k.source.Tenants(ctx)
		if err != nil {
			k.log.Warn("reading the tenants' keys failed", "error", err)
			return nil, err
		}
		after := k.parse(tenants, before)
		k.mu.Lock()
		k.keys, k.fetched = after, now
		k.mu.Unlock()
		return nil, nil
	})
}

// parse reads the keys, each only when it is new.
func (k *keyring) parse(tenants []vault.Tenant, before map[keyName]*verifyingKey) map[keyName]*verifyingKey {
	after := map[keyName]*verifyingKey{}
	for _, t := range tenants {
		for _, stored := range t.Keys {
			name := keyName{t.ID, stored.ID}
			key := &verifyingKey{der: stored.PublicKey, policy: t.Policy, direct: t.DirectEnrolment}
			if old := before[name]; old != nil && bytes.Equal(old.der, stored.PublicKey) {
				key.algorithm, key.public = old.algorithm, old.public
			} else if err := key.parse(); err != nil {
				k.log.Warn("a tenant's key is not usable", "tenant", t.ID, "kid", stored.ID, "error", err)
			}
			after[name] = key
		}
	}
	return after
}

// parse binds the key to the one algorithm of its type.
func (k *verifyingKey) parse() error {
	public, err := x509.ParsePKIXPublicKey(k.der)
	if err != nil {
		return err
	}
	switch public := public.(type) {
	case ed25519.PublicKey:
		k.algorithm = jwt.SigningMethodEdDSA.Alg()
	case *ecdsa.PublicKey:
		if public.Curve != elliptic.P256() {
			return fmt.Errorf("ECDSA over %s, want P-256", public.Curve.Params().Name)
		}
		k.algorithm = jwt.SigningMethodES256.Alg()
	case *rsa.PublicKey:
		if bits := public.N.BitLen(); bits < minRSABits {
			return fmt.Errorf("RSA with %d bits, want at least %d", bits, minRSABits)
		}
		k.algorithm = jwt.SigningMethodRS256.Alg()
	default:
		return fmt.Errorf("a key of type %T, want Ed25519, ECDSA P-256 or RSA", public)
	}
	k.public = public
	return nil
}
