package vault_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/vault"
)

// capsuleFor seals a request to one of a vault's relay keys, as it lists them.
func capsuleFor(t *testing.T, v *vault.Vault, kem uint16) []byte {
	t.Helper()
	configs, err := v.RelayConfigs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(configs) != 2 || configs[0].KEM != ohttp.MLKEM768P256 || configs[1].KEM != ohttp.DHKEMP256 {
		t.Fatalf("want the hybrid first and then the plain key, got %d", len(configs))
	}
	i := slices.IndexFunc(configs, func(c ohttp.KeyConfig) bool { return c.KEM == kem })
	capsule, _, err := configs[i].Seal([]byte("a request"))
	if err != nil {
		t.Fatal(err)
	}
	return capsule
}

func opens(t *testing.T, v *vault.Vault, capsule []byte) {
	t.Helper()
	if request, _, err := v.OpenCapsule(t.Context(), capsule); err != nil || string(request) != "a request" {
		t.Errorf("a capsule does not open: %v", err)
	}
}

func refusesCapsule(t *testing.T, v *vault.Vault, capsule []byte, want error) {
	t.Helper()
	if _, _, err := v.OpenCapsule(t.Context(), capsule); !errors.Is(err, want) {
		t.Errorf("a capsule is answered with %v, want %v", err, want)
	}
}

// The life of relay keys on a real token and a real database, at two instances.
func TestRelayKeysOnSchedule(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.start(t, nil), s.start(t, nil)
	tick := func() {
		t.Helper()
		for _, n := range []*node{a, b} {
			if err := n.rotation.Tick(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	relay1, relay2 := vault.Key{Purpose: "relay", Generation: 1}, vault.Key{Purpose: "relay", Generation: 2}
	first, plain := capsuleFor(t, a.Vault, ohttp.MLKEM768P256), capsuleFor(t, b.Vault, ohttp.DHKEMP256)
	for _, n := range []*node{a, b} {
		opens(t, n.Vault, first)
		opens(t, n.Vault, plain)
	}
	before, err := a.Identity(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}

	s.db.Exec(t, `UPDATE key_generations SET current_since = current_since - interval '31 days' WHERE purpose = 'relay'`)
	tick()
	tick()
	if a.keys.Newest("relay") != 2 || b.keys.Newest("relay") != 2 || a.key(t, relay2).State != vault.KeyCurrent {
		t.Fatalf("in time: %+v", a.key(t, relay2))
	}
	second := capsuleFor(t, a.Vault, ohttp.MLKEM768P256)
	time.Sleep(1100 * time.Millisecond) // the pause between two questions for a seed that is not there
	opens(t, b.Vault, second)
	after, err := b.Identity(t.Context(), time.Now())
	if err != nil || after.Keys.Serial != before.Keys.Serial+1 || !b.Outdated(t.Context(), before.Keys.Serial, before.Relay) ||
		b.Outdated(t.Context(), after.Keys.Serial, after.Relay) {
		t.Errorf("the serial went from %d to %d: %v", before.Keys.Serial, after.Keys.Serial, err)
	}
	// The old key serves for its grace, and an operator cannot destroy it sooner.
	for _, n := range []*node{a, b} {
		opens(t, n.Vault, first)
		opens(t, n.Vault, plain)
	}
	refusedBecause(t, a.rotation.Destroy(t.Context(), relay1), "may still be needed")

	// Then it goes by itself, and its seed with it.
	s.db.Exec(t, `UPDATE key_generations SET retired_at = retired_at - interval '7 days 16 minutes' WHERE purpose = 'relay' AND generation = 1`)
	tick()
	if a.key(t, relay1).State != vault.KeyDestroyed || slices.Contains(s.labels(t), "bkv/relay/1") {
		t.Errorf("the old key is still there: %+v", a.key(t, relay1))
	}
	if n := s.db.Exec(t, `SELECT FROM relay_seeds WHERE generation = 1 AND sealed IS NULL`); n != 1 {
		t.Error("the old key's seed is still there")
	}
	for _, n := range []*node{a, b} {
		refusesCapsule(t, n.Vault, first, ohttp.ErrUnknownKey)
		refusesCapsule(t, n.Vault, plain, ohttp.ErrUnknownKey)
		opens(t, n.Vault, second)
	}
}

// A master key goes when the relay key's seed has been moved, and not before. The key stays the same.
func TestRelaySeedMovesWithTheMasterKey(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.start(t, nil), s.start(t, nil)
	capsule := capsuleFor(t, a.Vault, ohttp.MLKEM768P256)
	opens(t, b.Vault, capsule)
	a.rotate(t, "master")
	master1 := vault.Key{Purpose: "master", Generation: 1}
	refusedBecause(t, a.rotation.Destroy(t.Context(), master1), "the relay key's seed still needs key master/1")
	// An instance that is late seals nothing under the old key any more.
	if err := a.rotation.Rewrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.db.Exec(t, `SELECT FROM relay_seeds WHERE sealed_under(sealed) = 2`); n != 1 {
		t.Fatal("the seed was not moved")
	}
	if err := a.rotation.Destroy(t.Context(), master1); err != nil {
		t.Fatal(err)
	}
	fresh := s.start(t, nil) // with nothing in memory
	for _, n := range []*node{a, b, fresh} {
		opens(t, n.Vault, capsule)
	}
}

// A seed whose master key is gone, or that somebody garbled, is made anew; what was sealed to the old one does not
// open, which is what tells a client to fetch the keys.
func TestLostRelaySeedIsMadeAnew(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.start(t, nil)
	capsule, plain := capsuleFor(t, a.Vault, ohttp.MLKEM768P256), capsuleFor(t, a.Vault, ohttp.DHKEMP256)
	before, err := a.RelayConfigs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, `UPDATE relay_seeds SET sealed = set_byte(sealed, 60, get_byte(sealed, 60) # 1)`)
	b := s.start(t, nil)
	after, err := b.RelayConfigs(t.Context())
	if err != nil || bytes.Equal(before[0].PublicKey, after[0].PublicKey) || !bytes.Equal(before[1].PublicKey, after[1].PublicKey) {
		t.Fatalf("the keys after the loss: %v", err)
	}
	refusesCapsule(t, b.Vault, capsule, ohttp.ErrCapsule)
	opens(t, b.Vault, plain)
	opens(t, b.Vault, capsuleFor(t, b.Vault, ohttp.MLKEM768P256))
}

// An erased seed does not come back, and without one the list is not made.
func TestSeedOfAnotherKeyIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := capsuleFor(t, w.Vault, ohttp.MLKEM768P256)
	w.token.RotateRelay()
	second := capsuleFor(t, w.Vault, ohttp.MLKEM768P256)
	opens(t, w.Vault, first)
	opens(t, w.Vault, second)
	// Both seeds are authentic, each for its own generation only.
	seeds, err := w.store.RelaySeeds(t.Context())
	if err != nil || len(seeds) != 2 {
		t.Fatalf("%d seeds: %v", len(seeds), err)
	}
	if err := w.store.SwapRelaySeed(t.Context(), 2, seeds[2], seeds[1]); err != nil {
		t.Fatal(err)
	}
	other, err := vault.New(vault.Config{ID: vaultID, Store: w.store, Token: w.token})
	if err != nil {
		t.Fatal(err)
	}
	opens(t, other, first)
	opens(t, other, capsuleFor(t, other, ohttp.MLKEM768P256)) // after it was made anew
	refusesCapsule(t, other, second, ohttp.ErrCapsule)
	w.token.DestroyRelays()
	refusesCapsule(t, other, first, ohttp.ErrUnknownKey)
}
