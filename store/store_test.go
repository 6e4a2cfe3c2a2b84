package store_test

import (
	"context"
	"testing"

	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// database is one with the contract's tenants.
func database(t testing.TB) *storetest.Database {
	t.Helper()
	db := storetest.New(t)
	owner := db.OwnerStore(t)
	for _, id := range vaulttest.Tenants {
		if err := owner.AddTenant(t.Context(), vault.Tenant{ID: id, Policy: vault.DefaultPolicy()}); err != nil {
			t.Fatal(err)
		}
	}
	return db
}

func TestStoreKeepsTheContract(t *testing.T) {
	vaulttest.StoreContract(t, func(t *testing.T) vault.Store { return database(t).Store(t) })
}

func TestStats(t *testing.T) {
	s := database(t).Store(t)
	before := s.Stats()
	if err := s.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := s.Stats()
	if after.Max < 1 || after.Open < 1 || after.Open > after.Max || after.InUse != 0 || after.Acquired != before.Acquired+1 || after.GaveUp != 0 {
		t.Errorf("before %+v, after a statement %+v", before, after)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Ping(over); err == nil || s.Stats().GaveUp != 1 {
		t.Errorf("a caller that gave up: %v, %+v", err, s.Stats())
	}
}
