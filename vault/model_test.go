package vault_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	mathrand "math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// A random state machine: operations, time, faults of store and token, lost replies
// and old messages, in random order, against the vault and against a reference model
// that keeps the whole history and knows no counters. After every step the vault must
// have answered as the model says, and its status must be the model's.
//
//	go test ./vault -run TestRandomSchedules -schedules 100000 -seed 7

var (
	schedules = flag.Int("schedules", 400, "random schedules to run")
	seed      = flag.Uint64("seed", 0, "seed of the first schedule; 0: from the clock")
)

func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	pool := newPool(t)
	began := time.Now()
	shards := runtime.GOMAXPROCS(0)
	t.Run("shards", func(t *testing.T) {
		for shard := range shards {
			t.Run(fmt.Sprint(shard), func(t *testing.T) {
				t.Parallel()
				for i := shard; i < *schedules && !t.Failed(); i += shards {
					runSchedule(t, pool, first+uint64(i))
				}
			})
		}
	})
	t.Logf("%d schedules, %.0f a second", *schedules, float64(*schedules)/time.Since(began).Seconds())
}

func runSchedule(t *testing.T, p *pool, seed uint64) {
	s := newSchedule(t, p, seed)
	for range 5 + s.rng.IntN(20) {
		s.step()
		if t.Failed() {
			t.Fatalf("run this schedule alone with -seed %d -schedules 1:\n%s", seed, strings.Join(s.log, "\n"))
		}
	}
}

// pool holds what is slow to make and carries no state: blinded messages.
type pool struct {
	requests []opaque.RegistrationRequest
	ke1s     []opaque.KE1
	owners   []ed25519.PrivateKey
	record   opaque.RegistrationRecord
}

