package httpapi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/vault"
)

// The relay channel (RFC 9458): an app's back end sends a capsule under its token for a user, and the request in it
// goes through the same router as one that came by itself, as that user's.
//
// What the back end learns is the size class, the time, and whether the capsule could be opened; everything that the vault
// says of the request, refusals included, is padded and sealed to the device. An answer is whole, and its outcome
// durable, before its first byte is sent.

const (
	relayPath     = "/v1/relay"
	relayKeysPath = "/v1/relay/keys"
	// maxCapsuleBytes bounds a capsule: the size class into which a body of maxBodyBytes falls with its path and header,
	// and the encapsulation.
	maxCapsuleBytes = 2*maxBodyBytes + 2<<10
	// chunkedMediaType is Chunked Oblivious HTTP's (draft-ietf-ohai-chunked-ohttp), whose answers come in parts.
	chunkedMediaType = "message/ohttp-chunked-req"
)

// relayRoutes registers the relay channel.
func (s *server) relayRoutes() {
	keys := operation{
		method: http.MethodGet, path: relayKeysPath, id: "get-relay-keys", public: true, cacheControl: cacheForAWhile,
		summary: "The relay channel's keys (RFC 9458)",
		doc: "The hybrid with ML-KEM-768 first, then DHKEM(P-256). They are in the signed list of GET /v1/vault too: " +
			"a client that knows the vault's fingerprint takes them from there.",
	}
	relay := operation{
		method: http.MethodPost, path: relayPath, id: "relay",
		summary: "Carry a request that only the vault can read (RFC 9458)",
		doc: "The capsule holds a request (RFC 9292) to any other path here, without Authorization: it is the token's user's. The answer, whatever it is, " +
			"comes sealed with status 200, padded to " + strconv.Itoa(ohttp.MinSizeClass) + " bytes or the next power of two. Only what is refused before the capsule is open comes as a problem.",
		problems: []string{api.OHTTPKey, api.TooLarge, api.MediaType, api.Busy},
	}
	documentRaw(s.document, keys, "", ohttp.KeysMediaType)
	documentRaw(s.document, relay, ohttp.RequestMediaType, ohttp.ResponseMediaType)
	s.router.Method(keys.method, keys.path, s.raw(keys, ohttp.KeysMediaType, s.relayKeys))
	s.router.Method(relay.method, relay.path, s.raw(relay, ohttp.ResponseMediaType, s.relay))
}

// raw is the endpoint of an operation whose bodies are not JSON.
func (s *server) raw(op operation, mediaType string, run func(http.ResponseWriter, *http.Request, *exchange) ([]byte, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := exchangeOf(r.Context())
		x.route = op.path
		body, err := run(w, r, x)
		if err != nil {
			s.refuse(w, x, refusalOf(x.client, err))
			return
		}
		if op.cacheControl != "" {
			w.Header().Set("Cache-Control", op.cacheControl)
		}
		write(w, x, http.StatusOK, mediaType, body)
	}
}

func (s *server) relayKeys(_ http.ResponseWriter, r *http.Request, _ *exchange) ([]byte, error) {
	if _, err := query(r.URL.RawQuery, nil); err != nil {
		return nil, err
	}
	if err := refuseBody(r); err != nil {
		return nil, err
	}
	configs, err := s.vault.RelayConfigs(r.Context())
	if err != nil {
		return nil, err
	}
	return ohttp.EncodeKeyConfigs(configs)
}

// relay opens a capsule, has the request in it answered, and seals the answer. What costs nothing is refused first.
func (s *server) relay(w http.ResponseWriter, r *http.Request, x *exchange) ([]byte, error) {
	if x.relayed != nil {
		return nil, invalid("", "a request inside a capsule cannot itself be to the relay channel")
	}
	if _, err := query(r.URL.RawQuery, nil); err != nil {
		return nil, err
	}
	if err := checkCapsuleType(r.Header); err != nil {
		return nil, err
	}
	if r.ContentLength > maxCapsuleBytes {
		return nil, tooLarge(maxCapsuleBytes)
	}
	who, err := s.authority.authenticate(r.Context(), r.Header)
	if err != nil {
		return nil, err
	}
	x.tenant = who.account.Tenant
	if err := who.account.Validate(); err != nil {
		return nil, err
	}
	if err := s.requests.take(who.account); err != nil {
		return nil, err
	}
	capsule, err := readLimited(w, r, maxCapsuleBytes)
	if err != nil {
		return nil, err
	}
	giveBack, err := s.places.take(x)
	if err != nil {
		return nil, err
	}
	defer giveBack()
	request, opened, err := s.vault.OpenCapsule(r.Context(), capsule)
	switch {
	case errors.Is(err, vault.ErrTokenUnavailable), errors.Is(err, vault.ErrStoreUnavailable):
		return nil, err
	case errors.Is(err, ohttp.ErrUnknownKey):
		return nil, refuse(api.OHTTPKey, "the capsule is sealed to a key, or with a suite, that the vault does not have, or not any more; fetch the keys again")
	case errors.Is(err, ohttp.ErrCapsule):
		// A wrong key under the right id looks the same as an altered capsule.
		return nil, refuse(api.OHTTPKey, "the capsule does not open: it was altered or cut off on its way, or sealed to another key of the same id; fetch the keys again")
	case err != nil:
		return nil, err
	}
	answer, err := s.inside(r.Context(), request, who, x).Encode()
	if err != nil {
		return nil, err
	}
	return opened.Seal(ohttp.Pad(answer))
}

