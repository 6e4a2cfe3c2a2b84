package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backup-key-vault/bkv/backup"
)

// idComment begins the comment of an archive's first entry, a global pax header, which
// other tars pass over. The archive's id follows, so that one archive cannot pass for another.
const idComment = "bkv archive "

// bufferBytes is what is read and written at a time.
const bufferBytes = 256 << 10

// CreateConfig says what goes into an archive.
type CreateConfig struct {
	// ID tells the archive from all others.
	ID string
	// Paths are files and directories. Each keeps its base name; a link given here is
	// followed, and links below are kept as links.
	Paths []string
	// Skip, if it is set, is asked for each file and directory, and leaves out what it
	// returns true for: the destination itself, if it lies below a path.
	Skip func(fs.FileInfo) bool
	// Progress, if it is set, is told of content as it is read, in bytes.
	Progress func(bytes int)
	// Problem, if it is set, is told what is not in the archive as it was on disk. Lost
	// says that content is missing from it; else it is of a kind that is never kept, or
	// was written to meanwhile.
	Problem func(path string, lost bool, err error)
}

// Summary counts what is in an archive.
type Summary struct {
	Files, Directories, Links int64 // links: symbolic, and further hard links
	Bytes                     int64 // content of the files
	// Lost counts files and directories that could not be read, or not whole.
	Lost int64
}

// Create writes an archive of the paths to dst. After an error dst holds nothing that would
// open as a whole archive. A file that cannot be read is left out and counted; a path
// of the configuration that cannot is an error.
func Create(ctx context.Context, dst io.Writer, key backup.Key, config CreateConfig) (Summary, error) {
	names, err := baseNames(config.Paths)
	if err != nil {
		return Summary{}, err
	}
	sealed, err := Seal(dst, key)
	if err != nil {
		return Summary{}, err
	}
	c := &creator{
		CreateConfig: config, ctx: ctx, tar: tar.NewWriter(sealed),
		buffer: make([]byte, bufferBytes), links: map[inode]*linked{},
	}
	if err := c.all(names); err != nil {
		return Summary{}, err // sealed is left open: what was written is no whole age file
	}
	if err := sealed.Close(); err != nil {
		return Summary{}, err
	}
	return c.summary, nil
}

// baseNames are the top names in the archive, which must differ.
func baseNames(paths []string) ([]string, error) {
	var names []string
	for _, p := range paths {
		absolute, err := filepath.Abs(p)
		if err != nil {
			return nil, err
		}
		name := filepath.Base(absolute)
		if filepath.Dir(absolute) == absolute {
			return nil, fmt.Errorf("%s: name what is in it instead: a whole file system has no name", p)
		}
		if slices.Contains(names, name) {
			return nil, fmt.Errorf("%s: another path is called %q too, and they would become one in the archive: back up the folder above them", p, name)
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return nil, errors.New("there is nothing to back up: name files or folders")
	}
	return names, nil
}

// inode is a file that several names may share.
type inode struct{ device, number uint64 }

// linked is the first name of an inode, and how many are still to come.
type linked struct {
	name string
	left uint64
}

type creator struct {
	CreateConfig
	ctx     context.Context
	tar     *tar.Writer
	buffer  []byte
	links   map[inode]*linked
	summary Summary
}

func (c *creator) all(names []string) error {
	err := c.tar.WriteHeader(&tar.Header{
		Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": idComment + c.ID},
	})
	if err != nil {
		return err
	}
	for i, p := range c.Paths {
		if err := c.top(p, names[i]); err != nil {
			return err
		}
	}
	return c.tar.Close()
}

// top adds one path of the configuration.
func (c *creator) top(p, name string) error {
	info, err := os.Stat(p)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s: neither a file nor a folder", p)
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }() // it was only read
		return c.file(f, info, p, name)
	}
	root, err := os.OpenRoot(p)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	return c.directory(root, ".", p, name, info)
}

func (c *creator) problem(p string, lost bool, err error) {
	if lost {
		c.summary.Lost++
	}
	if c.Problem != nil {
		var inner *fs.PathError
		if errors.As(err, &inner) { // it names the path relative to something
			err = inner.Err
		}
		c.Problem(p, lost, err)
	}
}

