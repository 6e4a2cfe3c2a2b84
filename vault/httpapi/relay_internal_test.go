package httpapi

import (
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/ohttp"
)

// Whatever a capsule holds is refused, or is a request to a path of this vault that says nothing of who sends it.
func FuzzRequestInside(f *testing.F) {
	for _, r := range []*ohttp.Request{
		{Method: "GET", Scheme: "https", Path: "/v1/vault"},
		{Method: "POST", Scheme: "https", Authority: "x", Path: "/v1/users/a%2Fb/backup-key?x=1", Header: []ohttp.Field{{Name: "content-length", Value: "2"}}, Content: []byte("{}")},
		{Method: "GET", Scheme: "https", Path: "/", Header: []ohttp.Field{{Name: "authorization", Value: "Bearer x"}}},
	} {
		b, err := r.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := requestInside(message)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || int64(len(body)) != r.ContentLength || !strings.HasPrefix(r.RequestURI, "/") {
			t.Fatalf("%v, %d bytes of %d, to %q", err, len(body), r.ContentLength, r.RequestURI)
		}
		for name := range r.Header {
			if slices.Contains(refusedInside, strings.ToLower(name)) {
				t.Fatalf("%s came through", name)
			}
		}
	})
}
