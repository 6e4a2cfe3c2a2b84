package pkcs11util

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// This file changes the set of keys while a Keyset is in use: keys are made and
// destroyed in the process that uses them, and not beside it. In SoftHSM 2.6.1 the start of
// another process failed while one wrote to the token, and only within a process
// does one mutex (module.Objects) keep searches and creations apart.
//
// A connection is never changed: a changed set of keys is a copy of the connection
// that shares its sessions. Calls that run go on with the set that they began with.

// MaxSeals is how many values one key seals. AES-GCM with random IVs of 96 bits may be invoked 2^32 times
// under one key (NIST SP 800-38D section 8.3).
const MaxSeals = 1 << 32

// lookPause is the least time between two looks into the token for a key that a caller names.
const lookPause = time.Second

// What the changing of keys answers, besides the token's faults.
var (
	// ErrWornOut: the key has sealed as many values as it may. Another generation must be made.
	ErrWornOut = errors.New("the key has sealed as many values as AES-GCM allows with random IVs")
	// ErrInUse: the key is the one that new work uses, and is not destroyed.
	ErrInUse = errors.New("the key is in use")
)

// rotation is a Keyset's knowledge of which keys to use. It is guarded by Keyset.mu, but for changes and the counts.
type rotation struct {
	// changes is held while keys are made, destroyed or looked for, and while the module is recycled: one at a time.
	changes sync.Mutex

	serial    string
	current   map[string]uint32 // as SetCurrent said
	forgotten map[KeyName]bool
	looks     map[string]look // the last look for a caller's unknown key, by purpose
	seals     map[KeyName]*sealCount
}

// look is a look into the token for a key that a caller named.
type look struct {
	began time.Time
	ended chan struct{} // closed then
}

// sealCount counts what a key sealed.
type sealCount struct {
	here      atomic.Uint64 // by this Keyset
	elsewhere atomic.Uint64 // by others and before, as SetCurrent said
}

func newRotation() rotation {
	return rotation{current: map[string]uint32{}, forgotten: map[KeyName]bool{}, looks: map[string]look{}, seals: map[KeyName]*sealCount{}}
}

// Serial is the token's serial number.
func (k *Keyset) Serial() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.serial
}

// Generations returns the generations of purpose that the token holds, from memory, the lowest first.
func (k *Keyset) Generations(purpose string) (generations []uint32) {
	for _, name := range k.Keys() {
		if name.Purpose == purpose {
			generations = append(generations, name.Generation)
		}
	}
	return generations
}

// SetCurrent says which generation of purpose new work uses from now on, and how many
// values other processes, and this one before it was started, have sealed under it. ErrNoKey: the token does not hold it.
func (k *Keyset) SetCurrent(purpose string, generation uint32, sealsElsewhere uint64) error {
	name := KeyName{purpose, generation}
	k.count(name).elsewhere.Store(sealsElsewhere)
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.known[name]; !ok {
		return fmt.Errorf("%s: %w", name, ErrNoKey)
	}
	k.current[purpose] = generation
	if k.newest[purpose] == generation {
		return nil
	}
	k.newest = maps.Clone(k.newest)
	k.newest[purpose] = generation
	if k.connection != nil {
		next := *k.connection
		next.newest = k.newest
		k.connection = &next
	}
	return nil
}

// inUse is the generation of each purpose that new work uses if keys are there: the chosen one. If that is
// gone and a higher one is there, others have rotated, and it is the highest. The forgotten ones it takes away.
// The caller holds mu.
func (k *Keyset) inUse(keys map[KeyName]*key) map[string]uint32 {
	newest := map[string]uint32{}
	for name := range keys {
		if k.forgotten[name] {
			delete(keys, name)
			continue
		}
		newest[name.Purpose] = max(newest[name.Purpose], name.Generation)
	}
	for purpose, current := range k.current {
		if keys[KeyName{purpose, current}] != nil || newest[purpose] < current {
			newest[purpose] = current
		}
	}
	return newest
}

// choose applies to a connection what SetCurrent and Forget have said, also while it was made. The
// caller holds mu, and nobody else has the connection or its maps yet.
func (k *Keyset) choose(c *connection) {
	c.newest = k.inUse(c.keys)
	maps.DeleteFunc(c.known, func(name KeyName, _ knownAnswer) bool { return c.keys[name] == nil })
	k.known, k.newest = c.known, c.newest
}

// count returns the counter of a key.
func (k *Keyset) count(name KeyName) *sealCount {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := k.seals[name]
	if n == nil {
		n = &sealCount{}
		k.seals[name] = n
	}
	return n
}

// countSeal counts a seal before it is made, and refuses it if it is one too many.
func (k *Keyset) countSeal(name KeyName) error {
	n := k.count(name)
	if n.elsewhere.Load()+n.here.Add(1) > MaxSeals {
		return fmt.Errorf("%s: %w", name, ErrWornOut)
	}
	return nil
}