func newPool(t *testing.T) *pool {
	w := newWorld(t)
	e, err := w.Prepare(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	p := &pool{record: e.Staging.Record}
	for range 8 {
		request, _, err1 := opaque.StartRegistration(rand.Reader, []byte("x"))
		ke1, _, err2 := opaque.StartLogin(rand.Reader, []byte("x"))
		_, owner, err3 := ed25519.GenerateKey(rand.Reader)
		if err := errors.Join(err1, err2, err3); err != nil {
			t.Fatal(err)
		}
		p.requests, p.ke1s, p.owners = append(p.requests, request), append(p.ke1s, ke1), append(p.owners, owner)
	}
	return p
}

// --- the model: history, no counters ---

type modelAttempt struct {
	number  uint32
	ke1     int
	state   string // open, right, wrong
	charged time.Time
}

type modelGeneration struct {
	id, follows vault.GenerationID
	digest      [32]byte
	owner       ed25519.PrivateKey
	staging     vault.Staging
	state       vault.State
	stateUntil  time.Time // of the enrolment's state
	until       time.Time // of staged and frozen
	usedUp      bool      // destroyed by failures
	attempts    []modelAttempt
}

func (g *modelGeneration) live() bool { return g.state == vault.Active || g.state == vault.Frozen }

func (a modelAttempt) open(now time.Time) bool {
	return a.state == "open" && now.Before(a.charged.Add(vault.AttemptLifetime))
}

// unforgiven are the attempts after the last success.
func (g *modelGeneration) unforgiven() []modelAttempt {
	for i := len(g.attempts) - 1; i >= 0; i-- {
		if g.attempts[i].state == "right" {
			return g.attempts[i+1:]
		}
	}
	return g.attempts
}

func (g *modelGeneration) failures() (n int) {
	for _, a := range g.attempts {
		if a.state != "right" {
			n++
		}
	}
	return n
}

func (g *modelGeneration) anyOpen(now time.Time) bool {
	return slices.ContainsFunc(g.attempts, func(a modelAttempt) bool { return a.open(now) })
}

type model struct {
	exists      bool
	policy      vault.Policy
	head        vault.GenerationID
	generations []*modelGeneration
}

func (m *model) find(id vault.GenerationID) *modelGeneration {
	for _, g := range m.generations {
		if g.id == id {
			return g
		}
	}
	return nil
}

func (m *model) in(s vault.State) *modelGeneration {
	for _, g := range m.generations {
		if g.state == s {
			return g
		}
	}
	return nil
}

func (m *model) used() (n int) {
	for _, g := range m.generations {
		if g.live() {
			n += len(g.unforgiven())
		}
	}
	return n
}

func (m *model) next() time.Time {
	var latest time.Time
	for _, g := range m.generations {
		if g.live() {
			for _, a := range g.unforgiven() {
				if a.charged.After(latest) {
					latest = a.charged
				}
			}
		}
	}
	if n := m.used(); n > 0 && n < len(m.policy.Delays) && m.policy.Delays[n] > 0 {
		return latest.Add(m.policy.Delays[n])
	}
	return time.Time{}
}

func (m *model) settle(now time.Time) {
	open := false
	for _, g := range m.generations {
		open = open || g.live() && g.anyOpen(now)
	}
	out := m.used() >= m.policy.MaxAttempts && !open
	for _, g := range m.generations {
		switch {
		case (g.state == vault.Staged || g.state == vault.Frozen) && !now.Before(g.until):
			g.state = vault.Destroyed
		case g.state == vault.Frozen && out,
			g.state == vault.Active && out && len(g.unforgiven()) >= m.policy.MaxAttempts,
			g.live() && g.failures() >= vault.MaxFailures && !g.anyOpen(now):
			g.state, g.usedUp = vault.Destroyed, true
		}
	}
}

func (m *model) supersede() {
	if g := m.in(vault.Staged); g != nil {
		g.state = vault.Destroyed
	}
}

// --- one schedule ---

type message struct {
	generation vault.GenerationID
	attempt    uint32
	state      []byte
}

type schedule struct {
	t      *testing.T
	rng    *mathrand.Rand
	pool   *pool
	world  *world
	faults *faultyStore
	m      model
	log    []string

	prepared []*modelGeneration // started, perhaps staged
	sent     []message          // recovery starts that were answered
	started  int                // enrolment starts that were answered
}

// faultyStore fails a write before or after it is made.
type faultyStore struct {
	vault.Store
	armed   string // "", "before", "after"
	written bool   // the operation's own change (not what was due) reached the store
	tried   bool
}

func (f *faultyStore) Write(ctx context.Context, c vault.Change) error {
	own := slices.ContainsFunc(c.Events, func(e vault.Event) bool {
		return e.Kind != vault.EventDestroyed ||
			!slices.Contains([]vault.Reason{vault.Exhausted, vault.Failures, vault.GraceOver, vault.NotInTime}, e.Reason)
	})
	f.tried = f.tried || own
	if f.armed == "before" {
		f.armed = ""
		return errors.New("connection refused")
	}
	err := f.Store.Write(ctx, c)
	if err == nil && own {
		f.written = true
	}
	if f.armed == "after" {
		f.armed = ""
		return errors.New("connection lost after commit")
	}
	return err
}

func newSchedule(t *testing.T, p *pool, seed uint64) *schedule {
	s := &schedule{t: t, rng: mathrand.New(mathrand.NewPCG(seed, 1)), pool: p, world: newWorld(t)}
	s.faults = &faultyStore{Store: s.world.store}
	v, err := vault.New(vault.Config{ID: vaultID, Store: s.faults, Token: s.world.token})
	if err != nil {
		t.Fatal(err)
	}
	s.world.Vault = v
	s.world.Caller.Policy = vault.Policy{MaxAttempts: 3 + s.rng.IntN(2), Grace: 2 * time.Hour}
	if s.rng.IntN(2) == 0 {
		s.world.Caller.Policy.Delays = []time.Duration{0, 0, time.Minute}
	}
	return s
}

func (s *schedule) logf(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

// pick returns a random element, the zero value if there is none.
func pick[T any](s *schedule, from []T) (out T) {
	if len(from) > 0 {
		out = from[s.rng.IntN(len(from))]
	}
	return out
}

// try runs one operation, perhaps with a fault in its way, and says whether the model
// should apply it; want is what the model expects of it without a fault.
func (s *schedule) try(name, want string, writes bool, do func() error) (applied bool) {
	s.faults.armed, s.faults.written, s.faults.tried = "", false, false
	tokenFault := false
	switch s.rng.IntN(12) {
	case 0:
		s.faults.armed = "before"
	case 1:
		s.faults.armed = "after"
	case 2:
		at, n := s.rng.IntN(6), 0
		s.world.token.FailWith(func(string) error {
			if n++; n > at {
				tokenFault = true
				return errors.New("device error")
			}
			return nil
		})
	}
	armed := s.faults.armed
	err := do()
	s.world.token.FailWith(nil)
	fired := armed != "" && s.faults.armed == ""
	s.faults.armed = ""
	got := kind(err)
	s.logf("%-40s want %-13s got %-13s fault %q fired %v token %v", name, want, got, armed, fired, tokenFault)
	switch {
	case fired && got != "unavailable", tokenFault && got != "unavailable":
		s.t.Errorf("%s: a fault was answered as %s", name, got)
	case !fired && !tokenFault && got != want:
		s.t.Errorf("%s: got %s (%v), want %s", name, got, err, want)
	}
	if s.faults.written && (want != "ok" && want != "wrong" && want != "destroyed-now" || !writes) {
		s.t.Errorf("%s was written, and the model expects %s", name, want)
	}
	return s.faults.written
}

// kind is an error's class.
func kind(err error) string {
	var conflict *vault.Conflict
	var invalid *vault.InvalidRequest
	var wrong *vault.WrongPassword
	var early *vault.TooEarly
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, vault.ErrStoreUnavailable), errors.Is(err, vault.ErrTokenUnavailable):
		return "unavailable"
	case errors.Is(err, vault.ErrNotEnrolled):
		return "not-enrolled"
	case errors.Is(err, vault.ErrKeyDestroyed):
		return "destroyed"
	case errors.Is(err, vault.ErrBadSignature):
		return "bad-signature"
	case errors.As(err, &conflict):
		return "conflict"
	case errors.As(err, &invalid):
		return "invalid"
	case errors.As(err, &wrong):
		return "wrong"
	case errors.As(err, &early):
		return "early"
	}
	return err.Error()
}

