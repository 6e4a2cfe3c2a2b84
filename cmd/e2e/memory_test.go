package e2e_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/backup-key-vault/bkv/store/storetest"
)

// Recoveries leave vaultd's memory where it was. The test makes a few; by hand, a million, printing the memory of vaultd's
// process, which is on its own, with SoftHSM in it and the phones not:
//
//	BKV_RECOVERIES=1000000 go test ./cmd/e2e -run TestRecoveriesLeaveTheMemory -v -timeout 12h
func TestRecoveriesLeaveTheMemory(t *testing.T) {
	n := 200
	if wish := os.Getenv("BKV_RECOVERIES"); wish != "" {
		var err error
		if n, err = strconv.Atoi(wish); err != nil || n < 10 {
			t.Fatalf("BKV_RECOVERIES=%s: want a number from 10 on", wish)
		}
	} else {
		t.Parallel()
	}
	d := deploy(t, storetest.New(t))
	v := d.start(t)
	const users = 16
	keys := make([][32]byte, users)
	for i := range keys {
		var err error
		if keys[i], err = d.phone(at(v), fmt.Sprint("user-", i)).enrol(t.Context(), right); err != nil {
			t.Fatal(err)
		}
	}
	var done atomic.Int64
	some := func(n int) {
		t.Helper()
		var wg sync.WaitGroup
		left := atomic.Int64{}
		left.Store(int64(n))
		for i := range keys { // each account by one phone at a time
			wg.Go(func() {
				for left.Add(-1) >= 0 {
					if key, err := d.phone(at(v), fmt.Sprint("user-", i)).recover(t.Context(), right); err != nil || key != keys[i] {
						t.Errorf("recovery: %v", err)
						return
					}
					done.Add(1)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	some(n / 10)
	first := v.resident(t)
	for part := 1; part <= 10; part++ {
		if part > 1 {
			some(n / 10)
		}
		if os.Getenv("BKV_RECOVERIES") != "" {
			fmt.Printf("%8d recoveries: %3d MiB resident, recycled %d times\n", done.Load(), v.resident(t), strings.Count(v.log.String(), "module recycled"))
		}
	}
	// What SoftHSM keeps until it is recycled, and what Go's collector takes its time with, comes and goes.
	if last := v.resident(t); last > first+64 {
		t.Errorf("vaultd had %d MiB after %d recoveries and has %d after %d", first, n/10, last, n)
	}
	v.stop(t)
}

// resident is the memory of vaultd's process in MiB, as Linux counts it.
func (v *vaultd) resident(t testing.TB) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib / 1024
}
