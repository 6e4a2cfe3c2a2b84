//go:build !linux

package main

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/term"
)

// readHidden reads a line that the terminal does not show.
func readHidden(f *os.File) (string, error) {
	line, err := term.ReadPassword(int(f.Fd()))
	return string(line), err
}

// syncTree brings all that was written to the disk below root, file by file.
func syncTree(root *os.Root) error {
	return fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		f, err := root.Open(p)
		if errors.Is(err, fs.ErrPermission) {
			return nil // a file that its owner may not read
		}
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}

// exchange swaps two folders. A crash in between leaves both under other names, and loses neither.
func exchange(a, b string) error {
	aside := b + ".bkv-before"
	if err := os.Rename(b, aside); err != nil {
		return err
	}
	if err := os.Rename(a, b); err != nil {
		return errors.Join(err, os.Rename(aside, b))
	}
	return os.Rename(aside, a)
}
