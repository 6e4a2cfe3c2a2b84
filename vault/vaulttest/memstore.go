package vaulttest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backup-key-vault/bkv/vault"
)

// ErrFault is what a write answers that a hook made fail.
var ErrFault = errors.New("injected fault")

// Fault is what becomes of a write.
type Fault int

// Faults.
const (
	NoFault      Fault = iota
	NotPersisted       // the write fails, and nothing of it is kept
	Persisted          // the write answers an error, and is kept all the same
)

// MemoryStore is a vault.Store in memory that holds the same law as the one in
// Postgres: both pass StoreContract. Nothing that goes in or out shares memory with
// what it keeps. It is safe for concurrent use.
type MemoryStore struct {
	clock func() time.Time

	mu       sync.Mutex // held over each call, so that each is atomic; guards all below
	accounts map[vault.AccountID]*memoryRow
	events   []vault.Event
	hook     func(vault.Change) Fault
	seeds    map[uint32][]byte // nil: erased
}

// memoryRow is an account with all its generations, tombstones included, by number.
type memoryRow struct {
	account vault.Account // its Generations are unused
	all     []vault.Generation
}

var _ vault.Store = (*MemoryStore)(nil)

// NewMemoryStore returns an empty store. clock is the database's clock; it is cut to microseconds.
func NewMemoryStore(clock func() time.Time) *MemoryStore {
	return &MemoryStore{clock: clock, accounts: map[vault.AccountID]*memoryRow{}, seeds: map[uint32][]byte{}}
}

// OnWrite has hook decide what becomes of each write from now on; nil: all succeed.
// The hook runs while the store is locked and must not use it.
func (m *MemoryStore) OnWrite(hook func(vault.Change) Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = hook
}

// Count returns how many events of a kind were recorded.
func (m *MemoryStore) Count(kind vault.EventKind) (n int) {
	for _, e := range m.Events() {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

// Events returns what was recorded, in order.
func (m *MemoryStore) Events() []vault.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.events)
}

// SealedBytes returns how many bytes of sealed secrets the store holds.
func (m *MemoryStore) SealedBytes() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, row := range m.accounts {
		for _, g := range row.all {
			n += len(g.Sealed)
		}
	}
	return n
}

// Holds reports whether b is part of anything sealed in the store.
func (m *MemoryStore) Holds(b []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, row := range m.accounts {
		for _, g := range row.all {
			if bytes.Contains(g.Sealed, b) {
				return true
			}
		}
	}
	return false
}

func (m *MemoryStore) now() time.Time { return m.clock().UTC().Truncate(time.Microsecond) }

// Account implements vault.Store.
func (m *MemoryStore) Account(ctx context.Context, id vault.AccountID) (vault.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return vault.Snapshot{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	snap := vault.Snapshot{Now: m.now()}
	row := m.accounts[id]
	if row == nil {
		return snap, nil
	}
	snap.Exists = true
	snap.Account = cloneAccount(row.account)
	for _, g := range row.all {
		if g.State != vault.Destroyed || g.ID == row.account.Head {
			snap.Account.Generations = append(snap.Account.Generations, cloneGeneration(g))
		}
	}
	return snap, nil
}

// Taken implements vault.Store.
func (m *MemoryStore) Taken(ctx context.Context, id vault.AccountID, generation vault.GenerationID) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	row := m.accounts[id]
	return row != nil && slices.ContainsFunc(row.all, func(g vault.Generation) bool { return g.ID == generation }), nil
}

// Due implements vault.Store.
func (m *MemoryStore) Due(ctx context.Context, after vault.AccountID, limit int) ([]vault.AccountID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	var due []vault.AccountID
	for _, id := range slices.SortedFunc(maps.Keys(m.accounts), compareIDs) {
		row := m.accounts[id]
		account := row.account
		account.Generations = row.all
		at := account.Due()
		if compareIDs(id, after) > 0 && !at.IsZero() && !at.After(now) && len(due) < limit {
			due = append(due, id)
		}
	}
	return due, nil
}

