package vaulttest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backup-key-vault/bkv/vault"
)

// Tenants are the tenants that StoreContract's accounts belong to: a store that
// knows tenants must know these.
var Tenants = []string{"alpha", "beta"}

// StoreContract is what every vault.Store must do. open returns an empty store that knows
// Tenants, for one subtest.
func StoreContract(t *testing.T, open func(t *testing.T) vault.Store) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, *contract)
	}{
		{"an account that does not exist still tells the time", testAbsent},
		{"what is written reads back the same", testReadBack},
		{"an account is created once", testCreateOnce},
		{"a write names the MAC that was read", testStale},
		{"tombstones are kept and not read back, but for the head", testTombstones},
		{"all generations change in one write", testManyAtOnce},
		{"the law", testLaw},
		{"the policy stays while two generations live", testPolicyOfTwo},
		{"the law for a new account", testLawOnCreate},
		{"what changes within the law is written", testLawful},
		{"a refused write leaves nothing behind", testNothingLeft},
		{"a generation id is taken for good", testTaken},
		{"of many writers one wins", testRace},
		{"of many creators one wins", testCreateRace},
		{"counting under a race loses nothing", testCountingRace},
		{"due accounts are paged in the order of their ids", testDue},
		{"user ids are bytes", testUserIDs},
		{"what is under a key is paged in the order of the ids", testUnder},
		{"what a caller keeps is not the store's", testNoAliasing},
		{"what cannot be exact is refused", testExact},
		{"a context that is over", testContext},
		{"a relay key's seed is swapped and erased for good", testRelaySeeds},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, &contract{open(t)}) })
	}
}

type contract struct{ vault.Store }

func (c *contract) read(t *testing.T, id vault.AccountID) vault.Snapshot {
	t.Helper()
	snap, err := c.Account(t.Context(), id)
	if err != nil {
		t.Fatalf("reading: %v", err)
	}
	return snap
}

func (c *contract) write(t *testing.T, change vault.Change) {
	t.Helper()
	if err := c.Write(t.Context(), change); err != nil {
		t.Fatalf("writing: %v", err)
	}
}

