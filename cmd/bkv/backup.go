package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/backup/archive"
	"github.com/backup-key-vault/bkv/backup/dest"
)

type backupCommand struct {
	Args     []string `arg:"" name:"path>... <destination" help:"Files and folders, and last the destination: a folder, or a URL that begins with s3://, gs:// or azblob://."`
	Keep     int      `default:"1" placeholder:"N" help:"How many backups stay there, this one included. Older ones are deleted after this one was read back and found whole."`
	Replaces []string `sep:"none" placeholder:"NAME" help:"An older copy at the destination that this backup takes the place of, such as an unencrypted one: a file, or a folder with a slash at its end. It is deleted after this backup was read back and found whole. May be repeated."`
	NoVerify bool     `help:"Do not read the backup back. Then nothing older is deleted."`
	Yes      bool     `help:"Do not ask before what --replaces names is deleted."`
}

// Validate refuses what makes no sense together.
func (c *backupCommand) Validate() error {
	var problems []error
	if c.Keep < 1 {
		problems = append(problems, fmt.Errorf("--keep: want at least 1, got %d", c.Keep))
	}
	if c.NoVerify && len(c.Replaces) > 0 {
		problems = append(problems, errors.New("--replaces: nothing is deleted with --no-verify"))
	}
	if len(c.Args) < 2 {
		problems = append(problems, errors.New("name what to back up, and last where to"))
	}
	return errors.Join(problems...)
}

// backingUp is one backup under way.
type backingUp struct {
	*environment
	*backupCommand
	key      backup.Key
	where    dest.Destination
	manifest *dest.Manifest
	replaced []string // names that --replaces means
}

func (c *backupCommand) Run(e *environment) error {
	keys, err := e.device.keys()
	if err != nil {
		return err
	}
	if e.device.Unsettled {
		return errUnsettled
	}
	paths, url := c.Args[:len(c.Args)-1], c.Args[len(c.Args)-1]
	where, err := dest.Open(e.ctx, url, true)
	if err != nil {
		return err
	}
	r := &backingUp{environment: e, backupCommand: c, key: keys[0], where: where}
	return errors.Join(r.run(paths, keys), where.Close())
}

func (r *backingUp) run(paths []string, keys []backup.Key) error {
	if err := r.where.Lock(); err != nil {
		return err
	}
	if err := r.begin(keys); err != nil {
		return err
	}
	if err := r.findReplaced(); err != nil {
		return err
	}
	now := time.Now()
	name := dest.ArchivePrefix + now.UTC().Format("20060102T150405.000Z-") + strings.ToLower(rand.Text()[:6]) + dest.ArchiveSuffix
	// The manifest says what is to be written before it is, so that what an interruption leaves
	// is known for what it is.
	r.manifest.Archives = append(r.manifest.Archives, dest.Archive{Name: name, Created: now.UTC().Truncate(time.Second), Unfinished: true})
	entry := &r.manifest.Archives[len(r.manifest.Archives)-1]
	if err := r.manifest.Write(r.ctx, r.where, r.key); err != nil {
		return err
	}
	if err := r.write(paths, entry); err != nil {
		return r.abandon(err)
	}
	if !r.NoVerify {
		if err := r.verify(entry); err != nil {
			return r.abandon(err)
		}
		entry.Verified = true
	}
	entry.Unfinished = false
	finished := *entry
	r.supersede(finished)
	if err := r.manifest.Write(r.ctx, r.where, r.key); err != nil {
		// It may have been written all the same, so both the new archive and the old ones stay.
		return err
	}
	noteErr := r.noteBackup(finished)
	r.say("Backed up: %s, %s in %s (%s encrypted), as %s.", count(int(finished.Files), "file", "files"), size(finished.Bytes), r.where, size(finished.Size), finished.Name)
	if finished.Incomplete > 0 {
		return errors.Join(noteErr, fmt.Errorf("the backup is there, but without what could not be read (%s, named above); older copies were kept", count(int(finished.Incomplete), "file or folder", "files or folders")))
	}
	if noteErr != nil {
		return noteErr
	}
	return r.deleteOld(finished)
}