func (s *schedule) step() {
	s.m.settle(s.world.clock.Now())
	switch n := s.rng.IntN(21); {
	case n == 20:
		s.rotate()
	case n < 2 || len(s.prepared) == 0:
		s.prepare()
	case n < 4:
		s.stage(pick(s, s.prepared))
	case n < 7:
		s.activate(pick(s, s.prepared))
	case n < 12:
		s.start()
	case n < 16 && len(s.sent) > 0:
		s.finish(pick(s, s.sent))
	case n == 16:
		s.turnOff(pick(s, s.prepared))
	case n == 17:
		s.reinstate(pick(s, s.prepared))
	default:
		d := pick(s, []time.Duration{time.Second, 30 * time.Second, time.Minute, vault.AttemptLifetime, time.Hour, 2 * time.Hour, 24 * time.Hour})
		s.world.clock.Advance(d)
		s.logf("%v pass", d)
		if s.rng.IntN(2) == 0 {
			if _, err := s.world.Vault.Sweep(s.t.Context()); err != nil {
				s.t.Errorf("sweep: %v", err)
			}
		}
	}
	s.m.settle(s.world.clock.Now())
	s.compare()
}

// rotate takes a new master key into use, rewraps, at first with a fault, and destroys the
// older keys. The model knows nothing of it: nobody is to notice.
func (s *schedule) rotate() {
	s.world.token.RotateMaster()
	pace := func(context.Context) error { return nil }
	s.faults.armed = pick(s, []string{"before", "after", ""})
	_, failed, err := s.world.Vault.Rewrap(s.t.Context(), pace)
	s.faults.armed, s.faults.written, s.faults.tried = "", false, false
	s.logf("rewrap: %d failed, %v", failed, err)
	if _, failed, err := s.world.Vault.Rewrap(s.t.Context(), pace); failed != 0 || err != nil {
		s.t.Errorf("rewrap: %d failed, %v", failed, err)
	}
	s.world.token.DestroyMasters()
}

