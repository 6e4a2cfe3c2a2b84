package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/backup/archive"
	"github.com/backup-key-vault/bkv/backup/dest"
)

type restoreCommand struct {
	vaultFlags
	passwordFlags
	Destination  string `arg:"" help:"Where the backup is: a folder, or a URL that begins with s3://, gs:// or azblob://."`
	Path         string `arg:"" optional:"" help:"The folder to restore to. It must not exist, unless --overwrite is given."`
	Archive      string `placeholder:"NAME" help:"An older backup than the last one; --list names them."`
	List         bool   `help:"Show the backups that are there, and restore none."`
	Overwrite    bool   `help:"Replace the folder if it exists, once the backup is restored beside it and found whole."`
	OutsideLinks bool   `help:"Also restore symbolic links that point out of the folder."`
	Digits       bool   `help:"Ask for the 64 digits: in place of the password, or for a backup that was made with another key than this device's."`
	DigitsFile   string `placeholder:"FILE" help:"File with the 64 digits, for use without a terminal."`
	AcceptOlder  bool   `help:"Restore even if the list of backups is older than what this device wrote."`
	KeyStore     string `enum:"auto,keyring,file" default:"auto" help:"On a device without the key: where to keep it then, as in setup."`
}

// partialSuffix marks what is not restored to its end.
const partialSuffix = ".bkv-partial-"

// Validate refuses what makes no sense together.
func (c *restoreCommand) Validate() error {
	switch {
	case c.List && c.Path != "":
		return errors.New("--list restores nothing: leave the folder out")
	case !c.List && c.Path == "":
		return errors.New("name the folder to restore to")
	}
	return nil
}

func (c *restoreCommand) Run(e *environment) error {
	// All that can be known before a password is asked for, which may cost an attempt.
	where, err := dest.Open(e.ctx, c.Destination, false)
	if err != nil {
		return err
	}
	return errors.Join(c.run(e, where), where.Close())
}

func (c *restoreCommand) run(e *environment, where dest.Destination) error {
	target, err := filepath.Abs(c.Path)
	if err != nil {
		return err
	}
	exists := false
	if !c.List {
		if exists, err = c.checkTarget(target); err != nil {
			return err
		}
	}
	if err := hasManifest(e.ctx, where); err != nil {
		return err
	}
	keys, err := c.keys(e)
	if err != nil {
		return err
	}
	manifest, err := findManifest(e.ctx, where, keys)
	if err != nil {
		return err
	}
	if c.List {
		return e.list(manifest)
	}
	entry, err := c.pick(e, where, manifest)
	if err != nil {
		return err
	}
	leftovers, err := filepath.Glob(filepath.Join(filepath.Dir(target), escapeGlob(filepath.Base(target))+partialSuffix+"*"))
	if err != nil {
		return err
	}
	for _, l := range leftovers {
		e.warn("NOTE: %s is left from a restore that was interrupted. It is not whole: delete it.", l)
	}
	stage := target + partialSuffix + rand.Text()[:8]
	if err := os.Mkdir(stage, 0o700); err != nil {
		return err
	}
	summary, err := c.extract(e, where, keys[0], entry, stage)
	for _, older := range keys[1:] {
		if !errors.Is(err, archive.ErrWrongKey) {
			break
		}
		summary, err = c.extract(e, where, older, entry, stage) // nothing was written yet
	}
	if err == nil {
		err = c.place(stage, target, exists)
	}
	if err != nil {
		return errors.Join(err, removeAll(stage))
	}
	e.say("Restored: %s, %s, the backup of %s, in %s.", count(int(summary.Files), "file", "files"), size(summary.Bytes), shownTime(entry.Created), target)
	if entry.Incomplete > 0 {
		e.warn("NOTE: %s could not be read when this backup was made.", count(int(entry.Incomplete), "file or folder", "files or folders"))
	}
	if summary.Lost > 0 {
		return fmt.Errorf("all is restored but %s out of the folder, named above: to restore such links too, give --outside-links", count(int(summary.Lost), "link that points", "links that point"))
	}
	return nil
}

// checkTarget reports whether there is something to be replaced, and refuses if nobody asked for it.
func (c *restoreCommand) checkTarget(target string) (exists bool, err error) {
	info, err := os.Lstat(target)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Dir(target)); err != nil {
			return false, fmt.Errorf("restoring to %s: %w", target, err)
		}
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.IsDir() {
		return false, fmt.Errorf("%s exists and is no folder: name another place", target)
	}
	if !c.Overwrite {
		return false, fmt.Errorf("%s exists: name another folder, or give --overwrite to replace it", target)
	}
	return true, nil
}

// hasManifest makes sure that there is a backup, authentic or not.
func hasManifest(ctx context.Context, where dest.Destination) error {
	content, _, err := where.Read(ctx, dest.ManifestName)
	if errors.Is(err, dest.ErrNotFound) {
		return fmt.Errorf("%s: %w", where, dest.ErrNoManifest)
	}
	if err != nil {
		return err
	}
	return content.Close()
}

