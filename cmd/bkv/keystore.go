package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/zalando/go-keyring"

	"github.com/backup-key-vault/bkv/backup"
)

// Where the key can be.
const (
	inKeyring = "keyring"
	inFile    = "file"
)

const (
	keyringService = "bkv"
	keyFile        = "key"
	// keyringPatience is for somebody who has to unlock the keyring by hand.
	keyringPatience = 2 * time.Minute
)

// hasKeyring reports whether the system has a keyring to ask. Without a session bus the library
// would start one.
func hasKeyring() bool {
	switch runtime.GOOS {
	case "darwin", "windows":
		return true
	}
	if os.Getenv("DBUS_SESSION_BUS_ADDRESS") != "" {
		return true
	}
	runtimeDir := os.Getenv("XDG_RUNTIME_DIR")
	if runtimeDir == "" {
		return false
	}
	_, err := os.Stat(filepath.Join(runtimeDir, "bus"))
	return err == nil
}

// patiently gives up on a keyring that does not answer.
func patiently(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(keyringPatience):
		return errors.New("it does not answer; is it waiting to be unlocked?")
	}
}

// storeKeys keeps the keys in the system's keyring, or in a file that only the user reads: where is
// "keyring", "file", or "auto" for the keyring if there is one. It does not save d.
func (e *environment) storeKeys(where string, keys ...backup.Key) error {
	d := e.device
	var lines strings.Builder
	for _, k := range keys {
		lines.WriteString(hex.EncodeToString(k[:]) + "\n")
	}
	if d.KeyStore != "" {
		where = d.KeyStore
	}
	if d.KeyName == "" {
		d.KeyName = "backup key " + rand.Text()[:8]
	}
	if where == inKeyring || where == "auto" && hasKeyring() {
		err := patiently(func() error { return keyring.Set(keyringService, d.KeyName, lines.String()) })
		if err == nil {
			d.KeyStore = inKeyring
			return nil
		}
		if where == inKeyring {
			return fmt.Errorf("putting the key into the system's keyring: %w", err)
		}
		e.warn("The system's keyring cannot be used: %v", err)
	}
	if err := writeFile(d.dir, keyFile, []byte(lines.String())); err != nil {
		return fmt.Errorf("keeping the key: %w", err)
	}
	if d.KeyStore == "" {
		e.warn("WARNING: the key lies in %s, unprotected but for the file's mode.\n"+
			"Whoever can read your files, or has the disk, can read your backup.", filepath.Join(d.dir, keyFile))
	}
	d.KeyStore = inFile
	return nil
}

func (d *device) loadKeys() ([]backup.Key, error) {
	var lines, where string
	var err error
	switch d.KeyStore {
	case inKeyring:
		where = "the system's keyring"
		err = patiently(func() (err error) { lines, err = keyring.Get(keyringService, d.KeyName); return err })
	case inFile:
		where = filepath.Join(d.dir, keyFile)
		var raw []byte
		raw, err = os.ReadFile(where)
		lines = string(raw)
	default:
		return nil, fmt.Errorf("%s says that the key is in %q, which this version does not know", filepath.Join(d.dir, settingsFile), d.KeyStore)
	}
	var keys []backup.Key
	for line := range strings.Lines(lines) {
		k, parseErr := backup.ParseDigits(line)
		err = errors.Join(err, parseErr)
		keys = append(keys, k)
	}
	if err == nil && len(keys) == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the key from %s: %w; if it is lost, 'bkv off --this-device' and then 'bkv setup --recover' bring it back", where, err)
	}
	return keys, nil
}

// forget removes the key and all settings from this device.
func (d *device) forget() error {
	switch d.KeyStore {
	case inKeyring:
		err := patiently(func() error { return keyring.Delete(keyringService, d.KeyName) })
		if err != nil && !errors.Is(err, keyring.ErrNotFound) {
			return fmt.Errorf("removing the key from the system's keyring: %w", err)
		}
	case inFile:
		if err := os.Remove(filepath.Join(d.dir, keyFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Remove(filepath.Join(d.dir, settingsFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