func (s *schedule) prepare() {
	var started *vault.EnrolmentStarted
	s.try("enrolment start", "ok", false, func() (err error) {
		started, err = s.world.Vault.StartEnrolment(s.t.Context(), s.world.Caller, pick(s, s.pool.requests))
		return err
	})
	s.started++ // evaluated or not: an upper bound is enough
	if started == nil {
		return
	}
	owner := pick(s, s.pool.owners)
	g := &modelGeneration{id: started.Generation, follows: started.Follows, owner: owner}
	g.staging = vault.Staging{State: started.State, Record: s.pool.record, KSF: vaulttest.KSF, OwnerKey: [32]byte(owner.Public().(ed25519.PublicKey))}
	rand.Read(g.staging.WrappedKey[:])
	g.stateUntil = s.world.clock.Now().Add(vault.EnrolmentStateLifetime)
	serverKey, err := s.world.token.PublicKey("server", 1)
	if err != nil {
		s.t.Fatal(err)
	}
	g.digest = transcript.Material{
		Record: g.staging.Record[:], WrappedKey: g.staging.WrappedKey[:],
		Time: vaulttest.KSF.Time, MemoryKiB: vaulttest.KSF.MemoryKiB, Threads: vaulttest.KSF.Threads,
		OwnerKey: g.staging.OwnerKey[:], ServerKey: serverKey[:],
	}.Digest()
	if started.Follows != s.m.head {
		s.t.Errorf("the enrolment follows %x, want %x", started.Follows, s.m.head)
	}
	s.prepared = append(s.prepared, g)
}

func (s *schedule) stage(g *modelGeneration) {
	now := s.world.clock.Now()
	known := s.m.find(g.id)
	want := "ok"
	switch {
	case known != nil && known.state == vault.Destroyed && g.id == s.m.head:
		want = "conflict"
	case known != nil && known.state != vault.Destroyed:
	case !now.Before(g.stateUntil):
		want = "invalid"
	case s.m.head != g.follows, known != nil:
		want = "conflict"
	}
	if s.try("stage", want, known == nil, func() error {
		return errOf(s.world.Vault.Stage(s.t.Context(), s.world.Caller, g.staging))
	}) {
		if !s.m.exists {
			s.m.exists, s.m.policy = true, s.world.Caller.Policy
		}
		s.m.supersede()
		g.state, g.until = vault.Staged, now.Add(vault.StagedLifetime)
		s.m.generations = append(s.m.generations, g)
	}
}

// gone reports whether a generation is a tombstone that the vault does not read any more.
func (s *schedule) gone(g *modelGeneration) bool {
	known := s.m.find(g.id)
	return known == nil || known.state == vault.Destroyed && g.id != s.m.head
}

func (s *schedule) activate(g *modelGeneration) {
	active, frozen := s.m.in(vault.Active), s.m.in(vault.Frozen)
	proof := pick(s, []string{"", "right", "wrong"})
	want, writes := "ok", false
	switch {
	case !s.m.exists:
		want = "not-enrolled"
	case s.gone(g):
		want = "conflict"
	case g.state == vault.Active:
	case g.state == vault.Destroyed:
		want = "destroyed"
	case g.state == vault.Frozen, g.follows != s.m.head:
		want = "conflict"
	case active != nil && proof == "wrong":
		want = "bad-signature"
	case active != nil && proof == "" && frozen != nil:
		want = "conflict"
	default:
		writes = true
	}
	a := vault.Activation{Generation: g.id,
		Signature: s.world.Statement(transcript.Activate, g.follows, g.id, g.digest).Sign(g.owner)}
	if proof != "" && active != nil {
		digest := g.digest
		if proof == "wrong" {
			digest[0]++
		}
		a.PreviousSignature = s.world.Statement(transcript.Replace, g.follows, g.id, digest).Sign(active.owner)
	}
	if s.try("activate, proof "+proof, want, writes, func() error {
		return errOf(s.world.Vault.Activate(s.t.Context(), s.world.Caller, a))
	}) {
		if active != nil {
			if proof == "right" {
				active.state = vault.Destroyed
			} else {
				active.state, active.until = vault.Frozen, s.world.clock.Now().Add(s.m.policy.Grace)
			}
		}
		g.state, s.m.head = vault.Active, g.id
	}
}

