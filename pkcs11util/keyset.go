package pkcs11util

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"filippo.io/nistec"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// Config says which token to use, and how.
type Config struct {
	// Module is the path of the PKCS#11 module, a shared library. It runs inside this process and
	// is trusted with all of it.
	Module string
	// Label is the token's label, at most 32 bytes. Exactly one token must have it.
	Label string
	// PIN is the user's PIN. It is kept in memory, to log in again after a fault.
	PIN PIN
	// Sessions bounds the calls that are inside the token at one time. Default 4. SoftHSM is no
	// faster with more; hardware may be.
	Sessions int
	// RecycleAfter is the number of session objects, made by whoever uses the module in this
	// process, after which it is finalised and initialised anew, for the memory that it does not
	// give back before. Calls wait meanwhile, and none fails. Multiplying a point takes two objects.
	// Default: 200,000 if the token is SoftHSM's, and never if it is not. -1: never.
	RecycleAfter int
	// Profile is how the token differs from others. Default: DefaultProfile.
	Profile Profile
	// Logger hears of faults and recoveries. Default: nobody.
	Logger *slog.Logger
	// Observe hears of every call to the token, when it has ended, from many goroutines at once; it
	// must return at once. Default: nobody.
	Observe func(Call)
}

// closeTimeout is how long Close waits for running calls.
const closeTimeout = 10 * time.Second

const (
	defaultSessions     = 4
	recycleSoftHSMAfter = 200_000
	maxLabelBytes       = 32 // CK_TOKEN_INFO, PKCS #11 v2.40 section 3.2
	maxRandomBytes      = 1 << 16
)

func (cfg Config) check() error {
	var errs []error
	if cfg.Module == "" {
		errs = append(errs, errors.New("the path of the PKCS#11 module is missing"))
	}
	if cfg.Label == "" || len(cfg.Label) > maxLabelBytes {
		errs = append(errs, fmt.Errorf("the token's label must be 1 to %d bytes", maxLabelBytes))
	}
	if cfg.PIN == "" {
		errs = append(errs, errors.New("the PIN is missing"))
	}
	if cfg.Sessions < 0 {
		errs = append(errs, errors.New("the number of sessions is negative"))
	}
	if cfg.RecycleAfter < -1 {
		errs = append(errs, errors.New("the number of session objects after which to recycle is below -1"))
	}
	if err := cfg.Profile.orDefault().check(); err != nil {
		errs = append(errs, fmt.Errorf("token profile: %w", err))
	}
	return errors.Join(errs...)
}

// Keyset is the long-lived keys in a token, ready for use. It is safe for concurrent
// use, and recovers by itself from faults of the token (see the package's
// documentation). Repeating a call is always safe.
type Keyset struct {
	config Config
	module *module.Module
	log    *slog.Logger

	calls sync.WaitGroup // calls and the recovery that run; added to with mu held and closed false
	stop  context.CancelFunc

	recycleAt atomic.Int64 // so many session objects; 0: never
	counts    counts
	history   history // the recovery's

	mu         sync.Mutex // guards all below
	connection *connection
	renewed    chan struct{} // if not nil, there is no connection but one is being made; closed at the end of that
	down       error         // why there is no connection, and none is being made
	closed     bool
	model      string
	// What was learned at the first login and since: answers for every key ever
	// seen, and each purpose's newest generation. A connection that contradicts them is refused.
	known  map[KeyName]knownAnswer
	newest map[string]uint32
	rotation
}

// Open loads the module, logs in to the token, and finds and proves its keys; every
// purpose must have one. Wrong paths, labels, PINs and keys are told apart by the
// error's text; a refused PIN is ErrPINRefused.
func Open(ctx context.Context, cfg Config) (*Keyset, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Sessions == 0 {
		cfg.Sessions = defaultSessions
	}
	cfg.Profile = cfg.Profile.orDefault()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m, err := module.Load(cfg.Module)
	if err != nil {
		return nil, err
	}
	k := &Keyset{
		config: cfg, module: m, log: cfg.Logger.With("token", cfg.Label),
		known: map[KeyName]knownAnswer{}, newest: map[string]uint32{}, rotation: newRotation(),
	}
	c, err := k.connect(ctx)
	if err != nil {
		m.Unload()
		return nil, err
	}
	k.connection = c
	k.scheduleRecycling()
	return k, nil
}

