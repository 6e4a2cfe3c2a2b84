package store_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
)

func der(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	b, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ed25519Key(t testing.TB) []byte {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return der(t, public)
}

func ecdsaKey(t testing.TB, curve elliptic.Curve) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return der(t, key.Public())
}

func rsaKey(t testing.TB, bits int) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return der(t, key.Public())
}

func TestTenants(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	owner, service := db.OwnerStore(t), db.Store(t)
	ctx := t.Context()
	is := func(what string, got, want error) {
		t.Helper()
		if !errors.Is(got, want) {
			t.Fatalf("%s: got %v, want %v", what, got, want)
		}
	}

	app := vault.Tenant{ID: "app", Policy: vault.DefaultPolicy(), Keys: []vault.TenantKey{
		{ID: "k1", PublicKey: ed25519Key(t)}, {ID: "k2", PublicKey: ecdsaKey(t, elliptic.P256())},
	}}
	bare := vault.Tenant{ID: "0-bare.app_2", Policy: vault.Policy{MaxAttempts: 3, Grace: time.Second}}
	is("add", owner.AddTenant(ctx, app), nil)
	is("add", owner.AddTenant(ctx, bare), nil)
	other := app
	other.Policy, other.Keys = bare.Policy, []vault.TenantKey{{ID: "k3", PublicKey: ed25519Key(t)}}
	is("add again", owner.AddTenant(ctx, other), store.ErrTenantExists)
	want := func(tenants ...vault.Tenant) {
		t.Helper()
		got, err := service.Tenants(ctx)
		if err != nil || !reflect.DeepEqual(got, tenants) {
			t.Fatalf("got %+v, %v\nwant %+v", got, err, tenants)
		}
	}
	want(bare, app)

	third := vault.TenantKey{ID: "k3", PublicKey: rsaKey(t, 2048)}
	is("add key", owner.AddTenantKey(ctx, "app", third), nil)
	is("add key again", owner.AddTenantKey(ctx, "app", third), store.ErrKeyExists)
	is("add key to nobody", owner.AddTenantKey(ctx, "nobody", third), store.ErrUnknownTenant)
	app.Keys = append(app.Keys, third)
	want(bare, app)

	is("revoke", owner.RevokeTenantKey(ctx, "app", "k1"), nil)
	first := records(t, owner)[1].Keys[0].RevokedAt
	is("revoke again", owner.RevokeTenantKey(ctx, "app", "k1"), nil)
	is("revoke the unknown", owner.RevokeTenantKey(ctx, "app", "k9"), store.ErrUnknownKey)
	is("revoke of nobody", owner.RevokeTenantKey(ctx, "nobody", "k1"), store.ErrUnknownTenant)
	is("add the revoked", owner.AddTenantKey(ctx, "app", app.Keys[0]), store.ErrKeyExists)
	revoked := app.Keys[0]
	app.Keys = app.Keys[1:]
	want(bare, app)

	bare.Policy = vault.Policy{MaxAttempts: 10, Delays: []time.Duration{0, time.Second, 7 * 24 * time.Hour}, Grace: 90 * 24 * time.Hour}
	is("set policy", owner.SetPolicy(ctx, bare.ID, bare.Policy), nil)
	is("set policy of nobody", owner.SetPolicy(ctx, "nobody", bare.Policy), store.ErrUnknownTenant)
	want(bare, app)

	list := records(t, owner)
	if len(list) != 2 || list[0].ID != bare.ID || len(list[0].Keys) != 0 || list[0].CreatedAt.IsZero() || len(list[1].Keys) != 3 {
		t.Fatalf("got %+v", list)
	}
	key := list[1].Keys[0]
	if !reflect.DeepEqual(key.TenantKey, revoked) || first.IsZero() || !key.RevokedAt.Equal(first) || key.CreatedAt.IsZero() ||
		!list[1].Keys[1].RevokedAt.IsZero() {
		t.Fatalf("got %+v", key)
	}

	// The service reads, and changes nothing.
	for what, err := range map[string]error{
		"add":        service.AddTenant(ctx, vault.Tenant{ID: "mine", Policy: bare.Policy}),
		"set policy": service.SetPolicy(ctx, bare.ID, vault.DefaultPolicy()),
		"add key":    service.AddTenantKey(ctx, "app", vault.TenantKey{ID: "mine", PublicKey: ed25519Key(t)}),
		"revoke":     service.RevokeTenantKey(ctx, "app", "k2"),
	} {
		if err == nil {
			t.Errorf("the service may %s", what)
		}
	}
	want(bare, app)
}

