package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/vault"
)

// Tests that wait between tries run in a bubble of testing/synctest, where waiting takes no time.

// The requests of each operation, in order, when nothing goes wrong.
var (
	enrolSteps   = []string{"GET /v1/vault", "GET backup-key", "POST backup-key/enrolment", "PUT backup-key", "POST backup-key/activation"}
	recoverSteps = []string{"GET /v1/vault", "GET backup-key", "POST backup-key/recovery", "POST backup-key/recovery/finish"}
)

// onceAt breaks the first request that is this step.
func onceAt(step string, f fault) func(int, string) fault {
	var done atomic.Bool
	return func(_ int, s string) fault {
		if s == step && !done.Swap(true) {
			return f
		}
		return ""
	}
}

// always breaks every request that is this step.
func always(step string, f fault) func(int, string) fault {
	return func(_ int, s string) fault {
		if s == step {
			return f
		}
		return ""
	}
}

// faultsOf are the faults worth the cost of stretching: each way that a request can be
// lost, doubled, or done and not known to be, where it writes; one where it only reads.
func faultsOf(step string) []fault {
	if strings.HasPrefix(step, "GET ") {
		return []fault{dropReply}
	}
	return []fault{dropRequest, dropReply, duplicate, busyAfter}
}

// wantResent fails unless requests of one step were the same bytes each time.
func wantResent(t *testing.T, all []sent) {
	t.Helper()
	first := map[string]client.Request{}
	for _, s := range all {
		before, again := first[s.step]
		if !again {
			first[s.step] = s.request
		} else if before.Path != s.request.Path || !bytes.Equal(before.Body, s.request.Body) {
			t.Errorf("%s was sent again with other bytes", s.step)
		}
	}
}

