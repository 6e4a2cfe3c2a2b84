package dest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"

	"gocloud.dev/blob"
	_ "gocloud.dev/blob/azureblob" // azblob://
	"gocloud.dev/blob/gcsblob"     // gs://
	_ "gocloud.dev/blob/s3blob"    // s3://
	"gocloud.dev/gcerrors"
	"gocloud.dev/gcp"
)

// bucket is a bucket of a cloud.
type bucket struct {
	name   string
	bucket *blob.Bucket
	needed string
}

func openBucket(ctx context.Context, location string) (*bucket, error) {
	u, err := url.Parse(location)
	if err != nil {
		return nil, errors.New("destination: it is no URL and no path")
	}
	if !blob.DefaultURLMux().ValidBucketScheme(u.Scheme) {
		return nil, fmt.Errorf("destination %s://…: want a folder, or a URL that begins with s3://, gs:// or azblob://", u.Scheme)
	}
	if err := hasCredentials(ctx, u); err != nil {
		return nil, fmt.Errorf("destination %s://%s: %w; %s", u.Scheme, u.Host, err, needed[u.Scheme])
	}
	b, err := blob.OpenBucket(ctx, location)
	if err != nil {
		return nil, fmt.Errorf("destination: %w; %s", err, needed[u.Scheme])
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	if prefix := u.Query().Get("prefix"); prefix != "" {
		shown.RawQuery = "prefix=" + prefix
	}
	return &bucket{shown.String(), b, needed[u.Scheme]}, nil
}

// hasCredentials looks for Google's credentials. gcsblob (v0.49.0) would say on standard output that there are none, and
// go on with some that do not work.
func hasCredentials(ctx context.Context, u *url.URL) error {
	query := u.Query()
	if u.Scheme != gcsblob.Scheme || query.Get("anonymous") == "true" || query.Get("access_id") == "-" ||
		os.Getenv("STORAGE_EMULATOR_HOST") != "" {
		return nil
	}
	_, err := gcp.DefaultCredentials(ctx)
	return err
}

// needed is what each cloud wants to know, for errors: its library's own texts rarely say it.
var needed = map[string]string{
	"s3": "check that the bucket exists and that you may use it; the region is ?region=… in the URL or AWS_REGION, " +
		"the credentials are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile (AWS_PROFILE); another server than Amazon's is &endpoint=https://…&use_path_style=true",
	"gs":     "check that the bucket exists and that you may use it; the credentials are a file that GOOGLE_APPLICATION_CREDENTIALS names, or those of 'gcloud auth application-default login'",
	"azblob": "check that the container exists and that you may use it; the account is AZURE_STORAGE_ACCOUNT, the credentials are AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN or those of 'az login'",
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
		return nil, 0, b.failed("reading from", err)
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
		return b.failed("writing to", err)
	}
	if err := fill(w); err != nil {
		cancel()
		_ = w.Close() // it says that it was cancelled
		return err
	}
	if err := w.Close(); err != nil {
		return b.failed("writing to", err)
	}
	return nil
}

// failed words an error of the cloud: what can be done about it too, unless the user stopped it.
func (b *bucket) failed(what string, err error) error {
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s %s: %w", what, b.name, err)
	}
	return fmt.Errorf("%s %s: %w; %s", what, b.name, err, b.needed)
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