func (c *contract) refused(t *testing.T, change vault.Change, want error) {
	t.Helper()
	if err := c.Write(t.Context(), change); !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

// random fills b.
func random(b []byte) { rand.Read(b) }

func newGeneration(number uint32, state vault.State, now time.Time) vault.Generation {
	g := vault.Generation{
		Number: number, State: state, CreatedAt: now.Add(-time.Hour - time.Microsecond),
		KSF:     vault.KSF{Time: 3, MemoryKiB: 1<<32 - 1, Threads: 4},
		OPRFKey: 7, ServerKey: 1<<32 - 1, Strategy: "derive", Sealed: make([]byte, 300),
	}
	for _, b := range [][]byte{g.ID[:], g.Digest[:], g.OwnerKey[:], g.Sealed} {
		random(b)
	}
	if state == vault.Staged || state == vault.Frozen {
		g.ExpiresAt = now.Add(time.Hour)
	}
	return g
}

// attempted gives a generation attempts that fit its counters.
func attempted(g vault.Generation, started, lastSuccess, successes uint32, now time.Time) vault.Generation {
	g.Started, g.LastSuccess, g.Successes, g.Attempts = started, lastSuccess, successes, nil
	for n := max(lastSuccess, 1); n <= started; n++ {
		a := vault.Attempt{Number: n, Outcome: vault.Open, ChargedAt: now.Add(-time.Duration(n) * time.Second), ExpiresAt: now.Add(time.Minute)}
		if n == lastSuccess {
			a.Outcome = vault.Succeeded
		}
		random(a.Claim[:])
		g.Attempts = append(g.Attempts, a)
	}
	return g
}

func destroyed(g vault.Generation, why vault.Reason) vault.Generation {
	g.State, g.Reason, g.Sealed, g.ExpiresAt = vault.Destroyed, why, nil, time.Time{}
	return g
}

// account is a new one with these generations, numbered in their order.
func account(id vault.AccountID, generations ...vault.Generation) vault.Account {
	a := vault.Account{ID: id, Policy: vault.DefaultPolicy(), MACKey: 1<<32 - 1, NextNumber: uint32(len(generations) + 1)}
	random(a.Pseudonym[:])
	random(a.MAC[:])
	for i, g := range generations {
		g.Number = uint32(i + 1)
		a.Generations = append(a.Generations, g)
		if g.Live() {
			a.Head = g.ID
		}
	}
	return a
}

func create(a vault.Account) vault.Change {
	return vault.Change{Create: true, Account: a, Changed: a.Generations}
}

// update is a change from a, as it was read, with a new MAC and these generations in
// place of those of their numbers, or added.
func update(a vault.Account, changed ...vault.Generation) vault.Change {
	c := vault.Change{Previous: a.MAC, Account: a, Changed: changed}
	random(c.Account.MAC[:])
	c.Account.Generations = slices.Clone(a.Generations)
	for _, g := range changed {
		i := slices.IndexFunc(c.Account.Generations, func(old vault.Generation) bool { return old.Number == g.Number })
		if i < 0 {
			c.Account.Generations = append(c.Account.Generations, g)
			c.Account.NextNumber = max(c.Account.NextNumber, g.Number+1)
			continue
		}
		c.Account.Generations[i] = g
	}
	return c
}

func same(t *testing.T, got, want vault.Account) {
	t.Helper()
	if reflect.DeepEqual(got, want) { // much faster than cmp
		return
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("the account differs (-want +got):\n%s", diff)
	}
}

var ann = vault.AccountID{Tenant: "alpha", User: "ann"}

func testAbsent(t *testing.T, c *contract) {
	snap := c.read(t, ann)
	if snap.Exists || snap.Now.IsZero() || snap.Now.Location() != time.UTC || snap.Now.Nanosecond()%1000 != 0 {
		t.Fatalf("got %+v", snap)
	}
	c.refused(t, update(account(ann)), vault.ErrStale)
	if taken, err := c.Taken(t.Context(), ann, vault.GenerationID{1}); taken || err != nil {
		t.Fatalf("taken: %v, %v", taken, err)
	}
}

func testReadBack(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann,
		attempted(newGeneration(1, vault.Frozen, now), 17, 12, 3, now),
		attempted(newGeneration(2, vault.Active, now), 3, 0, 0, now),
		newGeneration(3, vault.Staged, now))
	a.Generations[1].Follows = a.Generations[0].ID
	a.Generations[0].Attempts[2].Outcome = vault.Failed
	a.Policy.Delays = []time.Duration{0, time.Microsecond, 24 * time.Hour, 7 * 24 * time.Hour}
	a.Policy.Grace = 90*24*time.Hour - time.Microsecond
	ch := create(a)
	ch.Events = []vault.Event{
		{Kind: vault.EventStaged, Tenant: ann.Tenant, Pseudonym: a.Pseudonym, Generation: a.Generations[2].ID, RequestID: "request-1"},
		{Kind: vault.EventAttempt, Tenant: ann.Tenant, Pseudonym: a.Pseudonym, Generation: a.Generations[1].ID, Attempt: 3},
		{Kind: vault.EventDestroyed, Tenant: ann.Tenant, Pseudonym: a.Pseudonym, Generation: a.Generations[1].ID, Reason: vault.Exhausted},
	}
	c.write(t, ch)
	snap := c.read(t, ann)
	if !snap.Exists {
		t.Fatal("the account does not exist")
	}
	same(t, snap.Account, a)

	// With nothing optional.
	bare := account(vault.AccountID{Tenant: "beta", User: "ann"})
	bare.Policy.Delays = nil
	c.write(t, create(bare))
	same(t, c.read(t, bare.ID).Account, bare)
	same(t, c.read(t, ann).Account, a) // the same user of another tenant
}

func testCreateOnce(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Staged, now))
	c.write(t, create(a))
	c.refused(t, create(a), vault.ErrStale)
	c.refused(t, create(account(ann, newGeneration(1, vault.Staged, now))), vault.ErrStale)
	same(t, c.read(t, ann).Account, a)
}

func testStale(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Active, now))
	c.write(t, create(a))
	first := update(a, attempted(a.Generations[0], 1, 0, 0, now))
	second := update(a, attempted(a.Generations[0], 1, 0, 0, now))
	c.write(t, first)
	c.refused(t, second, vault.ErrStale)
	c.refused(t, first, vault.ErrStale) // itself again
	// Stale is told before the law: whoever lost the race reads again.
	second.Changed = []vault.Generation{attempted(a.Generations[0], 0, 0, 0, now)}
	c.refused(t, second, vault.ErrStale)
	same(t, c.read(t, ann).Account, first.Account)
}

func testTombstones(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Active, now), newGeneration(2, vault.Staged, now))
	c.write(t, create(a))
	// The head is destroyed, and stays in sight.
	head := update(a, destroyed(attempted(a.Generations[0], 10, 0, 0, now), vault.Exhausted))
	c.write(t, head)
	same(t, c.read(t, ann).Account, head.Account)
	// Another becomes the head; the old one is no longer read.
	active := a.Generations[1]
	active.State, active.ExpiresAt = vault.Active, time.Time{}
	next := update(head.Account, active)
	next.Account.Head = active.ID
	c.write(t, next)
	want := next.Account
	want.Generations = []vault.Generation{active}
	same(t, c.read(t, ann).Account, want)
	// A staged one that goes is not read either, and not listed in the account.
	staged := newGeneration(3, vault.Staged, now)
	third := update(want, staged)
	c.write(t, third)
	gone := update(third.Account, destroyed(staged, vault.NotInTime))
	gone.Account.Generations = []vault.Generation{active}
	c.write(t, gone)
	same(t, c.read(t, ann).Account, gone.Account)
	for _, id := range []vault.GenerationID{a.Generations[0].ID, active.ID, staged.ID} {
		if taken, err := c.Taken(t.Context(), ann, id); !taken || err != nil {
			t.Fatalf("taken: %v, %v", taken, err)
		}
	}
}

