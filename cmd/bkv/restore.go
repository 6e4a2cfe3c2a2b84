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
	vaultFlags    `group:"The vault, as setup saved it or an app gives it:"`
	passwordFlags `group:"The password:"`
	Destination   string `arg:"" help:"Where the backup is: a folder, or a URL that begins with s3://, gs:// or azblob://."`
	Path          string `arg:"" optional:"" help:"The folder to restore to. It must not exist, unless --overwrite is given."`
	Archive       string `placeholder:"NAME" help:"An older backup than the last one; --list names them."`
	List          bool   `help:"Show the backups that are there, and restore none."`
	Overwrite     bool   `help:"Replace the folder if it exists, once the backup is restored beside it and found whole."`
	OutsideLinks  bool   `help:"Also restore symbolic links that point out of the folder."`
	Digits        bool   `help:"Ask for the 64 digits: in place of the password, or for a backup that was made with another key than this device's."`
	DigitsFile    string `placeholder:"FILE" help:"File with the 64 digits, for use without a terminal."`
	AcceptOlder   bool   `help:"Restore even if the list of backups is older than the one that this device knows."`
	KeyStore      string `enum:"auto,keyring,file" default:"auto" help:"On a device without the key: where to keep it then, as in setup."`
}

// partialSuffix marks what is not restored to its end.
const partialSuffix = ".bkv-partial-"

// Validate refuses what makes no sense together.
func (c *restoreCommand) Validate() error {
	switch {
	case c.List && c.Path != "":
		return errors.New("--list restores nothing: leave the folder out")
	case !c.List && c.Path == "":
		return errors.New("name where the backup is, and the folder to restore to; or give --list")
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
		stay := []string{e.device.dir}
		if filepath.IsAbs(where.String()) { // it is no bucket
			stay = append(stay, where.String())
		}
		if exists, err = c.checkTarget(target, stay); err != nil {
			return err
		}
	}
	if err := hasManifest(e.ctx, where); err != nil {
		return err
	}
	keys, manifest, ours, err := c.open(e, where)
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
	var noteErr error
	if ours {
		live := manifest.Live() // entry is of them
		if noteErr = e.device.noteBackup(where, live[len(live)-1], manifest.Serial); noteErr != nil {
			noteErr = fmt.Errorf("all is restored, but this device could not note where the backup is: %w", noteErr)
		}
	}
	e.say("Restored: %s, %s, the backup of %s, in %s.", count(int(summary.Files), "file", "files"), size(summary.Bytes), shownTime(entry.Created), target)
	if entry.Incomplete > 0 {
		e.warn("NOTE: %s could not be read when this backup was made.", count(int(entry.Incomplete), "file or folder", "files or folders"))
	}
	if summary.Lost > 0 {
		return errors.Join(noteErr, fmt.Errorf("all is restored but %s out of the folder, named above: to restore such links too, give --outside-links", count(int(summary.Lost), "link that points", "links that point")))
	}
	return noteErr
}

// checkTarget reports whether there is something to be replaced, and refuses if nobody asked for it, or
// if what must stay would go with it.
func (c *restoreCommand) checkTarget(target string, stay []string) (exists bool, err error) {
	info, err := os.Lstat(target)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Dir(target)); err != nil {
			return false, fmt.Errorf("restoring to %s: %w; make the folder above it first", target, err)
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
	for _, p := range stay {
		if holds(info, p) {
			return false, fmt.Errorf("%s cannot be replaced, as %s is in it: name another folder", target, p)
		}
	}
	return true, nil
}

// holds reports whether p is a folder or below it; p need not exist.
func holds(folder fs.FileInfo, p string) bool {
	p, err := filepath.Abs(p)
	if err != nil {
		return false
	}
	for {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			p = real
		}
		if info, err := os.Stat(p); err == nil && os.SameFile(folder, info) {
			return true
		}
		up := filepath.Dir(p)
		if up == p {
			return false
		}
		p = up
	}
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

// open gets the keys and, with them, the list of backups: with this device's keys or, on a new device, with
// the key by password or digits, which that then keeps. Ours says that the backup is under this device's key.
func (c *restoreCommand) open(e *environment, where dest.Destination) (keys []backup.Key, m *dest.Manifest, ours bool, err error) {
	keys, err = e.device.keys()
	isNew := errors.Is(err, errNotSetUp)
	switch {
	case err != nil && !isNew:
		return nil, nil, false, err
	case c.Digits || c.DigitsFile != "":
		key, m, err := c.byDigits(e, where)
		if err == nil && isNew {
			err = e.remember(c.KeyStore, modeDigits, "", key)
		}
		return []backup.Key{key}, m, isNew, err
	case isNew:
		setup := setupCommand{vaultFlags: c.vaultFlags, passwordFlags: c.passwordFlags, Mode: modePassword, Recover: true, KeyStore: c.KeyStore}
		if c.over(e.device.Vault) == (vaultSettings{}) {
			return nil, nil, false, errors.New("this device knows neither the backup's key nor its vault: give --digits to type the 64 digits, or, for a password, say where the vault is with --vault and what 'bkv restore --help' names beside it")
		}
		if err = setup.Run(e); err != nil {
			return nil, nil, false, err
		}
		if keys, err = e.device.keys(); err != nil {
			return nil, nil, false, err
		}
	}
	m, err = findManifest(e.ctx, where, keys)
	return keys, m, true, err
}

// byDigits asks for the 64 digits until they are those of this backup. A wrong one costs nothing.
func (c *restoreCommand) byDigits(e *environment, where dest.Destination) (backup.Key, *dest.Manifest, error) {
	for {
		key, err := e.readDigits(c.DigitsFile)
		if err != nil {
			return key, nil, err
		}
		m, err := findManifest(e.ctx, where, []backup.Key{key})
		if c.DigitsFile == "" && errors.Is(err, dest.ErrForeignManifest) {
			e.warn("These are 64 digits, but not this backup's: compare them with what you wrote down,\n" +
				"and type all of them again.")
			continue
		}
		return key, m, err
	}
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
		return dest.Archive{}, fmt.Errorf("%s: the list of backups there is older than the one that this device knows (%d after %d): somebody put old files back; to restore all the same, give --accept-older", where, m.Serial, last.Serial)
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