// directory adds a directory and all that is in it, depth first. Where is its path for
// messages, and name the one in the archive.
func (c *creator) directory(root *os.Root, relative, where, name string, info fs.FileInfo) error {
	d, err := root.Open(relative)
	if err != nil {
		c.problem(where, true, err)
		return nil
	}
	entries, err := d.Readdirnames(-1)
	if closeErr := d.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		c.problem(where, true, err) // what could be listed is still added
	}
	if err := c.header(tar.TypeDir, name+"/", "", info, 0); err != nil {
		return err
	}
	c.summary.Directories++
	slices.Sort(entries)
	for _, entry := range entries {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.entry(root, path.Join(relative, entry), filepath.Join(where, entry), path.Join(name, entry)); err != nil {
			return err
		}
	}
	return nil
}

func (c *creator) entry(root *os.Root, relative, where, name string) error {
	info, err := root.Lstat(relative)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // deleted since the directory was listed
	case err != nil:
		c.problem(where, true, err)
		return nil
	case c.Skip != nil && c.Skip(info):
		return nil
	case info.IsDir():
		return c.directory(root, relative, where, name, info)
	case info.Mode().IsRegular():
		f, err := root.Open(relative)
		if err != nil {
			c.problem(where, true, err)
			return nil
		}
		defer func() { _ = f.Close() }() // it was only read
		return c.file(f, info, where, name)
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := root.Readlink(relative)
		if err != nil {
			c.problem(where, true, err)
			return nil
		}
		c.summary.Links++
		return c.header(tar.TypeSymlink, name, target, info, 0)
	default:
		c.problem(where, false, errors.New("not a file, a folder or a link: left out"))
		return nil
	}
}

// file adds a regular file, or a further name of one that is in the archive.
func (c *creator) file(f *os.File, found fs.FileInfo, where, name string) error {
	info, err := f.Stat()
	if err == nil && !os.SameFile(info, found) {
		err = errors.New("it was replaced by another while it was opened")
	}
	if err != nil {
		c.problem(where, true, err)
		return nil
	}
	if id, names, ok := inodeOf(info); ok && names > 1 {
		if first := c.links[id]; first != nil {
			if first.left--; first.left == 0 {
				delete(c.links, id)
			}
			c.summary.Links++
			return c.header(tar.TypeLink, name, first.name, info, 0)
		}
		c.links[id] = &linked{name, names - 1}
	}
	size := info.Size()
	if err := c.header(tar.TypeReg, name, "", info, size); err != nil {
		return err
	}
	c.summary.Files++
	c.summary.Bytes += size
	return c.content(f, info, where)
}

// content writes as many bytes as the header says, whatever becomes of the file meanwhile.
func (c *creator) content(f *os.File, info fs.FileInfo, where string) error {
	left := info.Size()
	for left > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(c.buffer[:min(left, bufferBytes)])
		if _, err := c.tar.Write(c.buffer[:n]); err != nil {
			return err
		}
		left -= int64(n)
		if c.Progress != nil {
			c.Progress(n)
		}
		if err != nil {
			if err == io.EOF {
				err = fmt.Errorf("it became shorter while it was read: its last %d bytes are zeros in the archive", left)
			} else {
				err = fmt.Errorf("%w: its last %d bytes are zeros in the archive", err, left)
			}
			c.problem(where, true, err)
			return c.zeros(left)
		}
	}
	if after, err := f.Stat(); err == nil && (after.Size() != info.Size() || !after.ModTime().Equal(info.ModTime())) {
		c.problem(where, false, errors.New("it was written to while it was read"))
	}
	return nil
}

func (c *creator) zeros(left int64) error {
	clear(c.buffer)
	for left > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, err := c.tar.Write(c.buffer[:min(left, bufferBytes)])
		if err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

func (c *creator) header(kind byte, name, target string, info fs.FileInfo, size int64) error {
	h := &tar.Header{
		Typeflag: kind, Name: name, Linkname: target, Size: size,
		Mode: tarMode(info.Mode()), ModTime: info.ModTime(),
		Format: tar.FormatPAX, // times to the nanosecond, names of any length and bytes
	}
	h.Uid, h.Gid = ownerOf(info)
	if err := c.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("%q: %w", strings.TrimSuffix(name, "/"), err)
	}
	return nil
}

// tarMode is a mode's permissions with POSIX's bits for set-user-ID, set-group-ID and sticky.
func tarMode(m fs.FileMode) int64 {
	mode := int64(m.Perm())
	for bit, posix := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= posix
		}
	}
	return mode
}
