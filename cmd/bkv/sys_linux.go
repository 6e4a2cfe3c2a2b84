package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// readHidden reads a line that the terminal does not show. term.ReadPassword goes on reading
// where the input has ended, so that Ctrl-D would do nothing.
func readHidden(f *os.File) (string, error) {
	fd := int(f.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return "", err
	}
	hiding := *before
	hiding.Lflag &^= unix.ECHO
	hiding.Lflag |= unix.ICANON | unix.ISIG
	hiding.Iflag |= unix.ICRNL
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hiding); err != nil {
		return "", err
	}
	line, err := readLine(f)
	return line, errors.Join(err, unix.IoctlSetTermios(fd, unix.TCSETS, before))
}

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