// Seals is how many values this Keyset has sealed under a key since it was opened.
func (k *Keyset) Seals(purpose string, generation uint32) uint64 {
	return k.count(KeyName{purpose, generation}).here.Load()
}

// Forget has the Keyset act as if the token did not hold a key, whatever it holds: a
// destroyed key that came back with an old copy of the token is not to be used.
func (k *Keyset) Forget(purpose string, generation uint32) {
	name := KeyName{purpose, generation}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.forgotten[name] {
		return
	}
	k.forgotten[name] = true
	k.known = maps.Clone(k.known)
	delete(k.known, name)
	if k.connection != nil {
		next := *k.connection
		next.known = k.known
		next.keys = maps.Clone(next.keys)
		delete(next.keys, name)
		k.connection = &next
	}
}

// seek looks into the token for a key that a caller names and this Keyset does not
// know, if it is the next generation of its purpose: another process may have made
// it. What callers name may be forged, so that it looks once in lookPause for each purpose; in between, as it
// cannot know, the answer is ErrUnavailable, after the look that runs, if one does, has ended. It returns nil also if the key is not there.
func (k *Keyset) seek(ctx context.Context, name KeyName) error {
	k.mu.Lock()
	if _, known := k.known[name]; known {
		k.mu.Unlock()
		return nil
	}
	highest := uint32(0)
	for n := range k.known {
		if n.Purpose == name.Purpose {
			highest = max(highest, n.Generation)
		}
	}
	if k.forgotten[name] || name.Generation != highest+1 || highest == 0 || k.connection == nil {
		k.mu.Unlock()
		return nil
	}
	last := k.looks[name.Purpose]
	if time.Since(last.began) >= lookPause {
		now := look{time.Now(), make(chan struct{})}
		defer close(now.ended)
		k.looks[name.Purpose] = now
		k.mu.Unlock()
		return k.Look(ctx)
	}
	k.mu.Unlock()
	select {
	case <-last.ended:
	case <-ctx.Done():
		return fmt.Errorf("waiting for a look into the token: %w", ctx.Err())
	}
	if _, err := k.Proof(name.Purpose, name.Generation); err != nil {
		return fmt.Errorf("%w: %s is not known here yet", ErrUnavailable, name)
	}
	return nil
}

// Look finds the token's keys anew, and proves those that were not known. It is how
// a Keyset learns of keys that another process made or destroyed. If a key that is in use
// is gone and there is no higher generation, that is ErrNoKey and nothing changes.
func (k *Keyset) Look(ctx context.Context) error {
	k.changes.Lock()
	defer k.changes.Unlock()
	return k.observed(ctx, OpLook, func(s session, c *connection) error {
		keys, err := s.findKeys(k.module)
		if err != nil {
			return err
		}
		known := map[KeyName]knownAnswer{}
		k.mu.Lock()
		newest := k.inUse(keys)
		k.mu.Unlock()
		for name, key := range keys {
			if old, ok := c.known[name]; ok {
				known[name] = old
				continue
			}
			if known[name], err = s.prove(key); err != nil {
				return fmt.Errorf("proving %s: %w", name, err)
			}
		}
		for purpose, generation := range newest {
			if name := (KeyName{purpose, generation}); keys[name] == nil {
				return fmt.Errorf("%s, which is in use: %w", name, ErrNoKey)
			}
		}
		k.replace(c, keys, known)
		return nil
	})
}

// replace gives the connection another set of keys. If it is lost already, the next one finds the keys for itself.
func (k *Keyset) replace(c *connection, keys map[KeyName]*key, known map[KeyName]knownAnswer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.isCurrent(c) {
		return
	}
	next := *k.connection
	next.keys, next.known = keys, known
	k.choose(&next)
	k.connection = &next
}

// MakeKey makes a key of a purpose and generation in the token: generated under a temporary
// label, proven, and only then named, so that a crash at any point leaves no key or a whole one. Objects that an
// earlier crash left under temporary labels of this purpose are destroyed first. If the key is there already, it is
// found and proven, and that is all. New work does not use it until SetCurrent says so
// (of a purpose that SetCurrent was never called for, the highest generation is used).
//
// Only one process may make keys of a purpose at one time.
func (k *Keyset) MakeKey(ctx context.Context, purpose string, generation uint32) error {
	name := KeyName{purpose, generation}
	if _, ok := kinds[purpose]; !ok || generation == 0 {
		return fmt.Errorf("%s is no name for a key", name)
	}
	if err := k.Look(ctx); err != nil {
		return err
	}
	k.changes.Lock()
	defer k.changes.Unlock()
	return k.change(ctx, OpMakeKey, func(s session, c *connection) error {
		if c.keys[name] != nil {
			return nil
		}
		if err := s.destroyLabelled(func(label string) bool { return strings.HasPrefix(label, temporaryPrefix+purpose+"/") }); err != nil {
			return fmt.Errorf("cleaning up after an earlier run: %w", err)
		}
		label := TemporaryLabel(name)
		if err := s.generate(purpose, label); err != nil {
			return fmt.Errorf("generating %s: %w", name, err)
		}
		key, answer, err := s.adopt(label, name)
		if err != nil {
			return err
		}
		keys, known := maps.Clone(c.keys), maps.Clone(c.known)
		keys[name], known[name] = key, answer
		k.replace(c, keys, known)
		return nil
	})
}