func records(t testing.TB, s *store.Store) []store.TenantRecord {
	t.Helper()
	list, err := s.ListTenants(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestTenantsRefused(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	owner := db.OwnerStore(t)
	good := vault.TenantKey{ID: "k", PublicKey: ed25519Key(t)}
	policy := vault.DefaultPolicy()
	for _, id := range []string{"", "App", "-app", ".app", "a/b", "a b", "é", "app\n", "a\x00", strings.Repeat("a", 65)} {
		if err := owner.AddTenant(t.Context(), vault.Tenant{ID: id, Policy: policy}); err == nil {
			t.Errorf("tenant %q was added", id)
		}
	}
	for name, p := range map[string]vault.Policy{
		"no attempts":          {MaxAttempts: 0, Grace: time.Hour},
		"eleven attempts":      {MaxAttempts: 11, Grace: time.Hour},
		"more delays":          {MaxAttempts: 1, Delays: make([]time.Duration, 2), Grace: time.Hour},
		"no grace":             {MaxAttempts: 1},
		"a fraction of grace":  {MaxAttempts: 1, Grace: time.Hour + time.Millisecond},
		"a fraction of delay":  {MaxAttempts: 1, Grace: time.Hour, Delays: []time.Duration{time.Millisecond}},
		"a delay that goes by": {MaxAttempts: 1, Grace: time.Hour, Delays: []time.Duration{-time.Second}},
	} {
		if err := owner.AddTenant(t.Context(), vault.Tenant{ID: "app", Policy: p}); err == nil {
			t.Errorf("%s: added", name)
		}
	}
	for name, k := range map[string]vault.TenantKey{
		"no kid":             {ID: "", PublicKey: good.PublicKey},
		"kid with space":     {ID: "a b", PublicKey: good.PublicKey},
		"kid with newline":   {ID: "a\n", PublicKey: good.PublicKey},
		"kid beyond ASCII":   {ID: "é", PublicKey: good.PublicKey},
		"kid too long":       {ID: strings.Repeat("k", 129), PublicKey: good.PublicKey},
		"no key":             {ID: "k"},
		"not DER":            {ID: "k", PublicKey: []byte("-----BEGIN PUBLIC KEY-----")},
		"something after it": {ID: "k", PublicKey: append(ed25519Key(t), 0)},
		"P-384":              {ID: "k", PublicKey: ecdsaKey(t, elliptic.P384())},
		"RSA of 1024 bits":   {ID: "k", PublicKey: weakRSA(t)},
	} {
		if err := owner.AddTenant(t.Context(), vault.Tenant{ID: "app", Policy: policy, Keys: []vault.TenantKey{k}}); err == nil {
			t.Errorf("%s: added", name)
		}
		if err := owner.AddTenantKey(t.Context(), "app", k); err == nil || errors.Is(err, store.ErrUnknownTenant) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := owner.AddTenant(t.Context(), vault.Tenant{ID: "app", Policy: policy, Keys: []vault.TenantKey{good, good}}); !errors.Is(err, store.ErrKeyExists) {
		t.Errorf("a kid twice: %v", err)
	}
	if list := records(t, owner); len(list) != 0 {
		t.Fatalf("got %+v", list)
	}
	// As large and as odd as they may be.
	for i, k := range []vault.TenantKey{
		{ID: strings.Repeat("~", 128), PublicKey: rsaKey(t, 4096)}, {ID: "!", PublicKey: good.PublicKey},
	} {
		id := strings.Repeat(string(rune('a'+i)), 64)
		if err := owner.AddTenant(t.Context(), vault.Tenant{ID: id, Policy: policy, Keys: []vault.TenantKey{k}}); err != nil {
			t.Error(err)
		}
	}
}

// weakRSA is not generated: Go refuses to make one so small.
func weakRSA(t testing.TB) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	weak := key.PublicKey
	weak.N = weak.N.Rsh(weak.N, 1024)
	weak.N.SetBit(weak.N, 0, 1)
	return der(t, &weak)
}
