package client_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"testing"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/transcript"
)

// docs/integration.md shows parts of these functions.

func guideFirstSteps(ctx context.Context, transport client.Transport, fingerprint transcript.Fingerprint,
	user, password string, token func(context.Context) (string, error),
) error {
	device, err := client.New(client.Config{
		Transport: transport, Fingerprint: fingerprint, Tenant: tenant, User: user, Token: token,
	})
	if err != nil {
		return err
	}
	enrolled, err := device.Enrol(ctx, password) // a new key, now kept by the vault
	if err != nil {
		return err
	}
	recovered, err := device.Recover(ctx, password) // on any device: the same key, for one try
	if err != nil {
		return err
	}
	if enrolled.Key != recovered.Key {
		return errors.New("another key")
	}
	return nil
}

// storage is an app's, with a backup of before.
type storage struct{ plain, encrypted []byte }

func guideMoveOver(ctx context.Context, device *client.Client, storage *storage, password string) error {
	enrolled, err := device.Enrol(ctx, password)
	if err != nil {
		return err
	}
	sealed, err := enrolled.Key.Seal(rand.Reader, storage.plain)
	if err != nil {
		return err
	}
	storage.encrypted = sealed
	// What was stored is read back and opened before the old one goes.
	opened, err := enrolled.Key.Unseal(storage.encrypted)
	if err != nil || !bytes.Equal(opened, storage.plain) {
		return errors.Join(errors.New("the upload is not what was sent: keep the old backup"), err)
	}
	storage.plain = nil
	return nil
}

func TestGuide(t *testing.T) {
	t.Parallel()
	s := newService(t)
	config := s.config("alice", inProcess{s.handler})
	if err := guideFirstSteps(t.Context(), config.Transport, s.pin, "alice", "a password", config.Token); err != nil {
		t.Fatal(err)
	}
	device, _ := s.device("bob")
	old := &storage{plain: []byte("history")}
	if err := guideMoveOver(t.Context(), device, old, "another password"); err != nil {
		t.Fatal(err)
	}
	got := mustRecover(t, device, "another password")
	if opened, err := got.Key.Unseal(old.encrypted); err != nil || string(opened) != "history" || old.plain != nil {
		t.Errorf("%q, %v, old: %q", opened, err, old.plain)
	}
}
