package dest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/backup-key-vault/bkv/backup"
)

// ManifestName is the manifest's name at every destination.
const ManifestName = "bkv-manifest"

// ArchivePrefix begins the names of archives, and ArchiveSuffix ends them.
const (
	ArchivePrefix = "bkv-"
	ArchiveSuffix = ".tar.zst.age"
)

var (
	// ErrNoManifest: bkv has written nothing here.
	ErrNoManifest = errors.New("there is no backup here")
	// ErrForeignManifest: the manifest is not authentic under this key.
	ErrForeignManifest = errors.New("the list of backups here (" + ManifestName + ") was made with another backup key, or was changed by somebody else")
)

// Manifest lists the archives at a destination. Only those count.
type Manifest struct {
	// Serial grows by one with each change.
	Serial   uint64    `json:"serial"`
	Archives []Archive `json:"archives"` // oldest first

	// tookOver: what is at the destination was made with an older key.
	tookOver bool
}

// TakeOver says that this manifest was read with an older key, and is to be written with
// another one over the one that is there.
func (m *Manifest) TakeOver() { m.tookOver = true }

// Archive is one archive as it was written.
type Archive struct {
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	Size    int64     `json:"size"`   // in bytes, encrypted
	SHA256  string    `json:"sha256"` // of the encrypted bytes, in hexadecimal
	Files   int64     `json:"files"`
	Bytes   int64     `json:"bytes"` // of the files' content
	// Incomplete: so many files could not be read.
	Incomplete int64 `json:"incomplete,omitempty"`
	// Verified: it was read back, and was what had been written.
	Verified bool `json:"verified"`
	// Unfinished: it is being written, or was when its writer was stopped.
	Unfinished bool `json:"unfinished,omitempty"`
	// Superseded: it is being deleted, and may be gone.
	Superseded bool `json:"superseded,omitempty"`
}

// manifestHeader is the first line, which the MAC covers too.
const manifestHeader = "bkv manifest 1\n"

// maxManifestBytes bounds what is read; an archive takes some 250 bytes.
const maxManifestBytes = 16 << 20

// Seal writes the manifest as it is stored: a line that says what it is, a line of JSON,
// and a line with the HMAC-SHA-256 of both, in hexadecimal.
func (m *Manifest) Seal(key backup.Key) ([]byte, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	out := append([]byte(manifestHeader), body...)
	out = append(out, '\n')
	return append(out, manifestMAC(key, out)+"\n"...), nil
}

func manifestMAC(key backup.Key, signed []byte) string {
	k := key.ManifestKey()
	mac := hmac.New(sha256.New, k[:])
	mac.Write(signed)
	return hex.EncodeToString(mac.Sum(nil))
}

// ParseManifest reads what Seal wrote.
//
// Errors: ErrForeignManifest, also for what is no manifest at all.
func ParseManifest(sealed []byte, key backup.Key) (*Manifest, error) {
	const macLine = 2*sha256.Size + 1
	if len(sealed) < len(manifestHeader)+macLine || !bytes.HasPrefix(sealed, []byte(manifestHeader)) {
		return nil, ErrForeignManifest
	}
	signed, mac := sealed[:len(sealed)-macLine], sealed[len(sealed)-macLine:]
	if !hmac.Equal(mac, []byte(manifestMAC(key, signed)+"\n")) {
		return nil, ErrForeignManifest
	}
	m := &Manifest{}
	d := json.NewDecoder(bytes.NewReader(signed[len(manifestHeader):]))
	if err := d.Decode(m); err != nil {
		return nil, fmt.Errorf("the manifest is authentic, and cannot be read: %w", err)
	}
	return m, nil
}

// ReadManifest reads a destination's manifest.
//
// Errors: ErrNoManifest, ErrForeignManifest, and the destination's.
func ReadManifest(ctx context.Context, d Destination, key backup.Key) (*Manifest, error) {
	content, _, err := d.Read(ctx, ManifestName)
	if errors.Is(err, ErrNotFound) {
		return nil, ErrNoManifest
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = content.Close() }() // it was only read
	sealed, err := io.ReadAll(io.LimitReader(content, maxManifestBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	if len(sealed) > maxManifestBytes {
		return nil, ErrForeignManifest
	}
	return ParseManifest(sealed, key)
}

// ErrChanged: somebody else wrote the manifest meanwhile.
var ErrChanged = errors.New("another device wrote to this destination meanwhile: run the backup again")

// Write stores the manifest under the next serial, unless another one is there by now than
// it was made of. Two writers in the same moment can still miss each other where Lock does
// nothing; what the later one does not know of is then never deleted, and never restored.
//
// Errors: ErrChanged, and the destination's. After the latter it is not known which of the two
// is there.
func (m *Manifest) Write(ctx context.Context, d Destination, key backup.Key) error {
	there, err := ReadManifest(ctx, d, key)
	switch {
	case errors.Is(err, ErrNoManifest):
		there = &Manifest{}
	case errors.Is(err, ErrForeignManifest) && m.tookOver:
		there = &Manifest{Serial: m.Serial}
	case err != nil:
		return err
	}
	if there.Serial != m.Serial {
		return ErrChanged
	}
	m.Serial++
	sealed, err := m.Seal(key)
	if err != nil {
		return err
	}
	err = d.Write(ctx, ManifestName, int64(len(sealed)), func(w io.Writer) error {
		_, err := w.Write(sealed)
		return err
	})
	if err != nil {
		return fmt.Errorf("writing the manifest: %w", err)
	}
	m.tookOver = false
	return nil
}

// Live are the archives that are neither unfinished nor being deleted, oldest first.
func (m *Manifest) Live() []Archive {
	return slices.DeleteFunc(slices.Clone(m.Archives), func(a Archive) bool { return a.Superseded || a.Unfinished })
}

// Find returns the live archive of a name.
func (m *Manifest) Find(name string) (Archive, bool) {
	for _, a := range m.Live() {
		if a.Name == name {
			return a, true
		}
	}
	return Archive{}, false
}
