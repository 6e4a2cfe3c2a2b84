package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/backup/dest"
)

// Modes of keeping the key.
const (
	modePassword = "password"
	modeDigits   = "digits"
)

// device is what bkv keeps on this device: settings, which are no secrets, and the key. It
// keeps neither the password nor anything that a password could be tested with: whoever
// stole the device could try as many as he likes.
type device struct {
	dir string

	Mode       string           `json:"mode,omitempty"`
	Vault      vaultSettings    `json:"vault,omitzero"`
	Serial     uint64           `json:"serial,omitempty"` // of the vault's newest key list seen
	Generation string           `json:"generation,omitempty"`
	KeyStore   string           `json:"key_store,omitempty"` // where the key is
	KeyName    string           `json:"key_name,omitempty"`  // what it is called there
	Backups    map[string]saved `json:"backups,omitempty"`   // the last one, by destination

	// Unsettled: a change of the key was begun, and which of the device's keys the vault has is not known.
	Unsettled bool `json:"unsettled,omitempty"`
}

// vaultSettings say where the vault is and who asks.
type vaultSettings struct {
	URL          string `json:"url,omitempty"`
	Fingerprint  string `json:"fingerprint,omitempty"`
	Tenant       string `json:"tenant,omitempty"`
	User         string `json:"user,omitempty"`
	TokenFile    string `json:"token_file,omitempty"`
	TokenCommand string `json:"token_command,omitempty"`
}

// saved is the last backup at a destination that this device knows of.
type saved struct {
	Archive string    `json:"archive"`
	Created time.Time `json:"created"`
	Files   int64     `json:"files"`
	Bytes   int64     `json:"bytes"`
	Serial  uint64    `json:"serial"` // of the manifest
}

const settingsFile = "settings.json"

// openDevice reads what is kept in dir, or in the user's configuration folder.
func openDevice(dir string) (*device, error) {
	if dir == "" {
		base, err := os.UserConfigDir()
		if err != nil {
			return nil, fmt.Errorf("%w: name a folder with --config-dir", err)
		}
		dir = filepath.Join(base, "bkv")
	}
	d := &device{dir: dir}
	raw, err := os.ReadFile(filepath.Join(dir, settingsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, d); err != nil {
		return nil, fmt.Errorf("%s cannot be read: %w; put it back from a copy, or delete it and run 'bkv setup --recover'", filepath.Join(dir, settingsFile), err)
	}
	return d, nil
}

// save writes the settings, as a whole or not at all.
func (d *device) save() error {
	raw, err := json.MarshalIndent(d, "", "\t")
	if err != nil {
		return err
	}
	return writeFile(d.dir, settingsFile, append(raw, '\n'))
}

// writeFile puts a file that only its owner reads into a folder: beside first, then renamed.
func writeFile(dir, name string, content []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, name+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFolder(dir)
}

// syncFolder makes a folder's names durable.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// errNotSetUp: this device has no key.
var errNotSetUp = errors.New("the backup is not set up on this device: run 'bkv setup', or 'bkv setup --recover' if it was set up on another one")

// noteBackup keeps which backup is the last at a destination, for status, and the serial of the list there,
// so that an older list is not believed.
func (d *device) noteBackup(where dest.Destination, a dest.Archive, serial uint64) error {
	if d.Backups == nil {
		d.Backups = map[string]saved{}
	}
	d.Backups[where.String()] = saved{Archive: a.Name, Created: a.Created, Files: a.Files, Bytes: a.Bytes, Serial: serial}
	return d.save()
}

// keys are the device's backup keys: first the one in use, then those that it replaced,
// which still open older backups.
//
// Errors: errNotSetUp, and the key store's.
func (d *device) keys() ([]backup.Key, error) {
	if d.KeyStore == "" {
		return nil, errNotSetUp
	}
	return d.loadKeys()
}

// key is the key in use.
func (d *device) key() (backup.Key, error) {
	keys, err := d.keys()
	if err != nil {
		return backup.Key{}, err
	}
	return keys[0], nil
}