func (s *schedule) start() {
	now := s.world.clock.Now()
	g := s.m.in(vault.Active)
	named := vault.GenerationID{}
	if len(s.m.generations) > 0 && s.rng.IntN(2) == 0 {
		g = pick(s, s.m.generations)
		named = g.id
	}
	ke1 := s.rng.IntN(len(s.pool.ke1s))
	var expect uint32
	if g != nil && s.rng.IntN(3) > 0 {
		expect = uint32(len(g.attempts) + pick(s, []int{0, 1, 1, 1, 2}))
	}
	want, same := "ok", false
	switch {
	case !s.m.exists:
		want = "not-enrolled"
	case g == nil && s.m.in(vault.Frozen) != nil:
		want = "conflict"
	case g == nil:
		want = "not-enrolled"
		if head := s.m.find(s.m.head); head != nil && head.usedUp {
			want = "destroyed"
		}
	case !named.IsZero() && s.gone(g), g.state == vault.Staged:
		want = "conflict"
	case g.state == vault.Destroyed:
		want = "destroyed"
	default:
		for _, a := range g.attempts {
			same = same || a.ke1 == ke1 && a.open(now) && !s.forgotten(g, a)
		}
		switch {
		case same:
		case expect != 0 && int(expect) != len(g.attempts)+1:
			want = "conflict"
		case s.m.next().After(now), s.m.used() >= s.m.policy.MaxAttempts, g.failures() >= vault.MaxFailures:
			want = "early"
		}
	}
	var started *vault.RecoveryStarted
	if s.try(fmt.Sprintf("start, ke1 %d, expecting %d", ke1, expect), want, !same, func() (err error) {
		started, err = s.world.Vault.StartRecovery(s.t.Context(), s.world.Caller,
			vault.RecoveryStart{KE1: s.pool.ke1s[ke1], Generation: named, Attempt: expect})
		return err
	}) {
		g.attempts = append(g.attempts, modelAttempt{number: uint32(len(g.attempts) + 1), ke1: ke1, state: "open", charged: now})
	}
	if started != nil {
		s.sent = append(s.sent, message{started.Generation, started.Attempt, started.State})
	}
}

// forgotten: an attempt before the last success, which the vault keeps no more.
func (s *schedule) forgotten(g *modelGeneration, a modelAttempt) bool {
	for _, later := range g.attempts[a.number:] {
		if later.state == "right" {
			return true
		}
	}
	return false
}

func (s *schedule) finish(msg message) {
	now := s.world.clock.Now()
	g := s.m.find(msg.generation)
	a := &g.attempts[msg.attempt-1]
	right := s.rng.IntN(3) == 0
	want, writes := "ok", false
	if !right {
		want = "wrong"
	}
	switch {
	case !g.live():
		want = "destroyed"
	case s.forgotten(g, *a):
		want = "conflict"
	case a.state == "right" && right:
	case a.state == "wrong" && !right:
	case a.state != "open" || !a.open(now):
		want = "conflict"
	default:
		writes = true
	}
	if writes && !right {
		a.state = "wrong" // would it destroy?
		probe := s.m.clone()
		a.state = "open"
		probe.settle(now)
		if !probe.find(g.id).live() {
			want = "destroyed"
		}
	}
	var ke3 opaque.KE3
	if right {
		var err error
		if ke3, err = s.world.Vault.ExpectedKE3(s.t.Context(), s.world.Caller.Account, msg.state); err != nil {
			s.t.Fatal(err)
		}
	}
	if s.tryFinish(fmt.Sprintf("finish %d, right %v", msg.attempt, right), want, writes, func() error {
		return errOf(s.world.Vault.FinishRecovery(s.t.Context(), s.world.Caller, ke3, msg.state))
	}) {
		a.state = map[bool]string{true: "right", false: "wrong"}[right]
	}
}

// tryFinish is try, where a write may be answered with the destruction that it caused.
func (s *schedule) tryFinish(name, want string, writes bool, do func() error) bool {
	if writes && want == "destroyed" {
		return s.try(name, "destroyed-now", true, func() error {
			if err := do(); !errors.Is(err, vault.ErrKeyDestroyed) {
				return err
			}
			return errDestroyedNow
		})
	}
	return s.try(name, want, writes, do)
}

var errDestroyedNow = errors.New("destroyed-now")

func (m *model) clone() *model {
	c := *m
	c.generations = nil
	for _, g := range m.generations {
		copied := *g
		copied.attempts = slices.Clone(g.attempts)
		c.generations = append(c.generations, &copied)
	}
	return &c
}

