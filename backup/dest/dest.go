// Package dest is where archives lie: a local folder, or a bucket of S3, Google Cloud
// Storage or Azure; and the manifest there, which says which archives count.
//
// # Trust boundary
//
// A destination is somebody else's. It sees sizes and times, and may lose, change,
// swap or withhold what it holds. So the manifest carries an HMAC under a key derived from
// the backup key and names each archive's size and SHA-256. What the package
// cannot notice by itself is an old manifest put back with the archives of its time: callers
// that remember the serial can.
//
// # What survives a crash
//
// A Write is seen whole or not at all. In a local folder that is a temporary file, fsync,
// rename, and fsync of the folder (POSIX's rename is atomic); in a bucket it is the
// service's own promise for an object. Nothing else is relied upon.
//
// The package is for cmd/bkv alone: the three clouds' libraries are large.
package dest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"gocloud.dev/blob"
)

// ErrNotFound: there is nothing of this name.
var ErrNotFound = errors.New("not found")

// Destination holds named objects. It is safe for concurrent use; two
// programs that write to one at the same time are kept apart in a local folder (see Lock)
// and are not in a bucket.
type Destination interface {
	// Read opens an object. Errors: ErrNotFound.
	Read(ctx context.Context, name string) (content io.ReadCloser, size int64, err error)
	// Write stores what fill writes, under a name that may be taken. After an error of
	// fill or of its own what was there before is there still. Expected is about how many
	// bytes to expect, 0 if that is not known.
	Write(ctx context.Context, name string, expected int64, fill func(io.Writer) error) error
	// Delete removes an object; that it is not there is no error.
	Delete(ctx context.Context, name string) error
	// List calls each with the name of every object whose name begins with prefix.
	List(ctx context.Context, prefix string, each func(name string, size int64) error) error
	// Lock keeps other programs from writing until Close, where that is possible, and clears
	// away what writers that were killed left. Errors: ErrLocked.
	Lock() error
	// Is reports whether this is the folder itself: nobody wants a backup of the backup.
	Is(fs.FileInfo) bool
	// String names it for people. It shows no credentials.
	String() string
	Close() error
}

// ErrLocked: another program is writing there.
var ErrLocked = errors.New("another bkv is writing to this destination: wait until it has ended")

// Open opens a destination by its URL: s3://, gs:// and azblob:// as gocloud.dev/blob
// describes them, file:// or a plain path for a local folder. With create a local folder is
// made if it is not there, but not the folders above it: they may be a disk that is not mounted.
func Open(ctx context.Context, url string, create bool) (Destination, error) {
	scheme, rest, isURL := strings.Cut(url, "://")
	switch {
	case url == "":
		return nil, errors.New("destination: it is empty")
	case !isURL:
		if scheme, _, found := strings.Cut(url, ":"); found && blob.DefaultURLMux().ValidBucketScheme(scheme) {
			return nil, fmt.Errorf("destination %s: a URL has two slashes after the colon; a folder of that name is ./%s", url, url)
		}
		return openFolder(url, create)
	case scheme == "file":
		p, ok := strings.CutPrefix(rest, "localhost/")
		if ok {
			p = "/" + p
		}
		if !filepath.IsAbs(p) || strings.ContainsAny(p, "?#") {
			return nil, fmt.Errorf("destination %s: want file:///absolute/path", url)
		}
		return openFolder(p, create)
	default:
		return openBucket(ctx, url)
	}
}

// exists reports whether there is a folder.
func exists(p string) (bool, error) {
	info, err := os.Stat(p)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case !info.IsDir():
		return false, fmt.Errorf("destination %s: it is no folder", p)
	}
	return true, nil
}