// begin reads the manifest and clears away what an interrupted run left.
func (r *backingUp) begin(keys []backup.Key) error {
	m, err := dest.ReadManifest(r.ctx, r.where, r.key)
	for _, older := range keys[1:] {
		if !errors.Is(err, dest.ErrForeignManifest) {
			break
		}
		// The key was changed since: all of it is superseded by what is to be written.
		if old, oldErr := dest.ReadManifest(r.ctx, r.where, older); oldErr == nil {
			old.TakeOver()
			m, err = old, nil
		}
	}
	switch {
	case errors.Is(err, dest.ErrNoManifest):
		m, err = &dest.Manifest{}, nil
	case errors.Is(err, dest.ErrForeignManifest):
		return fmt.Errorf("%s: %w; give this backup a folder of its own", r.where, err)
	}
	if err != nil {
		return err
	}
	if last, ok := r.device.Backups[r.where.String()]; ok && m.Serial > 0 && m.Serial < last.Serial {
		return fmt.Errorf("%s: the list of backups there is older than the one that this device knows (%d after %d): somebody put old files back; back up to another place, or take what is there for good with 'bkv restore --accept-older'", r.where, m.Serial, last.Serial)
	}
	r.manifest = m
	if err := r.insistOnNewest(); err != nil {
		return err
	}
	return r.sweep()
}

// insistOnNewest makes sure, before anything is deleted that an interrupted run left to be, that what
// took its place is there. If the destination lost that, the older ones count again.
func (r *backingUp) insistOnNewest() error {
	live := r.manifest.Live()
	if len(live) > 0 {
		newest := live[len(live)-1]
		content, length, err := r.where.Read(r.ctx, newest.Name)
		if err == nil {
			err = content.Close()
			if length == newest.Size {
				return err
			}
		}
		if err != nil && !errors.Is(err, dest.ErrNotFound) {
			return err
		}
		r.warn("WARNING: the last backup, %s, is not there as it was written: somebody changed or deleted it.", newest.Name)
	}
	for i := range r.manifest.Archives {
		r.manifest.Archives[i].Superseded = false
	}
	return nil
}

// sweep deletes what the manifest says is unfinished or superseded. It may be gone already.
func (r *backingUp) sweep() error {
	live := r.manifest.Live()
	if len(live) == len(r.manifest.Archives) {
		return nil
	}
	for _, a := range r.manifest.Archives {
		if !a.Unfinished && !a.Superseded {
			continue
		}
		if err := r.where.Delete(r.ctx, a.Name); err != nil {
			return err
		}
	}
	r.manifest.Archives = live
	return r.manifest.Write(r.ctx, r.where, r.key)
}

// findReplaced finds what --replaces names, before anything is written.
func (r *backingUp) findReplaced() error {
	for _, name := range r.Replaces {
		folder := strings.HasSuffix(name, "/")
		found, bytes := 0, int64(0)
		err := r.where.List(r.ctx, name, func(object string, n int64) error {
			if object != name && !folder {
				return nil
			}
			if strings.HasPrefix(object, dest.ArchivePrefix) || strings.HasPrefix(object, ".bkv-") {
				return fmt.Errorf("--replaces: %s is bkv's own", object)
			}
			found++
			bytes += n
			r.replaced = append(r.replaced, object)
			return nil
		})
		if err != nil {
			return err
		}
		if found == 0 {
			return fmt.Errorf("--replaces: %s holds nothing called %q; a folder's name ends with a slash", r.where, name)
		}
		r.say("To be deleted when this backup is whole: %s (%s, %s).", name, count(found, "file", "files"), size(bytes))
	}
	if len(r.replaced) > 0 && !r.Yes && r.term.interactive() {
		return r.term.confirm(r.ctx, "They cannot be brought back.", "delete")
	}
	return nil
}

// write uploads the archive.
func (r *backingUp) write(paths []string, entry *dest.Archive) error {
	expected, err := contentOf(r.ctx, paths, r.where.Is)
	if err != nil {
		return err
	}
	m := r.meter("backing up", expected)
	defer m.end()
	hash := sha256.New()
	var written int64
	var summary archive.Summary
	err = r.where.Write(r.ctx, entry.Name, expected, func(w io.Writer) error {
		summary, err = archive.Create(r.ctx, io.MultiWriter(w, hash, counter{&written}), r.key, archive.CreateConfig{
			ID: entry.Name, Paths: paths, Skip: r.where.Is, Progress: m.add,
			Problem: func(path string, lost bool, err error) { r.note(m, "%s: %v", path, err) },
		})
		return err
	})
	if err != nil {
		return err
	}
	entry.Size, entry.SHA256 = written, hex.EncodeToString(hash.Sum(nil))
	entry.Files, entry.Bytes, entry.Incomplete = summary.Files, summary.Bytes, summary.Lost
	return nil
}