// Under implements vault.Store.
func (m *MemoryStore) Under(ctx context.Context, key vault.Key, after vault.AccountID, limit int) ([]vault.AccountID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var under []vault.AccountID
	for _, id := range slices.SortedFunc(maps.Keys(m.accounts), compareIDs) {
		row := m.accounts[id]
		depends := key.Purpose == "mac" && row.account.MACKey == key.Generation ||
			key.Purpose == "master" && slices.ContainsFunc(row.all, func(g vault.Generation) bool {
				return g.State != vault.Destroyed && vault.SealedUnder(g.Sealed) == key.Generation
			})
		if depends && compareIDs(id, after) > 0 && len(under) < limit {
			under = append(under, id)
		}
	}
	return under, nil
}

func compareIDs(a, b vault.AccountID) int {
	return cmp.Or(strings.Compare(a.Tenant, b.Tenant), strings.Compare(a.User, b.User))
}

// Write implements vault.Store.
func (m *MemoryStore) Write(ctx context.Context, change vault.Change) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	fault := NoFault
	if m.hook != nil {
		fault = m.hook(change)
	}
	if fault == NotPersisted {
		return ErrFault
	}
	next, err := m.next(change)
	if err != nil {
		return err
	}
	m.accounts[change.Account.ID] = next
	m.events = append(m.events, change.Events...)
	if fault == Persisted {
		return ErrFault
	}
	return nil
}

// next is the row as the change makes it, or why the change is refused.
func (m *MemoryStore) next(change vault.Change) (*memoryRow, error) {
	if err := exact(change); err != nil {
		return nil, err
	}
	row := m.accounts[change.Account.ID]
	switch {
	case change.Create && row != nil:
		return nil, fmt.Errorf("%w: the account exists", vault.ErrStale)
	case !change.Create && (row == nil || row.account.MAC != change.Previous):
		return nil, fmt.Errorf("%w: another MAC", vault.ErrStale)
	}
	if err := change.Account.Policy.Validate(); err != nil {
		return nil, law("policy: %v", err)
	}
	next := &memoryRow{account: cloneAccount(change.Account)}
	if row != nil {
		next.all = slices.Clone(row.all)
		if row.account.Pseudonym != change.Account.Pseudonym {
			return nil, law("the pseudonym changed")
		}
		if change.Account.NextNumber < row.account.NextNumber {
			return nil, law("the next number went back")
		}
	}
	for _, g := range change.Changed {
		if g.Number >= change.Account.NextNumber {
			return nil, law("generation %d is past the next number", g.Number)
		}
		if err := one(g); err != nil {
			return nil, err
		}
		i := slices.IndexFunc(next.all, func(old vault.Generation) bool { return old.Number == g.Number })
		if i < 0 {
			next.all = append(next.all, cloneGeneration(g))
			continue
		}
		if err := step(next.all[i], g); err != nil {
			return nil, err
		}
		next.all[i] = cloneGeneration(g)
	}
	slices.SortFunc(next.all, func(a, b vault.Generation) int { return cmp.Compare(a.Number, b.Number) })

	used, live := 0, 0
	states, ids := map[vault.State]int{}, map[vault.GenerationID]bool{}
	for _, g := range next.all {
		if ids[g.ID] {
			return nil, fmt.Errorf("%w: the generation id is taken", vault.ErrStale)
		}
		ids[g.ID] = true
		states[g.State]++
		if g.Live() {
			live++
			used += g.Used()
		}
	}
	for _, s := range []vault.State{vault.Staged, vault.Active, vault.Frozen} {
		if states[s] > 1 {
			return nil, law("two generations are %s", s)
		}
	}
	if used > change.Account.Policy.MaxAttempts {
		return nil, law("%d attempts used of %d", used, change.Account.Policy.MaxAttempts)
	}
	if row != nil && !samePolicy(row.account.Policy, change.Account.Policy) && (live != 1 || used != 0) {
		return nil, law("the policy changed over %d live generations and %d used attempts", live, used)
	}
	return next, nil
}