// TestLostMessages breaks each request that an operation is made of, in each way. Every operation
// succeeds all the same, at no cost.
func TestLostMessages(t *testing.T) {
	type account struct {
		device   *client.Client
		wire     *wire
		enrolled client.Enrolled
	}
	enrol := func(t *testing.T, s *service) account {
		d, w := s.device("alice")
		enrolled, err := d.Enrol(t.Context(), "password")
		if err != nil {
			t.Fatal(err)
		}
		w.take()
		return account{d, w, enrolled}
	}
	for name, op := range map[string]struct {
		steps []string
		run   func(t *testing.T, s *service, breakAt func(*wire)) *wire
	}{
		"enrol": {enrolSteps[2:], func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			d, w := s.device("alice")
			w.set(breakAt)
			enrolled, err := d.Enrol(t.Context(), "password")
			if err != nil {
				t.Fatal(err)
			}
			if n := s.store.Count(vault.EventActivated); n != 1 {
				t.Errorf("%d activations", n)
			}
			other, _ := s.device("alice")
			if got := mustRecover(t, other, "password"); got.Key != enrolled.Key {
				t.Error("another key is in the vault than was returned")
			}
			return w
		}},
		"recover": {recoverSteps, func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			a := enrol(t, s)
			d, w := s.device("alice")
			w.set(breakAt)
			if got := mustRecover(t, d, "password"); got.Key != a.enrolled.Key {
				t.Error("another key")
			}
			if n, ok := s.store.Count(vault.EventAttempt), s.store.Count(vault.EventSuccess); n != 1 || ok != 1 {
				t.Errorf("%d attempts were charged and %d succeeded", n, ok)
			}
			return w
		}},
		"recover with a wrong password": {recoverSteps[3:], func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			enrol(t, s)
			d, w := s.device("alice")
			w.set(breakAt)
			wantWrong(t, d, "wrong", 9)
			if n, failed := s.store.Count(vault.EventAttempt), s.store.Count(vault.EventFailure); n != 1 || failed != 1 {
				t.Errorf("%d attempts were charged and %d failed", n, failed)
			}
			return w
		}},
		"change password": {enrolSteps[4:], func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			a := enrol(t, s)
			a.wire.set(breakAt)
			if _, err := a.device.ChangePassword(t.Context(), a.enrolled.Key, "new"); err != nil {
				t.Fatal(err)
			}
			if n := s.store.Count(vault.EventActivated); n != 2 {
				t.Errorf("%d activations", n)
			}
			return a.wire
		}},
		"turn off": {[]string{"DELETE backup-key"}, func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			a := enrol(t, s)
			a.wire.set(breakAt)
			if err := a.device.TurnOff(t.Context(), a.enrolled.Key); err != nil {
				t.Fatal(err)
			}
			return a.wire
		}},
		"turn off what is frozen": {[]string{"DELETE backup-key"}, func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			a := enrol(t, s)
			thief, _ := s.device("alice")
			if _, err := thief.ReplaceWithoutProof(t.Context(), "mine", newKey(t)); err != nil {
				t.Fatal(err)
			}
			a.wire.set(breakAt)
			if err := a.device.TurnOff(t.Context(), a.enrolled.Key); err != nil {
				t.Fatal(err)
			}
			status, err := thief.Status(t.Context())
			if err != nil || len(status.Generations) != 1 || status.Generations[0].State != "active" {
				t.Errorf("what is left: %+v, %v", status, err)
			}
			a.wire.take() // one DELETE for each generation, and neither is the other's resend
			return a.wire
		}},
		"reinstate": {[]string{"POST backup-key/reinstatement"}, func(t *testing.T, s *service, breakAt func(*wire)) *wire {
			a := enrol(t, s)
			if err := a.device.TurnOffWithoutProof(t.Context()); err != nil {
				t.Fatal(err)
			}
			a.wire.take()
			a.wire.set(breakAt)
			if err := a.device.Reinstate(t.Context(), a.enrolled.Key); err != nil {
				t.Fatal(err)
			}
			return a.wire
		}},
	} {
		for _, step := range op.steps {
			for _, f := range faultsOf(step) {
				t.Run(fmt.Sprintf("%s/%s/%s", name, strings.ReplaceAll(step, "/", "."), f), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						var broken atomic.Bool
						at := onceAt(step, f)
						w := op.run(t, newService(t), func(w *wire) {
							w.faults = func(n int, s string) fault {
								f := at(n, s)
								if f != "" {
									broken.Store(true)
								}
								return f
							}
						})
						if !broken.Load() {
							t.Fatalf("the operation never sent %s", step)
						}
						wantResent(t, w.take())
					})
				})
			}
		}
	}
}

// TestUnavailableEnrolmentIsResumed takes the vault away at each step after which it may
// have something, and brings it back.
func TestUnavailableEnrolmentIsResumed(t *testing.T) {
	for _, step := range []string{"PUT backup-key", "POST backup-key/activation"} {
		for _, f := range []fault{dropRequest, dropReply} {
			t.Run(fmt.Sprintf("%s/%s", strings.ReplaceAll(step, "/", "."), f), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newService(t)
					d, w := s.device("alice")
					w.set(func(w *wire) { w.faults = always(step, f) })
					enrolled, err := d.Enrol(t.Context(), "password")
					var pending *client.PendingEnrolment
					if !errors.As(err, &pending) || !errors.Is(err, client.ErrUnavailable) {
						t.Fatalf("want a pending enrolment, got: %v", err)
					}
					if enrolled != (client.Enrolled{}) {
						t.Error("a key that is not acknowledged was returned")
					}
					// Still away: still pending, and still the same enrolment.
					if _, err = pending.Resume(t.Context()); !errors.As(err, &pending) {
						t.Fatalf("resuming while it is away: %v", err)
					}
					w.set(func(w *wire) { w.faults = nil })
					for range 2 { // the second time it is an answered question, asked again
						if enrolled, err = pending.Resume(t.Context()); err != nil {
							t.Fatal(err)
						}
					}
					all := w.take()
					wantResent(t, all)
					if n := slices.Index(steps(all), "POST backup-key/enrolment"); slices.Contains(steps(all[n+1:]), "POST backup-key/enrolment") {
						t.Error("it was enrolled anew")
					}
					if n := s.store.Count(vault.EventStaged); n != 1 {
						t.Errorf("%d generations were staged", n)
					}
					other, _ := s.device("alice")
					if got := mustRecover(t, other, "password"); got.Key != enrolled.Key || got.Generation != enrolled.Generation {
						t.Error("another key is in the vault than was returned")
					}
				})
			})
		}
	}
}

