package main

import (
	"errors"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
)

type offCommand struct {
	vaultFlags   `group:"The vault, as setup saved it or an app gives it:"`
	KeepKey      bool `xor:"what" help:"Destroy only the vault's copy and go on with the 64 digits, which are shown."`
	ThisDevice   bool `xor:"what" help:"Only make this device forget the key; the vault keeps its copy."`
	WithoutProof bool `xor:"what" help:"On a device without the key: freeze the vault's copy. It is destroyed when its time is over (by default seven days), unless its owner brings it back."`
	Yes          bool `help:"Ask nothing."`
}

func (c *offCommand) Run(e *environment) error {
	if c.WithoutProof {
		return c.freeze(e)
	}
	keys, err := e.device.keys()
	if err != nil && (!c.ThisDevice || errors.Is(err, errNotSetUp)) { // what cannot be read can still be forgotten
		return err
	}
	if c.KeepKey {
		if e.device.Mode == modeDigits {
			return errors.New("the key is in no vault: there is nothing to turn off but this device's copy")
		}
		if err := e.showDigits(keys[0], c.Yes); err != nil {
			return err
		}
	} else if !c.Yes {
		e.warn("After this, backups that exist can be read with the 64 digits alone. If you still need\n" +
			"them and have not written the digits down, stop here and run 'bkv key'.")
		if err := e.term.confirm(e.ctx, "This cannot be undone.", "off"); err != nil {
			if errors.Is(err, errNobody) {
				return errors.Join(err, errors.New("to turn the backup off without being asked, give --yes"))
			}
			return err
		}
	}
	if e.device.Mode == modePassword && !c.ThisDevice {
		vault, err := e.connect(c.vaultFlags)
		if err != nil {
			return err
		}
		err = e.prove(keys, func(key backup.Key) error { return vault.TurnOff(e.ctx, key) })
		switch {
		case errors.Is(err, client.ErrNotEnrolled), errors.Is(err, client.ErrKeyDestroyed):
			e.say("The vault keeps no key any more.")
		case err != nil:
			return err
		default:
			e.say("The vault's copy of the key is destroyed.")
		}
	}
	if c.KeepKey {
		e.device.Mode, e.device.Generation = modeDigits, ""
		return e.device.save()
	}
	if err := e.device.forget(); err != nil {
		return err
	}
	e.say("This device has forgotten the key. The backups themselves are still where they are.")
	return nil
}

func (c *offCommand) freeze(e *environment) error {
	vault, err := e.connect(c.vaultFlags)
	if err != nil {
		return err
	}
	if !c.Yes {
		if err := e.term.confirm(e.ctx, "The vault's copy of the key is to be frozen, and later destroyed.", "off"); err != nil {
			return err
		}
	}
	if err := vault.TurnOffWithoutProof(e.ctx); err != nil {
		return err
	}
	e.say("It is frozen: see 'bkv status' on a device that has the key.")
	return nil
}
