package httpapi

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/backup-key-vault/bkv/api"
)

const (
	// maxBodyBytes bounds a request's body; the largest that is valid has about 900 bytes.
	maxBodyBytes = 16 << 10
	// maxDepth bounds nesting; valid bodies have two levels.
	maxDepth = 4
	// maxEchoedName bounds how much of an unknown member's name a problem repeats.
	maxEchoedName = 64
)

// readBody reads a body of JSON, or says why not: media-type, too-large, or invalid.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if err := checkMediaType(r.Header); err != nil {
		return nil, err
	}
	return readLimited(w, r, maxBodyBytes)
}

// readLimited reads a body of at most limit bytes.
func readLimited(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength > limit {
		return nil, tooLarge(limit)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if tooLong := (*http.MaxBytesError)(nil); errors.As(err, &tooLong) {
		return nil, tooLarge(limit)
	} else if err != nil {
		return nil, invalid("", "the body could not be read to its end").because(err)
	}
	return body, nil
}

// tooLarge closes the connection, so that the rest of the body is not read.
func tooLarge(limit int64) *refusal {
	r := refuse(api.TooLarge, "at most "+strconv.FormatInt(limit, 10)+" bytes are read")
	r.header.Set("Connection", "close")
	return r
}

// checkMediaType accepts application/json, with no parameter but charset=utf-8.
func checkMediaType(h http.Header) error {
	bad := refuse(api.MediaType, "want one Content-Type, application/json, with no parameter but charset=utf-8, and no Content-Encoding")
	values := h.Values("Content-Type")
	if len(values) != 1 || len(h.Values("Content-Encoding")) != 0 {
		return bad
	}
	kind, params, err := mime.ParseMediaType(values[0])
	if err != nil || kind != "application/json" {
		return bad
	}
	for name, value := range params {
		if name != "charset" || !strings.EqualFold(value, "utf-8") {
			return bad
		}
	}
	return nil
}

// refuseBody is for the routes that take none: a body there is a mistake of its
// sender, who should hear of it.
func refuseBody(r *http.Request) error {
	if r.ContentLength != 0 {
		return invalid("", "this request has no body")
	}
	return nil
}

// member is one member that a request must have, by its JSON pointer (RFC 6901).
type member struct{ parent, pointer string }

// decode reads a JSON object into out, strictly: I-JSON (RFC 7493: valid UTF-8, no
// member twice), names in their exact case, no unknown member, none of the
// required ones missing, no null anywhere, nothing after the object.
//
// The problem names the member, never its value.
func decode(body []byte, required []member, out any) error {
	if len(body) == 0 {
		return invalid("", "the body is empty; want a JSON object")
	}
	// First the shape alone, so that what is wrong is told apart from what is missing.
	seen := map[string]bool{"": true}
	d := jsontext.NewDecoder(bytes.NewReader(body))
	for {
		token, err := d.ReadToken()
		if err == io.EOF {
			break
		}
		if err != nil {
			return syntaxRefusal(err, d.InputOffset())
		}
		switch at := d.StackPointer(); {
		case d.StackDepth() == 0 && token.Kind() != '}':
			return invalid("", "want a JSON object")
		case d.StackDepth() > maxDepth:
			return invalid(fieldOf(at), "nested too deeply")
		case token.Kind() == 'n':
			return invalid(fieldOf(at), "null is not a value here; leave optional members out")
		default:
			seen[string(at)] = true
		}
	}
	err := json.Unmarshal(body, out, json.RejectUnknownMembers(true))
	if err != nil {
		return semanticRefusal(err)
	}
	for _, m := range required {
		if seen[m.parent] && !seen[m.pointer] {
			return invalid(fieldOf(jsontext.Pointer(m.pointer)), "this member is required")
		}
	}
	return nil
}

func syntaxRefusal(err error, offset int64) *refusal {
	at := " at byte " + strconv.FormatInt(offset, 10)
	syntax := (*jsontext.SyntacticError)(nil)
	switch {
	case errors.Is(err, jsontext.ErrDuplicateName):
		errors.As(err, &syntax)
		return invalid(fieldOf(syntax.JSONPointer), "this member is there twice")
	case errors.As(err, &syntax):
		return invalid("", "not JSON in UTF-8 (RFC 8259)"+" at byte "+strconv.FormatInt(syntax.ByteOffset, 10))
	default: // a body that ends early
		return invalid("", "not one whole JSON object (RFC 8259)"+at)
	}
}

func semanticRefusal(err error) *refusal {
	semantic := (*json.SemanticError)(nil)
	if !errors.As(err, &semantic) {
		return syntaxRefusal(err, 0)
	}
	field := fieldOf(semantic.JSONPointer)
	if errors.Is(err, json.ErrUnknownName) {
		return invalid(field, "there is no such member; names are case-sensitive")
	}
	return invalid(field, "want "+wanted(semantic.GoType))
}

// wanted says what a member of a Go type looks like in JSON.
func wanted(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[api.Bytes]():
		return "a string of base64url without padding"
	case reflect.TypeFor[api.GenerationID]():
		return "a string of 32 lower-case hexadecimal digits"
	case reflect.TypeFor[uint32]():
		return "a whole number from 0 to 4294967295"
	case reflect.TypeFor[string]():
		return "a string"
	default:
		return "a JSON object"
	}
}

// fieldOf writes a JSON pointer as names with dots between, cut to a sane length.
func fieldOf(p jsontext.Pointer) string {
	out := strings.Join(slices.Collect(p.Tokens()), ".")
	if len(out) > maxEchoedName {
		cut := maxEchoedName
		for cut > 0 && !utf8.RuneStart(out[cut]) {
			cut--
		}
		out = out[:cut] + "…"
	}
	return out
}

// query reads a query string that may hold the named parameters, each once.
func query(raw string, known []param) (map[string]string, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, invalid("", "the query is not well-formed")
	}
	out := make(map[string]string, len(values))
	for name, v := range values {
		field := fieldOf(jsontext.Pointer("").AppendToken(strings.ToValidUTF8(name, "�")))
		if !slices.ContainsFunc(known, func(p param) bool { return p.name == name }) {
			return nil, invalid(field, "there is no such query parameter")
		}
		if len(v) != 1 {
			return nil, invalid(field, "this query parameter is there twice")
		}
		out[name] = v[0]
	}
	for _, p := range known {
		if _, ok := out[p.name]; p.required && !ok {
			return nil, invalid(p.name, "this query parameter is required")
		}
	}
	return out, nil
}
