package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/backup-key-vault/bkv/backup"
)

// ExtractConfig says how an archive is read.
type ExtractConfig struct {
	// ID is the archive's; another one's is ErrUnsafe.
	ID string
	// OutsideLinks also makes symbolic links that point out of the tree. They are never
	// followed, but whoever works in the tree later may follow them.
	OutsideLinks bool
	// Owners gives files the user and group ids that they had, which needs root.
	Owners bool
	// Problem, if it is set, is told what was left out. It is then counted as Lost.
	Problem func(name string, err error)
}

// ErrOutsideLink is what Problem is told of links that point out of the tree.
var ErrOutsideLink = errors.New("a link that points out of the restored tree: left out")

// Extract reads an archive from src into root, which should be empty. After an error, root
// holds something half-written: the caller must put it nowhere that makes it
// pass for whole.
//
// Entries that no archive of ours has are refused, with ErrUnsafe: names that leave
// the tree, names twice, entries under a link or under no folder, hard links to anything but
// files of the archive, and devices. Set-user-ID and set-group-ID are dropped
// unless the owner is the same. Runs of zeros become holes.
//
// Errors: those of Open, ErrUnsafe, and what the disk says.
func Extract(ctx context.Context, src io.Reader, key backup.Key, root *os.Root, config ExtractConfig) (Summary, error) {
	x := &extractor{ExtractConfig: config, ctx: ctx, root: root, buffer: make([]byte, bufferBytes), real: "."}
	err := entries(ctx, src, key, config.ID, x.entry)
	if err == nil {
		err = x.leave(".")
	}
	return x.summary, err
}

// Verify reads an archive to its end as Extract does, and writes nothing. The summary's
// Lost is 0.
//
// Errors: those of Open, and ErrUnsafe.
func Verify(ctx context.Context, src io.Reader, key backup.Key, id string) (Summary, error) {
	var s Summary
	buffer := make([]byte, bufferBytes)
	err := entries(ctx, src, key, id, func(h *tar.Header, content io.Reader) error {
		if _, err := entryName(h); err != nil {
			return err
		}
		s.count(h)
		_, err := io.CopyBuffer(writer{io.Discard}, content, buffer)
		return err
	})
	return s, err
}

// writer hides what io.Discard would read by itself, in small pieces.
type writer struct{ io.Writer }

func (s *Summary) count(h *tar.Header) {
	switch h.Typeflag {
	case tar.TypeDir:
		s.Directories++
	case tar.TypeReg:
		s.Files++
		s.Bytes += h.Size
	default:
		s.Links++
	}
}

// entries calls each for every entry of an archive, and returns nil only if the archive is
// authentic to its end and nothing follows it.
func entries(ctx context.Context, src io.Reader, key backup.Key, id string, each func(*tar.Header, io.Reader) error) error {
	opened, err := Open(contextReader{ctx, src}, key)
	if err != nil {
		return err
	}
	defer func() { _ = opened.Close() }() // it was only read
	t := tar.NewReader(opened)
	explain := func(err error) error {
		if errors.Is(err, tar.ErrHeader) || err == io.ErrUnexpectedEOF || err == io.EOF {
			return fmt.Errorf("%w: what was encrypted is no tar: %w", ErrDamaged, err)
		}
		return err
	}
	first, err := t.Next()
	if err != nil {
		return explain(err)
	}
	found, ok := strings.CutPrefix(first.PAXRecords["comment"], idComment)
	switch {
	case first.Typeflag != tar.TypeXGlobalHeader || !ok:
		return fmt.Errorf("%w: bkv did not write it", ErrUnsafe)
	case found != id:
		return fmt.Errorf("%w: it is the archive %q under the name of %q", ErrUnsafe, found, id)
	}
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return explain(err)
		}
		if err := each(h, t); err != nil {
			return err
		}
	}
	n, err := io.Copy(io.Discard, opened) // to the end, which alone is proof that it is whole
	if err == nil && n > 0 {
		err = fmt.Errorf("%w: %d bytes follow the end of the tar", ErrUnsafe, n)
	}
	return err
}

// entryName returns an entry's name, without the slash at a directory's end, if it is one that
// Create gives.
func entryName(h *tar.Header) (string, error) {
	name := h.Name
	if h.Typeflag == tar.TypeDir {
		name = strings.TrimSuffix(name, "/")
	}
	switch {
	case !filepath.IsLocal(filepath.FromSlash(name)) || name != path.Clean(name) || name == ".":
		return "", fmt.Errorf("%w: the name %q leaves the tree or is none", ErrUnsafe, h.Name)
	case h.Typeflag != tar.TypeDir && h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeSymlink && h.Typeflag != tar.TypeLink:
		return "", fmt.Errorf("%w: %q is neither a file, a folder nor a link but of type %q", ErrUnsafe, name, h.Typeflag)
	}
	return name, nil
}

type extractor struct {
	ExtractConfig
	ctx     context.Context
	root    *os.Root
	buffer  []byte
	summary Summary
	open    []directory // those that we are in; their modes and times are set when they are left
	real    string      // a path that is known to be made of directories alone
}

type directory struct {
	name   string
	header *tar.Header
}

func (x *extractor) entry(h *tar.Header, content io.Reader) error {
	name, err := entryName(h)
	if err != nil {
		return err
	}
	parent := path.Dir(name)
	if err := x.leave(parent); err != nil {
		return err
	}
	if err := x.insist(parent, name); err != nil {
		return err
	}
	err = x.make(h, name, content)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %q is in it twice", ErrUnsafe, name)
	}
	return err
}