// The active generation freezes, the staged becomes active, the frozen goes, another
// is staged: no order of the rows may matter.
func testManyAtOnce(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Frozen, now), newGeneration(2, vault.Staged, now), newGeneration(3, vault.Active, now))
	c.write(t, create(a))
	g1, g2, g3 := destroyed(a.Generations[0], vault.GraceOver), a.Generations[1], a.Generations[2]
	g2.State, g2.ExpiresAt = vault.Active, time.Time{}
	g3.State, g3.ExpiresAt = vault.Frozen, now.Add(time.Hour)
	ch := update(a, g1, g2, g3, newGeneration(4, vault.Staged, now))
	ch.Account.Head = g2.ID
	c.write(t, ch)
	want := ch.Account
	want.Generations = want.Generations[1:]
	same(t, c.read(t, ann).Account, want)
}

// testLaw starts from a frozen generation (4 used), an active one (3 used after the second
// success), a staged one and a tombstone that is not the head. Each case breaks one
// rule only, so that none hides behind another.
func testLaw(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	n := 0
	var tombstone vault.Generation
	start := func(t *testing.T) vault.Account {
		n++
		a := account(vault.AccountID{Tenant: "alpha", User: fmt.Sprintf("user %d", n)},
			attempted(newGeneration(1, vault.Frozen, now), 4, 0, 0, now),
			attempted(newGeneration(2, vault.Active, now), 6, 3, 2, now),
			newGeneration(3, vault.Staged, now),
			destroyed(newGeneration(4, vault.Staged, now), vault.Superseded))
		c.write(t, create(a))
		tombstone = a.Generations[3]
		a.Generations = a.Generations[:3]
		same(t, c.read(t, a.ID).Account, a)
		return a
	}
	for _, bad := range []struct {
		name   string
		change func(a vault.Account) vault.Change
	}{
		{"started goes back", edit(1, func(g *vault.Generation) { *g = attempted(*g, 5, 3, 2, now) })},
		{"the last success goes back", edit(1, func(g *vault.Generation) { g.LastSuccess = 2 })},
		{"successes go back", edit(1, func(g *vault.Generation) { g.Successes = 1 })},
		{"all counters begin anew", edit(1, func(g *vault.Generation) { *g = attempted(*g, 0, 0, 0, now) })},
		{"forgiven without a success", edit(1, func(g *vault.Generation) { g.LastSuccess = 5 })},
		{"a success that forgives nothing", edit(1, func(g *vault.Generation) { g.Successes = 3 })},
		{"a success past what was started", edit(1, func(g *vault.Generation) { g.LastSuccess, g.Successes = 7, 3 })},
		{"the cap passed on the active one", edit(1, func(g *vault.Generation) { *g = attempted(*g, 10, 3, 2, now) })},
		{"the cap passed on the frozen one", edit(0, func(g *vault.Generation) { *g = attempted(*g, 8, 0, 0, now) })},
		{"the cap passed by both", func(a vault.Account) vault.Change {
			return update(a, attempted(a.Generations[0], 6, 0, 0, now), attempted(a.Generations[1], 8, 3, 2, now))
		}},
		{"the cap passed by one that was staged", func(a vault.Account) vault.Change {
			g := attempted(a.Generations[2], 7, 0, 0, now)
			g.State, g.ExpiresAt = vault.Active, time.Time{}
			return update(a, destroyed(a.Generations[1], vault.Replaced), g)
		}},
		{"the cap of one generation passed after its destruction", edit(1, func(g *vault.Generation) {
			*g = destroyed(attempted(*g, 14, 3, 2, now), vault.Exhausted)
			g.Attempts = g.Attempts[:2]
		})},
		{"a hundred and one failures", edit(1, func(g *vault.Generation) {
			g.Started, g.LastSuccess, g.Successes = 104, 103, 3
		})},
		{"a looser cap", policy(func(p *vault.Policy) { p.Delays = nil })},
		{"a lower cap", policy(func(p *vault.Policy) { p.MaxAttempts = 7; p.Delays = p.Delays[:7] })},
		{"another grace", policy(func(p *vault.Policy) { p.Grace += time.Second })},
		{"another delay", policy(func(p *vault.Policy) { p.Delays = slices.Clone(p.Delays); p.Delays[9] = 0 })},
		{"another policy with a used attempt left", func(a vault.Account) vault.Change {
			ch := update(a, destroyed(a.Generations[0], vault.Replaced))
			ch.Account.Policy.Delays = nil
			return ch
		}},
		{"another policy with nothing left", func(a vault.Account) vault.Change {
			ch := update(a, destroyed(a.Generations[0], vault.Replaced), destroyed(a.Generations[1], vault.Replaced))
			ch.Account.Policy.Delays = nil
			return ch
		}},
		{"a cap of eleven", policy(func(p *vault.Policy) { p.MaxAttempts = 11 })},
		{"the next number goes back", func(a vault.Account) vault.Change {
			ch := update(a)
			ch.Account.NextNumber--
			return ch
		}},
		{"a generation past the next number", func(a vault.Account) vault.Change {
			ch := update(a, newGeneration(5, vault.Destroyed, now))
			ch.Changed[0] = destroyed(ch.Changed[0], vault.Superseded)
			ch.Account.NextNumber = 5
			return ch
		}},
		{"another pseudonym", func(a vault.Account) vault.Change {
			ch := update(a)
			ch.Account.Pseudonym[0] ^= 1
			return ch
		}},
		{"a tombstone rises", func(a vault.Account) vault.Change {
			g := tombstone
			g.State, g.Reason, g.Sealed = vault.Active, "", []byte("secrets")
			return update(a, destroyed(a.Generations[1], vault.Replaced), g)
		}},
		{"a tombstone is written over", func(a vault.Account) vault.Change { return update(a, tombstone) }},
		{"an active generation is staged again", func(a vault.Account) vault.Change {
			g := a.Generations[1]
			g.State, g.ExpiresAt = vault.Staged, now
			return update(a, g, destroyed(a.Generations[2], vault.Superseded))
		}},
		{"a frozen generation is staged again", func(a vault.Account) vault.Change {
			g := a.Generations[0]
			g.State, g.ExpiresAt = vault.Staged, now
			return update(a, g, destroyed(a.Generations[2], vault.Superseded))
		}},
		{"a staged generation freezes", func(a vault.Account) vault.Change {
			g := a.Generations[2]
			g.State = vault.Frozen
			return update(a, destroyed(a.Generations[0], vault.GraceOver), g)
		}},
		{"two are active", edit(0, func(g *vault.Generation) { g.State, g.ExpiresAt = vault.Active, time.Time{} })},
		{"two are staged", func(a vault.Account) vault.Change { return update(a, newGeneration(5, vault.Staged, now)) }},
		{"a destroyed generation keeps its secrets", edit(0, func(g *vault.Generation) {
			g.State, g.Reason, g.ExpiresAt = vault.Destroyed, vault.GraceOver, time.Time{}
		})},
		{"a live generation loses its secrets", edit(1, func(g *vault.Generation) { g.Sealed = nil })},
		{"destroyed for no reason", edit(0, func(g *vault.Generation) { *g = destroyed(*g, "") })},
		{"frozen for ever", edit(0, func(g *vault.Generation) { g.ExpiresAt = time.Time{} })},
		{"another generation id", edit(1, func(g *vault.Generation) { g.ID[0] ^= 1 })},
		{"another predecessor", edit(1, func(g *vault.Generation) { g.Follows[0] ^= 1 })},
		{"another birth", edit(1, func(g *vault.Generation) { g.CreatedAt = g.CreatedAt.Add(time.Microsecond) })},
		{"another digest", edit(1, func(g *vault.Generation) { g.Digest[0] ^= 1 })},
		{"another owner key", edit(1, func(g *vault.Generation) { g.OwnerKey[0] ^= 1 })},
		{"other stretching: time", edit(1, func(g *vault.Generation) { g.KSF.Time++ })},
		{"other stretching: memory", edit(1, func(g *vault.Generation) { g.KSF.MemoryKiB-- })},
		{"other stretching: threads", edit(1, func(g *vault.Generation) { g.KSF.Threads++ })},
		{"another OPRF key", edit(1, func(g *vault.Generation) { g.OPRFKey++ })},
		{"another server key", edit(1, func(g *vault.Generation) { g.ServerKey-- })},
		{"another strategy", edit(1, func(g *vault.Generation) { g.Strategy += "2" })},
	} {
		t.Run(bad.name, func(t *testing.T) {
			a := start(t)
			c.refused(t, bad.change(a), vault.ErrLaw)
			same(t, c.read(t, a.ID).Account, a)
			// The account goes on as if nothing had been asked.
			c.write(t, update(a, attempted(a.Generations[1], 7, 3, 2, now)))
		})
	}
}

