package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-cmp/cmp"

	"github.com/backup-key-vault/bkv/backup"
)

var key = backup.Key{1, 2, 3}

// node is a file, folder or link as a test compares it.
type node struct {
	Mode     fs.FileMode
	Modified time.Time
	Content  string // a hash would say less
	Target   string
	SameAs   string // the first name, in order, of the same inode
}

// tree reads all that is below a directory, itself included.
func tree(t testing.TB, dir string) map[string]node {
	t.Helper()
	nodes := map[string]node{}
	first := map[inode]string{}
	err := filepath.Walk(dir, func(p string, info fs.FileInfo, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		n := node{Mode: info.Mode(), Modified: info.ModTime()}
		switch {
		case info.Mode().IsRegular():
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			n.Content = string(content)
			id, _, _ := inodeOf(info)
			if n.SameAs = first[id]; n.SameAs == "" {
				first[id] = name
			}
		case info.Mode()&fs.ModeSymlink != 0:
			if n.Target, err = os.Readlink(p); err != nil {
				return err
			}
		}
		nodes[name] = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

// names that a disk may hold and a program may stumble over.
var oddNames = []string{
	"plain", " ", " space around ", "tab\there", "line\nbreak", "-rf", "*?[a]", "quote'\"", `back\slash`, "colon:",
	"...", "..hidden", "~", "é", "e\u0301", "\u202egnp.exe", "日本語", "😀", "\xff\xfe not UTF-8", "C:", "CON",
	strings.Repeat("long", 63), "\x01\x7f", "a=b", "PaxHeaders.0", "@LongLink", "café\xe9", "%2e%2e",
}

// grow fills a directory with random things: files, folders, links of both kinds.
func grow(t testing.TB, r *mathrand.Rand, root string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	modes := []fs.FileMode{0o644, 0o600, 0o400, 0o755, 0o777, 0o000 | fs.ModeSticky, 0o640, 0o444}
	times := []int64{0, 1, -1, 1_700_000_000_123_456_789, 4_102_444_800_000_000_001, -86_400_000_000_001}
	var files []string
	type set struct {
		path string
		mode fs.FileMode
	}
	var later []set
	stamp := func(p string) {
		at := time.Unix(0, times[r.IntN(len(times))])
		must(os.Chtimes(p, at, at))
	}
	var fill func(dir string, depth int)
	fill = func(dir string, depth int) {
		for _, i := range r.Perm(len(oddNames))[:r.IntN(8)] {
			p := filepath.Join(dir, oddNames[i])
			switch kind := r.IntN(10); {
			case kind < 3 && depth < 5:
				must(os.Mkdir(p, 0o700))
				fill(p, depth+1)
				later = append(later, set{p, []fs.FileMode{0o755, 0o700, 0o500, 0o755 | fs.ModeSticky, 0o755 | fs.ModeSetgid}[r.IntN(5)]})
			case kind == 3:
				targets := []string{"plain", ".", "nowhere", strings.Repeat("x", 200), "é\nb"}
				must(os.Symlink(targets[r.IntN(len(targets))], p))
				must(linkTimeAt(p, time.Unix(0, times[r.IntN(len(times))])))
			case kind == 4 && len(files) > 0:
				must(os.Link(files[r.IntN(len(files))], p))
			case kind == 5: // sparse
				f, err := os.Create(p)
				must(err)
				must(f.Truncate(int64(r.IntN(3 << 20))))
				_, err = f.WriteAt([]byte("in the middle"), int64(r.IntN(1<<20)))
				must(err)
				must(f.Close())
				stamp(p)
			default:
				sizes := []int{0, 1, 511, 512, 513, 64 << 10, bufferBytes, bufferBytes + 1, r.IntN(700 << 10)}
				content := make([]byte, sizes[r.IntN(len(sizes))])
				if r.IntN(2) == 0 {
					_, _ = rand.Read(content)
				}
				must(os.WriteFile(p, content, 0o600))
				must(os.Chmod(p, modes[r.IntN(len(modes))]))
				stamp(p)
				files = append(files, p)
			}
		}
	}
	fill(root, 0)
	for _, s := range later { // deepest first
		must(os.Chmod(s.path, s.mode))
		stamp(s.path)
	}
}

func linkTimeAt(p string, at time.Time) error {
	root, err := os.OpenRoot(filepath.Dir(p))
	if err != nil {
		return err
	}
	defer root.Close()
	return linkTime(root, filepath.Base(p), at)
}

// writable makes what a test left removable for one that is not root.
func writable(t testing.TB, dir string) {
	t.Cleanup(func() {
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_ = os.Chmod(p, 0o700)
			}
			return nil
		})
	})
}

