package main

import (
	"errors"
	"os"

	"golang.org/x/term"

	"github.com/backup-key-vault/bkv/backup/archive"
)

type keyCommand struct {
	Raw         bool `xor:"form" help:"The key's 32 bytes as they are. Not to a terminal."`
	AgeIdentity bool `xor:"form" help:"The identity that opens the archives with stock age (1.3 or newer): age -d -i <(bkv key --age-identity) FILE | zstd -d | tar -x"`
	Restic      bool `xor:"form" help:"A password for a restic repository, derived from the key: RESTIC_PASSWORD_COMMAND='bkv key --restic'"`
	Rclone      bool `xor:"form" help:"A password for rclone, derived from the key: RCLONE_PASSWORD_COMMAND='bkv key --rclone'"`
}

func (c *keyCommand) Run(e *environment) error {
	key, err := e.device.key()
	if err != nil {
		return err
	}
	switch {
	case c.Raw:
		if f, ok := e.stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			return errors.New("--raw writes bytes that would upset the terminal: send them to a file or a program")
		}
		_, err := e.stdout.Write(key[:])
		return err
	case c.AgeIdentity:
		identity, err := archive.Identity(key)
		if err != nil {
			return err
		}
		return e.printf("%s\n", identity)
	case c.Restic:
		return e.printf("%s\n", key.ResticPassword())
	case c.Rclone:
		return e.printf("%s\n", key.RclonePassword())
	}
	if e.term.shows() {
		e.say("Whoever sees these 64 digits can read your backup.")
	}
	return e.printf("%s\n", key.Digits())
}
