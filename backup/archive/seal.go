// Package archive puts files into an encrypted archive and gets them out again: a tar
// (POSIX.1-2001 pax), compressed by Zstandard (RFC 8878), in an ordinary age file
// (age-encryption.org/v1) for one post-quantum recipient, MLKEM768-X25519, whose
// identity is derived from the backup key. Stock tools open it without this package:
//
//	age --decrypt -i <(bkv key --age-identity) FILE | zstd -d | tar -x
//
// Everything is streamed: memory does not grow with the content, but for the names
// of one directory at a time and of files with several hard links.
//
// # Trust boundary
//
// What is read back is hostile input: its storage is somebody else's. age
// authenticates each chunk and the end, so damage and truncation are errors and never
// silently short content. But age does not say who wrote a file, and whoever
// learned the recipient could write one: callers that know what they wrote
// compare a hash too. [Extract] stays inside the directory that it is given
// whatever an archive says, follows no link in it, and replaces nothing.
//
// Nothing here imports net/http; the package also builds for the browser, where
// [Seal] and [Open] are of use alone. All functions are safe for concurrent use.
package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"

	"github.com/backup-key-vault/bkv/backup"
)

var (
	// ErrWrongKey: the archive is for another key.
	ErrWrongKey = errors.New("the archive was made with another backup key")
	// ErrDamaged: it is not what was written: changed, cut off, or no archive at all.
	ErrDamaged = errors.New("the archive is damaged")
	// ErrUnsafe: an entry that no archive of ours has, and that could do harm. Nothing of it was written.
	ErrUnsafe = errors.New("the archive is refused")
)

// Identity is the age identity of a backup key. Its String is what age's -i reads, a secret;
// its Recipient encrypts.
func Identity(key backup.Key) (*age.HybridIdentity, error) {
	seed := key.AgeSeed()
	// age makes an identity of given bytes from their text alone.
	identity, err := age.ParseHybridIdentity(identityText(seed[:]))
	if err != nil {
		return nil, fmt.Errorf("deriving the age identity: %w", err)
	}
	return identity, nil
}

// Seal compresses and encrypts what is written to it, and writes that to dst. Only after
// Close has returned nil is it whole: anything less is refused when it is opened. It
// does not close dst.
func Seal(dst io.Writer, key backup.Key) (io.WriteCloser, error) {
	identity, err := Identity(key)
	if err != nil {
		return nil, err
	}
	encrypted, err := age.Encrypt(dst, identity.Recipient())
	if err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	// The fastest level takes two thirds of the default's time, and 1 to 2 % more room where half
	// of the data is text. Photos and films do not become smaller at any level.
	compressed, err := zstd.NewWriter(encrypted, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, fmt.Errorf("compressing: %w", err)
	}
	return &sealer{compressed, encrypted}, nil
}

type sealer struct {
	*zstd.Encoder
	encrypted io.Closer
}

func (s *sealer) Close() error {
	// The encoder's end is written first, then age's, which nothing else can forge.
	if err := s.Encoder.Close(); err != nil {
		return err
	}
	return s.encrypted.Close()
}

// maxWindowBytes bounds the memory that a forged frame can ask for. Ours need 8 MiB.
const maxWindowBytes = 32 << 20

// Open decrypts and decompresses src. What was read is authentic, and complete
// once a Read has returned io.EOF: nobody may act on it before.
//
// Errors, also of Read: ErrWrongKey, ErrDamaged, and src's own.
func Open(src io.Reader, key backup.Key) (io.ReadCloser, error) {
	identity, err := Identity(key)
	if err != nil {
		return nil, err
	}
	o := &opened{src: &source{Reader: src}}
	decrypted, err := age.Decrypt(o.src, identity)
	if err != nil {
		var mismatch *age.NoIdentityMatchError
		if errors.As(err, &mismatch) {
			return nil, ErrWrongKey
		}
		return nil, o.explain(err)
	}
	if o.Decoder, err = zstd.NewReader(decrypted, zstd.WithDecoderMaxWindow(maxWindowBytes)); err != nil {
		return nil, o.explain(err)
	}
	return o, nil
}

type opened struct {
	*zstd.Decoder
	src *source
}

func (o *opened) Read(p []byte) (int, error) {
	n, err := o.Decoder.Read(p)
	if err != nil && err != io.EOF {
		err = o.explain(err)
	}
	return n, err
}

func (o *opened) Close() error {
	o.Decoder.Close()
	return nil
}

// explain tells a source that failed from one that holds something else.
func (o *opened) explain(err error) error {
	if failure := o.src.failure.Load(); failure != nil {
		return *failure
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

// source remembers why it failed. The decoder reads it from a goroutine of its own.
type source struct {
	io.Reader
	failure atomic.Pointer[error]
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && err != io.EOF {
		s.failure.Store(&err)
	}
	return n, err
}

// contextReader stops reading when its context does.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