// Close waits for running calls, and gives up with an error if one hangs. It gives the sessions
// back, which logs the process out unless it has other sessions with this token, and finalises the
// module if nobody else in the process uses it.
func (k *Keyset) Close() error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return nil
	}
	k.closed, k.down = true, ErrClosed
	c := k.connection
	k.connection = nil
	if k.stop != nil {
		k.stop()
	}
	if c != nil {
		close(c.gone)
	}
	k.mu.Unlock()

	ended := make(chan struct{})
	go func() {
		k.calls.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(closeTimeout):
		return errors.New("closing the token's keys: a call hangs in the PKCS#11 module, which is left as it is")
	}
	if c != nil {
		k.discard(c)
	}
	k.module.Unload()
	return nil
}

// call runs f with a session of the present connection, once. ctx bounds the wait for the
// session; f is not interrupted.
func (k *Keyset) call(ctx context.Context, f func(s session, c *connection) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("calling the token: %w", err)
	}
	for {
		c, err := k.enter(ctx)
		if err != nil {
			return err
		}
		ran, err := k.callOn(ctx, c, f)
		k.calls.Done()
		if ran || err != nil {
			return err
		}
	}
}

// enter returns the connection, counted in k.calls. While a new one is being made it waits.
func (k *Keyset) enter(ctx context.Context) (*connection, error) {
	for {
		k.mu.Lock()
		c, renewed, down := k.connection, k.renewed, k.down
		if c != nil {
			k.calls.Add(1)
		}
		k.mu.Unlock()
		switch {
		case c != nil:
			return c, nil
		case renewed == nil:
			return nil, down
		}
		select {
		case <-renewed:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the PKCS#11 module to be initialised anew: %w", ctx.Err())
		}
	}
}

// callOn runs f, unless the connection ends before it can: then ran is false, and err nil.
func (k *Keyset) callOn(ctx context.Context, c *connection, f func(s session, c *connection) error) (ran bool, err error) {
	var s session
	select {
	case <-ctx.Done():
		return false, fmt.Errorf("waiting for a session with the token: %w", ctx.Err())
	case <-c.gone:
		return false, nil
	case s = <-c.idle:
	}
	release, err := k.module.Enter(ctx, c.incarnation)
	if errors.Is(err, module.ErrReinitialised) {
		k.renew(c)
		return false, nil
	}
	if err != nil {
		c.idle <- s
		return false, err
	}
	defer release()
	if c.ended() {
		c.put(s) // which closes it
		return false, nil
	}

	err = f(s, c)
	if fault(err) {
		return true, k.mend(c, s, err)
	}
	c.put(s)
	if at := k.recycleAt.Load(); at > 0 && k.module.SessionObjects.Load() >= at {
		k.recycleSoon(c)
	}
	return true, err
}

// key returns the connection's key.
func (c *connection) key(purpose string, generation uint32) (*key, error) {
	name := KeyName{purpose, generation}
	k := c.keys[name]
	if k == nil {
		return nil, fmt.Errorf("%s: %w", name, ErrNoKey)
	}
	return k, nil
}

// Seal encrypts 1 to 8,192 bytes under the generation of purpose (Master or State) that is
// in use. The result is bound to purpose, id and associated data, and opens with the same
// of them only. A key that has sealed MaxSeals values is ErrWornOut.
func (k *Keyset) Seal(ctx context.Context, purpose string, id [16]byte, plaintext, associated []byte) (sealed []byte, err error) {
	err = k.observed(ctx, OpSeal, func(s session, c *connection) error {
		if !seals(purpose) {
			return fmt.Errorf("sealing for %s: %w", purpose, ErrNoKey)
		}
		key, err := c.key(purpose, c.newest[purpose])
		if err != nil {
			return err
		}
		if err := k.countSeal(key.name); err != nil {
			return err
		}
		sealed, err = s.seal(key, id, plaintext, associated)
		return err
	})
	return sealed, err
}