// edit changes the generation at i.
func edit(i int, change func(*vault.Generation)) func(vault.Account) vault.Change {
	return func(a vault.Account) vault.Change {
		g := a.Generations[i]
		change(&g)
		return update(a, g)
	}
}

func policy(change func(*vault.Policy)) func(vault.Account) vault.Change {
	return func(a vault.Account) vault.Change {
		ch := update(a)
		change(&ch.Account.Policy)
		return ch
	}
}

// Two unused generations are enough to keep the policy: the older one's owner has it.
func testPolicyOfTwo(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Frozen, now), newGeneration(2, vault.Active, now))
	c.write(t, create(a))
	looser := policy(func(p *vault.Policy) { p.Delays = nil })
	c.refused(t, looser(a), vault.ErrLaw)
	one := update(a, destroyed(a.Generations[0], vault.GraceOver))
	one.Account.Generations = one.Account.Generations[1:]
	c.write(t, one)
	c.write(t, looser(one.Account))
}

func testLawOnCreate(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	active, frozen := newGeneration(1, vault.Active, now), newGeneration(2, vault.Frozen, now)
	for name, a := range map[string]vault.Account{
		"eleven attempts on one":   account(ann, attempted(active, 11, 0, 0, now)),
		"eleven attempts on two":   account(ann, attempted(active, 6, 0, 0, now), attempted(frozen, 5, 0, 0, now)),
		"two active ones":          account(ann, active, newGeneration(2, vault.Active, now)),
		"a number past the next":   {ID: ann, Policy: vault.DefaultPolicy(), NextNumber: 1, Generations: []vault.Generation{active}},
		"a cap of none":            {ID: ann, Policy: vault.Policy{Grace: time.Hour}, NextNumber: 1},
		"a success never started":  account(ann, attempted(active, 0, 1, 1, now)),
		"secrets of the destroyed": account(ann, func() vault.Generation { g := active; g.State, g.Reason = vault.Destroyed, vault.Replaced; return g }()),
	} {
		t.Run(name, func(t *testing.T) {
			c.refused(t, create(a), vault.ErrLaw)
			if c.read(t, ann).Exists {
				t.Fatal("the account was created")
			}
		})
	}
}