// An enrolment that never got as far as staging leaves nothing to resume.
func TestUnavailableEnrolmentStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		d, w := s.device("alice")
		w.set(func(w *wire) { w.faults = always("POST backup-key/enrolment", dropReply) })
		_, err := d.Enrol(t.Context(), "password")
		var pending *client.PendingEnrolment
		if errors.As(err, &pending) || !errors.Is(err, client.ErrUnavailable) || !errors.Is(err, errLost) {
			t.Fatalf("got: %v", err)
		}
		if n := len(w.take()); n != 2+client.MaxTries {
			t.Errorf("%d requests", n)
		}
	})
}

func TestUnavailableRecoveryIsResumed(t *testing.T) {
	for _, step := range recoverSteps[2:] {
		for _, f := range []fault{dropRequest, dropReply} {
			for _, password := range []string{"right", "wrong"} {
				t.Run(fmt.Sprintf("%s/%s/%s", strings.ReplaceAll(step, "/", "."), f, password), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						s := newService(t)
						d, w := s.device("alice")
						enrolled, err := d.Enrol(t.Context(), "right")
						if err != nil {
							t.Fatal(err)
						}
						w.take()
						w.set(func(w *wire) { w.faults = always(step, f) })
						_, err = d.Recover(t.Context(), password)
						var pending *client.PendingRecovery
						if !errors.As(err, &pending) || !errors.Is(err, client.ErrUnavailable) {
							t.Fatalf("want a pending recovery, got: %v", err)
						}
						w.set(func(w *wire) { w.faults = nil })
						got, err := pending.Resume(t.Context())
						var wrong *client.WrongPasswordError
						switch {
						case password == "right" && (err != nil || got.Key != enrolled.Key):
							t.Errorf("resumed: %v", err)
						case password == "wrong" && (!errors.As(err, &wrong) || wrong.AttemptsLeft != 9):
							t.Errorf("resumed: %v", err)
						}
						wantResent(t, w.take())
						if n := s.store.Count(vault.EventAttempt); n != 1 {
							t.Errorf("%d attempts were charged", n)
						}
					})
				})
			}
		}
	}
}

// A start that is resumed after its attempt has expired is not charged again.
func TestResumeAfterExpiryChargesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		d, w := s.device("alice")
		if _, err := d.Enrol(t.Context(), "right"); err != nil {
			t.Fatal(err)
		}
		w.set(func(w *wire) { w.faults = always("POST backup-key/recovery", dropReply) })
		_, err := d.Recover(t.Context(), "right")
		var pending *client.PendingRecovery
		if !errors.As(err, &pending) {
			t.Fatal(err)
		}
		w.set(func(w *wire) { w.faults = nil })
		time.Sleep(vault.AttemptLifetime + time.Second)
		if _, err := pending.Resume(t.Context()); !errors.Is(err, client.ErrConflict) {
			t.Errorf("resumed after expiry: %v", err)
		}
		if n := s.store.Count(vault.EventAttempt); n != 1 {
			t.Errorf("%d attempts were charged", n)
		}
		mustRecover(t, d, "right")
	})
}

