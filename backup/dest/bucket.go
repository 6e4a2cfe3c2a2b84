package dest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"

	"gocloud.dev/blob"
	_ "gocloud.dev/blob/azureblob" // azblob://
	_ "gocloud.dev/blob/gcsblob"   // gs://
	_ "gocloud.dev/blob/s3blob"    // s3://
	"gocloud.dev/gcerrors"
)

// bucket is a bucket of a cloud.
type bucket struct {
	name   string
	bucket *blob.Bucket
}

func openBucket(ctx context.Context, location string) (*bucket, error) {
	u, err := url.Parse(location)
	if err != nil {
		return nil, errors.New("destination: it is no URL and no path")
	}
	if !blob.DefaultURLMux().ValidBucketScheme(u.Scheme) {
		return nil, fmt.Errorf("destination %s://…: want a folder, or a URL that begins with s3://, gs:// or azblob://", u.Scheme)
	}
	b, err := blob.OpenBucket(ctx, location)
	if err != nil {
		return nil, fmt.Errorf("destination: %w", err)
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	if prefix := u.Query().Get("prefix"); prefix != "" {
		shown.RawQuery = "prefix=" + prefix
	}
	return &bucket{shown.String(), b}, nil
}

func (b *bucket) String() string { return b.name }

func (b *bucket) Is(fs.FileInfo) bool { return false }

func (b *bucket) Lock() error { return nil }

func (b *bucket) Close() error { return b.bucket.Close() }

func (b *bucket) Read(ctx context.Context, name string) (io.ReadCloser, int64, error) {
	r, err := b.bucket.NewReader(ctx, name, nil)
	if gcerrors.Code(err) == gcerrors.NotFound {
		return nil, 0, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("reading from %s: %w", b.name, err)
	}
	return r, r.Size(), nil
}

// Parts of an upload. S3 takes at most 10,000 of them, so they grow with what is to be expected.
const (
	leastPartBytes = 16 << 20
	mostParts      = 9000
	partsAtATime   = 2
)

func (b *bucket) Write(ctx context.Context, name string, expected int64, fill func(io.Writer) error) error {
	// Cancelling is how an upload is given up: Close would store what was written.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := b.bucket.NewWriter(ctx, name, &blob.WriterOptions{
		BufferSize:     int(max(leastPartBytes, expected/mostParts)),
		MaxConcurrency: partsAtATime,
		ContentType:    "application/octet-stream",
	})
	if err != nil {
		return fmt.Errorf("writing to %s: %w", b.name, err)
	}
	if err := fill(w); err != nil {
		cancel()
		_ = w.Close() // it says that it was cancelled
		return err
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("writing to %s: %w", b.name, err)
	}
	return nil
}

func (b *bucket) Delete(ctx context.Context, name string) error {
	err := b.bucket.Delete(ctx, name)
	if err != nil && gcerrors.Code(err) != gcerrors.NotFound {
		return fmt.Errorf("deleting %s from %s: %w", name, b.name, err)
	}
	return nil
}

func (b *bucket) List(ctx context.Context, prefix string, each func(string, int64) error) error {
	objects := b.bucket.List(&blob.ListOptions{Prefix: prefix})
	for {
		o, err := objects.Next(ctx)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("listing %s: %w", b.name, err)
		}
		if err := each(o.Key, o.Size); err != nil {
			return err
		}
	}
}