func (s *schedule) turnOff(g *modelGeneration) {
	proven := s.rng.IntN(2) == 0
	want, writes := "ok", false
	switch {
	case !s.m.exists:
		want = "not-enrolled"
	case s.gone(g):
		want = "conflict"
	case g.state == vault.Destroyed, g.state == vault.Frozen && !proven:
	case g.state == vault.Staged:
		want = "conflict"
	case !proven && s.m.in(vault.Frozen) != nil:
		want = "conflict"
	default:
		writes = true
	}
	var signature []byte
	if proven {
		signature = s.world.Statement(transcript.TurnOff, g.id, vault.GenerationID{}, g.digest).Sign(g.owner)
	}
	if s.try(fmt.Sprintf("turn off, proven %v", proven), want, writes, func() error {
		return errOf(s.world.Vault.TurnOff(s.t.Context(), s.world.Caller, g.id, signature))
	}) {
		if proven {
			g.state, g.until = vault.Destroyed, s.world.clock.Now()
		} else {
			g.state, g.until = vault.Frozen, s.world.clock.Now().Add(s.m.policy.Grace)
		}
		if g.id == s.m.head {
			s.m.supersede()
		}
	}
}

func (s *schedule) reinstate(g *modelGeneration) {
	active := s.m.in(vault.Active)
	var replaces vault.GenerationID
	if active != nil && s.rng.IntN(4) > 0 {
		replaces = active.id
	}
	until := g.until
	if s.rng.IntN(4) == 0 { // an earlier freezing's
		until = until.Add(-time.Microsecond)
	}
	want, writes := "ok", false
	switch {
	case !s.m.exists:
		want = "not-enrolled"
	case s.gone(g):
		want = "conflict"
	case g.state == vault.Active:
	case g.state == vault.Destroyed:
		want = "destroyed"
	case g.state == vault.Staged, active != nil && replaces != active.id, !until.Equal(g.until):
		want = "conflict"
	default:
		writes = true
	}
	if s.try("reinstate", want, writes, func() error {
		return errOf(s.world.Vault.Reinstate(s.t.Context(), s.world.Caller,
			s.world.Reinstatement(&vaulttest.Enrolment{Generation: g.id, Digest: g.digest, Owner: g.owner}, replaces, until)))
	}) {
		if active != nil {
			active.state = vault.Destroyed
		}
		s.m.supersede()
		g.state, s.m.head = vault.Active, g.id
	}
}

// compare holds the vault's status, and the law itself, against the model.
func (s *schedule) compare() {
	// The law, by the history alone.
	charged := 0
	for _, g := range s.m.generations {
		charged += len(g.attempts)
		if g.failures() > vault.MaxFailures {
			s.t.Errorf("generation %x has %d failures", g.id, g.failures())
		}
	}
	if s.m.exists && s.m.used() > s.m.policy.MaxAttempts {
		s.t.Errorf("%d attempts used, %d allowed", s.m.used(), s.m.policy.MaxAttempts)
	}
	if n := s.world.token.Evaluated(); n > charged+s.started {
		s.t.Errorf("%d distinct evaluations, and %d attempts charged, %d enrolments started", n, charged, s.started)
	}
	status, err := s.world.Vault.Status(s.t.Context(), s.world.Caller)
	if !s.m.exists {
		if !errors.Is(err, vault.ErrNotEnrolled) {
			s.t.Errorf("status before anything is staged: %v", err)
		}
		return
	}
	if err != nil {
		s.t.Errorf("status: %v", err)
		return
	}
	want := map[vault.GenerationID]*modelGeneration{}
	for _, g := range s.m.generations {
		if g.state != vault.Destroyed || g.id == s.m.head {
			want[g.id] = g
		}
	}
	if len(want) != len(status.Generations) || status.Follow != s.m.head {
		s.t.Errorf("status has %d generations and follows %x; want %d, %x", len(status.Generations), status.Follow, len(want), s.m.head)
		return
	}
	for _, got := range status.Generations {
		g := want[got.ID]
		if g == nil || got.State != g.state || int(got.Started) != len(g.attempts) || got.Used() != len(g.unforgiven()) || got.Failures() != g.failures() {
			s.t.Errorf("status %+v, model %+v", got, g)
		}
	}
	if s.m.in(vault.Active) != nil || s.m.in(vault.Frozen) != nil {
		if left := s.m.policy.MaxAttempts - s.m.used(); status.AttemptsLeft != left {
			s.t.Errorf("%d attempts left, want %d", status.AttemptsLeft, left)
		}
	}
}