// keys are this device's keys or, on a new one, the key by password or digits, which it then keeps.
func (c *restoreCommand) keys(e *environment) ([]backup.Key, error) {
	keys, err := e.device.keys()
	switch {
	case err == nil && (c.Digits || c.DigitsFile != ""): // for this once
		key, err := e.readDigits(c.DigitsFile)
		return []backup.Key{key}, err
	case !errors.Is(err, errNotSetUp):
		return keys, err
	}
	setup := setupCommand{vaultFlags: c.vaultFlags, passwordFlags: c.passwordFlags, Mode: modePassword, Recover: true, KeyStore: c.KeyStore, DigitsFile: c.DigitsFile}
	if c.Digits || c.DigitsFile != "" {
		setup.Mode = modeDigits
	}
	if err := setup.Run(e); err != nil {
		return nil, err
	}
	return e.device.keys()
}

// findManifest reads the manifest with the key that it was made with.
func findManifest(ctx context.Context, where dest.Destination, keys []backup.Key) (*dest.Manifest, error) {
	var m *dest.Manifest
	var err error
	for _, key := range keys {
		if m, err = dest.ReadManifest(ctx, where, key); err == nil {
			return m, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", where, err)
}

// list shows what can be restored, oldest first.
func (e *environment) list(m *dest.Manifest) error {
	for _, a := range m.Live() {
		note := ""
		if a.Incomplete > 0 {
			note = ", incomplete"
		}
		if !a.Verified {
			note += ", not read back"
		}
		if err := e.printf("%s  %s  %s, %s%s\n", a.Name, shownTime(a.Created), count(int(a.Files), "file", "files"), size(a.Bytes), note); err != nil {
			return err
		}
	}
	return nil
}

// pick finds the archive to restore.
func (c *restoreCommand) pick(e *environment, where dest.Destination, m *dest.Manifest) (dest.Archive, error) {
	if last, ok := e.device.Backups[where.String()]; ok && m.Serial < last.Serial && !c.AcceptOlder {
		return dest.Archive{}, fmt.Errorf("%s: the list of backups there is older than the one that this device wrote (%d after %d): somebody put old files back; to restore all the same, give --accept-older", where, m.Serial, last.Serial)
	}
	live := m.Live()
	if len(live) == 0 {
		return dest.Archive{}, fmt.Errorf("%s: no backup there was ever finished", where)
	}
	if c.Archive == "" {
		return live[len(live)-1], nil
	}
	entry, ok := m.Find(c.Archive)
	if !ok {
		return dest.Archive{}, fmt.Errorf("%s: there is no backup called %q; the last one is %q", where, c.Archive, live[len(live)-1].Name)
	}
	return entry, nil
}

// extract restores into stage. All of it is on the disk when it returns nil.
func (c *restoreCommand) extract(e *environment, where dest.Destination, key backup.Key, entry dest.Archive, stage string) (archive.Summary, error) {
	root, err := os.OpenRoot(stage)
	if err != nil {
		return archive.Summary{}, err
	}
	m := e.meter("restoring", entry.Size)
	defer m.end()
	summary, err := readBack(e.ctx, where, entry, m, func(src io.Reader) (archive.Summary, error) {
		return archive.Extract(e.ctx, src, key, root, archive.ExtractConfig{
			ID: entry.Name, OutsideLinks: c.OutsideLinks, Owners: os.Geteuid() == 0,
			Problem: func(name string, err error) { e.note(m, "%s: %v", name, err) },
		})
	})
	if err == nil {
		err = syncTree(root)
	}
	return summary, errors.Join(err, root.Close())
}

// place puts the restored folder where it belongs, in one step: whoever looks sees the old one
// or the new one.
func (c *restoreCommand) place(stage, target string, exists bool) error {
	if !exists {
		// Rename would replace an empty folder that somebody made meanwhile, which does no harm.
		if err := os.Rename(stage, target); err != nil {
			return err
		}
		return syncFolder(filepath.Dir(target))
	}
	if err := exchange(stage, target); err != nil {
		return fmt.Errorf("putting %s in the place of %s: %w", stage, target, err)
	}
	if err := syncFolder(filepath.Dir(target)); err != nil {
		return err
	}
	return removeAll(stage) // what was there before
}

// removeAll is os.RemoveAll for folders that may not be written to.
func removeAll(dir string) error {
	if err := os.RemoveAll(dir); err == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.Chmod(p, 0o700) // RemoveAll will say what it could not do
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// escapeGlob makes a name match itself.
func escapeGlob(name string) string {
	var out []byte
	for i := range len(name) {
		switch name[i] {
		case '*', '?', '[', '\\':
			out = append(out, '\\')
		}
		out = append(out, name[i])
	}
	return string(out)
}
