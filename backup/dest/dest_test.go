package dest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/backup"
)

var key = backup.Key{1, 2, 3}

func open(t testing.TB, url string, create bool) Destination {
	t.Helper()
	d, err := Open(t.Context(), url, create)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func put(t testing.TB, d Destination, name, content string) {
	t.Helper()
	err := d.Write(t.Context(), name, int64(len(content)), func(w io.Writer) error {
		_, err := io.WriteString(w, content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func get(d Destination, name string) (string, error) {
	r, size, err := d.Read(context.Background(), name)
	if err != nil {
		return "", err
	}
	defer r.Close()
	content, err := io.ReadAll(r)
	if err == nil && int64(len(content)) != size {
		err = fmt.Errorf("%d bytes, and %d were announced", len(content), size)
	}
	return string(content), err
}

func TestFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "there")
	if _, err := Open(t.Context(), dir, false); err == nil || !strings.Contains(err.Error(), "there is no such folder") {
		t.Errorf("not made: %v", err)
	}
	d := open(t, "file://"+dir, true)
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	put(t, d, "a", "one")
	put(t, d, "a", "two")
	if got, err := get(d, "a"); got != "two" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "a")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	// What fails leaves what was there, and nothing else.
	broken := errors.New("broken")
	err := d.Write(t.Context(), "a", 0, func(w io.Writer) error {
		if _, err := io.WriteString(w, "thr"); err != nil {
			t.Error(err)
		}
		return broken
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	if got, err := get(d, "a"); got != "two" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if left, _ := filepath.Glob(dir + "/" + partial + "*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if _, err := get(d, "b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("nothing: %v", err)
	}
	if _, err := get(d, "../x"); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("outside: %v", err)
	}

	for _, name := range []string{"old/a/b", "old/c", "older"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, want := range map[string][]string{
		"": {lockName, "a", "old/a/b", "old/c", "older"}, "old": {"old/a/b", "old/c", "older"},
		"old/": {"old/a/b", "old/c"}, "old/a": {"old/a/b"}, "z": nil, "older": {"older"},
	} {
		var got []string
		if err := d.List(t.Context(), prefix, func(name string, _ int64) error { got = append(got, name); return nil }); err != nil {
			t.Error(err)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", prefix, got, want)
		}
	}
	for _, name := range []string{"old/a/b", "old/c", "old/c", "nothing"} {
		if err := d.Delete(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(dir + "/old"); err == nil {
		t.Error("an empty folder is left")
	}
	if err := d.Delete(t.Context(), "../there/a"); err == nil {
		t.Error("deleted from outside")
	}
}

// One writes at a time, and clears away what a killed one left.
func TestLock(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, partial+"left")
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	first, err := Open(t.Context(), dir, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Lock(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); err == nil {
		t.Error("what a killed writer left is there")
	}
	second := open(t, dir, false)
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := second.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("locked twice: %v", err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Error("cleared away what another is writing")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Lock(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]string{
		"":                          "empty",
		file:                        "no folder",
		filepath.Dir(file) + "/x/y": "is that mounted?",
		"file://relative":           "want file:///absolute/path",
		"file:///x?y=z":             "want file:///absolute/path",
		"ftp://host/x":              "want a folder, or a URL that begins with s3://",
		"mem://":                    "want a folder, or a URL that begins with s3://",
		"s3://user:secret@":         "destination",
		"http://secret@host/":       "want a folder",
	} {
		d, err := Open(t.Context(), url, true)
		if err == nil {
			_ = d.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", url, err)
		}
	}
}

func sample() *Manifest {
	at := time.Date(2026, 11, 28, 1, 2, 3, 0, time.UTC)
	return &Manifest{Serial: 3, Archives: []Archive{
		{Name: "bkv-1", Created: at, Size: 1, SHA256: "aa", Files: 2, Bytes: 3, Verified: true, Superseded: true},
		{Name: "bkv-2", Created: at.Add(time.Hour), Size: 4, SHA256: "bb", Files: 5, Bytes: 6, Incomplete: 7},
		{Name: "bkv-3", Created: at.Add(2 * time.Hour), Unfinished: true},
	}}
}

func TestManifest(t *testing.T) {
	m := sample()
	sealed, err := m.Seal(key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseManifest(sealed, key)
	if err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%+v, %v", got, err)
	}
	if live := got.Live(); len(live) != 1 || live[0].Name != "bkv-2" {
		t.Errorf("live: %+v", live)
	}
	for _, name := range []string{"bkv-1", "bkv-3", ""} {
		if a, ok := got.Find(name); ok {
			t.Errorf("found %+v", a)
		}
	}
	// Every changed byte, every length.
	for i := range sealed {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		if _, err := ParseManifest(b, key); !errors.Is(err, ErrForeignManifest) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := ParseManifest(sealed[:i], key); !errors.Is(err, ErrForeignManifest) {
			t.Fatalf("cut off at %d: %v", i, err)
		}
	}
	if _, err := ParseManifest(append(sealed, '\n'), key); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("longer: %v", err)
	}
	if _, err := ParseManifest(sealed, backup.Key{9}); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("another key: %v", err)
	}
}

func TestManifestAtADestination(t *testing.T) {
	d := open(t, t.TempDir(), false)
	ctx := t.Context()
	if _, err := ReadManifest(ctx, d, key); !errors.Is(err, ErrNoManifest) {
		t.Fatal(err)
	}
	m := &Manifest{}
	for serial := range uint64(3) {
		if err := m.Write(ctx, d, key); err != nil || m.Serial != serial+1 {
			t.Fatalf("%d, %v", m.Serial, err)
		}
	}
	// Another device was faster.
	other, err := ReadManifest(ctx, d, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Write(ctx, d, key); err != nil {
		t.Fatal(err)
	}
	if err := m.Write(ctx, d, key); !errors.Is(err, ErrChanged) {
		t.Errorf("over another's: %v", err)
	}
	// The key was changed.
	newKey := backup.Key{7}
	if err := other.Write(ctx, d, newKey); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("over one of another key: %v", err)
	}
	serial := other.Serial
	other.TakeOver()
	if err := other.Write(ctx, d, newKey); err != nil || other.Serial != serial+1 {
		t.Errorf("taking over: %d, %v", other.Serial, err)
	}
	if _, err := ReadManifest(ctx, d, newKey); err != nil {
		t.Error(err)
	}
	put(t, d, ManifestName, strings.Repeat("x", maxManifestBytes+1))
	if _, err := ReadManifest(ctx, d, key); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("a huge one: %v", err)
	}
	if err := other.Write(ctx, d, key); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("over a foreign one: %v", err)
	}
}

func FuzzManifest(f *testing.F) {
	sealed, err := sample().Seal(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add([]byte(manifestHeader + "{}\n" + strings.Repeat("0", 64) + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ParseManifest(b, key); err == nil {
			again, err := m.Seal(key)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseManifest(again, key); err != nil {
				t.Errorf("what it writes it does not read: %v", err)
			}
		}
	})
}
