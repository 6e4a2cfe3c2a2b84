package vault

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// This file rotates keys. What every key is for decides what becomes of its older generations:
//
//	master    records are sealed anew (Rewrap); then it can be destroyed, and with it every copy of a
//	          record, in whatever dump, that it sealed
//	mac       rows get a new MAC (Rewrap); the first generation also makes pseudonyms, and stays
//	state     seals what lives an hour; the older one is destroyed after that, by itself
//	oprf,     part of what a record was made with, and cannot be exchanged: it serves until its last
//	server    record is gone
//	relay     serves until the key lists that name it have expired; the older one is destroyed after that, by itself
//	audit     signs what is to come; what it signed is verified without it
//	identity  is what clients pin: it does not rotate
//
// The table of keys (KeyStore) says which generation is in use. It is not trusted to
// name keys: what a token holds is compared with the proof in the table. Whoever can write to
// the table can have an older key used that still exists, or a rotation left out; keys are only destroyed at an
// operator's command, but for state and relay, and never those in use.

const (
	// claimLifetime is how long an instance that makes a key is taken to live.
	claimLifetime = 15 * time.Second
	// rewrapLease is the same for one that rewraps; it is renewed before a third of it has passed.
	rewrapLease = 30 * time.Second
	// sealsWarning and sealsLimit: AES-GCM with random IVs allows 2^32 seals under a key (NIST SP 800-38D section 8.3).
	sealsWarning = 1 << 31
	sealsLimit   = 1 << 32
	// stateMargin is beyond what states live: for instances that were late to notice a rotation.
	stateMargin = 15 * time.Minute
	// refusalsReportedEvery keeps the log readable while a rotation that is due waits for people.
	refusalsReportedEvery = time.Hour
)

// keptRetired is the least time between a key's retirement and its destruction.
func keptRetired(purpose string) time.Duration {
	switch purpose {
	case purposeState:
		return EnrolmentStateLifetime + stateMargin // the longest that a state lives
	case purposeOPRF, purposeServer:
		return EnrolmentStateLifetime + stateMargin // enrolments that were started with it
	case purposeRelay:
		return keyListLifetime + stateMargin
	}
	return 0
}

// neverDestroyed says why a key is kept for ever, or nothing.
func neverDestroyed(key Key) string {
	switch {
	case key.Purpose == purposeIdentity:
		return "clients pin it"
	case key == Key{purposeMAC, pseudonymKey}:
		return "it makes the pseudonyms by which events name accounts"
	}
	return ""
}

// RotationConfig is what a Rotation is made of. Log may be nil.
type RotationConfig struct {
	Store KeyStore
	Token KeyToken
	Vault *Vault
	Log   *slog.Logger
	// StateEvery is how long a state key is used; 0: 30 days.
	StateEvery time.Duration
	// RelayEvery is how long a relay key is used; 0: 30 days.
	RelayEvery time.Duration
	// RewrapsPerSecond bounds how many accounts this instance rewraps; 0: 200.
	RewrapsPerSecond int
	// SyncEvery is how often the table is read; 0: 5 seconds.
	SyncEvery time.Duration
	// Warnings are what the token's keys do not protect against, for the status to repeat.
	Warnings []string
}

// Rotation keeps one instance's token in step with the table of keys, and makes, exchanges and
// destroys keys. Any number of instances can do so at once. Its methods are safe for concurrent use.
type Rotation struct {
	store    KeyStore
	token    KeyToken
	vault    *Vault
	log      *slog.Logger
	config   RotationConfig
	instance string // this one, in leases

	moved, unmoved atomic.Uint64 // accounts, by Rewrap here

	refused  map[string]time.Time // when a due rotation of a purpose was last reported as refused; Run's
	operator sync.Mutex           // held by Rotate and Destroy: one at a time
	wake     chan struct{}        // a rewrap may be due

	mu       sync.Mutex // held while in step is being kept; guards all below
	reported map[Key]uint64
	looked   string // for which missing or surplus keys the token was last looked into
	told     map[Key]bool
}

