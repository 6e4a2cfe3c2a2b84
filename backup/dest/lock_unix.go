//go:build unix

package dest

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// flock locks a file until it is closed, also by the end of the process.
func flock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}