// DestroyKey destroys a key in the token, and its public half, and sees that they are gone. What is not there
// is destroyed already. The key that is in use is ErrInUse. It may be repeated after a crash.
func (k *Keyset) DestroyKey(ctx context.Context, purpose string, generation uint32) error {
	name := KeyName{purpose, generation}
	k.changes.Lock()
	defer k.changes.Unlock()
	err := k.change(ctx, OpDestroyKey, func(s session, c *connection) error {
		if c.newest[purpose] == generation {
			return fmt.Errorf("%s: %w", name, ErrInUse)
		}
		is := func(label string) bool { return label == name.String() }
		if err := s.destroyLabelled(is); err != nil {
			return err
		}
		for _, class := range keyClasses {
			left, err := s.objects(class)
			if err != nil {
				return err
			}
			for _, o := range left {
				if is(o.label) {
					return fmt.Errorf("%w: %s is still there after C_DestroyObject", errFaulty, name)
				}
			}
		}
		return nil
	})
	if err == nil {
		k.Forget(purpose, generation)
	}
	return err
}

// keyClasses are the classes of objects that keys are made of, in the order in which they are
// destroyed: a key is gone when the first of its objects is.
var keyClasses = []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY}

// change runs f with a session of its own that may write, and nobody else at the token's objects.
func (k *Keyset) change(ctx context.Context, op Operation, f func(s session, c *connection) error) error {
	return k.observed(ctx, op, func(_ session, c *connection) error {
		s, err := openSession(k.module, c.slot, pkcs11.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		defer s.close()
		k.module.Objects.Lock()
		defer k.module.Objects.Unlock()
		return f(s.under(k.config.Profile), c)
	})
}

// destroyLabelled destroys the keys whose label is asked for. The caller holds module.Objects.
func (s session) destroyLabelled(asked func(label string) bool) error {
	for _, class := range keyClasses {
		found, err := s.objects(class)
		if err != nil {
			return err
		}
		for _, o := range found {
			if !asked(o.label) {
				continue
			}
			if err := s.p.DestroyObject(s.handle, o.handle); err != nil {
				return Explain(fmt.Errorf("C_DestroyObject of %s: %w", o.label, err))
			}
		}
	}
	return nil
}

// generate makes a key or pair of purpose under a label.
func (s session) generate(purpose, label string) error {
	secret, private, public, err := s.profile.Templates(purpose)
	if err != nil {
		return err
	}
	id := make([]byte, 16) // both halves of a pair share it
	_, _ = rand.Read(id)   // crypto/rand never fails: it ends the process first
	names := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, id)}
	if secret == nil {
		_, _, err := s.p.GenerateKeyPair(s.handle, mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil), append(public, names...), append(private, names...))
		if err != nil {
			return Explain(fmt.Errorf("C_GenerateKeyPair: %w", err))
		}
		return nil
	}
	if _, err := s.p.GenerateKey(s.handle, mechanism(s.profile.SecretKeyGen(purpose), nil), append(secret, names...)); err != nil {
		return Explain(fmt.Errorf("C_GenerateKey: %w", err))
	}
	return nil
}

// Proof returns what tells a key from every other of its purpose and gives nothing away: the
// public half, a MAC over a fixed text, or a fixed text sealed. ErrNoKey: the token does not hold the key.
func (k *Keyset) Proof(purpose string, generation uint32) ([]byte, error) {
	name := KeyName{purpose, generation}
	k.mu.Lock()
	defer k.mu.Unlock()
	known, ok := k.known[name]
	switch {
	case !ok:
		return nil, fmt.Errorf("%s: %w", name, ErrNoKey)
	case seals(purpose):
		return known.sealed, nil
	case purpose == MAC:
		return known.mac[:], nil
	default:
		return known.public[:], nil
	}
}

// Confirm tells whether the token's key is the one that proof, which Proof made here or at another token, is of.
func (k *Keyset) Confirm(ctx context.Context, purpose string, generation uint32, proof []byte) (same bool, err error) {
	mine, err := k.Proof(purpose, generation)
	if err != nil {
		return false, err
	}
	if !seals(purpose) {
		return subtle.ConstantTimeCompare(mine, proof) == 1, nil
	}
	plaintext, authentic, err := k.Open(ctx, purpose, probeID, proof, probeAssociated)
	return authentic && string(plaintext) == string(probeText), err
}
