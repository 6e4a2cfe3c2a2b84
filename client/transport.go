package client

import "context"

// MaxResponseBytes bounds what a vault may answer. A [Transport] should read no more.
const MaxResponseBytes = 64 << 10

// Transport carries one request to the vault and brings its answer back. It is safe
// for concurrent use, follows no redirects, sends each request as it is, sets a
// time limit of its own, and keeps nothing of either.
//
// An error means that it is unknown whether the request arrived; the same
// request may then be sent again. Every answer with a status is no error.
type Transport interface {
	RoundTrip(ctx context.Context, r *Request) (*Response, error)
}

// Request is one HTTP request.
type Request struct {
	Method string
	// Path is the escaped path, with the query if there is one, and begins with a slash.
	Path string
	// Header has names in lower case.
	Header map[string]string
	Body   []byte
}

// Response is the answer to a Request.
type Response struct {
	Status int
	// Header has names in lower case, each with its first value.
	Header map[string]string
	Body   []byte
}