// RelaySeeds implements vault.Store.
func (m *MemoryStore) RelaySeeds(context.Context) (map[uint32][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[uint32][]byte{}
	for generation, sealed := range m.seeds {
		if sealed != nil {
			out[generation] = bytes.Clone(sealed)
		}
	}
	return out, nil
}

// SwapRelaySeed implements vault.Store. It knows of no closing keys.
func (m *MemoryStore) SwapRelaySeed(_ context.Context, generation uint32, old, sealed []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, exists := m.seeds[generation]
	if exists != (old != nil) || !bytes.Equal(now, old) {
		return vault.ErrStale
	}
	m.seeds[generation] = bytes.Clone(sealed)
	return nil
}

func law(format string, args ...any) error {
	return fmt.Errorf("%w: %s", vault.ErrLaw, fmt.Sprintf(format, args...))
}

// one holds the law as far as one generation shows it.
func one(g vault.Generation) error {
	destroyed := g.State == vault.Destroyed
	switch {
	case g.LastSuccess > g.Started, g.Successes > g.LastSuccess, (g.Successes == 0) != (g.LastSuccess == 0):
		return law("generation %d: the counters contradict each other", g.Number)
	case g.Used() > vault.MaxAttemptsLimit, g.Failures() > vault.MaxFailures:
		return law("generation %d: too many attempts", g.Number)
	case destroyed != (g.Sealed == nil), destroyed != (g.Reason != ""):
		return law("generation %d: destroyed and not, by its secrets or reason", g.Number)
	case (g.State == vault.Staged || g.State == vault.Frozen) == g.ExpiresAt.IsZero():
		return law("generation %d: expiry and state contradict each other", g.Number)
	}
	return nil
}

// step holds the law from one version of a generation to the next.
func step(from, to vault.Generation) error {
	switch {
	case from.State == vault.Destroyed:
		return law("generation %d is a tombstone", from.Number)
	case to.Started < from.Started, to.LastSuccess < from.LastSuccess, to.Successes < from.Successes:
		return law("generation %d: a counter went back", from.Number)
	case (to.LastSuccess > from.LastSuccess) != (to.Successes > from.Successes):
		return law("generation %d: forgiven without a success", from.Number)
	case to.State == vault.Staged && from.State != vault.Staged, to.State == vault.Frozen && from.State == vault.Staged:
		return law("generation %d: from %s to %s", from.Number, from.State, to.State)
	case from.ID != to.ID, from.Follows != to.Follows, from.Digest != to.Digest, from.OwnerKey != to.OwnerKey, from.KSF != to.KSF,
		from.OPRFKey != to.OPRFKey, from.ServerKey != to.ServerKey, from.Strategy != to.Strategy, !from.CreatedAt.Equal(to.CreatedAt):
		return law("generation %d: what was fixed when it was staged changed", from.Number)
	}
	return nil
}

// exact refuses what a database could not give back as it was.
func exact(change vault.Change) error {
	durations := append([]time.Duration{change.Account.Policy.Grace}, change.Account.Policy.Delays...)
	for i, g := range change.Changed {
		if i > 0 && g.Number <= change.Changed[i-1].Number {
			return errors.New("the changed generations are not in the order of their numbers")
		}
		times := []time.Time{g.CreatedAt, g.ExpiresAt}
		for _, t := range g.Attempts {
			times = append(times, t.ChargedAt, t.ExpiresAt)
		}
		for _, t := range times {
			durations = append(durations, time.Duration(t.Nanosecond()))
		}
	}
	for _, d := range durations {
		if d%time.Microsecond != 0 {
			return errors.New("a time or delay is finer than a microsecond")
		}
	}
	return nil
}

func samePolicy(a, b vault.Policy) bool {
	return a.MaxAttempts == b.MaxAttempts && a.Grace == b.Grace && slices.Equal(a.Delays, b.Delays)
}

// cloneAccount copies everything but the generations.
func cloneAccount(a vault.Account) vault.Account {
	a.Policy.Delays = slices.Clone(a.Policy.Delays)
	if len(a.Policy.Delays) == 0 {
		a.Policy.Delays = nil
	}
	a.Generations = nil
	return a
}

func cloneGeneration(g vault.Generation) vault.Generation {
	g.Sealed = bytes.Clone(g.Sealed)
	g.CreatedAt = g.CreatedAt.UTC()
	if !g.ExpiresAt.IsZero() {
		g.ExpiresAt = g.ExpiresAt.UTC()
	}
	attempts := make([]vault.Attempt, 0, len(g.Attempts))
	for _, t := range g.Attempts {
		t.ChargedAt, t.ExpiresAt = t.ChargedAt.UTC(), t.ExpiresAt.UTC()
		attempts = append(attempts, t)
	}
	g.Attempts = attempts
	if len(attempts) == 0 {
		g.Attempts = nil
	}
	return g
}
