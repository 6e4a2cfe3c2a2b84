package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncTree brings all that was written to the disk below root: syncfs(2) returns when the whole
// file system is written, where fsync of each file would take far longer.
func syncTree(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return unix.Syncfs(int(d.Fd()))
}

// exchange swaps two folders in one step (renameat2(2) with RENAME_EXCHANGE).
func exchange(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
}
