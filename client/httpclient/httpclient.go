// Package httpclient carries a client's requests by net/http. It is apart from
// package client so that a program for the browser, where net/http doubles the
// size, can bring a transport of its own.
//
// Trust boundary: TLS keeps tokens and traffic from the network and says whom the
// URL names; that this is the right vault is package client's to check. Nothing
// is kept of a request or its answer.
package httpclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/backup-key-vault/bkv/client"
)

const (
	// timeout is for one request, from dialling to the answer's last byte.
	timeout = 30 * time.Second
	// maxHeaderBytes bounds an answer's header.
	maxHeaderBytes = 32 << 10
)

// Config says where the vault is.
type Config struct {
	// BaseURL is the vault's address, with the path under which it is served if there is
	// one: "https://vault.example" or "https://app.example/vault". It must be https, unless
	// the host is this one (a loopback address or "localhost").
	BaseURL string
	// TLS is for an own root of trust or a client certificate; by default the system's
	// roots and TLS 1.2 or later.
	TLS *tls.Config
	// AllowPlainHTTP also takes an http URL of another host: then everybody on the
	// way sees the user's token and can answer in the vault's place.
	AllowPlainHTTP bool
}

// Transport is a [client.Transport]. It reuses connections, takes the proxy from the
// environment as net/http does, follows no redirect (the answer is then the redirect
// itself), and reads no more of an answer than a vault may send. It is safe for
// concurrent use; one serves any number of clients.
type Transport struct {
	base string // without a slash at the end
	http *http.Client
}

var _ client.Transport = (*Transport)(nil)

// New checks the address. It connects to nothing.
func New(c Config) (*Transport, error) {
	u, err := url.Parse(c.BaseURL)
	if err != nil {
		return nil, fmt.Errorf("vault address: %w", err)
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http", u.Host == "", u.Opaque != "":
		return nil, errors.New("vault address: want https://host or https://host/path")
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, errors.New("vault address: a user, a query or a fragment has no place in it")
	case u.Scheme == "http" && !c.AllowPlainHTTP && !loopback(u.Hostname()):
		return nil, errors.New("vault address: want https; plain http is for this host alone, unless it is allowed")
	}
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:    10 * time.Second,
		TLSClientConfig:        c.TLS.Clone(),
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // what is read is what was sent, and no bomb
		MaxIdleConns:           16,
		MaxIdleConnsPerHost:    4,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	return &Transport{
		base: strings.TrimRight(u.String(), "/"),
		http: &http.Client{
			Transport:     t,
			Timeout:       timeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// RoundTrip sends one request. Any error means that it is unknown whether it arrived.
func (t *Transport) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	request, err := http.NewRequestWithContext(ctx, r.Method, t.base+r.Path, bytes.NewReader(r.Body))
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", withoutURL(err))
	}
	for name, value := range r.Header {
		request.Header.Set(name, value)
	}
	response, err := t.http.Do(request)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(response.Body, client.MaxResponseBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if len(body) > client.MaxResponseBytes {
		return nil, fmt.Errorf("reading the answer: over %d bytes", client.MaxResponseBytes)
	}
	header := make(map[string]string, len(response.Header))
	for name, values := range response.Header {
		header[strings.ToLower(name)] = values[0]
	}
	return &client.Response{Status: response.StatusCode, Header: header, Body: body}, nil
}

// withoutURL drops what net/http writes around an error: the URL holds the user's id.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// CloseIdleConnections closes those that no request uses. The Transport stays usable.
func (t *Transport) CloseIdleConnections() { t.http.CloseIdleConnections() }