// NewRotation checks the configuration. It calls neither store nor token.
func NewRotation(c RotationConfig) (*Rotation, error) {
	if c.Store == nil || c.Token == nil || c.Vault == nil {
		return nil, errors.New("a rotation needs a store, a token and a vault")
	}
	if c.StateEvery == 0 {
		c.StateEvery = 30 * 24 * time.Hour
	}
	if c.RelayEvery == 0 {
		c.RelayEvery = 30 * 24 * time.Hour
	}
	if c.RewrapsPerSecond == 0 {
		c.RewrapsPerSecond = 200
	}
	if c.SyncEvery == 0 {
		c.SyncEvery = 5 * time.Second
	}
	if c.StateEvery < 0 || c.RelayEvery < 0 || c.RewrapsPerSecond < 0 || c.SyncEvery < 0 {
		return nil, errors.New("a rotation's times and rates must be positive")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails: it ends the process first
	return &Rotation{
		store: c.Store, token: c.Token, vault: c.Vault, log: c.Log, config: c, instance: hex.EncodeToString(id[:]),
		wake: make(chan struct{}, 1), reported: map[Key]uint64{}, told: map[Key]bool{}, refused: map[string]time.Time{},
	}, nil
}

// Start brings the token into step with the table for the first time: it registers the token's keys, and of a purpose
// that has none in use yet it takes the lowest. An error says what does not fit; the service must not start then.
func (r *Rotation) Start(ctx context.Context) error {
	_, err := r.sync(ctx)
	return err
}

// Run keeps in step, rotates state and relay on their schedules and rewraps, until ctx is over. It then reports the last seals.
func (r *Rotation) Run(ctx context.Context) {
	var rewrapper sync.WaitGroup
	rewrapper.Go(func() { r.rewrapWhenDue(ctx) })
	ticker := time.NewTicker(r.config.SyncEvery)
	defer ticker.Stop()
	for ctx.Err() == nil {
		if err := r.tick(ctx); err != nil && ctx.Err() == nil {
			r.log.ErrorContext(ctx, "keeping in step with the table of keys", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
	rewrapper.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.reportSeals(last); err != nil {
		r.log.ErrorContext(last, "reporting the last seals", "error", err)
	}
}

func (r *Rotation) tick(ctx context.Context) error {
	table, err := r.sync(ctx)
	if err != nil {
		return err
	}
	for _, purpose := range []string{purposeState, purposeRelay} {
		if err := r.keepSchedule(ctx, table, purpose); err != nil {
			return err
		}
	}
	return nil
}

// dueAt is when a key is to rotate by itself; ok is false if it does not.
func (r *Rotation) dueAt(current *KeyGeneration) (due time.Time, ok bool) {
	switch current.Purpose {
	case purposeState:
		return current.CurrentSince.Add(r.config.StateEvery), true
	case purposeRelay:
		return current.CurrentSince.Add(r.config.RelayEvery), true
	}
	return time.Time{}, false
}

// keepSchedule rotates a purpose's key if it is time, and destroys those that nobody can need any more.
func (r *Rotation) keepSchedule(ctx context.Context, table *KeyTable, purpose string) error {
	isDue := func(t *KeyTable) bool {
		current := t.Current(purpose)
		if current == nil || !r.holds(current.Key) {
			return true
		}
		due, ok := r.dueAt(current)
		return ok && !t.Now.Before(due)
	}
	if isDue(table) {
		key, err := r.rotate(ctx, purpose, isDue)
		var refused *KeyRefusal
		switch {
		case errors.As(err, &refused):
			// With several tokens it stays so until the next ceremony; the status says so, too.
			if time.Since(r.refused[purpose]) > refusalsReportedEvery {
				r.refused[purpose] = time.Now()
				r.log.WarnContext(ctx, "a key is due for rotation", "purpose", purpose, "refused", refused.Reason)
			}
		case err != nil:
			return fmt.Errorf("rotating the %s key: %w", purpose, err)
		default:
			r.log.InfoContext(ctx, "a key was rotated on schedule", "key", key.String())
		}
	}
	for i := range table.Keys {
		g := &table.Keys[i]
		over := g.State == KeyClosing || g.State == KeyRetired && !table.Now.Before(g.RetiredAt.Add(keptRetired(purpose)))
		if g.Purpose != purpose || !over || !r.holds(g.Key) {
			continue
		}
		if err := r.Destroy(ctx, g.Key); err != nil {
			return fmt.Errorf("destroying the old %s key: %w", purpose, err)
		}
	}
	return nil
}

func (r *Rotation) holds(key Key) bool {
	return slices.Contains(r.token.Generations(key.Purpose), key.Generation)
}

// sync brings the token and the table into step, both ways.
func (r *Rotation) sync(ctx context.Context) (*KeyTable, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.reportSeals(ctx); err != nil {
		return nil, err
	}
	table, err := r.read(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.lookForChanges(ctx, table); err != nil {
		return nil, err
	}
	registered, err := r.register(ctx, table)
	if err != nil {
		return nil, err
	}
	if registered {
		if table, err = r.read(ctx); err != nil {
			return nil, err
		}
	}
	for _, purpose := range purposes {
		current := table.Current(purpose)
		if current == nil {
			return nil, fmt.Errorf("the table of keys has no key %s in use", purpose)
		}
		if !r.holds(current.Key) {
			if purpose == purposeState { // nothing lasting depends on it, and the next tick makes another
				continue
			}
			return nil, fmt.Errorf("the database says that key %v is in use, and token %s does not hold it: this is another token, or an old copy of it, or the database is older than the key's destruction",
				current.Key, r.token.Serial())
		}
		reported := min(current.Seals, r.reported[current.Key])
		if err := r.token.SetCurrent(purpose, current.Generation, current.Seals-reported); err != nil {
			return nil, tokenFault("taking a key into use", err)
		}
		if current.Seals >= sealsWarning && !r.told[current.Key] {
			r.told[current.Key] = true
			r.log.WarnContext(ctx, "a key has made half of the seals that it may make: rotate it", "key", current.Key.String(), "seals", current.Seals)
		}
	}
	return table, nil
}

func (r *Rotation) read(ctx context.Context) (*KeyTable, error) {
	table, err := r.store.Keys(ctx)
	if err != nil {
		return nil, storeFault("reading the table of keys", err)
	}
	return &table, nil
}

func (r *Rotation) edit(ctx context.Context, purpose string, edit func(*KeyEdit) error) error {
	err := r.store.EditKeys(ctx, purpose, func(e *KeyEdit) error {
		err := edit(e)
		for i := range e.Events {
			e.Events[i].Operator = OperatorOf(ctx)
		}
		return err
	})
	var refused *KeyRefusal
	if err == nil || errors.As(err, &refused) {
		return err
	}
	return storeFault("writing the table of keys", err)
}

// reportSeals adds what was sealed since the last time to the table. If it is not known whether an addition was written it
// is made again: too high a count does no harm.
func (r *Rotation) reportSeals(ctx context.Context) error {
	for _, purpose := range []string{purposeMaster, purposeState} {
		for _, generation := range r.token.Generations(purpose) {
			key := Key{purpose, generation}
			made := r.token.Seals(purpose, generation)
			if made == r.reported[key] {
				continue
			}
			if err := r.store.AddSeals(ctx, key, made-r.reported[key]); err != nil {
				return storeFault("reporting seals", err)
			}
			r.reported[key] = made
		}
	}
	return nil
}

// lookForChanges has the token look for its keys if others must have made or destroyed some: those that the table knows
// and it does not, or the other way round. It looks once for each set of them and their states.
func (r *Rotation) lookForChanges(ctx context.Context, table *KeyTable) error {
	differ := ""
	for i := range table.Keys {
		g := &table.Keys[i]
		here, known := g.heldBy(r.token.Serial())
		expected := g.State != KeyDestroyed && (here || !known)
		if expected != r.holds(g.Key) {
			differ += fmt.Sprintf("%v %s ", g.Key, g.State)
		}
	}
	if differ == "" || differ == r.looked {
		return nil
	}
	if err := r.token.Look(ctx); err != nil {
		return tokenFault("looking for keys", err)
	}
	r.looked = differ
	return nil
}

// register writes into the table what the token holds, and takes the lowest generation of a purpose that has never had one in use.
func (r *Rotation) register(ctx context.Context, table *KeyTable) (changed bool, err error) {
	serial := r.token.Serial()
	for _, purpose := range purposes {
		for _, generation := range r.token.Generations(purpose) {
			key := Key{purpose, generation}
			row := table.Find(key)
			if row != nil {
				holds, held := row.heldBy(serial)
				if row.State == KeyDestroyed || held && !holds {
					r.token.Forget(purpose, generation)
					r.log.ErrorContext(ctx, "a destroyed key came back with an old copy of the token, and is not used: destroy it again", "key", key.String())
					continue
				}
				if holds {
					continue
				}
			}
			if err := r.prove(ctx, key, row); err != nil {
				return changed, err
			}
			changed = true
		}
		if slices.ContainsFunc(table.Keys, func(g KeyGeneration) bool { return g.Purpose == purpose && !g.CurrentSince.IsZero() }) {
			continue
		}
		if err := r.edit(ctx, purpose, func(e *KeyEdit) error { return useFirst(e, purpose) }); err != nil {
			return changed, err
		}
		changed = true
	}
	return changed, nil
}

// useFirst takes the lowest generation of purpose that is made into use, if none ever was.
func useFirst(e *KeyEdit, purpose string) error {
	var first *KeyGeneration
	for i := range e.Keys {
		g := &e.Keys[i]
		if g.Purpose != purpose {
			continue
		}
		if !g.CurrentSince.IsZero() {
			return nil
		}
		if first == nil && g.State == KeyMade {
			first = g
		}
	}
	if first == nil {
		return refuse("there is no key %s to use", purpose)
	}
	first.State, first.CurrentSince = KeyCurrent, e.Now
	e.note(EventKeyCurrent, first.Key)
	return nil
}

// prove registers that the token holds a key, and that it is the same as in other tokens.
func (r *Rotation) prove(ctx context.Context, key Key, row *KeyGeneration) error {
	proof, err := r.token.Proof(key.Purpose, key.Generation)
	if err != nil {
		return tokenFault("proving a key", err)
	}
	if row != nil && row.Proof != nil {
		switch same, err := r.token.Confirm(ctx, key.Purpose, key.Generation, row.Proof); {
		case err != nil:
			return tokenFault(fmt.Sprintf("comparing key %v with the one that is known", key), err)
		case !same:
			return fmt.Errorf("token %s holds another key %v than the database knows by this name: one of them is of another vault, or the keys were made apart and not in a ceremony",
				r.token.Serial(), key)
		}
		proof = row.Proof
	}
	return r.edit(ctx, key.Purpose, func(e *KeyEdit) error {
		g := e.Find(key)
		if g == nil {
			e.Keys = append(e.Keys, KeyGeneration{Key: key, State: KeyMaking, CreatedAt: e.Now})
			g = &e.Keys[len(e.Keys)-1]
		}
		switch {
		case g.State == KeyMaking:
			g.State, g.Proof, g.Holder, g.HeldUntil = KeyMade, proof, "", time.Time{}
			e.note(EventKeyMade, key)
		case g.State == KeyDestroyed:
			return refuse("key %v was given up before it was whole; its number is not used again", key)
		case !bytes.Equal(g.Proof, proof):
			if holds, _ := g.heldBy(r.token.Serial()); holds {
				return nil // another instance at this token was faster
			}
			return refuse("another token has registered key %v at this moment; try again", key)
		}
		g.register(r.token.Serial())
		return nil
	})
}

// Rotate takes the next generation of purpose into use. If every token in service holds one already (from a ceremony,
// or from a rotation that was cut short), it is that; else, if there is just this token, it is made. Rotating master or mac
// starts a rewrap.
//
// Errors: InvalidRequest for what is no purpose, KeyRefusal, ErrTokenUnavailable, ErrStoreUnavailable. It
// may be called again after any of them, and goes on where it was.
func (r *Rotation) Rotate(ctx context.Context, purpose string) (Key, error) {
	return r.rotate(ctx, purpose, func(*KeyTable) bool { return true })
}

func (r *Rotation) rotate(ctx context.Context, purpose string, due func(*KeyTable) bool) (Key, error) {
	switch {
	case !slices.Contains(purposes, purpose):
		return Key{}, &InvalidRequest{Field: "purpose", Reason: fmt.Sprintf("there is no such key; there are %v", purposes)}
	case purpose == purposeIdentity:
		return Key{}, refuse("the identity key never rotates: clients pin it")
	}
	if !r.operator.TryLock() {
		return Key{}, refuse("another operation on keys is in progress at this instance; look at the status and try again")
	}
	defer r.operator.Unlock()
	table, err := r.sync(ctx)
	if err != nil {
		return Key{}, err
	}
	if !due(table) {
		return table.Current(purpose).Key, nil
	}
	from := table.Current(purpose).Key
	if left, err := r.dependentsOfOlder(ctx, table, from); err != nil {
		return Key{}, err
	} else if rewrapped(purpose) && left > 0 {
		return Key{}, refuse("the rotation to %v is still in progress: %d records are under older keys", from, left)
	}
	key, err := r.next(ctx, table, from)
	if err != nil {
		return Key{}, err
	}
	if err := r.use(ctx, from, key); err != nil {
		return Key{}, err
	}
	if _, err := r.sync(ctx); err != nil {
		// It is in use by the table, and this instance follows at the next tick.
		r.log.ErrorContext(ctx, "taking the new key into use here", "key", key.String(), "error", err)
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
	r.log.InfoContext(ctx, "key rotated", "from", from.String(), "to", key.String())
	return key, nil
}

// rewrapped says whether what depends on a key of this purpose is moved to the newest.
func rewrapped(purpose string) bool { return purpose == purposeMaster || purpose == purposeMAC }

func (r *Rotation) dependentsOfOlder(ctx context.Context, table *KeyTable, key Key) (left int64, err error) {
	for i := range table.Keys {
		g := &table.Keys[i]
		if g.Purpose != key.Purpose || g.Generation >= key.Generation || g.State == KeyDestroyed || g.State == KeyMaking {
			continue
		}
		n, err := r.dependents(ctx, g.Key)
		if err != nil {
			return 0, err
		}
		left += n
	}
	return left, nil
}

func (r *Rotation) dependents(ctx context.Context, key Key) (int64, error) {
	n, err := r.store.Dependents(ctx, key)
	if err != nil {
		return 0, storeFault("counting what depends on a key", err)
	}
	return n, nil
}

// next finds or makes the generation that is to follow from.
func (r *Rotation) next(ctx context.Context, table *KeyTable, from Key) (Key, error) {
	for i := range table.Keys {
		g := &table.Keys[i]
		if g.Purpose == from.Purpose && g.Generation > from.Generation && g.State == KeyMade && len(table.ready(g)) == 0 {
			return g.Key, nil
		}
	}
	if tokens := table.tokens(); len(tokens) != 1 || tokens[0] != r.token.Serial() {
		return Key{}, refuse("%d tokens are in service (%v), and there is no next %s key that all of them hold: make it in a ceremony, then restart every vaultd",
			len(tokens), tokens, from.Purpose)
	}
	key, err := r.claim(ctx, from)
	if err != nil {
		return Key{}, err
	}
	if err := r.token.MakeKey(ctx, key.Purpose, key.Generation); err != nil {
		return Key{}, tokenFault(fmt.Sprintf("making key %v", key), err)
	}
	err = r.prove(ctx, key, nil)
	var refused *KeyRefusal
	if errors.As(err, &refused) {
		// The claim was taken for dead while the token was slow; nobody has seen the key.
		err = errors.Join(err, r.token.DestroyKey(ctx, key.Purpose, key.Generation))
	}
	return key, err
}

// claim claims the number of the next generation. It gives up claims whose holder is dead, and goes on with its own.
func (r *Rotation) claim(ctx context.Context, from Key) (key Key, err error) {
	err = r.edit(ctx, from.Purpose, func(e *KeyEdit) error {
		key = Key{from.Purpose, 1}
		if current := e.Current(from.Purpose); current == nil || current.Key != from {
			return refuse("key %v is not in use any more: somebody else has rotated; look at the status", from)
		}
		for i := range e.Keys {
			g := &e.Keys[i]
			if g.Purpose != from.Purpose {
				continue
			}
			key.Generation = max(key.Generation, g.Generation+1)
			switch {
			case g.State != KeyMaking:
			case g.heldByOther(r.instance, e.Now):
				return refuse("another instance is making key %v at this moment; if it has died, try again in %v", g.Key, g.HeldUntil.Sub(e.Now).Round(time.Second))
			case g.Holder == r.instance:
				key, g.HeldUntil = g.Key, e.Now.Add(claimLifetime)
				return nil
			default:
				g.State, g.DestroyedAt, g.Holder, g.HeldUntil = KeyDestroyed, e.Now, "", time.Time{}
			}
		}
		e.Keys = append(e.Keys, KeyGeneration{
			Key: key, State: KeyMaking, CreatedAt: e.Now, Holder: r.instance, HeldUntil: e.Now.Add(claimLifetime),
		})
		return nil
	})
	return key, err
}

// use takes a key into use, after another.
func (r *Rotation) use(ctx context.Context, from, to Key) error {
	return r.edit(ctx, to.Purpose, func(e *KeyEdit) error {
		old, next := e.Find(from), e.Find(to)
		switch {
		case next != nil && next.State == KeyCurrent:
			return nil // it was written, and the answer lost
		case old == nil || old.State != KeyCurrent || next == nil || next.State != KeyMade:
			return refuse("somebody else has changed the %s keys at this moment; look at the status", to.Purpose)
		}
		if missing := e.ready(next); len(missing) > 0 {
			return refuse("key %v is not in token %v", to, missing)
		}
		old.State, old.RetiredAt, old.Holder, old.HeldUntil = KeyRetired, e.Now, "", time.Time{}
		next.State, next.CurrentSince = KeyCurrent, e.Now
		e.note(EventKeyCurrent, to)
		return nil
	})
}

// Destroy destroys a generation that nothing needs any more, in this instance's token. When no token holds it, it
// is destroyed for good.
//
// First the key is marked as closing, from when on the store refuses writes after which more would depend on it; then
// the writes that run are awaited; and what depends on the key then is all that ever will. Only if that is nothing, the key is destroyed.
//
// Errors: InvalidRequest, KeyRefusal, ErrTokenUnavailable, ErrStoreUnavailable. It may be called again after any
// of them, and goes on where it was.
func (r *Rotation) Destroy(ctx context.Context, key Key) error {
	if !r.operator.TryLock() {
		return refuse("another operation on keys is in progress at this instance; look at the status and try again")
	}
	defer r.operator.Unlock()
	table, err := r.sync(ctx)
	if err != nil {
		return err
	}
	row := table.Find(key)
	if row == nil {
		return &InvalidRequest{Field: "key", Reason: "there is no such key"}
	}
	if why := neverDestroyed(key); why != "" {
		return refuse("key %v is never destroyed: %s", key, why)
	}
	if row.State == KeyCurrent {
		return refuse("key %v is in use: rotate first", key)
	}
	if err := r.unneeded(ctx, key); err != nil {
		return err
	}
	err = r.edit(ctx, key.Purpose, func(e *KeyEdit) error {
		g := e.Find(key)
		switch {
		case g == nil || g.State == KeyCurrent:
			return refuse("key %v is in use: rotate first", key)
		case g.State == KeyMaking:
			return refuse("key %v is being made", key)
		case g.State == KeyRetired && e.Now.Before(g.RetiredAt.Add(keptRetired(key.Purpose))):
			return refuse("key %v may still be needed by what was begun with it, until %s", key, g.RetiredAt.Add(keptRetired(key.Purpose)).UTC().Format(time.RFC3339))
		case g.State == KeyDestroyed:
			return nil // it may have come back with an old copy of the token
		}
		if g.State != KeyClosing {
			g.State = KeyClosing
			e.note(EventKeyClosing, key)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := r.store.AwaitWrites(ctx); err != nil {
		return storeFault("waiting for writes that run", err)
	}
	if err := r.unneeded(ctx, key); err != nil {
		return err
	}
	if key.Purpose == purposeRelay {
		if err := r.vault.eraseRelaySeed(ctx, key.Generation); err != nil && !errors.Is(err, ErrStale) {
			return err
		}
	}
	if err := r.token.DestroyKey(ctx, key.Purpose, key.Generation); err != nil {
		return tokenFault(fmt.Sprintf("destroying key %v", key), err)
	}
	err = r.edit(ctx, key.Purpose, func(e *KeyEdit) error {
		gone := e.Find(key).release(r.token.Serial(), e.Now, true)
		e.noteAt(EventKeyErased, key, r.token.Serial())
		if gone {
			e.note(EventKeyDestroyed, key)
		}
		return nil
	})
	if err == nil {
		r.log.InfoContext(ctx, "key destroyed", "key", key.String())
	}
	return err
}

// ForgetToken takes a token out of service that is not used any more, so that rotations do not wait for it. It must
// be destroyed or wiped: what it holds counts as destroyed from then on. A vaultd that still uses it brings it back
// within seconds.
//
// Errors: InvalidRequest, KeyRefusal, ErrStoreUnavailable. It may be called again.
func (r *Rotation) ForgetToken(ctx context.Context, serial string) error {
	if serial == r.token.Serial() {
		return refuse("token %s is this instance's own", serial)
	}
	table, err := r.read(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(table.tokens(), serial) {
		return &InvalidRequest{Field: "token", Reason: fmt.Sprintf("no token %q is in service; there are %v", serial, table.tokens())}
	}
	for i, purpose := range purposes {
		if err := r.edit(ctx, purpose, func(e *KeyEdit) error {
			if i == 0 {
				e.noteAt(EventForgotten, Key{}, serial)
			}
			for i := range e.Keys {
				if g := &e.Keys[i]; g.Purpose == purpose && g.release(serial, e.Now, false) {
					e.note(EventKeyDestroyed, g.Key)
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	r.log.InfoContext(ctx, "token out of service", "token", serial)
	return nil
}

// unneeded refuses while anything depends on a key.
func (r *Rotation) unneeded(ctx context.Context, key Key) error {
	seeds, err := r.vault.relaySeedsUnder(ctx, key)
	if err != nil {
		return err
	}
	if seeds > 0 {
		return refuse("the relay key's seed still needs key %v; it is being moved to the key in use: look at the status", key)
	}
	n, err := r.dependents(ctx, key)
	if err != nil || n == 0 {
		return err
	}
	if rewrapped(key.Purpose) {
		return refuse("%d records still need key %v; they are being moved to the key in use: look at the status", n, key)
	}
	return refuse("%d records still need key %v, and it serves until the last of them is replaced or destroyed", n, key)
}

// rewrapWhenDue rewraps whenever something is under an older key, until ctx is over.
func (r *Rotation) rewrapWhenDue(ctx context.Context) {
	ticker := time.NewTicker(r.config.SyncEvery)
	defer ticker.Stop()
	for ctx.Err() == nil {
		pause := ticker.C
		if err := r.Rewrap(ctx); err != nil && ctx.Err() == nil {
			r.log.ErrorContext(ctx, "rewrapping", "error", err)
			pause = time.After(10 * r.config.SyncEvery) // what failed may well fail again
		}
		select {
		case <-ctx.Done():
		case <-r.wake:
		case <-pause:
		}
	}
}

// errLease ends a rewrap that another instance has taken over.
var errLease = errors.New("another instance rewraps")

// Rewrap moves everything from older keys to those in use (see Vault.Rewrap), unless another instance does
// so; when nothing is left it is written down as done. It returns at once if there is nothing to do.
func (r *Rotation) Rewrap(ctx context.Context) error {
	for _, purpose := range []string{purposeMaster, purposeMAC} {
		table, err := r.read(ctx)
		if err != nil {
			return err
		}
		current := table.Current(purpose)
		if current == nil || current.Generation != r.vault.token.Newest(purpose) {
			continue // this instance is not in step yet
		}
		left, err := r.anyUnderOlder(ctx, table, current.Key)
		if err != nil {
			return err
		}
		if left {
			if err := r.rewrapTo(ctx, current.Key); err != nil {
				return err
			}
			if left, err = r.anyUnderOlder(ctx, table, current.Key); err != nil {
				return err
			}
		}
		if left || !current.RewrappedAt.IsZero() || current.Generation == 1 {
			continue
		}
		if err := r.edit(ctx, purpose, func(e *KeyEdit) error {
			if g := e.Current(purpose); g != nil && g.Key == current.Key && g.RewrappedAt.IsZero() {
				g.RewrappedAt, g.Holder, g.HeldUntil = e.Now, "", time.Time{}
				e.note(EventRewrapDone, g.Key)
			}
			return nil
		}); err != nil {
			return err
		}
		r.log.InfoContext(ctx, "rewrap done", "key", current.Key.String())
	}
	return nil
}

// anyUnderOlder reports whether anything is left to rewrap.
func (r *Rotation) anyUnderOlder(ctx context.Context, table *KeyTable, key Key) (bool, error) {
	for i := range table.Keys {
		g := &table.Keys[i]
		if g.Purpose != key.Purpose || g.Generation >= key.Generation || g.State == KeyDestroyed || g.State == KeyMaking {
			continue
		}
		if seeds, err := r.vault.relaySeedsUnder(ctx, g.Key); err != nil || seeds > 0 {
			return seeds > 0, err
		}
		ids, err := r.vault.store.Under(ctx, g.Key, AccountID{}, 1)
		if err != nil {
			return false, storeFault("looking for records under an older key", err)
		}
		if len(ids) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// rewrapTo rewraps under a lease, at the configured rate.
func (r *Rotation) rewrapTo(ctx context.Context, key Key) error {
	lease := func() error {
		return r.edit(ctx, key.Purpose, func(e *KeyEdit) error {
			g := e.Current(key.Purpose)
			if g == nil || g.Key != key || g.heldByOther(r.instance, e.Now) {
				return &KeyRefusal{errLease.Error()}
			}
			g.Holder, g.HeldUntil = r.instance, e.Now.Add(rewrapLease)
			return nil
		})
	}
	var refused *KeyRefusal
	if err := lease(); errors.As(err, &refused) {
		return nil // somebody else does it
	} else if err != nil {
		return err
	}
	r.log.InfoContext(ctx, "rewrapping", "to", key.String())
	renewed, next := time.Now(), time.Now()
	moved, failed, err := r.vault.Rewrap(ctx, func(ctx context.Context) error {
		if time.Since(renewed) > rewrapLease/3 {
			if err := lease(); err != nil {
				return err
			}
			renewed = time.Now()
		}
		next = next.Add(time.Second / time.Duration(r.config.RewrapsPerSecond))
		wait := time.Until(next)
		if wait <= 0 {
			next = time.Now() // what was not used is not saved up
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
			return nil
		}
	})
	r.moved.Add(uint64(moved))
	r.unmoved.Add(uint64(failed))
	r.log.InfoContext(ctx, "rewrapped", "moved", moved, "failed", failed)
	if errors.As(err, &refused) {
		return nil
	}
	return err
}

// KeyOverview is what can be said of the keys at any time, at little cost.
type KeyOverview struct {
	KeyTable
	// RewrapLeft is how many records and rows are under older keys than those in use.
	RewrapLeft int64
	// OldestUncovered and Warnings are as in KeyStatus, but for records that are lost.
	OldestUncovered time.Time
	Warnings        []string
	// Moved and Unmoved count the accounts that this instance rewrapped, and those that it could not, since it was
	// started; a rewrap counts when it ends.
	Moved, Unmoved uint64
}

// Overview reads the table of keys and counts what is left to rewrap, while something is. It takes time in proportion to that.
//
// Errors: ErrStoreUnavailable.
func (r *Rotation) Overview(ctx context.Context) (*KeyOverview, error) {
	table, err := r.read(ctx)
	if err != nil {
		return nil, err
	}
	o := &KeyOverview{KeyTable: *table, Moved: r.moved.Load(), Unmoved: r.unmoved.Load(), Warnings: r.warnings(table)}
	for _, purpose := range []string{purposeMaster, purposeMAC} {
		current := table.Current(purpose)
		if current == nil || !current.RewrappedAt.IsZero() {
			continue
		}
		left, err := r.dependentsOfOlder(ctx, table, current.Key)
		if err != nil {
			return nil, err
		}
		o.RewrapLeft += left
	}
	if o.OldestUncovered, err = r.oldestUncovered(ctx, table); err != nil {
		return nil, err
	}
	return o, nil
}

// oldestUncovered is when the first record was destroyed at a time when a master key that still exists was in use, or had been.
func (r *Rotation) oldestUncovered(ctx context.Context, table *KeyTable) (time.Time, error) {
	var since time.Time // when the first master key that still exists came into use
	for i := range table.Keys {
		g := &table.Keys[i]
		if g.State != KeyDestroyed && g.Purpose == purposeMaster && !g.CurrentSince.IsZero() && (since.IsZero() || g.CurrentSince.Before(since)) {
			since = g.CurrentSince
		}
	}
	oldest, err := r.store.OldestDestruction(ctx, since)
	if err != nil {
		return time.Time{}, storeFault("looking for the oldest destruction", err)
	}
	return oldest, nil
}

// KeyStatus is what operators see of the keys.
type KeyStatus struct {
	Now    time.Time
	Token  string   // this instance's, by serial number
	Tokens []string // all that are in service
	Keys   []KeyReport
	// RewrapLeft is how many records are under older keys than those in use, and Rewrapping who moves them, if anybody does.
	RewrapLeft int64
	Rewrapping string
	// OldestUncovered is when the first record was destroyed whose copies could still be opened: a destruction is
	// covered when every master key that was in use before it is destroyed. Zero: all are covered.
	OldestUncovered time.Time
	Warnings        []string
}

// warnings are what the table alone gives an operator to do.
func (r *Rotation) warnings(table *KeyTable) (warnings []string) {
	for i := range table.Keys {
		g := &table.Keys[i]
		if g.Seals >= sealsWarning && g.State == KeyCurrent {
			warnings = append(warnings, fmt.Sprintf("key %v has made %d of the %d seals that it may make: rotate it", g.Key, g.Seals, uint64(sealsLimit)))
		}
		if due, ok := r.dueAt(g); ok && g.State == KeyCurrent && table.Now.After(due.Add(time.Minute)) {
			warnings = append(warnings, fmt.Sprintf("key %v was due for rotation at %s: see the log for why it did not rotate by itself; with several tokens, make the next in a ceremony",
				g.Key, due.UTC().Format(time.RFC3339)))
		}
		if missing := table.ready(g); g.State == KeyMade && len(missing) > 0 {
			warnings = append(warnings, fmt.Sprintf("key %v is not in token %v yet", g.Key, missing))
		}
	}
	return warnings
}

// KeyReport is one key in a KeyStatus.
type KeyReport struct {
	KeyGeneration
	// Dependents are the records, or for mac the accounts, that need the key.
	Dependents int64
	Proven     bool // this instance's token holds it
}

// Status reports all keys. It charges and changes nothing, but for the report of seals.
//
// Errors: ErrTokenUnavailable, ErrStoreUnavailable.
func (r *Rotation) Status(ctx context.Context) (*KeyStatus, error) {
	table, err := r.sync(ctx)
	if err != nil {
		return nil, err
	}
	dependents, err := r.store.AllDependents(ctx)
	if err != nil {
		return nil, storeFault("counting what depends on keys", err)
	}
	s := &KeyStatus{Now: table.Now, Token: r.token.Serial(), Tokens: table.tokens(), Warnings: append(slices.Clone(r.config.Warnings), r.warnings(table)...)}
	for i := range table.Keys {
		g := table.Keys[i]
		report := KeyReport{KeyGeneration: g, Dependents: dependents[g.Key], Proven: r.holds(g.Key)}
		s.Keys = append(s.Keys, report)
		if current := table.Current(g.Purpose); rewrapped(g.Purpose) && current != nil && g.Generation < current.Generation {
			s.RewrapLeft += report.Dependents
		}
		if g.State == KeyCurrent && g.heldByOther("", table.Now) {
			s.Rewrapping = g.Holder
		}
		if report.Dependents > 0 && g.State == KeyDestroyed {
			s.Warnings = append(s.Warnings, fmt.Sprintf("%d records need key %v, which is destroyed: they are lost (was an older database restored?)", report.Dependents, g.Key))
		}
	}
	if s.OldestUncovered, err = r.oldestUncovered(ctx, table); err != nil {
		return nil, err
	}
	return s, nil
}
