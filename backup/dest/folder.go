package dest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// folder is a local folder. gocloud's own driver is not used: it does not fsync, so that
// a crash of the machine could leave an empty file under a name that says it is whole.
type folder struct {
	path string
	root *os.Root
	info fs.FileInfo
	lock *os.File
}

// Names of what is not whole yet, and of the file that is locked.
const (
	partial  = ".bkv-partial-"
	lockName = ".bkv-lock"
)

func openFolder(p string, create bool) (*folder, error) {
	p, err := filepath.Abs(p)
	if err != nil {
		return nil, err
	}
	there, err := exists(p)
	switch {
	case err != nil:
		return nil, err
	case !there && !create:
		return nil, fmt.Errorf("destination %s: there is no such folder", p)
	case !there:
		if err := os.Mkdir(p, 0o700); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("destination %s: the folder above it is not there; if it is on a disk, is that mounted?", p)
			}
			return nil, fmt.Errorf("destination: %w", err)
		}
		if err := syncPath(filepath.Dir(p)); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(p)
	if err != nil {
		return nil, fmt.Errorf("destination: %w", err)
	}
	info, err := root.Stat(".")
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return &folder{path: p, root: root, info: info}, nil
}

func (f *folder) String() string { return f.path }

func (f *folder) Is(info fs.FileInfo) bool { return os.SameFile(f.info, info) }

func (f *folder) Read(_ context.Context, name string) (io.ReadCloser, int64, error) {
	file, err := f.root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: it is no file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	return file, info.Size(), nil
}

func (f *folder) Write(_ context.Context, name string, _ int64, fill func(io.Writer) error) error {
	temporary := path.Join(path.Dir(name), partial+rand.Text())
	file, err := f.root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = fill(file)
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = f.root.Rename(temporary, name)
	}
	if err != nil {
		return errors.Join(err, f.root.Remove(temporary))
	}
	return f.sync(path.Dir(name))
}

func (f *folder) Delete(_ context.Context, name string) error {
	if err := f.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Folders that are empty now go too, as they would in a bucket, which has none.
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if err := f.root.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return f.sync(dir) // it is not empty
		}
	}
	return f.sync(".")
}

func (f *folder) List(ctx context.Context, prefix string, each func(string, int64) error) error {
	return fs.WalkDir(f.root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case d.IsDir() && p != "." && !strings.HasPrefix(p+"/", prefix) && !strings.HasPrefix(prefix, p+"/"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasPrefix(p, prefix):
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return each(p, info.Size())
	})
}

func (f *folder) Lock() error {
	lock, err := f.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("destination %s: %w", f.path, err)
	}
	if err := flock(lock); err != nil {
		return errors.Join(err, lock.Close())
	}
	f.lock = lock
	// Nobody is writing, so these are of writers that were killed.
	left, err := fs.Glob(f.root.FS(), partial+"*")
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := f.root.Remove(name); err != nil {
			return fmt.Errorf("clearing away an interrupted upload: %w", err)
		}
	}
	return nil
}

func (f *folder) Close() error {
	err := f.root.Close()
	if f.lock != nil {
		err = errors.Join(err, f.lock.Close()) // which unlocks it
	}
	return err
}

// sync makes names in a folder durable.
func (f *folder) sync(dir string) error {
	d, err := f.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func syncPath(p string) error {
	d, err := os.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
