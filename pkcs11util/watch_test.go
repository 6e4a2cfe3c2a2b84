package pkcs11util_test

import (
	"context"
	"sync"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// observed counts calls by operation and result.
type observed struct {
	mu    sync.Mutex
	calls map[pkcs11util.Operation]map[pkcs11util.Result]int
}

func (o *observed) note(c pkcs11util.Call) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.calls == nil {
		o.calls = map[pkcs11util.Operation]map[pkcs11util.Result]int{}
	}
	if o.calls[c.Operation] == nil {
		o.calls[c.Operation] = map[pkcs11util.Result]int{}
	}
	o.calls[c.Operation][c.Result]++
	if c.Waited < 0 || c.Took < 0 || c.Result == pkcs11util.ResultOK && c.Took == 0 {
		panic("a call took no time")
	}
}

func (o *observed) count(op pkcs11util.Operation, r pkcs11util.Result) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.calls[op][r]
}

// Every call is observed with its operation and result, and what becomes of the token is counted.
func TestCallsAreObserved(t *testing.T) {
	tok := tokentest.New(t)
	var seen observed
	cfg := tok.Config()
	cfg.Sessions, cfg.Observe = 3, seen.note
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	keys := tok.OpenKeyset(t, cfg)
	sealed, err := keys.Seal(ctx, pkcs11util.Master, id, []byte("before"), nil)
	if err != nil {
		t.Fatal(err)
	}
	working(t, keys, sealed)
	if err := keys.MakeKey(ctx, pkcs11util.Audit, 2); err != nil {
		t.Fatal(err)
	}
	if err := keys.SetCurrent(pkcs11util.Audit, 2, 0); err != nil {
		t.Fatal(err)
	}
	if err := keys.DestroyKey(ctx, pkcs11util.Audit, 1); err != nil {
		t.Fatal(err)
	}
	for _, op := range pkcs11util.Operations() {
		if seen.count(op, pkcs11util.ResultOK) == 0 {
			t.Errorf("no call %s was observed", op)
		}
	}
	if _, err := keys.Sign(ctx, pkcs11util.Identity, 99, [32]byte{}); err == nil || seen.count(pkcs11util.OpSign, pkcs11util.ResultRefused) != 1 {
		t.Errorf("a key that is not there: %v, %v", err, seen.calls)
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := keys.MAC(over, 1, nil); err == nil || seen.count(pkcs11util.OpMAC, pkcs11util.ResultGaveUp) != 1 {
		t.Errorf("a caller that gave up: %v, %v", err, seen.calls)
	}
	if s := keys.Stats(); !s.Available || s.Sessions != 3 || s.Idle != 3 || s.Lost != 0 {
		t.Errorf("at rest: %+v", s)
	}

	tok.Vanish(t)
	if err := keys.Check(ctx); err == nil {
		t.Fatal("a token that vanished passes its check")
	}
	if seen.count(pkcs11util.OpCheck, pkcs11util.ResultFault) != 1 {
		t.Errorf("%v", seen.calls)
	}
	eventually(t, "failed recoveries", func() bool { return keys.Stats().FailedRecoveries > 0 })
	if s := keys.Stats(); s.Available || s.Lost != 1 || s.Sessions != 0 {
		t.Errorf("without its token: %+v", s)
	}
	tok.Return(t)
	eventually(t, "recovery", func() bool { return keys.Check(ctx) == nil })
	if s := keys.Stats(); !s.Available || s.LoggedIn+s.Reinitialised != 1 || s.Lost != 1 {
		t.Errorf("recovered: %+v", s)
	}
}