func testLawful(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Active, now))
	c.write(t, create(a))
	step := func(name string, ch vault.Change) {
		t.Helper()
		if err := c.Write(t.Context(), ch); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		a = ch.Account
		same(t, c.read(t, ann).Account, a)
	}
	for n := range uint32(10) {
		step(fmt.Sprintf("attempt %d", n+1), update(a, attempted(a.Generations[0], n+1, 0, 0, now)))
	}
	step("a success forgives them", update(a, attempted(a.Generations[0], 10, 10, 1, now)))
	step("ten more", update(a, attempted(a.Generations[0], 20, 10, 1, now)))
	step("an earlier one of them succeeds", update(a, attempted(a.Generations[0], 20, 12, 2, now)))
	step("a hundred failures", update(a, attempted(a.Generations[0], 110, 109, 10, now)))

	staged := newGeneration(2, vault.Staged, now)
	staged.Follows = a.Generations[0].ID
	step("another is staged", update(a, staged))
	frozen, active := a.Generations[0], staged
	frozen.State, frozen.ExpiresAt = vault.Frozen, now.Add(time.Hour)
	active.State, active.ExpiresAt = vault.Active, time.Time{}
	ch := update(a, frozen, active)
	ch.Account.Head = active.ID
	step("it becomes active, the first freezes", ch)

	back := frozen
	back.State, back.ExpiresAt = vault.Active, time.Time{}
	ch = update(a, back, destroyed(active, vault.Overruled))
	ch.Account.Head = back.ID
	ch.Account.Generations = []vault.Generation{back}
	step("the first is brought back", ch)

	sealedAnew := back
	sealedAnew.Sealed = make([]byte, 333)
	random(sealedAnew.Sealed)
	step("sealed anew under another master key", update(a, sealedAnew))

	fresh := newGeneration(3, vault.Active, now)
	ch = update(a, destroyed(sealedAnew, vault.Replaced), fresh)
	ch.Account.Head = fresh.ID
	ch.Account.Generations = []vault.Generation{fresh}
	ch.Account.Policy = vault.Policy{MaxAttempts: 3, Delays: []time.Duration{time.Second}, Grace: time.Minute}
	step("one fresh generation brings the policy of today", ch)
	step("three attempts", update(a, attempted(fresh, 3, 0, 0, now)))
	c.refused(t, update(a, attempted(fresh, 4, 0, 0, now)), vault.ErrLaw)

	for i, why := range []vault.Reason{vault.Exhausted, vault.Failures, vault.Replaced, vault.Overruled,
		vault.TurnedOff, vault.GraceOver, vault.NotInTime, vault.Superseded} {
		b := account(vault.AccountID{Tenant: "beta", User: string(why)}, newGeneration(1, vault.Active, now))
		c.write(t, create(b))
		end := update(b, destroyed(b.Generations[0], why))
		for _, kind := range []vault.EventKind{vault.EventStaged, vault.EventActivated, vault.EventFrozen,
			vault.EventReinstated, vault.EventAttempt, vault.EventSuccess, vault.EventFailure, vault.EventDestroyed} {
			e := vault.Event{Kind: kind, Tenant: "beta", Pseudonym: b.Pseudonym, Generation: b.Generations[0].ID}
			switch kind {
			case vault.EventAttempt, vault.EventSuccess, vault.EventFailure:
				e.Attempt = uint32(i + 1)
			case vault.EventDestroyed:
				e.Reason = why
			}
			end.Events = append(end.Events, e)
		}
		c.write(t, end)
		same(t, c.read(t, b.ID).Account, end.Account)
	}
}