func create(t testing.TB, paths ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	s, err := Create(t.Context(), &b, key, CreateConfig{ID: "one", Paths: paths, Problem: func(p string, lost bool, err error) {
		t.Errorf("%s: %v", p, err)
	}})
	if err != nil || s.Lost != 0 {
		t.Fatalf("%v, %+v", err, s)
	}
	return b.Bytes()
}

func extract(t testing.TB, sealed []byte, config ExtractConfig) (string, Summary, error) {
	t.Helper()
	dir := t.TempDir()
	writable(t, dir)
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if config.ID == "" {
		config.ID = "one"
	}
	s, err := Extract(t.Context(), bytes.NewReader(sealed), key, root, config)
	return dir, s, err
}

// What is restored is what was backed up: names, modes, times, links, content.
func TestRestoredTreeIsTheTree(t *testing.T) {
	t.Parallel()
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := mathrand.New(mathrand.NewPCG(seed, 7))
			a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b\n ")
			for _, dir := range []string{a, b} {
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				writable(t, dir)
				grow(t, r, dir)
			}
			if os.Getuid() != 0 {
				readable(t, a)
				readable(t, b)
			}
			sealed := create(t, a, b)
			got, s, err := extract(t, sealed, ExtractConfig{Owners: os.Getuid() == 0})
			if err != nil || s.Lost != 0 {
				t.Fatalf("%v, %+v", err, s)
			}
			for _, dir := range []string{a, b} {
				if diff := cmp.Diff(tree(t, dir), tree(t, filepath.Join(got, filepath.Base(dir)))); diff != "" {
					t.Errorf("%s differs (-want +got):\n%s", dir, diff)
				}
			}
			verified, err := Verify(t.Context(), bytes.NewReader(sealed), key, "one")
			if err != nil || verified != s {
				t.Errorf("verified %+v, restored %+v, %v", verified, s, err)
			}
		})
	}
}