// leave finishes the directories that are not above what comes next. "." leaves all.
func (x *extractor) leave(next string) error {
	for len(x.open) > 0 {
		d := x.open[len(x.open)-1]
		if next == d.name || strings.HasPrefix(next, d.name+"/") {
			return nil
		}
		x.open = x.open[:len(x.open)-1]
		if err := x.finish(d.name, d.header); err != nil {
			return err
		}
	}
	return nil
}

// insist makes sure that every step to a directory is a directory, and no link. Nothing is
// ever removed or replaced, so what was one stays one.
func (x *extractor) insist(dir, name string) error {
	if dir == x.real || strings.HasPrefix(x.real, dir+"/") || dir == "." {
		return nil
	}
	for i := 0; i < len(dir); {
		next := strings.IndexByte(dir[i:], '/')
		if next < 0 {
			next = len(dir) - i
		}
		i += next
		info, err := x.root.Lstat(dir[:i])
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err != nil || !info.IsDir() {
			return fmt.Errorf("%w: %q does not lie in a folder of the archive", ErrUnsafe, name)
		}
		i++
	}
	x.real = dir
	return nil
}

func (x *extractor) make(h *tar.Header, name string, content io.Reader) error {
	switch h.Typeflag {
	case tar.TypeDir:
		// Its own mode may forbid to write into it.
		if err := x.root.Mkdir(name, 0o700); err != nil {
			return err
		}
		x.open = append(x.open, directory{name, h})
	case tar.TypeReg:
		if err := x.file(h, name, content); err != nil {
			return err
		}
	case tar.TypeLink:
		if err := x.hardLink(h, name); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if !x.OutsideLinks && pointsOutside(h.Linkname, strings.Count(name, "/")) {
			x.summary.Lost++
			if x.Problem != nil {
				x.Problem(name, fmt.Errorf("%w: it points to %q", ErrOutsideLink, h.Linkname))
			}
			return nil
		}
		if err := x.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		if x.Owners {
			if err := x.root.Lchown(name, h.Uid, h.Gid); err != nil {
				return err
			}
		}
		if err := linkTime(x.root, name, h.ModTime); err != nil {
			return fmt.Errorf("setting the time of %q: %w", name, err)
		}
	}
	x.summary.count(h)
	return nil
}

// pointsOutside reports whether a link's target, from a directory of this depth, leaves
// the tree. All ".." must come first: what they would mean after a name depends on whether that
// is a link. As every directory above the link is real, no chain of such links leads out.
func pointsOutside(target string, depth int) bool {
	if path.IsAbs(target) || filepath.IsAbs(target) || filepath.VolumeName(target) != "" {
		return true
	}
	down := false
	for step := range strings.SplitSeq(filepath.ToSlash(target), "/") {
		switch {
		case step == "" || step == ".":
		case step != "..":
			down = true
		case down || depth == 0:
			return true
		default:
			depth--
		}
	}
	return false
}

func (x *extractor) hardLink(h *tar.Header, name string) error {
	target := h.Linkname
	if !filepath.IsLocal(filepath.FromSlash(target)) || target != path.Clean(target) {
		return fmt.Errorf("%w: the hard link %q leaves the tree", ErrUnsafe, name)
	}
	if err := x.insist(path.Dir(target), name); err != nil {
		return err
	}
	info, err := x.root.Lstat(target)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil || !info.Mode().IsRegular() {
		return fmt.Errorf("%w: the hard link %q is to no file of the archive", ErrUnsafe, name)
	}
	return x.root.Link(target, name)
}

func (x *extractor) file(h *tar.Header, name string, content io.Reader) error {
	f, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = x.fill(f, h.Size, content)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return x.finish(name, h)
}

// holeBytes is the least run of zeros, at a multiple of itself, that is not written.
const holeBytes = 64 << 10

var noBytes [holeBytes]byte

// fill writes a file's content, of which runs of zeros become holes. So sparse files
// take as little room as before.
func (x *extractor) fill(f *os.File, size int64, content io.Reader) error {
	hole := false
	for at := int64(0); at < size; {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(content, x.buffer[:min(size-at, bufferBytes)])
		if err != nil {
			return err
		}
		at += int64(n)
		for rest := x.buffer[:n]; len(rest) > 0; {
			run := 0
			for run < len(rest) && len(rest)-run >= holeBytes && bytes.Equal(rest[run:run+holeBytes], noBytes[:]) {
				run += holeBytes
			}
			if hole = run > 0; hole {
				if _, err := f.Seek(int64(run), io.SeekCurrent); err != nil {
					return err
				}
				rest = rest[run:]
				continue
			}
			for run < len(rest) && (run == 0 || len(rest)-run < holeBytes || !bytes.Equal(rest[run:run+holeBytes], noBytes[:])) {
				run = min(run+holeBytes, len(rest))
			}
			if _, err := f.Write(rest[:run]); err != nil {
				return err
			}
			rest = rest[run:]
		}
	}
	if hole {
		return f.Truncate(size)
	}
	return nil
}

// finish sets owner, mode and time, in this order: a change of owner drops bits of the
// mode, and either may change times.
func (x *extractor) finish(name string, h *tar.Header) error {
	if x.Owners {
		if err := x.root.Lchown(name, h.Uid, h.Gid); err != nil {
			return err
		}
	}
	mode := h.FileInfo().Mode()
	mode &= fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	if !x.Owners && (h.Uid != os.Geteuid() || h.Gid != os.Getegid()) && !h.FileInfo().IsDir() {
		mode &^= fs.ModeSetuid | fs.ModeSetgid // they would lend another user's rights
	}
	if err := x.root.Chmod(name, mode); err != nil {
		return err
	}
	return x.root.Chtimes(name, h.ModTime, h.ModTime)
}
