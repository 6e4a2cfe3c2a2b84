package e2e_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/backup-key-vault/bkv/store/storetest"
)

// Two processes on one database and one token directory, one attempt left, many
// devices: exactly one is answered.
func TestTwoProcessesRaceForTheLastAttempt(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	addresses := []*address{at(d.start(t)), at(d.start(t))}
	for round := range 5 {
		user := fmt.Sprintf("ann-%d", round)
		ann := d.phone(addresses[0], user)
		if _, err := ann.enrol(t.Context(), "right"); err != nil {
			t.Fatal(err)
		}
		for range 9 {
			if _, err := ann.recover(t.Context(), "wrong"); !isRefused(err, "wrong-password") {
				t.Fatalf("a wrong password: %v", err)
			}
		}
		var answered, early atomic.Int32
		var racers sync.WaitGroup
		for i := range 24 {
			racers.Go(func() {
				g, err := newGuess("wrong")
				if err == nil {
					err = d.phone(addresses[i%2], user).start(t.Context(), g)
				}
				switch {
				case err == nil:
					answered.Add(1)
				case isRefused(err, "too-early"):
					early.Add(1)
				default:
					t.Errorf("racing: %v", err)
				}
			})
		}
		racers.Wait()
		if answered.Load() != 1 || early.Load() != 23 || d.started(t, user) != 10 {
			t.Fatalf("round %d: %d answered, %d refused, %d counted", round, answered.Load(), early.Load(), d.started(t, user))
		}
	}
}