// A write that is refused for one of its generations writes none of the others.
func testNothingLeft(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, attempted(newGeneration(1, vault.Frozen, now), 4, 0, 0, now), attempted(newGeneration(2, vault.Active, now), 4, 0, 0, now))
	c.write(t, create(a))
	bad := update(a, attempted(a.Generations[0], 5, 0, 0, now), attempted(a.Generations[1], 3, 0, 0, now), newGeneration(3, vault.Staged, now))
	c.refused(t, bad, vault.ErrLaw)
	same(t, c.read(t, ann).Account, a)
	if taken, err := c.Taken(t.Context(), ann, bad.Changed[2].ID); taken || err != nil {
		t.Fatalf("taken: %v, %v", taken, err)
	}
}

func testTaken(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	a := account(ann, newGeneration(1, vault.Active, now), newGeneration(2, vault.Staged, now))
	c.write(t, create(a))
	gone := update(a, destroyed(a.Generations[1], vault.Superseded))
	gone.Account.Generations = gone.Account.Generations[:1]
	c.write(t, gone)
	for _, id := range []vault.GenerationID{a.Generations[0].ID, a.Generations[1].ID} {
		again := newGeneration(3, vault.Staged, now)
		again.ID = id
		c.refused(t, update(gone.Account, again), vault.ErrStale)
	}
	same(t, c.read(t, ann).Account, gone.Account)
	// Another account may have it: ids are the account's own.
	b := account(vault.AccountID{Tenant: "beta", User: "ann"}, a.Generations[0])
	c.write(t, create(b))
	if taken, err := c.Taken(t.Context(), b.ID, a.Generations[1].ID); taken || err != nil {
		t.Fatalf("taken by another account: %v, %v", taken, err)
	}
}

// racers run at once; each answer is nil or ErrStale.
func racers(t *testing.T, n int, write func(i int) error) (won []int) {
	t.Helper()
	errs := make([]error, n)
	var ready, done sync.WaitGroup
	ready.Add(1)
	for i := range n {
		done.Go(func() {
			ready.Wait()
			errs[i] = write(i)
		})
	}
	ready.Done()
	done.Wait()
	for i, err := range errs {
		switch {
		case err == nil:
			won = append(won, i)
		case !errors.Is(err, vault.ErrStale):
			t.Errorf("racer %d: %v", i, err)
		}
	}
	return won
}

func testRace(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	// One attempt is left.
	a := account(ann, attempted(newGeneration(1, vault.Active, now), 9, 0, 0, now))
	c.write(t, create(a))
	changes := make([]vault.Change, 16)
	for i := range changes {
		changes[i] = update(a, attempted(a.Generations[0], 10, 0, 0, now))
	}
	won := racers(t, len(changes), func(i int) error { return c.Write(t.Context(), changes[i]) })
	if len(won) != 1 {
		t.Fatalf("%d writers won", len(won))
	}
	same(t, c.read(t, ann).Account, changes[won[0]].Account)
}

func testCreateRace(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	changes := make([]vault.Change, 16)
	for i := range changes {
		changes[i] = create(account(ann, newGeneration(1, vault.Staged, now)))
	}
	won := racers(t, len(changes), func(i int) error { return c.Write(t.Context(), changes[i]) })
	if len(won) != 1 {
		t.Fatalf("%d creators won", len(won))
	}
	same(t, c.read(t, ann).Account, changes[won[0]].Account)
}

// Each writer counts one attempt, reading again as often as it must; together they
// come to exactly the cap, and the rest is refused by the law.
func testCountingRace(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	c.write(t, create(account(ann,
		attempted(newGeneration(1, vault.Frozen, now), 2, 0, 0, now), newGeneration(2, vault.Active, now))))
	const writers = 12
	errs := make([]error, writers)
	var done sync.WaitGroup
	for i := range writers {
		done.Go(func() {
			for {
				snap, err := c.Account(t.Context(), ann)
				if err != nil {
					errs[i] = err
					return
				}
				g := snap.Account.Generations[i%2]
				g = attempted(g, g.Started+1, 0, 0, now)
				if errs[i] = c.Write(t.Context(), update(snap.Account, g)); !errors.Is(errs[i], vault.ErrStale) {
					return
				}
			}
		})
	}
	done.Wait()
	counted := 0
	for i, err := range errs {
		switch {
		case err == nil:
			counted++
		case !errors.Is(err, vault.ErrLaw):
			t.Errorf("writer %d: %v", i, err)
		}
	}
	a := c.read(t, ann).Account
	if used := a.Generations[0].Used() + a.Generations[1].Used(); counted != 8 || used != 10 {
		t.Fatalf("%d attempts counted, %d used; want 8 and 10", counted, used)
	}
}