func seals(purpose string) bool { return purpose == Master || purpose == State }

// Open decrypts. authentic is false, and err nil, for everything that Seal did not
// make in this token with this purpose, id and associated data: another length or
// header, a generation that is not there, a changed bit. An error means that the token could
// not answer.
func (k *Keyset) Open(ctx context.Context, purpose string, id [16]byte, sealed, associated []byte) (plaintext []byte, authentic bool, err error) {
	h, iv, ciphertext, ok := parseSealed(sealed)
	if !ok || h.id != id || !seals(purpose) {
		return nil, false, nil
	}
	name := KeyName{purpose, h.generation}
	if err := k.seek(ctx, name); err != nil {
		return nil, false, err
	}
	err = k.observed(ctx, OpOpen, func(s session, c *connection) error {
		key := c.keys[name]
		if key == nil {
			return nil
		}
		// A token's error code does not tell a forgery from a fault (SoftHSM 2.6.1
		// answers CKR_GENERAL_ERROR to both), and a forgery must not pass for a fault:
		// whoever sends forgeries could then force recoveries. Nor a fault for a forgery.
		// So a value is forged if it is refused before and after a known value opens.
		for try := 0; ; try++ {
			opened, refused, err := s.decrypt(key, iv, ciphertext, h.associated(purpose, associated))
			if err != nil {
				return err
			}
			if refused == nil {
				plaintext, authentic = opened, true
				return nil
			}
			if try > 0 {
				return nil
			}
			if err := s.confirm(key, c.known[name]); err != nil {
				return err
			}
		}
	})
	return plaintext, authentic, err
}

// Multiply returns k·P, compressed, for the key k of purpose (OPRF or Server). Points that cannot
// be multiplied this way are ErrInvalidPoint, before the token sees them: what is not the
// compressed encoding of a point, and −G. The result was checked against the key's public half.
func (k *Keyset) Multiply(ctx context.Context, purpose string, generation uint32, point [33]byte) (product [33]byte, err error) {
	if purpose != OPRF && purpose != Server {
		return product, fmt.Errorf("multiplying by %s: %w", purpose, ErrNoKey)
	}
	p, pPlusG, err := shifted(point)
	if err != nil {
		return product, err
	}
	if err := k.seek(ctx, KeyName{purpose, generation}); err != nil {
		return product, err
	}
	err = k.observed(ctx, OpMultiply, func(s session, c *connection) error {
		key, err := c.key(purpose, generation)
		if err != nil {
			return err
		}
		if s.profile.ECDH == ECDHInMemory {
			whole, err := s.product(key, p)
			if err == nil {
				product = [pointBytes]byte(whole.BytesCompressed())
			}
			return err
		}
		x1, err := s.x(key, p)
		if err != nil {
			return err
		}
		x2, err := s.x(key, pPlusG)
		if err != nil {
			return err
		}
		product, err = fullPoint(x1, x2, key.public.point)
		if err != nil {
			return fmt.Errorf("multiplying by %s: %w", key.name, err)
		}
		return nil
	})
	return product, err
}

