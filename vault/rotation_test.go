package vault_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
)

// site is a deployment whose keys rotate: a database, a token, and instances that each
// have a login to the token, connections, and a rotation of their own.
type site struct {
	db  *storetest.Database
	tok *tokentest.Token
}

type node struct {
	*vault.Vault
	keys     *pkcs11util.Keyset
	counted  *countingToken
	store    *store.Store
	rotation *vault.Rotation
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{db: storetest.New(t), tok: tokentest.New(t)}
	if err := s.db.OwnerStore(t).AddTenant(t.Context(), vault.Tenant{ID: "app", Policy: vault.DefaultPolicy()}); err != nil {
		t.Fatal(err)
	}
	return s
}

// start adds an instance. wrap, if not nil, comes between its rotation and the token.
func (s *site) start(t testing.TB, wrap func(vault.KeyToken) vault.KeyToken) *node {
	t.Helper()
	n := s.unstarted(t, wrap)
	if err := n.rotation.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func (s *site) unstarted(t testing.TB, wrap func(vault.KeyToken) vault.KeyToken) *node {
	t.Helper()
	n := &node{keys: s.tok.OpenKeyset(t, s.tok.Config()), store: s.db.Store(t)}
	n.counted = &countingToken{Token: n.keys, evaluated: map[[33]byte]bool{}}
	var err error
	if n.Vault, err = vault.New(vault.Config{ID: vaultID, Store: n.store, Token: n.counted}); err != nil {
		t.Fatal(err)
	}
	var token vault.KeyToken = n.keys
	if wrap != nil {
		token = wrap(token)
	}
	n.rotation, err = vault.NewRotation(vault.RotationConfig{
		Store: n.store, Token: token, Vault: n.Vault, RewrapsPerSecond: 100_000, SyncEvery: 50 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) rotate(t testing.TB, purpose string) vault.Key {
	t.Helper()
	key, err := n.rotation.Rotate(t.Context(), purpose)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (n *node) status(t testing.TB) *vault.KeyStatus {
	t.Helper()
	status, err := n.rotation.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	overview, err := n.rotation.Overview(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(overview.Keys) != len(status.Keys) || !overview.OldestUncovered.Equal(status.OldestUncovered) {
		t.Errorf("the overview has %d keys and the oldest uncovered destruction %v, the status %d and %v",
			len(overview.Keys), overview.OldestUncovered, len(status.Keys), status.OldestUncovered)
	}
	// Only a rewrap may have come between.
	if overview.RewrapLeft > status.RewrapLeft {
		t.Errorf("the overview has %d records left to rewrap, the status had %d", overview.RewrapLeft, status.RewrapLeft)
	}
	return status
}

func (n *node) key(t testing.TB, key vault.Key) vault.KeyReport {
	t.Helper()
	for _, k := range n.status(t).Keys {
		if k.Key == key {
			return k
		}
	}
	t.Fatalf("no key %v", key)
	return vault.KeyReport{}
}

func refusedBecause(t testing.TB, err error, reason string) {
	t.Helper()
	var refused *vault.KeyRefusal
	if !errors.As(err, &refused) || !strings.Contains(refused.Reason, reason) {
		t.Fatalf("got %v, want a refusal with %q", err, reason)
	}
}

func (s *site) events(t testing.TB) (kinds []string) {
	t.Helper()
	for _, kind := range []string{"key-made", "key-current", "rewrap-done", "key-destroyed"} {
		n := s.db.Exec(t, `SELECT FROM events WHERE kind = $1 AND (purpose <> 'master' OR key_generation > 0)`, kind)
		kinds = append(kinds, fmt.Sprintf("%s×%d", kind, n))
	}
	return kinds
}

// labels are those of the objects in the token.
func (s *site) labels(t testing.TB) (labels []string) {
	t.Helper()
	s.tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(session, nil); err != nil {
			return err
		}
		found, _, err := p.FindObjects(session, 1000)
		if err != nil {
			return err
		}
		for _, h := range found {
			values, err := p.GetAttributeValue(session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return err
			}
			labels = append(labels, string(values[0].Value))
		}
		return p.FindObjectsFinal(session)
	})
	slices.Sort(labels)
	return labels
}

var master1, master2 = vault.Key{Purpose: "master", Generation: 1}, vault.Key{Purpose: "master", Generation: 2}

// A dump from before a rotation cannot be opened by anybody after it: not what was destroyed
// since, and not what lives, whether the dump's rows come back alone or with their MACs.
func TestRotationMakesOldDumpsWorthless(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.start(t, nil), s.start(t, nil)
	ann, bob, eve := deviceOf(a.Vault, "ann"), deviceOf(b.Vault, "bob"), deviceOf(a.Vault, "eve")
	annKey := ann.MustEnrol(t, "ann's", nil)
	bobFirst := bob.MustEnrol(t, "first", nil)
	eveKey := eve.MustEnrol(t, "eve's", nil)
	if _, err := bob.Recover(t.Context(), "wrong"); err == nil {
		t.Fatal("a wrong password was right")
	}

	// The dump.
	s.db.Exec(t, `CREATE TABLE dump_accounts AS SELECT * FROM accounts`)
	s.db.Exec(t, `CREATE TABLE dump_generations AS SELECT * FROM generations`)
	snap, err := a.store.Account(t.Context(), ann.Caller.Account)
	if err != nil {
		t.Fatal(err)
	}
	dumped := snap.Account.Generations[0]

	// Bob's first key and Eve's are destroyed after the dump, and nothing covers that yet.
	bobSecond := bob.MustEnrol(t, "second", bobFirst)
	if _, err := eve.Vault.TurnOff(t.Context(), eve.Caller, eveKey.Generation, eve.Statement(transcript.TurnOff, eveKey.Generation, vault.GenerationID{}, eveKey.Digest).Sign(eveKey.Owner)); err != nil {
		t.Fatal(err)
	}
	if a.status(t).OldestUncovered.IsZero() {
		t.Error("a destruction is covered before any rotation")
	}
	evaluated := a.counted.count() + b.counted.count()

	if key := a.rotate(t, "master"); key != master2 {
		t.Fatalf("rotated to %v", key)
	}
	// What follows goes through the other instance, which has not been told.
	cat := deviceOf(b.Vault, "cat")
	catKey := cat.MustEnrol(t, "cat's", nil)
	refusedBecause(t, a.rotation.Destroy(t.Context(), master1), "records still need key master/1")
	if !slices.Contains(s.labels(t), "bkv/master/1") {
		t.Fatal("a key that records need was destroyed")
	}
	_, err = a.rotation.Rotate(t.Context(), "master")
	refusedBecause(t, err, "still in progress")
	for range 2 { // the second run has nothing to do
		if err := b.rotation.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := b.rotation.Rewrap(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.key(t, master1).Dependents; n != 0 {
		t.Fatalf("%d records are left under the old key", n)
	}
	if n := b.key(t, master2).Dependents; n != 3 { // ann's, bob's second, cat's; no tombstone
		t.Fatalf("%d records are under the new key, want 3", n)
	}
	if a.status(t).OldestUncovered.IsZero() {
		t.Error("a destruction is covered while the old key exists")
	}
	if err := b.rotation.Destroy(t.Context(), master1); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(s.labels(t), "bkv/master/1") {
		t.Error("the token still has an object of the old key")
	}
	if k := b.key(t, master1); k.State != vault.KeyDestroyed || k.Proven {
		t.Errorf("the old key: %+v", k)
	}
	if at := a.status(t).OldestUncovered; !at.IsZero() {
		t.Errorf("the destruction of %v is not covered by the rotation", at)
	}
	if n := a.counted.count() + b.counted.count() - evaluated; n != 1 { // cat's enrolment
		t.Errorf("the rotation evaluated %d elements", n-1)
	}
	if got := strings.Join(s.events(t), " "); got != "key-made×9 key-current×9 rewrap-done×1 key-destroyed×1" {
		t.Errorf("events: %s", got)
	}

	// The token does not open the dump's record: neither through this login nor through a new one.
	for _, keys := range []*pkcs11util.Keyset{a.keys, b.keys, s.tok.OpenKeyset(t, s.tok.Config())} {
		if _, authentic, err := keys.Open(t.Context(), "master", dumped.ID, dumped.Sealed, nil); err != nil || authentic {
			t.Errorf("the dump's record: authentic %v, %v", authentic, err)
		}
	}
	// Everybody alive is served.
	for d, want := range map[interface {
		Recover(context.Context, string) ([32]byte, error)
	}][2]any{ann: {"ann's", annKey.Key}, bob: {"second", bobSecond.Key}, cat: {"cat's", catKey.Key}} {
		if key, err := d.Recover(t.Context(), want[0].(string)); err != nil || key != want[1].([32]byte) {
			t.Errorf("%s: %v", want[0], err)
		}
	}
	// The dump's sealed value in the living row, then the dump's rows with their MACs.
	s.db.Exec(t, `UPDATE generations SET sealed = d.sealed FROM dump_generations AS d
		WHERE generations.generation_id = d.generation_id AND generations.user_id = 'ann'::bytea`)
	if _, err := ann.Recover(t.Context(), "ann's"); !errors.Is(err, vault.ErrAccountFault) {
		t.Errorf("the dump's value in the living row: %v", err)
	}
	s.db.Exec(t, `DELETE FROM generations`)
	s.db.Exec(t, `DELETE FROM accounts`)
	s.db.Exec(t, `INSERT INTO accounts SELECT * FROM dump_accounts`)
	s.db.Exec(t, `INSERT INTO generations SELECT * FROM dump_generations`)
	if _, err := bob.Vault.Status(t.Context(), bob.Caller); err != nil {
		t.Fatalf("the dump's rows are genuine, so that the next line shows what it says: %v", err)
	}
	for d, password := range map[interface {
		Recover(context.Context, string) ([32]byte, error)
	}]string{ann: "ann's", bob: "first", eve: "eve's"} {
		if _, err := d.Recover(t.Context(), password); !errors.Is(err, vault.ErrAccountFault) {
			t.Errorf("%s from the dump: %v", password, err)
		}
	}
	if warnings := a.status(t).Warnings; len(warnings) != 1 || !strings.Contains(warnings[0], "3 records need key master/1, which is destroyed") {
		t.Errorf("warnings: %q", warnings)
	}
}

// Enrolments and recoveries go on through two instances while master, mac and state rotate again and again and old keys
// are destroyed at once: none fails, none is charged twice, none is evaluated uncounted.
func TestRotationUnderTraffic(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	nodes := []*node{s.start(t, nil), s.start(t, nil)}
	running, stop := context.WithCancel(t.Context())
	var background, traffic sync.WaitGroup
	for _, n := range nodes {
		background.Go(func() { n.rotation.Run(running) })
	}
	const users = 6
	enough := make(chan struct{})
	var recoveries, enrolments sync.Map
	for u := range users {
		traffic.Go(func() {
			user := fmt.Sprintf("user-%d", u)
			devices := []interface {
				Recover(context.Context, string) ([32]byte, error)
			}{deviceOf(nodes[0].Vault, user), deviceOf(nodes[1].Vault, user)}
			current, count, enrolled := deviceOf(nodes[u%2].Vault, user).MustEnrol(t, "right", nil), 0, 1
			for i := 0; ; i++ {
				select {
				case <-enough:
					recoveries.Store(u, count)
					enrolments.Store(u, enrolled)
					return
				default:
				}
				key, err := devices[i%2].Recover(t.Context(), "right")
				if err != nil || key != current.Key {
					t.Errorf("%s: recovery %d: %v", user, i, err)
					return
				}
				count++
				if i%5 == 4 {
					next, err := deviceOf(nodes[i%2].Vault, user).Enrol(t.Context(), "right", current)
					if err != nil {
						t.Errorf("%s: enrolment: %v", user, err)
						return
					}
					current = next
					enrolled++
				}
			}
		})
	}
	for round := range 3 {
		for _, purpose := range []string{"master", "mac", "state"} {
			n := nodes[round%2]
			key := n.rotate(t, purpose)
			old := vault.Key{Purpose: purpose, Generation: key.Generation - 1}
			if purpose == "state" || old == (vault.Key{Purpose: "mac", Generation: 1}) {
				continue
			}
			eventually(t, func() error {
				err := n.rotation.Destroy(t.Context(), old)
				var refused *vault.KeyRefusal
				if err != nil && !errors.As(err, &refused) {
					t.Fatal(err)
				}
				return err
			})
		}
	}
	close(enough)
	traffic.Wait()
	stop()
	background.Wait()
	total := 0
	for u := range users {
		r, ok := recoveries.Load(u)
		e, _ := enrolments.Load(u)
		if !ok {
			t.Fatal("a user gave up")
		}
		total += r.(int) + e.(int)
	}
	if n := nodes[0].counted.count() + nodes[1].counted.count(); n != total {
		t.Errorf("%d distinct evaluations for %d recoveries and enrolments", n, total)
	}
	if n := s.db.Exec(t, `SELECT FROM generations WHERE state <> 'destroyed' AND started <> last_success`); n != 0 {
		t.Errorf("%d generations have attempts that were charged and not credited", n)
	}
	if n := s.db.Exec(t, `SELECT FROM events WHERE kind = 'rewrap-done'`); n != 6 {
		t.Errorf("%d rewraps done, want 6", n)
	}
	if k := nodes[0].key(t, vault.Key{Purpose: "master", Generation: 4}); k.State != vault.KeyCurrent || k.Dependents != users || k.Seals < users {
		t.Errorf("the newest master key: %+v", k)
	}
}

// eventually repeats what is refused until the background work is done.
func eventually(t testing.TB, do func() error) {
	t.Helper()
	var err error
	for range 600 {
		if err = do(); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal(err)
}

// Two operators at once, each at an instance of his own: one new key, and a clear refusal or the same key.
func TestTwoRotationsAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	nodes := []*node{s.start(t, nil), s.start(t, nil), s.start(t, nil)}
	deviceOf(nodes[0].Vault, "ann").MustEnrol(t, "right", nil)
	errs, got := make([]error, 6), make([]vault.Key, 6)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { got[i], errs[i] = nodes[i%3].rotation.Rotate(t.Context(), "master") })
	}
	wg.Wait()
	won := 0
	for i, err := range errs {
		var refused *vault.KeyRefusal
		switch {
		case err == nil && got[i] == master2:
			won++
		case !errors.As(err, &refused):
			t.Errorf("got %v, %v; want %v or a refusal", got[i], err, master2)
		}
	}
	if won == 0 {
		t.Errorf("none of the rotations succeeded: %v", errs)
	}
	if k := nodes[2].key(t, master2); k.State != vault.KeyCurrent {
		t.Errorf("%v is %s", master2, k.State)
	}
	labels := s.labels(t)
	if n := len(slices.DeleteFunc(labels, func(l string) bool { return !strings.Contains(l, "master") })); n != 2 {
		t.Errorf("%d master keys in the token, want 2", n)
	}
}

func TestRotationRefusals(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	before := s.labels(t)
	rotate := func(purpose string) error { return errOf(n.rotation.Rotate(t.Context(), purpose)) }
	destroy := func(purpose string, generation uint32) error {
		return n.rotation.Destroy(t.Context(), vault.Key{Purpose: purpose, Generation: generation})
	}
	var invalid *vault.InvalidRequest
	for _, err := range []error{rotate(""), rotate("Master"), rotate("tmp/master"), destroy("master", 2), destroy("nothing", 1), destroy("master", 0)} {
		if !errors.As(err, &invalid) {
			t.Errorf("got %v, want an invalid request", err)
		}
	}
	refusedBecause(t, rotate("identity"), "never rotates")
	refusedBecause(t, destroy("identity", 1), "never destroyed")
	refusedBecause(t, destroy("mac", 1), "never destroyed")
	refusedBecause(t, destroy("master", 1), "in use")
	if after := s.labels(t); !slices.Equal(after, before) {
		t.Errorf("refusals changed the token: %v", after)
	}
	n.rotate(t, "mac")
	refusedBecause(t, destroy("mac", 1), "pseudonyms")
	n.rotate(t, "oprf")
	refusedBecause(t, destroy("oprf", 1), "may still be needed by what was begun with it, until ")
	n.rotate(t, "audit")
	if err := destroy("audit", 1); err != nil {
		t.Error(err)
	}
}

// OPRF and server keys: new enrolments take the new one, old records keep theirs until the last one is gone.
func TestRotationOfOPRFAndServerKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.start(t, nil), s.start(t, nil)
	ann, bob := deviceOf(a.Vault, "ann"), deviceOf(b.Vault, "bob")
	first := ann.MustEnrol(t, "first", nil)
	begun, err := bob.Prepare(t.Context(), "bob's") // an enrolment across the rotation
	if err != nil {
		t.Fatal(err)
	}
	before, err := a.Identity(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	oprf1, server1 := vault.Key{Purpose: "oprf", Generation: 1}, vault.Key{Purpose: "server", Generation: 1}
	a.rotate(t, "oprf")
	a.rotate(t, "server")
	if err := b.rotation.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b} {
		now, err := n.Identity(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if now.Keys.Serial <= before.Keys.Serial || len(now.Keys.Keys) != 4 || now.Keys.Keys[0].Generation != 2 || now.Keys.Keys[1].Generation != 1 {
			t.Errorf("the key list after the rotation has %d keys and the serial %d", len(now.Keys.Keys), now.Keys.Serial)
		}
	}
	if err := bob.Stage(t.Context(), begun); err != nil {
		t.Fatal(err)
	}
	if _, err := bob.Vault.Activate(t.Context(), bob.Caller, bob.Activation(begun, nil)); err != nil {
		t.Fatal(err)
	}
	for d, want := range map[interface {
		Recover(context.Context, string) ([32]byte, error)
	}]string{ann: "first", bob: "bob's"} {
		if _, err := d.Recover(t.Context(), want); err != nil {
			t.Errorf("%s, whose record is of the old keys: %v", want, err)
		}
	}
	second := ann.MustEnrol(t, "second", first)
	if k, o := a.key(t, oprf1), a.key(t, vault.Key{Purpose: "oprf", Generation: 2}); k.Dependents != 1 || o.Dependents != 1 {
		t.Errorf("%d records on the old key and %d on the new one, want 1 and 1", k.Dependents, o.Dependents)
	}
	late, err := deviceOf(a.Vault, "late").Prepare(t.Context(), "late")
	if err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, `UPDATE key_generations SET retired_at = retired_at - interval '2 hours' WHERE state = 'retired'`)
	refusedBecause(t, a.rotation.Destroy(t.Context(), oprf1), "1 records still need key oprf/1, and it serves until")
	bob.MustEnrol(t, "bob's", begun)
	for _, key := range []vault.Key{oprf1, server1} {
		if err := a.rotation.Destroy(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := deviceOf(a.Vault, "late").Stage(t.Context(), late); err != nil {
		t.Errorf("an enrolment with the new keys: %v", err)
	}
	if slices.ContainsFunc(s.labels(t), func(l string) bool { return l == "bkv/oprf/1" || l == "bkv/server/1" }) {
		t.Errorf("the token still holds them: %v", s.labels(t))
	}
	if key, err := ann.Recover(t.Context(), "second"); err != nil || key != second.Key {
		t.Error(err)
	}
	// The other instance notices, and its list shrinks; the serial does not go back.
	if err := b.rotation.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	now, err := b.Identity(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if len(now.Keys.Keys) != 3 || now.Keys.Serial != 2 {
		t.Errorf("%d keys and the serial %d", len(now.Keys.Keys), now.Keys.Serial)
	}
}

// An instance that has not noticed a rotation seals under the old key. Once that is closing, the store refuses, and nothing is lost.
func TestNothingNewDependsOnAClosingKey(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, stale := s.start(t, nil), s.start(t, nil)
	d := deviceOf(stale.Vault, "ann")
	begun, err := d.Prepare(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	for _, purpose := range []string{"master", "oprf", "mac", "mac"} {
		a.rotate(t, purpose)
	}
	s.db.Exec(t, `UPDATE key_generations SET state = 'closing' WHERE purpose = 'master' AND generation = 1`)
	if err := d.Stage(t.Context(), begun); !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatalf("a record under a closing master key: %v", err)
	}
	if err := stale.rotation.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, `UPDATE key_generations SET state = 'closing' WHERE purpose = 'oprf' AND generation = 1`)
	var conflict *vault.Conflict
	if err := d.Stage(t.Context(), begun); !errors.As(err, &conflict) {
		t.Fatalf("a record of a closing OPRF key: %v", err)
	}
	if n := s.db.Exec(t, `SELECT FROM generations`); n != 0 {
		t.Fatal("something was written")
	}
	d.MustEnrol(t, "right", nil)
	s.db.Exec(t, `UPDATE key_generations SET state = 'closing' WHERE purpose = 'mac' AND generation = 2`)
	if _, err := d.Recover(t.Context(), "right"); err != nil {
		t.Fatalf("with the mac key before the last closing: %v", err)
	}
}

// State keys rotate by themselves; what was sealed before opens until it cannot be valid any more.
func TestStateRotatesOnSchedule(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	d := deviceOf(n.Vault, "ann")
	begun, err := d.Prepare(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	state1, state2 := vault.Key{Purpose: "state", Generation: 1}, vault.Key{Purpose: "state", Generation: 2}
	tick := func() {
		t.Helper()
		if err := n.rotation.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	tick()
	if n.keys.Newest("state") != 1 {
		t.Fatal("rotated before its time")
	}
	s.db.Exec(t, `UPDATE key_generations SET current_since = current_since - interval '31 days' WHERE purpose = 'state'`)
	tick()
	tick()
	if n.keys.Newest("state") != 2 || n.key(t, state2).State != vault.KeyCurrent || n.key(t, state1).State != vault.KeyRetired {
		t.Fatalf("%+v, %+v", n.key(t, state1), n.key(t, state2))
	}
	refusedBecause(t, n.rotation.Destroy(t.Context(), state1), "may still be needed")
	if err := d.Stage(t.Context(), begun); err != nil {
		t.Fatalf("a state from before the rotation: %v", err)
	}
	if _, err := d.Vault.Activate(t.Context(), d.Caller, d.Activation(begun, nil)); err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, `UPDATE key_generations SET retired_at = retired_at - interval '2 hours' WHERE purpose = 'state' AND generation = 1`)
	tick()
	if n.key(t, state1).State != vault.KeyDestroyed || slices.Contains(s.labels(t), "bkv/state/1") {
		t.Errorf("the old key is still there: %+v", n.key(t, state1))
	}
	var invalid *vault.InvalidRequest
	if err := d.Stage(t.Context(), begun); !errors.As(err, &invalid) {
		t.Errorf("a state of a destroyed key: %v", err)
	}
	if _, err := d.Recover(t.Context(), "right"); err != nil {
		t.Error(err)
	}
	// A database from before the rotation, with the token of today: another key is made.
	s.db.Exec(t, `DELETE FROM token_proofs WHERE purpose = 'state'`)
	s.db.Exec(t, `DELETE FROM key_generations WHERE purpose = 'state' AND generation = 2`)
	s.db.Exec(t, `UPDATE key_generations SET state = 'current', destroyed_at = NULL WHERE purpose = 'state'`)
	again := s.start(t, nil)
	if err := again.rotation.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again.key(t, state2).State != vault.KeyCurrent {
		t.Errorf("%+v", again.key(t, state2))
	}
}

// The relay key rotates on its schedule as well, and the old one is destroyed when no key list can name it any more.
func TestRelayRotatesOnSchedule(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	first, second := vault.Key{Purpose: "relay", Generation: 1}, vault.Key{Purpose: "relay", Generation: 2}
	tick := func() {
		t.Helper()
		if err := n.rotation.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	tick()
	if n.keys.Newest("relay") != 1 {
		t.Fatal("rotated before its time")
	}
	s.db.Exec(t, `UPDATE key_generations SET current_since = current_since - interval '31 days' WHERE purpose = 'relay'`)
	tick()
	tick()
	if n.keys.Newest("relay") != 2 || n.keys.Newest("state") != 1 || n.key(t, first).State != vault.KeyRetired || n.key(t, second).State != vault.KeyCurrent {
		t.Fatalf("%+v, %+v", n.key(t, first), n.key(t, second))
	}
	s.db.Exec(t, `UPDATE key_generations SET retired_at = retired_at - interval '6 days' WHERE purpose = 'relay' AND generation = 1`)
	tick()
	if n.key(t, first).State != vault.KeyRetired {
		t.Error("destroyed while a key list may name it")
	}
	s.db.Exec(t, `UPDATE key_generations SET retired_at = retired_at - interval '2 days' WHERE purpose = 'relay' AND generation = 1`)
	tick()
	if n.key(t, first).State != vault.KeyDestroyed || slices.Contains(s.labels(t), "bkv/relay/1") {
		t.Errorf("the old key is still there: %+v", n.key(t, first))
	}
}

// With two tokens, what is due waits for a ceremony: nothing fails, and the status says so.
func TestScheduleWaitsForACeremony(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	s.db.Exec(t, `INSERT INTO token_proofs (token_serial, purpose, generation) VALUES ('elsewhere', 'relay', 1), ('elsewhere', 'state', 1)`)
	s.db.Exec(t, `UPDATE key_generations SET current_since = current_since - interval '31 days' WHERE purpose IN ('relay', 'state')`)
	for range 3 {
		if err := n.rotation.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	status, err := n.rotation.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"state/1", "relay/1"} {
		if !slices.ContainsFunc(status.Warnings, func(w string) bool {
			return strings.HasPrefix(w, "key "+key+" was due for rotation at ") && strings.Contains(w, "make the next in a ceremony")
		}) {
			t.Errorf("no warning of %s: %q", key, status.Warnings)
		}
	}
	if n.keys.Newest("relay") != 1 || n.keys.Newest("state") != 1 {
		t.Error("rotated to a key that the other token does not hold")
	}
}

// otherToken is the same keys under another serial number, as a ceremony makes them, without those that are hidden.
type otherToken struct {
	vault.KeyToken
	hidden map[vault.Key]bool
	swaps  bool // answers no proof: it holds other keys
}

func (o *otherToken) Serial() string { return "another" }
func (o *otherToken) Generations(purpose string) []uint32 {
	return slices.DeleteFunc(o.KeyToken.Generations(purpose), func(g uint32) bool { return o.hidden[vault.Key{Purpose: purpose, Generation: g}] })
}
func (o *otherToken) Confirm(ctx context.Context, purpose string, generation uint32, proof []byte) (bool, error) {
	if o.swaps {
		proof = slices.Clone(proof)
		proof[len(proof)-1] ^= 1
	}
	return o.KeyToken.Confirm(ctx, purpose, generation, proof)
}

// With several tokens, rotation switches only to a key that every one of them has shown to hold.
func TestRotationWithSeveralTokens(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	other := &otherToken{hidden: map[vault.Key]bool{master2: true}}
	a := s.start(t, nil)
	wrapped := func(k vault.KeyToken) vault.KeyToken { other.KeyToken = k; return other }
	b := s.start(t, wrapped)
	if tokens := a.status(t).Tokens; len(tokens) != 2 {
		t.Fatalf("tokens in service: %v", tokens)
	}
	_, err := a.rotation.Rotate(t.Context(), "master")
	refusedBecause(t, err, "make it in a ceremony")
	s.tok.MakeKey(t, pkcs11util.KeyName{Purpose: "master", Generation: 2})
	if err := a.keys.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = a.rotation.Rotate(t.Context(), "master")
	refusedBecause(t, err, "make it in a ceremony")
	if w := a.status(t).Warnings; len(w) != 1 || !strings.Contains(w[0], "master/2 is not in token [another] yet") {
		t.Errorf("warnings: %q", w)
	}
	if a.keys.Newest("master") != 1 || b.keys.Newest("master") != 1 {
		t.Fatal("the key is used before all have it")
	}
	other.hidden = nil
	if err := b.keys.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.rotation.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if key := a.rotate(t, "master"); key != master2 {
		t.Fatalf("rotated to %v", key)
	}
	// A token that left holds nothing up; a vaultd that uses it all the same brings it back.
	var invalid *vault.InvalidRequest
	if err := a.rotation.ForgetToken(t.Context(), "nothing"); !errors.As(err, &invalid) {
		t.Errorf("forgetting what is not there: %v", err)
	}
	refusedBecause(t, a.rotation.ForgetToken(t.Context(), a.keys.Serial()), "this instance's own")
	if err := a.rotation.ForgetToken(t.Context(), "another"); err != nil {
		t.Fatal(err)
	}
	if tokens := a.status(t).Tokens; !slices.Equal(tokens, []string{a.keys.Serial()}) {
		t.Errorf("tokens in service: %v", tokens)
	}
	if err := b.rotation.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if tokens := a.status(t).Tokens; len(tokens) != 2 {
		t.Errorf("tokens in service: %v", tokens)
	}
	// Each instance destroys in its own token; the key is destroyed with the last.
	if err := a.rotation.Destroy(t.Context(), master1); err != nil {
		t.Fatal(err)
	}
	if k := a.key(t, master1); k.State != vault.KeyClosing {
		t.Errorf("it is %s while another token holds it", k.State)
	}
	if err := b.rotation.Destroy(t.Context(), master1); err != nil {
		t.Fatal(err)
	}
	if k := a.key(t, master1); k.State != vault.KeyDestroyed {
		t.Errorf("it is %s when no token holds it", k.State)
	}
	// Other keys of the same names are not taken for these.
	s.db.Exec(t, `DELETE FROM token_proofs WHERE token_serial = 'another'`)
	other.swaps = true
	c := s.unstarted(t, wrapped)
	if err := c.rotation.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "token another holds another key") {
		t.Errorf("a token with other keys: %v", err)
	}
}

// A destroyed key that comes back with an old copy of the token is not used; a token without the key in use is refused.
func TestOldCopiesOfToken(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	n.rotate(t, "master")
	if err := n.rotation.Destroy(t.Context(), master1); err != nil {
		t.Fatal(err)
	}
	s.tok.MakeKey(t, pkcs11util.KeyName{Purpose: "master", Generation: 1})
	again := s.start(t, nil)
	if got := again.keys.Generations("master"); !slices.Equal(got, []uint32{2}) {
		t.Errorf("the generations in use: %v", got)
	}
	if k := again.key(t, master1); k.State != vault.KeyDestroyed {
		t.Errorf("it is %s", k.State)
	}
	if err := again.rotation.Destroy(t.Context(), master1); err != nil || slices.Contains(s.labels(t), "bkv/master/1") {
		t.Errorf("destroying it again: %v", err)
	}
	s.db.Exec(t, `UPDATE key_generations SET state = 'retired', retired_at = now() WHERE purpose = 'master' AND state = 'current'`)
	s.db.Exec(t, `UPDATE key_generations SET state = 'current', destroyed_at = NULL, current_since = now() WHERE purpose = 'master' AND generation = 1`)
	if err := s.unstarted(t, nil).rotation.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "master/1 is in use, and token") {
		t.Errorf("the key in use is not in the token: %v", err)
	}
}

// brokenToken fails in its turn.
type brokenToken struct {
	vault.KeyToken
	fail map[string]error
}

func (b *brokenToken) MakeKey(ctx context.Context, purpose string, generation uint32) error {
	if err := b.fail["make"]; err != nil {
		return err
	}
	return b.KeyToken.MakeKey(ctx, purpose, generation)
}

func (b *brokenToken) DestroyKey(ctx context.Context, purpose string, generation uint32) error {
	if err := b.fail["destroy"]; err != nil {
		return err
	}
	return b.KeyToken.DestroyKey(ctx, purpose, generation)
}

func TestRotationWhileTheTokenIsAway(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	broken := &brokenToken{fail: map[string]error{"make": pkcs11util.ErrUnavailable, "destroy": pkcs11util.ErrUnavailable}}
	n := s.start(t, func(k vault.KeyToken) vault.KeyToken { broken.KeyToken = k; return broken })
	if _, err := n.rotation.Rotate(t.Context(), "master"); !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatal(err)
	}
	if n.keys.Newest("master") != 1 || n.key(t, master1).State != vault.KeyCurrent {
		t.Fatal("something changed")
	}
	other := s.start(t, nil)
	_, err := other.rotation.Rotate(t.Context(), "master")
	refusedBecause(t, err, "is making key master/2 at this moment")
	delete(broken.fail, "make")
	if key := n.rotate(t, "master"); key != master2 { // it goes on with its claim
		t.Fatalf("rotated to %v", key)
	}
	if err := n.rotation.Destroy(t.Context(), master1); !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatal(err)
	}
	if k := n.key(t, master1); k.State != vault.KeyClosing {
		t.Errorf("it is %s", k.State)
	}
	if err := other.rotation.Destroy(t.Context(), master1); err != nil {
		t.Fatal(err)
	}
	// A claim whose holder died is given up, and its number not used again.
	broken.fail["make"] = pkcs11util.ErrUnavailable
	if _, err := n.rotation.Rotate(t.Context(), "server"); !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatal(err)
	}
	s.db.Exec(t, `UPDATE key_generations SET held_until = now() WHERE state = 'making'`)
	if key := other.rotate(t, "server"); key != (vault.Key{Purpose: "server", Generation: 3}) {
		t.Errorf("rotated to %v", key)
	}
}

// Seals are counted across instances and restarts, warned of, and refused at the limit.
func TestSealsAreCounted(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.start(t, nil), s.start(t, nil)
	deviceOf(a.Vault, "ann").MustEnrol(t, "right", nil)
	deviceOf(b.Vault, "bob").MustEnrol(t, "right", nil)
	a.status(t)
	if n := b.key(t, master1).Seals; n != 2 {
		t.Errorf("%d seals under master, want 2", n)
	}
	s.db.Exec(t, `UPDATE key_generations SET seals = 1::bigint << 31 WHERE purpose = 'master'`)
	if w := a.status(t).Warnings; len(w) != 1 || !strings.Contains(w[0], "rotate it") {
		t.Errorf("warnings: %q", w)
	}
	s.db.Exec(t, `UPDATE key_generations SET seals = (1::bigint << 32) - 1 WHERE purpose = 'master'`)
	c := s.start(t, nil) // has reported nothing yet
	deviceOf(c.Vault, "cat").MustEnrol(t, "right", nil)
	if _, err := deviceOf(c.Vault, "dog").Enrol(t.Context(), "right", nil); !errors.Is(err, pkcs11util.ErrWornOut) || !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatalf("one seal too many: %v", err)
	}
	c.rotate(t, "master")
	deviceOf(c.Vault, "dog").MustEnrol(t, "right", nil)
}
