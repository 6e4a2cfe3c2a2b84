package vault

import (
	"errors"
	"testing"
	"time"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func lawAccount(states ...State) *Account {
	a := &Account{ID: AccountID{"app", "u"}, Policy: DefaultPolicy(), NextNumber: 1}
	for i, s := range states {
		g := Generation{Number: uint32(i + 1), ID: GenerationID{byte(i + 1)}, State: s, Sealed: []byte{1}}
		if s == Staged || s == Frozen {
			g.ExpiresAt = epoch.Add(7 * 24 * time.Hour)
		}
		a.Generations = append(a.Generations, g)
	}
	return a
}

func claimN(n int) Claim { return Claim{byte(n), byte(n >> 8), 1} }

// The delays: attempts 1 to 4 at once, then 1 min, 5 min, 15 min, 1 h, 4 h, 24 h.
func TestDelaysGrowWithUse(t *testing.T) {
	t.Parallel()
	a, now := lawAccount(Active), epoch
	wait := []time.Duration{0, 0, 0, 0, time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour, 4 * time.Hour, 24 * time.Hour}
	for n, w := range wait {
		if w > 0 {
			_, err := a.charge(&a.Generations[0], claimN(n), now.Add(w-time.Microsecond))
			var early *TooEarly
			if !errors.As(err, &early) || early.Wait != time.Microsecond || a.used() != n {
				t.Fatalf("attempt %d a microsecond early: %v, used %d", n+1, err, a.used())
			}
		}
		now = now.Add(w)
		attempt, err := a.charge(&a.Generations[0], claimN(n), now)
		if err != nil || attempt.Number != uint32(n+1) || !attempt.ExpiresAt.Equal(now.Add(AttemptLifetime)) {
			t.Fatalf("attempt %d: %+v, %v", n+1, attempt, err)
		}
	}
	if _, err := a.charge(&a.Generations[0], claimN(99), now.Add(1000*time.Hour)); err == nil {
		t.Fatal("an eleventh attempt was charged")
	}
}

// The cap and the delays count over all live generations together.
func TestCapIsSharedByLiveGenerations(t *testing.T) {
	t.Parallel()
	a := lawAccount(Frozen, Active)
	a.Policy.Delays = nil
	for n := range 10 {
		if _, err := a.charge(&a.Generations[n%2], claimN(n), epoch); err != nil {
			t.Fatalf("attempt %d: %v", n+1, err)
		}
	}
	for i := range a.Generations {
		if _, err := a.charge(&a.Generations[i], claimN(50), epoch); err == nil {
			t.Fatalf("generation %d took an attempt past the cap", i+1)
		}
	}
	if d := a.settle(epoch.Add(AttemptLifetime - time.Microsecond)); len(d) != 0 {
		t.Fatal("destroyed while attempts are open")
	}
	// All expired: the frozen one goes, the active one has used only five by itself.
	d := a.settle(epoch.Add(AttemptLifetime))
	if len(d) != 1 || d[0].Number != 1 || d[0].Reason != Exhausted || d[0].Sealed != nil {
		t.Fatalf("destroyed: %+v", d)
	}
	if a.AttemptsLeft() != 5 {
		t.Fatalf("attempts left: %d", a.AttemptsLeft())
	}
}

// A success forgives what was before it, nothing after it, and nothing elsewhere.
func TestCreditForgivesOnlyEarlierAttemptsOfItsGeneration(t *testing.T) {
	t.Parallel()
	a := lawAccount(Frozen, Active)
	a.Policy.Delays = nil
	frozen, active := &a.Generations[0], &a.Generations[1]
	for n := range 3 {
		if _, err := a.charge(frozen, claimN(100+n), epoch); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 4 {
		if _, err := a.charge(active, claimN(n), epoch); err != nil {
			t.Fatal(err)
		}
	}
	active.credit(active.attempt(2, claimN(1)))
	if active.Used() != 2 || frozen.Used() != 3 || active.Successes != 1 || active.Failures() != 3 {
		t.Fatalf("active %+v, frozen %+v", active, frozen)
	}
	if len(active.Attempts) != 3 || active.Attempts[0].Number != 2 {
		t.Fatalf("kept attempts: %+v", active.Attempts)
	}
	// A later success, then nothing of the earlier is left to credit.
	active.credit(active.attempt(4, claimN(3)))
	if active.Used() != 0 || active.attempt(3, claimN(2)) != nil {
		t.Fatalf("after the later success: %+v", active)
	}
}

// Whatever lies between, a generation ends with its hundredth failure.
func TestHundredFailuresInAll(t *testing.T) {
	t.Parallel()
	a := lawAccount(Active)
	a.Policy.Delays = nil
	g, now, attempts := &a.Generations[0], epoch, 0
	for g.Live() && attempts < 1000 {
		attempt, err := a.charge(g, claimN(attempts), now)
		if err != nil {
			t.Fatalf("attempt %d: %v", attempts+1, err)
		}
		attempts++
		if attempts%5 == 0 {
			g.credit(attempt)
		} else {
			attempt.Outcome = Failed
		}
		a.settle(now)
		now = now.Add(time.Second)
	}
	if g.Reason != Failures || g.Failures() != MaxFailures || attempts != 124 {
		t.Fatalf("after %d attempts: %d failures, %s", attempts, g.Failures(), g.Reason)
	}
}

func TestSettleByTime(t *testing.T) {
	t.Parallel()
	a := lawAccount(Frozen, Active, Staged)
	at := a.Generations[0].ExpiresAt
	if !a.Due().Equal(at) {
		t.Fatalf("due %v, want %v", a.Due(), at)
	}
	if d := a.settle(at.Add(-time.Microsecond)); len(d) != 0 {
		t.Fatalf("too soon: %+v", d)
	}
	d := a.settle(at)
	if len(d) != 2 || d[0].Reason != GraceOver || d[1].Reason != NotInTime || !a.Generations[1].Live() {
		t.Fatalf("%+v", d)
	}
	if !a.Due().IsZero() {
		t.Fatalf("still due at %v", a.Due())
	}
}

// Due must never be later than the first moment at which settle would act.
func TestDueIsWhenSettleActs(t *testing.T) {
	t.Parallel()
	a := lawAccount(Frozen, Active)
	a.Policy.Delays = nil
	for n := range 10 {
		if _, err := a.charge(&a.Generations[1], claimN(n), epoch.Add(time.Duration(n)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	want := epoch.Add(9*time.Second + AttemptLifetime)
	if !a.Due().Equal(want) {
		t.Fatalf("due %v, want %v", a.Due(), want)
	}
	if d := a.settle(want.Add(-time.Microsecond)); len(d) != 0 {
		t.Fatalf("too soon: %+v", d)
	}
	if d := a.settle(want); len(d) != 2 {
		t.Fatalf("destroyed %d, want both: the frozen one by the sum, the active one by its own", len(d))
	}
}

func TestSameGuessOnlyWhileOpen(t *testing.T) {
	t.Parallel()
	a := lawAccount(Active)
	g := &a.Generations[0]
	attempt, err := a.charge(g, claimN(1), epoch)
	if err != nil {
		t.Fatal(err)
	}
	if g.sameGuess(claimN(1), epoch.Add(AttemptLifetime-1)) == nil || g.sameGuess(claimN(2), epoch) != nil {
		t.Fatal("the open claim is the same guess, another is not")
	}
	if g.sameGuess(claimN(1), epoch.Add(AttemptLifetime)) != nil {
		t.Fatal("an expired attempt was taken for open")
	}
	attempt.Outcome = Failed
	if g.sameGuess(claimN(1), epoch) != nil {
		t.Fatal("a closed attempt was taken for open")
	}
	if claimOf(GenerationID{1}, []byte("ke1")) == claimOf(GenerationID{2}, []byte("ke1")) {
		t.Fatal("a claim must depend on the generation")
	}
}

func TestUserIDs(t *testing.T) {
	t.Parallel()
	long := make([]byte, MaxUserBytes+1)
	for i := range long {
		long[i] = 'a'
	}
	for _, ok := range []string{"a", "ünïcode/with:slash %2F", "日本", string(long[:MaxUserBytes]), ".", "..", "\U0001F511"} {
		if err := (AccountID{"t", ok}).Validate(); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{"", string(long), "a\x00b", "line\nbreak", "\xff\xfe", "\x7f", "\u0085"} {
		if err := (AccountID{"t", bad}).Validate(); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestPolicyBounds(t *testing.T) {
	t.Parallel()
	if err := DefaultPolicy().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Policy){
		"no attempts":     func(p *Policy) { p.MaxAttempts = 0 },
		"eleven attempts": func(p *Policy) { p.MaxAttempts = 11 },
		"too many delays": func(p *Policy) { p.MaxAttempts = 5 },
		"negative delay":  func(p *Policy) { p.Delays[2] = -1 },
		"endless delay":   func(p *Policy) { p.Delays[2] = MaxDelay + 1 },
		"no grace":        func(p *Policy) { p.Grace = 0 },
		"endless grace":   func(p *Policy) { p.Grace = MaxGrace + 1 },
	} {
		p := DefaultPolicy()
		if spoil(&p); p.Validate() == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}