// DeriveX returns x(k·P), the shared secret of ECDH (SEC 1 version 2.0, section 3.3.1), for the key k of purpose
// (Relay) and an uncompressed point P. What is no point is ErrInvalidPoint, before the token sees it. It is one derive, where
// Multiply is two: the result was not checked against the key's public half, so what is made with it must
// be authenticated.
func (k *Keyset) DeriveX(ctx context.Context, purpose string, generation uint32, point [65]byte) (x [32]byte, err error) {
	if purpose != Relay {
		return x, fmt.Errorf("deriving by %s: %w", purpose, ErrNoKey)
	}
	if _, err := nistec.NewP256Point().SetBytes(point[:]); err != nil {
		return x, ErrInvalidPoint
	}
	if err := k.seek(ctx, KeyName{purpose, generation}); err != nil {
		return x, err
	}
	err = k.call(ctx, func(s session, c *connection) error {
		key, err := c.key(purpose, generation)
		if err != nil {
			return err
		}
		x, err = s.x(key, point[:])
		return err
	})
	return x, err
}

// PublicKey returns the compressed public half of an EC key, from memory. It answers while the
// token is away, too.
func (k *Keyset) PublicKey(purpose string, generation uint32) ([33]byte, error) {
	name := KeyName{purpose, generation}
	k.mu.Lock()
	defer k.mu.Unlock()
	known := k.known[name]
	if known.public[0] == 0 {
		return [33]byte{}, fmt.Errorf("public half of %s: %w", name, ErrNoKey)
	}
	return known.public, nil
}

// MAC is HMAC-SHA-256 under a generation of MAC.
func (k *Keyset) MAC(ctx context.Context, generation uint32, message []byte) (mac [32]byte, err error) {
	if err := k.seek(ctx, KeyName{MAC, generation}); err != nil {
		return mac, err
	}
	err = k.observed(ctx, OpMAC, func(s session, c *connection) error {
		key, err := c.key(MAC, generation)
		if err != nil {
			return err
		}
		mac, err = s.mac(key, message)
		return err
	})
	return mac, err
}

// Sign is ECDSA over a SHA-256 digest by a key of purpose (Identity or Audit): r and
// s, 32 bytes each. The signature was verified.
func (k *Keyset) Sign(ctx context.Context, purpose string, generation uint32, digest [32]byte) (signature [64]byte, err error) {
	if purpose != Identity && purpose != Audit {
		return signature, fmt.Errorf("signing by %s: %w", purpose, ErrNoKey)
	}
	err = k.observed(ctx, OpSign, func(s session, c *connection) error {
		key, err := c.key(purpose, generation)
		if err != nil {
			return err
		}
		signature, err = s.signVerified(key, digest)
		return err
	})
	return signature, err
}

// Strategy says how the token multiplies, ECDHDerive, ECDHDeriveWrap or ECDHInMemory, for records to keep.
func (k *Keyset) Strategy() string { return k.config.Profile.ECDH }

// Weakness is the profile's: what is lost under it that others keep, or nothing.
func (k *Keyset) Weakness() string { return k.config.Profile.Weakness() }

// Newest is the generation of a purpose that new work uses, from memory: what SetCurrent said
// last, before that the highest that was found. It is 0 for what is no purpose.
func (k *Keyset) Newest(purpose string) uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.newest[purpose]
}

// Random returns 1 to 65,536 bytes from the token's generator.
func (k *Keyset) Random(ctx context.Context, n int) (b []byte, err error) {
	if n < 1 || n > maxRandomBytes {
		return nil, fmt.Errorf("asked the token for %d random bytes: must be 1 to %d", n, maxRandomBytes)
	}
	err = k.observed(ctx, OpRandom, func(s session, _ *connection) error {
		b, err = s.random(n)
		return err
	})
	return b, err
}

// Check asks the token whether the login still stands and has each purpose's newest key answer
// a question whose answer is known. An error means that the token is not fit for use at present; a fault
// that was not known before starts the recovery.
func (k *Keyset) Check(ctx context.Context) error {
	return k.observed(ctx, OpCheck, func(s session, c *connection) error { return c.probe(s) })
}

// Model says what the token is, by its own account, for the operator.
func (k *Keyset) Model() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.model
}

// Keys returns the names of all keys that were found, sorted.
func (k *Keyset) Keys() []KeyName {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names []KeyName
	for name := range k.known {
		names = append(names, name)
	}
	sortNames(names)
	return names
}
