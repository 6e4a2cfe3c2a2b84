package store_test

import (
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
