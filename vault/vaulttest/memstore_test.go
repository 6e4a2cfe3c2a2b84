package vaulttest_test

import (
	"errors"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

func TestMemoryStoreKeepsTheContract(t *testing.T) {
	vaulttest.StoreContract(t, func(*testing.T) vault.Store { return vaulttest.NewMemoryStore(time.Now) })
}

// A write that fails is kept or not, as the hook says, and fails either way.
func TestMemoryStoreFaults(t *testing.T) {
	id := vault.AccountID{Tenant: "alpha", User: "ann"}
	change := vault.Change{Create: true, Account: vault.Account{ID: id, Policy: vault.DefaultPolicy(), NextNumber: 1}}
	for fault, kept := range map[vaulttest.Fault]bool{vaulttest.NotPersisted: false, vaulttest.Persisted: true} {
		m := vaulttest.NewMemoryStore(time.Now)
		m.OnWrite(func(vault.Change) vaulttest.Fault { return fault })
		if err := m.Write(t.Context(), change); !errors.Is(err, vaulttest.ErrFault) {
			t.Fatalf("fault %d: %v", fault, err)
		}
		if snap, err := m.Account(t.Context(), id); err != nil || snap.Exists != kept {
			t.Fatalf("fault %d: kept is %v, %v", fault, snap.Exists, err)
		}
		m.OnWrite(nil)
		if err := m.Write(t.Context(), change); errors.Is(err, vault.ErrStale) != kept {
			t.Fatalf("fault %d, again: %v", fault, err)
		}
	}
}