func testDue(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	var want []vault.AccountID
	for _, tenant := range Tenants {
		for i, user := range []string{"a", "a\x01", "aa", "b", "B", "é", "\u00ff", "~", "z/1", strings.Repeat("z", 256)} {
			id := vault.AccountID{Tenant: tenant, User: user}
			g := newGeneration(1, vault.Staged, now)
			if i%3 == 2 { // not yet
				c.write(t, create(account(id, g)))
				continue
			}
			g.ExpiresAt = now.Add(-time.Duration(i) * time.Second)
			c.write(t, create(account(id, g)))
			want = append(want, id)
		}
		id := vault.AccountID{Tenant: tenant, User: "never"}
		c.write(t, create(account(id, newGeneration(1, vault.Active, now))))
	}
	slices.SortFunc(want, compareIDs)
	for _, limit := range []int{1, 3, 100} {
		var got []vault.AccountID
		for after := (vault.AccountID{}); ; after = got[len(got)-1] {
			page, err := c.Due(t.Context(), after, limit)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) > limit {
				t.Fatalf("%d accounts in a page of %d", len(page), limit)
			}
			got = append(got, page...)
			if len(page) < limit {
				break
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("pages of %d (-want +got):\n%s", limit, diff)
		}
	}
	// What is done is due no more.
	a := c.read(t, want[0]).Account
	gone := update(a, destroyed(a.Generations[0], vault.NotInTime))
	gone.Account.Generations = nil
	c.write(t, gone)
	if page, err := c.Due(t.Context(), vault.AccountID{}, 1); err != nil || len(page) != 1 || page[0] != want[1] {
		t.Fatalf("after the first was done: %v, %v", page, err)
	}
}

func testUserIDs(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	written := map[vault.AccountID]vault.Account{}
	for _, user := range []string{
		"a", "A", "a ", " a", "a/b", "a%2Fb", "../a", `a\b`, `a'"b`, "é", "e\u0301", "ß", "ss", "İ", "i", "日本語", "👩\u200d👩\u200d👧",
		"\\x61", "NULL", "{}", "\x00", "a\x00", "\xff\xfe", strings.Repeat("x", 256), strings.Repeat("\xff", 256),
	} {
		a := account(vault.AccountID{Tenant: "alpha", User: user}, newGeneration(1, vault.Staged, now))
		c.write(t, create(a))
		written[a.ID] = a
	}
	for id, a := range written {
		same(t, c.read(t, id).Account, a)
	}
	for _, user := range []string{"", strings.Repeat("x", 257), "b", "日本"} {
		if c.read(t, vault.AccountID{Tenant: "alpha", User: user}).Exists {
			t.Fatalf("%q exists", user)
		}
	}
}

// A caller may change what it wrote or read; the store's own stays.
func testNoAliasing(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	make := func() vault.Account {
		return account(ann, attempted(newGeneration(1, vault.Active, now), 3, 0, 0, now))
	}
	a := make()
	ch := create(a)
	c.write(t, ch)
	want := c.read(t, ann).Account
	clear(a.Generations[0].Sealed)
	a.Generations[0].Attempts[0].Claim = vault.Claim{}
	a.Policy.Delays[5] = 0
	same(t, c.read(t, ann).Account, want)
	got := c.read(t, ann).Account
	clear(got.Generations[0].Sealed)
	got.Generations[0].Attempts[0].Claim = vault.Claim{}
	got.Policy.Delays[5] = 0
	got.Generations = got.Generations[:0]
	same(t, c.read(t, ann).Account, want)
}

// A store that rounded would give back another row than the one that its MAC covers.
func testExact(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	for name, spoil := range map[string]func(*vault.Account){
		"birth":   func(a *vault.Account) { a.Generations[0].CreatedAt = now.Add(1) },
		"expiry":  func(a *vault.Account) { a.Generations[0].ExpiresAt = now.Add(999) },
		"charge":  func(a *vault.Account) { a.Generations[0].Attempts[1].ChargedAt = now.Add(1) },
		"attempt": func(a *vault.Account) { a.Generations[0].Attempts[1].ExpiresAt = now.Add(1) },
		"delay":   func(a *vault.Account) { a.Policy.Delays[3] = 1 },
		"grace":   func(a *vault.Account) { a.Policy.Grace++ },
	} {
		a := account(ann, attempted(newGeneration(1, vault.Frozen, now), 2, 0, 0, now))
		spoil(&a)
		if err := c.Write(t.Context(), create(a)); err == nil {
			t.Errorf("%s: rounded", name)
		}
	}
	a := account(ann, newGeneration(1, vault.Frozen, now), newGeneration(2, vault.Active, now))
	ch := create(a)
	ch.Changed = []vault.Generation{a.Generations[1], a.Generations[0]}
	if err := c.Write(t.Context(), ch); err == nil {
		t.Error("generations out of order were written")
	}
	if c.read(t, ann).Exists {
		t.Fatal("the account was created")
	}
}