// checkCapsuleType accepts message/ohttp-req without parameters.
func checkCapsuleType(h http.Header) error {
	values := h.Values("Content-Type")
	if len(values) == 1 && len(h.Values("Content-Encoding")) == 0 {
		switch kind, params, err := mime.ParseMediaType(values[0]); {
		case err == nil && kind == ohttp.RequestMediaType && len(params) == 0:
			return nil
		case err == nil && kind == chunkedMediaType:
			return refuse(api.MediaType, "capsules in chunks are not taken, because an answer is whole before it is sent; want "+ohttp.RequestMediaType)
		}
	}
	return refuse(api.MediaType, "want one Content-Type, "+ohttp.RequestMediaType+", without parameters, and no Content-Encoding")
}

// refusedInside are the header fields that a request in a capsule cannot have: those of a connection (RFC 9110 section 7.6.1 and
// Expect), and those that say who sends it, which the capsule's own token does.
var refusedInside = []string{
	"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect",
	"authorization", "proxy-authorization", "cookie",
}

// inside answers the request in a capsule.
func (s *server) inside(ctx context.Context, message []byte, who identity, outside *exchange) *ohttp.Response {
	x := &exchange{id: outside.id, client: outside.client, route: relayPath, tenant: outside.tenant, relayed: &who}
	outside.inside = x
	w := &recorder{header: http.Header{}}
	s.commonHeader(w, x)
	if r, err := requestInside(message); err != nil {
		s.refuse(w, x, refusalOf(x.client, err))
	} else {
		x.method = r.Method
		s.route(ctx, w, r, x)
	}
	return w.response()
}

// requestInside makes a request of a capsule's content. Its scheme and authority are not looked at: this vault is
// all that there is to reach here.
func requestInside(message []byte) (*http.Request, error) {
	m, err := ohttp.DecodeRequest(message)
	if err != nil {
		return nil, invalid("", "the capsule holds no Binary HTTP request (RFC 9292)").because(err)
	}
	if len(m.Trailer) > 0 {
		return nil, invalid("", "a request in a capsule has no trailer here")
	}
	target, err := url.ParseRequestURI(m.Path)
	if err != nil || !strings.HasPrefix(m.Path, "/") {
		return nil, invalid("", "the path of the request in the capsule is none")
	}
	r := &http.Request{
		Method: m.Method, URL: target, RequestURI: m.Path, Host: m.Authority, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: http.NoBody, ContentLength: int64(len(m.Content)),
	}
	if len(m.Content) > 0 {
		r.Body = io.NopCloser(bytes.NewReader(m.Content))
	}
	for _, f := range m.Header {
		switch {
		case slices.Contains(refusedInside, f.Name):
			return nil, invalid("", "the request in the capsule has a header field that it cannot have: "+f.Name)
		case f.Name == "content-length" && f.Value != strconv.Itoa(len(m.Content)):
			return nil, invalid("", "the content-length of the request in the capsule is not its content's")
		}
		r.Header.Add(f.Name, f.Value)
	}
	return r, nil
}

// recorder keeps an answer until it is sealed.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (w *recorder) Header() http.Header { return w.header }

func (w *recorder) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

func (w *recorder) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(b)
}

func (w *recorder) response() *ohttp.Response {
	w.WriteHeader(http.StatusOK)
	out := &ohttp.Response{Status: w.status, Content: w.body.Bytes()}
	for name, values := range w.header {
		if name = strings.ToLower(name); name == "connection" {
			continue // about a connection that the device is not on
		}
		for _, value := range values {
			out.Header = append(out.Header, ohttp.Field{Name: name, Value: value})
		}
	}
	slices.SortStableFunc(out.Header, func(a, b ohttp.Field) int { return strings.Compare(a.Name, b.Name) })
	return out
}