// The context's end stops an operation where it is, and leaves it resumable.
func TestCancelledInTheMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		d, w := s.device("alice")
		enrolled, err := d.Enrol(t.Context(), "right")
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range recoverSteps[2:] {
			ctx, cancel := context.WithCancel(t.Context())
			w.set(func(w *wire) {
				w.before = func(s string) {
					if s == step {
						cancel()
					}
				}
			})
			_, err := d.Recover(ctx, "right")
			var pending *client.PendingRecovery
			if !errors.As(err, &pending) || !errors.Is(err, context.Canceled) || errors.Is(err, client.ErrUnavailable) {
				t.Fatalf("%s: %v", step, err)
			}
			w.set(func(w *wire) { w.before = nil })
			if got, err := pending.Resume(t.Context()); err != nil || got.Key != enrolled.Key {
				t.Errorf("%s: resumed: %v", step, err)
			}
		}
		if n, ok := s.store.Count(vault.EventAttempt), s.store.Count(vault.EventSuccess); n != 2 || ok != 2 {
			t.Errorf("%d attempts, %d successes", n, ok)
		}
	})
}

// The token or the store fails inside the vault, before or after it has written.
func TestFaultsInsideTheVault(t *testing.T) {
	for _, f := range []vaultFault{failedNotPersisted, failedPersisted} {
		t.Run(string(f), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newService(t)
				d, _ := s.device("alice")
				enrolled, err := d.Enrol(t.Context(), "right")
				if err != nil {
					t.Fatal(err)
				}
				s.failNextWrite(f)
				if got := mustRecover(t, d, "right"); got.Key != enrolled.Key {
					t.Error("another key")
				}
				if n := s.store.Count(vault.EventAttempt); n != 1 {
					t.Errorf("%d attempts were charged", n)
				}
				s.failNextWrite(f)
				if _, err := d.ChangePassword(t.Context(), enrolled.Key, "new"); err != nil {
					t.Fatal(err)
				}
				if n := s.store.Count(vault.EventStaged); n != 2 {
					t.Errorf("%d generations were staged", n)
				}
				mustRecover(t, d, "new")
			})
		})
	}
}

// Two devices have read the same status, and both make an attempt.
func TestTwoDevicesAtOnce(t *testing.T) {
	s := newService(t)
	first, w1 := s.device("alice")
	second, w2 := s.device("alice")
	if _, err := first.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	var ready sync.WaitGroup
	ready.Add(2)
	meet := func(w *wire) {
		w.before = func(step string) {
			if step == "POST backup-key/recovery" {
				ready.Done()
				ready.Wait()
			}
		}
	}
	w1.set(meet)
	w2.set(meet)
	results := make(chan error, 2)
	for _, d := range []*client.Client{first, second} {
		go func() {
			_, err := d.Recover(t.Context(), "right")
			results <- err
		}()
	}
	errs := []error{<-results, <-results}
	if errs[0] != nil {
		slices.Reverse(errs)
	}
	if errs[0] != nil || !errors.Is(errs[1], client.ErrConflict) {
		t.Errorf("want one success and one conflict, got %v and %v", errs[0], errs[1])
	}
	if n := s.store.Count(vault.EventAttempt); n != 1 {
		t.Errorf("%d attempts were charged", n)
	}
}

// One client, used by many at once: each operation stands for itself.
func TestClientIsSafeForConcurrentUse(t *testing.T) {
	s := newService(t)
	d, _ := s.device("alice")
	enrolled, err := d.Enrol(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	fresh, _ := s.device("alice") // with nothing in memory yet
	var group sync.WaitGroup
	var won atomic.Int32
	for range 4 {
		group.Go(func() {
			got, err := fresh.Recover(t.Context(), "right")
			switch {
			case err == nil && got.Key == enrolled.Key:
				won.Add(1)
			case !errors.Is(err, client.ErrConflict):
				t.Errorf("got: %v", err)
			}
		})
		group.Go(func() {
			if _, err := fresh.Status(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	// One that a later success overtook was charged, and is forgiven by it.
	status, err := d.Status(t.Context())
	if err != nil || status.AttemptsLeft != 10 || won.Load() == 0 {
		t.Errorf("%d successes left %+v, %v", won.Load(), status, err)
	}
}