func testContext(t *testing.T, c *contract) {
	now := c.read(t, ann).Now
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, errAccount := c.Account(ctx, ann)
	_, errDue := c.Due(ctx, vault.AccountID{}, 1)
	_, errTaken := c.Taken(ctx, ann, vault.GenerationID{})
	for name, err := range map[string]error{
		"account": errAccount, "due": errDue, "taken": errTaken,
		"write": c.Write(ctx, create(account(ann, newGeneration(1, vault.Staged, now)))),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if c.read(t, ann).Exists {
		t.Fatal("the account was created")
	}
}

// sealedUnder is a made-up sealed value of a key's generation.
func sealedUnder(generation uint32) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{1}, generation), make([]byte, 60)...)
}

func testUnder(t *testing.T, c *contract) {
	now := c.read(t, vault.AccountID{Tenant: "alpha", User: "nobody"}).Now
	under := func(purpose string, generation uint32, want ...vault.AccountID) {
		t.Helper()
		var got []vault.AccountID
		for after := (vault.AccountID{}); ; after = got[len(got)-1] {
			page, err := c.Under(t.Context(), vault.Key{Purpose: purpose, Generation: generation}, after, 2)
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, page...); len(page) < 2 {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("under %s/%d: %v, want %v", purpose, generation, got, want)
		}
	}
	var ids []vault.AccountID
	for i, user := range []string{"a", "b", "c"} {
		for _, tenant := range Tenants {
			id := vault.AccountID{Tenant: tenant, User: user}
			ids = append(ids, id)
			active, frozen := newGeneration(1, vault.Active, now), newGeneration(2, vault.Frozen, now)
			active.Sealed, frozen.Sealed = sealedUnder(uint32(1+i)), sealedUnder(1<<32-1)
			a := account(id, active, frozen)
			a.MACKey = uint32(10 + i)
			c.write(t, create(a))
		}
	}
	slices.SortFunc(ids, func(a, b vault.AccountID) int { return strings.Compare(a.Tenant+" "+a.User, b.Tenant+" "+b.User) })
	under("master", 1, ids[0], ids[3])
	under("master", 2, ids[1], ids[4])
	under("master", 4)
	under("master", 1<<32-1, ids...)
	under("mac", 12, ids[2], ids[5])
	under("mac", 1)
	// Sealed anew, and destroyed: neither is under the key any more.
	for i, edit := range []func(g *vault.Generation){
		func(g *vault.Generation) { g.Sealed = sealedUnder(3) },
		func(g *vault.Generation) { *g = destroyed(*g, vault.TurnedOff) },
	} {
		snap := c.read(t, ids[3*i])
		g := snap.Account.Generations[0]
		edit(&g)
		c.write(t, update(snap.Account, g))
	}
	under("master", 1)
	under("master", 3, ids[0], ids[2], ids[5])
}

func testRelaySeeds(t *testing.T, c *contract) {
	seed := func(b byte) []byte { return append([]byte{1, 0, 0, 0, 1}, bytes.Repeat([]byte{b}, 100)...) }
	swap := func(generation uint32, old, sealed []byte, want error) {
		t.Helper()
		if err := c.SwapRelaySeed(t.Context(), generation, old, sealed); !errors.Is(err, want) {
			t.Fatalf("got %v, want %v", err, want)
		}
	}
	has := func(want map[uint32][]byte) {
		t.Helper()
		got, err := c.RelaySeeds(t.Context())
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%v, %v; want %v", got, err, want)
		}
	}
	has(map[uint32][]byte{})
	swap(1, seed(9), seed(1), vault.ErrStale)
	// Of many who bring the first, one wins.
	var won atomic.Int32
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			switch err := c.SwapRelaySeed(t.Context(), 1, nil, seed(byte(i))); {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, vault.ErrStale):
				t.Error(err)
			}
		})
	}
	group.Wait()
	got, err := c.RelaySeeds(t.Context())
	if err != nil || won.Load() != 1 {
		t.Fatalf("%d won: %v", won.Load(), err)
	}
	first := got[1]
	swap(1, nil, seed(20), vault.ErrStale)
	swap(1, seed(21), seed(22), vault.ErrStale)
	swap(1, first, seed(23), nil)
	swap(4294967295, nil, seed(24), nil)
	has(map[uint32][]byte{1: seed(23), 4294967295: seed(24)})
	swap(1, seed(23), nil, nil)
	for _, old := range [][]byte{nil, seed(23)} {
		swap(1, old, seed(25), vault.ErrStale)
	}
	has(map[uint32][]byte{4294967295: seed(24)})
}