// contentOf adds up the sizes of files, for the meter and the size of an upload's parts. What
// it cannot read it passes over.
func contentOf(ctx context.Context, paths []string, skip func(fs.FileInfo) bool) (total int64, err error) {
	for _, p := range paths {
		resolved, err := filepath.EvalSymlinks(p)
		if err != nil {
			return 0, err
		}
		err = filepath.WalkDir(resolved, func(_ string, d fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				return nil //nolint:nilerr // Create reports it
			}
			info, err := d.Info()
			switch {
			case err != nil:
			case info.IsDir() && skip(info):
				return fs.SkipDir
			case info.Mode().IsRegular():
				total += info.Size()
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return total, nil
}

type counter struct{ n *int64 }

func (c counter) Write(p []byte) (int, error) {
	*c.n += int64(len(p))
	return len(p), nil
}

// verify reads the archive back from where it is, and insists that it is what was written.
func (r *backingUp) verify(entry *dest.Archive) error {
	m := r.meter("reading it back", entry.Size)
	defer m.end()
	summary, err := readBack(r.ctx, r.where, *entry, m, func(src io.Reader) (archive.Summary, error) {
		return archive.Verify(r.ctx, src, r.key, entry.Name)
	})
	if err == nil && (summary.Files != entry.Files || summary.Bytes != entry.Bytes) {
		err = fmt.Errorf("%d files of %d bytes came back, and %d of %d were written", summary.Files, summary.Bytes, entry.Files, entry.Bytes)
	}
	if err != nil {
		return fmt.Errorf("reading the backup back: %w", err)
	}
	return nil
}

// errChanged: an archive is not the one that the manifest lists.
var errChanged = errors.New("the archive is not the one that was written: it was changed or exchanged at the destination")

// readBack has an archive read to its end, and compares it with what the manifest says. Nobody
// may trust what use read before readBack has returned nil.
func readBack(ctx context.Context, where dest.Destination, entry dest.Archive, m *meter, use func(io.Reader) (archive.Summary, error)) (archive.Summary, error) {
	content, length, err := where.Read(ctx, entry.Name)
	if errors.Is(err, dest.ErrNotFound) {
		return archive.Summary{}, fmt.Errorf("%s is listed at %s and is not there: somebody deleted it", entry.Name, where)
	}
	if err != nil {
		return archive.Summary{}, err
	}
	defer func() { _ = content.Close() }() // it was only read
	if length >= 0 && length != entry.Size {
		return archive.Summary{}, fmt.Errorf("%s has %d bytes, and %d were written: it is cut off or was changed", entry.Name, length, entry.Size)
	}
	hash := sha256.New()
	src := io.TeeReader(measured{content, m}, hash)
	summary, err := use(src)
	if err != nil {
		return summary, fmt.Errorf("%s: %w", entry.Name, err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != entry.SHA256 {
		return summary, fmt.Errorf("%s: %w", entry.Name, errChanged)
	}
	return summary, nil
}

// abandon takes the unfinished archive away after an error; what was there before stays. If that
// fails too, the next run does it.
func (r *backingUp) abandon(cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), 10*time.Second)
	defer cancel()
	last := len(r.manifest.Archives) - 1
	if err := r.where.Delete(ctx, r.manifest.Archives[last].Name); err != nil {
		return cause
	}
	r.manifest.Archives = r.manifest.Archives[:last]
	_ = r.manifest.Write(ctx, r.where, r.key) // the cause says more, and the next run does it
	return cause
}

// supersede marks those archives that are to be deleted: all but the newest that --keep allows. Nothing
// is, unless the new one is whole and was read back.
func (r *backingUp) supersede(newest dest.Archive) {
	if !newest.Verified || newest.Incomplete > 0 {
		return
	}
	doomed := len(r.manifest.Archives) - r.Keep
	for i := range max(0, doomed) {
		r.manifest.Archives[i].Superseded = true
	}
}

// deleteOld deletes what the new archive takes the place of, and names it.
func (r *backingUp) deleteOld(newest dest.Archive) error {
	if !newest.Verified {
		return nil
	}
	for _, a := range r.manifest.Archives {
		if a.Superseded {
			r.say("Deleting the older backup of %s, %s.", shownTime(a.Created), a.Name)
		}
	}
	if err := r.sweep(); err != nil {
		return fmt.Errorf("the backup is whole, but older copies are still there: %w", err)
	}
	for _, name := range r.replaced {
		r.say("Deleting %s, which this backup replaces.", name)
		if err := r.where.Delete(r.ctx, name); err != nil {
			return fmt.Errorf("the backup is whole, but what it replaces is still there: %w", err)
		}
	}
	return r.noteBackup(newest)
}

// noteBackup keeps on this device that there is this backup.
func (r *backingUp) noteBackup(a dest.Archive) error {
	if err := r.device.noteBackup(r.where, a, r.manifest.Serial); err != nil {
		return fmt.Errorf("the backup is whole, but this device could not note it: %w", err)
	}
	return nil
}