// readable lets a test that is not root read everything: what cannot be read has a test of its own.
func readable(t testing.TB, dir string) {
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			err = os.Chmod(p, 0o600)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSparseFilesStaySparse(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "sparse")
	f, err := os.Create(p)
	if err != nil {
		t.Fatal(err)
	}
	const size = 1<<30 + 12345
	if _, err := f.WriteAt([]byte("start"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("middle"), size/2); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	got, _, err := extract(t, create(t, p), ExtractConfig{})
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(got, "sparse"))
	if err != nil || info.Size() != size {
		t.Fatalf("%v, %v", info, err)
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks; blocks*512 > 1<<20 {
		t.Errorf("%d bytes on disk", blocks*512)
	}
	back, err := os.Open(filepath.Join(got, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	middle := make([]byte, 8)
	if _, err := back.ReadAt(middle, size/2-1); err != nil || string(middle) != "\x00middle\x00" {
		t.Errorf("%q, %v", middle, err)
	}
}

func TestTopNames(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"a/x", "b/x", "c"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "c", "file"), []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("c", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		paths []string
		want  string
	}{
		"nothing":          {nil, "nothing to back up"},
		"twice the name":   {[]string{dir + "/a/x", dir + "/b/x"}, "another path is called"},
		"the root":         {[]string{"/"}, "name what is in it instead"},
		"nowhere":          {[]string{dir + "/nowhere"}, "no such file"},
		"a device":         {[]string{"/dev/null"}, "neither a file nor a folder"},
		"below a file":     {[]string{dir + "/c/file/x"}, "not a directory"},
		"after a good one": {[]string{dir + "/c", dir + "/nowhere"}, "no such file"},
	} {
		var b bytes.Buffer
		if _, err := Create(t.Context(), &b, key, CreateConfig{ID: "one", Paths: test.paths}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Verify(t.Context(), &b, key, "one"); err == nil {
			t.Errorf("%s: left a whole archive", name)
		}
	}
	// A link that is named is followed, a file is taken alone.
	got, s, err := extract(t, create(t, dir+"/link", dir+"/c/file"), ExtractConfig{})
	if err != nil || s.Files != 2 || s.Directories != 1 {
		t.Fatalf("%v, %+v", err, s)
	}
	for _, f := range []string{"link/file", "file"} {
		if content, err := os.ReadFile(filepath.Join(got, f)); string(content) != "hello" {
			t.Errorf("%s: %q, %v", f, content, err)
		}
	}
}

// What cannot be kept is told, and the rest is there.
func TestProblems(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.MkdirAll(dir+"/skipped", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"good", "skipped/x"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	skipped, err := os.Stat(dir + "/skipped")
	if err != nil {
		t.Fatal(err)
	}
	// A file becomes shorter, and another is written to, as soon as reading begins.
	big := make([]byte, 4*bufferBytes)
	_, _ = rand.Read(big)
	for _, f := range []string{"shrinks", "touched"} {
		if err := os.WriteFile(filepath.Join(dir, f), big, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var told []string
	var b bytes.Buffer
	read := 0
	s, err := Create(t.Context(), &b, key, CreateConfig{
		ID: "one", Paths: []string{dir},
		Skip: func(info fs.FileInfo) bool { return os.SameFile(info, skipped) },
		Progress: func(n int) {
			if read += n; read == 1+bufferBytes {
				if err := os.Truncate(dir+"/shrinks", bufferBytes); err != nil {
					t.Error(err)
				}
			}
			if read == 1+3*bufferBytes {
				if err := os.Chtimes(dir+"/touched", time.Now(), time.Now()); err != nil {
					t.Error(err)
				}
			}
		},
		Problem: func(p string, lost bool, err error) {
			told = append(told, fmt.Sprint(filepath.Base(p), " ", lost, " ", err))
		},
	})
	want := []string{
		"fifo false not a file, a folder or a link: left out",
		"shrinks true it became shorter while it was read: its last 786432 bytes are zeros in the archive",
		"touched false it was written to while it was read",
	}
	if err != nil || s.Lost != 1 || !slices.Equal(told, want) {
		t.Errorf("%v, %+v, %q", err, s, told)
	}
	got, s, err := extract(t, b.Bytes(), ExtractConfig{})
	if err != nil || s.Files != 3 {
		t.Fatalf("%v, %+v", err, s)
	}
	if _, err := os.Stat(filepath.Join(got, "d/skipped")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("what was to be skipped is there")
	}
	if content, err := os.ReadFile(filepath.Join(got, "d/touched")); !bytes.Equal(content, big) {
		t.Errorf("a touched file differs: %v", err)
	}
}

// Changed bytes all over it, and every kind of length: never anything but an error that says what.
func TestDamage(t *testing.T) {
	t.Parallel()
	p := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(p, []byte(strings.Repeat("hello ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	sealed := create(t, p)
	refused := func(what string, b []byte) {
		t.Helper()
		_, err := Verify(t.Context(), bytes.NewReader(b), key, "one")
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrWrongKey) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for i := 0; i < len(sealed); i += 19 {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		refused(fmt.Sprintf("byte %d changed", i), b)
		refused(fmt.Sprintf("cut off at %d", i), sealed[:i])
	}
	refused("more at the end", append(bytes.Clone(sealed), 0))
	refused("twice", append(bytes.Clone(sealed), sealed...))

	if _, err := Verify(t.Context(), bytes.NewReader(sealed), backup.Key{9}, "one"); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
	if _, err := Verify(t.Context(), bytes.NewReader(sealed), key, "two"); !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), `the archive "one" under the name of "two"`) {
		t.Errorf("swapped: %v", err)
	}
	broken := errors.New("the wire broke")
	if _, err := Verify(t.Context(), io.MultiReader(bytes.NewReader(sealed[:len(sealed)/2]), failing{broken}), key, "one"); !errors.Is(err, broken) || errors.Is(err, ErrDamaged) {
		t.Errorf("a source that fails: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Verify(ctx, bytes.NewReader(sealed), key, "one"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Create(ctx, io.Discard, key, CreateConfig{ID: "one", Paths: []string{filepath.Dir(p)}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type failing struct{ error }

func (f failing) Read([]byte) (int, error) { return 0, f.error }

// handmade is an archive of the right key that Create would not write.
func handmade(t testing.TB, entries ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	sealed, err := Seal(&b, key)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(sealed)
	for _, h := range append([]*tar.Header{{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": idComment + "one"}}}, entries...) {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), sealed.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 3, Mode: 0o600}
}
func folder(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o700}
}
func link(kind byte, name, target string) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o600}
}

func TestHostileArchivesAreRefused(t *testing.T) {
	t.Parallel()
	outside := filepath.Join(t.TempDir(), "outside")
	for name, entries := range map[string][]*tar.Header{
		"up":                       {file("../x")},
		"up in the middle":         {folder("d"), file("d/../../x")},
		"to itself":                {file("d/./x")},
		"absolute":                 {file(outside)},
		"empty":                    {file("")},
		"the root":                 {folder("./")},
		"double slash":             {folder("d"), file("d//x")},
		"twice":                    {file("x"), file("x")},
		"a file over a folder":     {folder("x"), file("x")},
		"a folder twice":           {folder("x"), folder("x")},
		"a link over a file":       {file("x"), link(tar.TypeSymlink, "x", "y")},
		"through a link":           {folder("d"), link(tar.TypeSymlink, "l", "d"), file("l/x")},
		"through a link below":     {folder("d"), folder("d/e"), link(tar.TypeSymlink, "d/l", "e"), folder("d/l/f")},
		"a folder that is missing": {file("d/x")},
		"a hard link out":          {link(tar.TypeLink, "x", "../x")},
		"a hard link to root":      {link(tar.TypeLink, "x", "/etc/passwd")},
		"a hard link to nothing":   {link(tar.TypeLink, "x", "y")},
		"a hard link to a folder":  {folder("d"), link(tar.TypeLink, "x", "d")},
		"a hard link to a link":    {link(tar.TypeSymlink, "l", "x"), link(tar.TypeLink, "x", "l")},
		"a hard link through one":  {folder("d"), file("d/f"), link(tar.TypeSymlink, "l", "d"), link(tar.TypeLink, "x", "l/f")},
		"a device":                 {{Typeflag: tar.TypeChar, Name: "x", Devmajor: 1, Devminor: 3}},
		"a block device":           {{Typeflag: tar.TypeBlock, Name: "x", Devmajor: 8}},
		"a fifo":                   {{Typeflag: tar.TypeFifo, Name: "x"}},
		"another global header":    {{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}},
		"a type that nobody has":   {{Typeflag: 'Z', Name: "x"}},
	} {
		for _, config := range []ExtractConfig{{}, {OutsideLinks: true}} {
			dir, _, err := extract(t, handmade(t, entries...), config)
			if !errors.Is(err, ErrUnsafe) {
				t.Errorf("%s: %v", name, err)
			}
			// Nothing of the refused entry is there, and nothing outside.
			if _, err := os.Lstat(outside); err == nil {
				t.Errorf("%s: wrote outside", name)
			}
			if found, _ := filepath.Glob(filepath.Dir(dir) + "/x"); len(found) > 0 {
				t.Errorf("%s: wrote %q", name, found)
			}
		}
	}
	// Bytes after the tar's end.
	var b bytes.Buffer
	sealed, err := Seal(&b, key)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(sealed)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": idComment + "one"}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := sealed.Write([]byte("more")); err != nil {
		t.Fatal(err)
	}
	if err := sealed.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := extract(t, b.Bytes(), ExtractConfig{}); !errors.Is(err, ErrUnsafe) {
		t.Errorf("bytes after the end: %v", err)
	}
	// No tar at all, and a tar of somebody else.
	for _, content := range []string{"", "hello", strings.Repeat("\x00", 1024)} {
		var b bytes.Buffer
		sealed, err := Seal(&b, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(sealed, content); err != nil {
			t.Fatal(err)
		}
		if err := sealed.Close(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := extract(t, b.Bytes(), ExtractConfig{}); !errors.Is(err, ErrDamaged) {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestLinksOutOfTheTree(t *testing.T) {
	for target, outside := range map[string]bool{
		"x": false, "../x": false, "../../x": false, "../../../x": true, "/etc": true, "..": false, "../..": false,
		"../../..": true, "x/../../../y": true, "x/..": true, "./../x": false, "": false, ".": false, "a/b": false,
		".././/../x": false,
	} {
		if got := pointsOutside(target, 2); got != outside {
			t.Errorf("%q from a/b: outside: %v", target, got)
		}
	}
	sealed := handmade(t, folder("d"), link(tar.TypeSymlink, "d/out", "../../x"), link(tar.TypeSymlink, "d/in", "../y"), file("y"))
	var told []string
	dir, s, err := extract(t, sealed, ExtractConfig{Problem: func(name string, err error) {
		if !errors.Is(err, ErrOutsideLink) {
			t.Error(err)
		}
		told = append(told, name)
	}})
	if err != nil || s.Lost != 1 || s.Links != 1 || !slices.Equal(told, []string{"d/out"}) {
		t.Errorf("%v, %+v, %q", err, s, told)
	}
	if _, err := os.Lstat(dir + "/d/out"); err == nil {
		t.Error("it was made")
	}
	if content, err := os.ReadFile(dir + "/d/in"); string(content) != "\x00\x00\x00" {
		t.Errorf("%q, %v", content, err)
	}
	dir, s, err = extract(t, sealed, ExtractConfig{OutsideLinks: true})
	if err != nil || s.Lost != 0 || s.Links != 2 {
		t.Errorf("%v, %+v", err, s)
	}
	if target, err := os.Readlink(dir + "/d/out"); target != "../../x" {
		t.Errorf("%q, %v", target, err)
	}
}

// Another user's set-user-ID program would run with the rights of who restores.
func TestSetUserID(t *testing.T) {
	mine, other := file("mine"), file("other")
	mine.Mode, other.Mode = 0o4755, 0o6755
	mine.Uid, mine.Gid = os.Geteuid(), os.Getegid()
	other.Uid = os.Geteuid() + 1
	dir, _, err := extract(t, handmade(t, mine, other), ExtractConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{"mine": 0o755 | fs.ModeSetuid, "other": 0o755} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// The identity can never change: archives that are stored depend on it.
func TestIdentityVector(t *testing.T) {
	identity, err := Identity(backup.Key{})
	if err != nil {
		t.Fatal(err)
	}
	const want = "AGE-SECRET-KEY-PQ-1M06C6R6TFFZMRVRT0JJ7YV3JL4T02GSWV7G7LPWZ3NK4GCMKR9WQPAUFMY"
	if got := identity.String(); got != want {
		t.Errorf("got %s", got)
	}
	again, err := age.ParseHybridIdentity(identity.String())
	if err != nil || again.Recipient().String() != identity.Recipient().String() {
		t.Errorf("%v", err)
	}
}

// Test vectors of BIP 173, and of age's own implementation, which checks ours.
func TestBech32(t *testing.T) {
	if got := bech32("a", nil); got != "a12uel5l" {
		t.Error(got)
	}
	for range 100 {
		seed := make([]byte, 32)
		_, _ = rand.Read(seed)
		if _, err := age.ParseHybridIdentity(identityText(seed)); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzExtract reads anything that was sealed with the right key.
func FuzzExtract(f *testing.F) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": idComment + "one"}},
		folder("d"), file("d/x"), link(tar.TypeSymlink, "d/l", "x"), link(tar.TypeLink, "d/h", "d/x"),
	} {
		if err := w.WriteHeader(h); err != nil {
			f.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(plain.Bytes())
	f.Fuzz(func(t *testing.T, content []byte) {
		if len(content) > 1<<20 {
			return
		}
		var b bytes.Buffer
		sealed, err := Seal(&b, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sealed.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := sealed.Close(); err != nil {
			t.Fatal(err)
		}
		above := t.TempDir()
		dir := filepath.Join(above, "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		writable(t, above)
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		_, _ = Extract(t.Context(), bytes.NewReader(b.Bytes()), key, root, ExtractConfig{ID: "one"})
		found, err := os.ReadDir(above)
		if err != nil || len(found) != 1 {
			t.Errorf("outside: %v, %v", found, err)
		}
	})
}
