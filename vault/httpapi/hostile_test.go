package httpapi_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
)

// bodyRoutes are the routes that take a body, with one that is well-formed.
type bodyRoute struct {
	method, rest string
	body         map[string]any
	// bytes are the members of a fixed size; points are the offsets of curve points in them.
	bytes  map[string]int
	points map[string][]int
	ids    []string
	times  []string
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// bodyRoutes for an account that p has enrolled, with e.
func bodyRoutes(t testing.TB, p *phone, e *enrolment) []bodyRoute {
	t.Helper()
	ke1 := p.guess("x").request.KE1
	request, _, err := opaque.StartRegistration(rand.Reader, []byte("x"))
	must(t, err)
	signature := b64(make([]byte, 64))
	return []bodyRoute{
		{method: "POST", rest: "/enrolment", body: map[string]any{"registration_request": b64(request[:])},
			bytes: map[string]int{"registration_request": 33}, points: map[string][]int{"registration_request": {0}}},
		{method: "PUT", rest: "", body: map[string]any{
			"state": b64(e.stage.State), "record": b64(e.stage.Record), "wrapped_key": b64(e.stage.WrappedKey), "owner_key": b64(e.stage.OwnerKey),
			"ksf": map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 65536, "threads": 4},
		}, bytes: map[string]int{"record": 129, "wrapped_key": 60, "owner_key": 32}, points: map[string][]int{"record": {0}}},
		{method: "POST", rest: "/activation", body: map[string]any{
			"generation": e.generation.String(), "signature": signature, "previous_signature": signature,
		}, bytes: map[string]int{"signature": 64, "previous_signature": 64}, ids: []string{"generation"}},
		{method: "POST", rest: "/recovery", body: map[string]any{
			"ke1": b64(ke1), "generation": e.generation.String(), "attempt": 77, // not the next: a conflict, and not counted
		}, bytes: map[string]int{"ke1": 98}, points: map[string][]int{"ke1": {0, 65}}, ids: []string{"generation"}},
		{method: "POST", rest: "/recovery/finish", body: map[string]any{"ke3": b64(make([]byte, 32)), "state": b64(make([]byte, 300))},
			bytes: map[string]int{"ke3": 32}},
		{method: "POST", rest: "/reinstatement", body: map[string]any{
			"generation": e.generation.String(), "replaces": strings.Repeat("0", 32), "frozen_until": "2026-01-02T03:04:05.678901Z", "signature": signature,
		}, bytes: map[string]int{"signature": 64}, ids: []string{"generation", "replaces"}, times: []string{"frozen_until"}},
	}
}

// optional members may be left out.
var optional = []string{"previous_signature", "attempt", "generation@/recovery"}

// change returns a body with one member changed.
func (r bodyRoute) change(name string, value any) map[string]any {
	out := maps.Clone(r.body)
	out[name] = value
	return out
}

func (r bodyRoute) text(t testing.TB) string {
	t.Helper()
	raw, err := json.Marshal(r.body)
	must(t, err)
	return string(raw)
}

const canary = "canary-value-8271"

// TestHostileBodies sends every route what it must refuse, and looks that nothing was
// evaluated, counted or said back.
func TestHostileBodies(t *testing.T) {
	s := newService(t, nil)
	p := s.phone("anna")
	e := p.enrol("right", nil)
	before, evaluated := s.status("anna"), s.token.Evaluated()

	for _, route := range bodyRoutes(t, p, e) {
		t.Run(route.method+route.rest, func(t *testing.T) {
			s := s.in(t)
			wants := func(name string, body any, kind, field string) {
				t.Helper()
				r := s.call(route.method, "anna", route.rest, body)
				if r.problem.Type != kind || r.problem.Field != field {
					t.Errorf("%s: want %s of %q, got %v", name, kind, field, r)
				}
				if bytes.Contains(r.body, []byte(canary)) {
					t.Errorf("%s: the value is in the answer: %v", name, r)
				}
			}
			bad := func(name string, body any, field string) { t.Helper(); wants(name, body, api.InvalidRequest, field) }

			good := route.text(t)
			for name, body := range map[string]string{
				"empty": "", "white space": " \n", "a BOM": "\ufeff" + good, "null": "null", "a list": "[" + good + "]", "text": `"x"`, "a number": "7",
				"true": "true", "cut short": good[:len(good)-1], "twice": good + good, "trailing text": good + "x", "trailing number": good + " 7",
				"trailing comma": good[:len(good)-1] + ",}", "a comment": "/* */" + good, "NUL": good + "\x00", "NaN": `{"a":NaN}`, "single quotes": `{'a':1}`,
				"UTF-16": "\xff\xfe{\x00}\x00", "invalid UTF-8 in a value": `{"` + "a" + `":"` + "\xff" + `"}`, "a lone surrogate": `{"a":"\ud800"}`,
			} {
				bad(name, body, "")
			}
			bad("an unknown member", route.change("unknown", canary), "unknown")
			bad("an unknown member with a long name", route.change(strings.Repeat("ü", 500), 1), strings.Repeat("ü", 32)+"…")
			bad("$schema", route.change("$schema", canary), "$schema")
			bad("deep lists", good[:len(good)-1]+`,"x":`+strings.Repeat("[", 5000)+strings.Repeat("]", 5000)+"}", "x.0.0.0")
			bad("deep objects", strings.Repeat(`{"x":`, 2000)+"1"+strings.Repeat("}", 2000), "x.x.x.x")
			wants("huge", good[:len(good)-1]+`,"x":"`+strings.Repeat("a", 16<<10)+`"}`, api.TooLarge, "")
			bad("just not too large", good[:len(good)-1]+`,"x":"`+strings.Repeat("a", 16<<10-len(good)-7)+`"}`, "x")

			for name := range route.body {
				quoted := `"` + name + `":`
				bad(name+" twice", good[:len(good)-1]+","+quoted+`"`+canary+`"}`, name)
				bad(name+" in capitals", strings.Replace(good, quoted, `"`+strings.ToUpper(name)+`":`, 1), strings.ToUpper(name))
				for spelling, value := range map[string]any{
					"null": nil, "a list": []any{canary}, "true": true,
				} {
					field := name
					bad(name+" as "+spelling, route.change(name, value), field)
				}
				without := maps.Clone(route.body)
				delete(without, name)
				if !slices.Contains(optional, name) && !slices.Contains(optional, name+"@"+route.rest) {
					bad("no "+name, without, name)
				}
			}
			for name, size := range route.bytes {
				value := route.body[name].(string)
				for spelling, v := range map[string]any{
					"empty": "", "a number": 7, "an object": map[string]any{"x": canary}, "spaces": " " + value, "a line break": value[:10] + "\n" + value[10:],
					"padded": value + strings.Repeat("=", (4-len(value)%4)%4) + "=", "standard base64": "+/" + value[2:], "garbage": canary + "!",
					"one byte less": b64(make([]byte, size-1)), "one byte more": b64(make([]byte, size+1)), "a lot more": b64(make([]byte, 9000)),
					"one letter": "A", "hexadecimal": hex.EncodeToString(make([]byte, size)),
				} {
					bad(name+": "+spelling, route.change(name, v), name)
				}
				if len(value)%4 != 0 {
					bad(name+": stray bits", route.change(name, value[:len(value)-1]+"_"), name)
				}
			}
			for name, offsets := range route.points {
				valid, err := base64.RawURLEncoding.DecodeString(route.body[name].(string))
				must(t, err)
				for _, offset := range offsets {
					for spelling, point := range hostilePoints(offset == 65) {
						b := slices.Clone(valid)
						copy(b[offset:], point)
						bad(fmt.Sprintf("%s: %s at %d", name, spelling, offset), route.change(name, b64(b)), name)
					}
				}
				// Uncompressed, as other stacks write points.
				curve := elliptic.P256().Params()
				//lint:ignore SA1019 what is tested is that form itself
				long := elliptic.Marshal(elliptic.P256(), curve.Gx, curve.Gy)
				bad(name+": an uncompressed point", route.change(name, b64(append(long, valid[33:]...))), name)
			}
			for _, name := range route.ids {
				for spelling, v := range map[string]any{
					"empty": "", "short": "00", "long": strings.Repeat("0", 33), "capitals": strings.Repeat("A", 32), "no hexadecimal": strings.Repeat("g", 32),
					"with dashes": "00000000-0000-0000-0000-00000000", "a number": 7,
				} {
					bad(name+": "+spelling, route.change(name, v), name)
				}
			}
			for _, name := range route.times {
				for spelling, v := range map[string]any{
					"empty": "", "a number": 7, "a date": "2026-01-02", "no zone": "2026-01-02T03:04:05", "a space": "2026-01-02 03:04:05Z",
					"no such day": "2026-02-30T03:04:05Z", "year 10000": "10000-01-02T03:04:05Z", "a leap second": "2026-12-31T23:59:60Z", "garbage": canary,
				} {
					bad(name+": "+spelling, route.change(name, v), name)
				}
			}
		})
	}
	for _, c := range []struct {
		name  string
		rest  string
		body  string
		field string
	}{
		{"attempt zero", "/recovery", `"attempt":0`, "attempt"},
		{"attempt below zero", "/recovery", `"attempt":-1`, "attempt"},
		{"attempt too large", "/recovery", `"attempt":4294967296`, "attempt"},
		{"attempt with a fraction", "/recovery", `"attempt":1.0`, "attempt"},
		{"attempt with an exponent", "/recovery", `"attempt":1e1`, "attempt"},
		{"attempt far too large", "/recovery", `"attempt":1e999`, "attempt"},
		{"attempt with many digits", "/recovery", `"attempt":` + strings.Repeat("9", 9000), "attempt"},
		{"attempt as text", "/recovery", `"attempt":"1"`, "attempt"},
		{"generation zero", "/recovery", `"generation":"` + strings.Repeat("0", 32) + `"`, "generation"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := s.in(t).call("POST", "anna", c.rest, `{"ke1":"`+b64(p.guess("x").request.KE1)+`",`+c.body+`}`)
			if r.problem.Type != api.InvalidRequest || r.problem.Field != c.field {
				t.Errorf("got %v", r)
			}
		})
	}
	for name, ksf := range map[string]struct {
		ksf   map[string]any
		field string
	}{
		"another algorithm":       {map[string]any{"algorithm": "scrypt", "time": 3, "memory_kib": 65536, "threads": 4}, "ksf.algorithm"},
		"algorithm in capitals":   {map[string]any{"algorithm": "Argon2id", "time": 3, "memory_kib": 65536, "threads": 4}, "ksf.algorithm"},
		"no time":                 {map[string]any{"algorithm": "argon2id", "memory_kib": 65536, "threads": 4}, "ksf.time"},
		"an unknown member":       {map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 65536, "threads": 4, "salt": canary}, "ksf.salt"},
		"time as text":            {map[string]any{"algorithm": "argon2id", "time": canary, "memory_kib": 65536, "threads": 4}, "ksf.time"},
		"threads that are null":   {map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 65536, "threads": nil}, "ksf.threads"},
		"threads over a byte":     {map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 65536, "threads": 260}, "ksf"},
		"less than the floor":     {map[string]any{"algorithm": "argon2id", "time": 1, "memory_kib": 65536, "threads": 4}, "ksf"},
		"more than the ceiling":   {map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 4294967295, "threads": 4}, "ksf"},
		"all of it zero":          {map[string]any{"algorithm": "argon2id", "time": 0, "memory_kib": 0, "threads": 0}, "ksf"},
		"memory beyond 32 bits":   {map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 4294967296, "threads": 4}, "ksf.memory_kib"},
		"memory with a fraction":  {map[string]any{"algorithm": "argon2id", "time": 3, "memory_kib": 65536.5, "threads": 4}, "ksf.memory_kib"},
		"an empty object":         {map[string]any{}, "ksf.algorithm"},
		"an algorithm of nothing": {map[string]any{"algorithm": "", "time": 3, "memory_kib": 65536, "threads": 4}, "ksf.algorithm"},
	} {
		t.Run("ksf: "+name, func(t *testing.T) {
			r := s.in(t).call("PUT", "anna", "", bodyRoutes(t, p, e)[1].change("ksf", ksf.ksf))
			if r.problem.Type != api.InvalidRequest || r.problem.Field != ksf.field || bytes.Contains(r.body, []byte(canary)) {
				t.Errorf("got %v", r)
			}
		})
	}

	if after := s.status("anna"); !sameJSON(t, before, after) {
		t.Errorf("the account changed:\n%+v\n%+v", before, after)
	}
	if got := s.token.Evaluated(); got != evaluated {
		t.Errorf("%d elements were evaluated for nothing", got-evaluated)
	}
	if strings.Contains(s.log.String(), canary) {
		t.Error("a value is in the log")
	}
}

// hostilePoints are 33 bytes that are no element of the group, or, for the key share, −G.
func hostilePoints(keyshare bool) map[string][]byte {
	curve := elliptic.P256().Params()
	generator := elliptic.MarshalCompressed(elliptic.P256(), curve.Gx, curve.Gy)
	with := func(prefix byte, rest []byte) []byte { return append([]byte{prefix}, rest...) }
	out := map[string][]byte{
		"zeros":                    make([]byte, 33),
		"the identity, padded":     with(0, make([]byte, 32)),
		"x beyond the field":       with(2, bytes.Repeat([]byte{0xff}, 32)),
		"x that is the prime":      with(2, curve.P.FillBytes(make([]byte, 32))),
		"off the curve":            with(2, append(make([]byte, 31), 1)),
		"an uncompressed prefix":   with(4, generator[1:]),
		"a hybrid prefix":          with(6, generator[1:]),
		"a prefix that is nothing": with(1, generator[1:]),
	}
	if keyshare {
		out["the negative of the generator"] = with(generator[0]^1, generator[1:])
	}
	return out
}

func sameJSON(t testing.TB, a, b any) bool {
	t.Helper()
	x, err := json.Marshal(a)
	must(t, err)
	y, err := json.Marshal(b)
	must(t, err)
	return bytes.Equal(x, y)
}

// TestWellFormedButWrong sends each route its well-formed body: what the domain refuses
// is no 500 either, and counts nothing.
func TestWellFormedButWrong(t *testing.T) {
	s := newService(t, nil)
	p := s.phone("anna")
	e := p.enrol("right", nil)
	want := map[string]string{
		"PUT": "", "POST/enrolment": "", "POST/activation": api.Forbidden, "POST/recovery": api.Conflict,
		"POST/recovery/finish": api.InvalidRequest, "POST/reinstatement": api.Forbidden,
	}
	for _, route := range bodyRoutes(t, p, e) {
		if r := s.call(route.method, "anna", route.rest, route.body); r.problem.Type != want[route.method+route.rest] {
			t.Errorf("%s%s: got %v", route.method, route.rest, r)
		}
	}
	if got := s.status("anna"); got.AttemptsLeft != 10 || got.Generations[0].NextAttempt != 1 {
		t.Errorf("an attempt was counted: %+v", got)
	}
}

func TestMediaTypes(t *testing.T) {
	s := newService(t, nil)
	good := bodyRoutes(t, s.phone("anna"), s.phone("anna").enrol("right", nil))
	for _, c := range []struct {
		values []string
		ok     bool
	}{
		{[]string{"application/json"}, true},
		{[]string{"application/json; charset=utf-8"}, true},
		{[]string{"Application/JSON;charset=UTF-8"}, true},
		{nil, false},
		{[]string{""}, false},
		{[]string{"application/json", "application/json"}, false},
		{[]string{"application/json, text/plain"}, false},
		{[]string{"application/json; charset=latin1"}, false},
		{[]string{"application/json; charset=utf-8; version=1"}, false},
		{[]string{"application/json; charset=utf-8; charset=latin1"}, false},
		{[]string{"application/problem+json"}, false},
		{[]string{"application/cbor"}, false},
		{[]string{"text/plain"}, false},
		{[]string{"text/json"}, false},
		{[]string{"application/x-www-form-urlencoded"}, false},
		{[]string{"multipart/form-data; boundary=x"}, false},
		{[]string{"application/*"}, false},
		{[]string{"json"}, false},
	} {
		for _, route := range good {
			r := s.newRequest(route.method, pathOf("anna", route.rest), "anna", route.body)
			r.Header["Content-Type"] = c.values
			if got := s.send(r); (got.problem.Type != api.MediaType) != c.ok {
				t.Errorf("%q to %s: got %v", c.values, route.rest, got)
			}
		}
	}
	r := s.newRequest("POST", pathOf("anna", "/enrolment"), "anna", good[0].body)
	r.Header.Set("Content-Encoding", "gzip")
	wantProblem(t, s.send(r), api.MediaType)

	// A foreign Accept is answered in JSON all the same.
	for _, accept := range []string{"application/cbor", "text/html", "application/xml;q=1, */*;q=0", "garbage"} {
		r := s.newRequest("GET", pathOf("anna", ""), "anna", nil)
		r.Header.Set("Accept", accept)
		into[api.Status](t, s.send(r))
	}
}

// endless is a body without an end, which counts how much of it was read.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	e.read += len(p)
	return copy(p, bytes.Repeat([]byte(" "), len(p))), nil
}

func TestHugeBodies(t *testing.T) {
	s := newService(t, nil)
	for name, length := range map[string]int64{"announced": 1 << 40, "not announced": -1} {
		body := &endless{}
		r := s.newRequest("POST", pathOf("anna", "/recovery"), "anna", "")
		r.Body, r.ContentLength = io.NopCloser(body), length
		got := s.send(r)
		wantProblem(t, got, api.TooLarge)
		if got.header.Get("Connection") != "close" {
			t.Errorf("%s: the connection stays", name)
		}
		if body.read > 64<<10 || length > 0 && body.read > 0 {
			t.Errorf("%s: %d bytes were read", name, body.read)
		}
	}
	// One that breaks off.
	r := s.newRequest("POST", pathOf("anna", "/recovery"), "anna", "")
	r.Body = io.NopCloser(io.MultiReader(strings.NewReader(`{"ke1":`), brokenReader{}))
	r.ContentLength = 100
	wantProblem(t, s.send(r), api.InvalidRequest)
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestBodiesWhereNoneBelongs(t *testing.T) {
	s := newService(t, nil)
	wantProblem(t, s.call("GET", "anna", "", `{}`), api.InvalidRequest)
	wantProblem(t, s.call("DELETE", "anna", "?generation="+strings.Repeat("0", 32), `{"generation":"x"}`), api.InvalidRequest)
	r := httptest.NewRequest("GET", "/v1/vault", strings.NewReader("x"))
	wantProblem(t, s.send(r), api.InvalidRequest)
}

func TestQueries(t *testing.T) {
	s := newService(t, nil)
	e := s.phone("anna").enrol("right", nil)
	id := e.generation.String()
	for query, field := range map[string]string{
		"":                      "generation",
		"generation=":           "generation",
		"generation":            "generation",
		"generation=" + id[:31]: "generation",
		"generation=" + strings.ToUpper(id[:31]) + "G":                        "generation",
		"generation=" + id + "&generation=" + id:                              "generation",
		"generation=" + id + "&unknown=1":                                     "unknown",
		"Generation=" + id:                                                    "Generation",
		"generation=" + id + "&signature=":                                    "signature",
		"generation=" + id + "&signature=AA":                                  "signature",
		"generation=" + id + "&signature=A":                                   "signature",
		"generation=" + id + "&signature=" + canary + "!":                     "signature",
		"generation=" + id + "&signature=" + b64(make([]byte, 64)) + "%3D%3D": "signature",
		"generation=" + id + "&signature=" + b64(make([]byte, 65)):            "signature",
		"generation=" + id + "&signature=x&signature=y":                       "signature",
		"generation=" + id + "&%zz":                                           "",
		"generation=" + id + ";signature=x":                                   "",
		"generation=" + id + "&" + url.QueryEscape(strings.Repeat("x", 100)):  strings.Repeat("x", 64) + "…",
		"generation=" + id + "&%ff=1":                                         "�",
	} {
		r := s.call("DELETE", "anna", "?"+query, nil)
		if r.problem.Type != api.InvalidRequest || r.problem.Field != field || bytes.Contains(r.body, []byte(canary)) {
			t.Errorf("%s: want %q, got %v", query, field, r)
		}
	}
	wantProblem(t, s.call("GET", "anna", "?x=1", nil), api.InvalidRequest)
	wantProblem(t, s.call("POST", "anna", "/recovery?ke1=x", bodyRoutes(t, s.phone("anna"), e)[3].body), api.InvalidRequest)
	wantProblem(t, s.send(httptest.NewRequest("GET", "/v1/vault?x=1", nil)), api.InvalidRequest)
	if got := s.status("anna"); got.Generations[0].State != "active" {
		t.Errorf("the generation was turned off: %+v", got)
	}
}

// TestUsers sends user ids in every odd spelling. What is in the token, byte for byte,
// is what must come out of the path.
func TestUsers(t *testing.T) {
	s := newService(t, nil)
	for _, user := range []string{
		"anna", "Anna", "a b", "a+b", "a/b", "/", "//", "a%2Fb", "%2F", "%252F", "%", "%zz", ".", "..", "../anna", "a/../b", "backup-key", "anna/backup-key",
		"users", "{user}", "*", "a?b", "a#b", "a;b", "a&b=c", "a:b@c", "\u00fc", "u\u0308", "日本語", "🔑", "\u202eanna", "~", "'", `"`, "\\", "|", "<script>",
		strings.Repeat("x", 256), strings.Repeat("ü", 128), strings.Repeat("/", 256), " ", "\ufeff", "\ufffd",
	} {
		for _, path := range []string{pathOf(user, ""), "/v1/users/" + everyByte(user) + "/backup-key"} {
			r := s.newRequest("GET", "/", user, nil)
			u, err := url.ParseRequestURI(path)
			must(t, err)
			r.URL = u
			if got := s.send(r); got.problem.Type != api.NotEnrolled {
				t.Errorf("%q as %s: got %v", user, path, got)
			}
		}
	}
	// None of them is another's account.
	s.phone("a/b").enrol("x", nil)
	for _, user := range []string{"a%2Fb", "a", "b", "a//b", "A/B", "a/b ", "a／b"} {
		wantProblem(t, s.call("GET", user, "", nil), api.NotEnrolled)
	}
	if got := s.status("a/b"); len(got.Generations) != 1 {
		t.Errorf("got %+v", got)
	}

	for _, user := range []string{
		strings.Repeat("x", 257), strings.Repeat("x", 1024), strings.Repeat("ü", 129), "a\x00b", "\x00", "a\nb", "\x7f", "\u0085", "a\tb",
	} {
		r := s.call("GET", user, "", nil)
		if r.problem.Type != api.InvalidRequest || r.problem.Field != "user" {
			t.Errorf("%q: got %v", user, r)
		}
		// Before anything is opened in the token.
		r = s.call("PUT", user, "", bodyRoutes(t, s.phone("anna"), s.phone("anna").prepare("x"))[1].body)
		if r.problem.Type != api.InvalidRequest || r.problem.Field != "user" {
			t.Errorf("%q: got %v", user, r)
		}
	}
	// What a token cannot say, because it is no UTF-8, is no user of it.
	for _, escaped := range []string{"%FF", "ann%FF", "%C3", "%ED%A0%80", "anna%00"} {
		r := s.newRequest("GET", "/", "anna", nil)
		u, err := url.ParseRequestURI("/v1/users/" + escaped + "/backup-key")
		must(t, err)
		r.URL = u
		if got := s.send(r); got.problem.Type != api.Forbidden {
			t.Errorf("%s: got %v", escaped, got)
		}
	}
	// An empty one has no token, and paths that only look like a user's are none.
	for path, want := range map[string]string{
		"/v1/users//backup-key": api.Forbidden, "/v1/users/backup-key": api.NotFound, "/v1/users/a/b/backup-key": api.NotFound,
		"/v1/users/anna/backup-key/": api.NotFound, "/v1/users/anna/": api.NotFound, "/v1//users/anna/backup-key": api.NotFound,
		"/v1/users/anna/Backup-Key": api.NotFound, "/v1/users/anna%2Fbackup-key": api.NotFound, "/v1/users/x/../anna/backup-key": api.NotFound,
	} {
		r := s.newRequest("GET", "/", "anna", nil)
		u, err := url.ParseRequestURI(path)
		must(t, err)
		r.URL = u
		if got := s.send(r); got.problem.Type != want {
			t.Errorf("%s: got %v", path, got)
		}
	}
}

// everyByte percent-encodes all of it, as no client must and any may.
func everyByte(s string) string {
	var out strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&out, "%%%02x", c)
	}
	return out.String()
}

// FuzzBodies sends any body to each route. Only a well-formed one may get past the
// decoder, and no body is a 500.
func FuzzBodies(f *testing.F) {
	s := newService(f, nil)
	p := s.phone("anna")
	e := p.enrol("right", nil)
	routes := bodyRoutes(f, p, e)
	for i, route := range routes {
		good := route.text(f)
		f.Add(uint8(i), []byte(good))
		f.Add(uint8(i), []byte(good+" "))
		f.Add(uint8(i), []byte(good[:len(good)/2]))
		f.Add(uint8(i), []byte(strings.Replace(good, `"`, `"\u0061`, 3)))
	}
	for _, seed := range []string{``, `{}`, `null`, `[]`, `{"a":{"a":{"a":{"a":{}}}}}`, `{"":1}`, "\ufeff{}", `{"ke1":"AA"}`, `{"~":0,"~":0}`, `{"/":null}`} {
		f.Add(uint8(3), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, i uint8, body []byte) {
		s := s.in(t)
		route := routes[int(i)%len(routes)]
		r := s.newRequest(route.method, pathOf("anna", route.rest), "anna", string(body))
		got := s.send(r)
		if got.status >= http.StatusInternalServerError {
			t.Fatalf("got %v", got)
		}
		// The standard library is laxer: what it refuses, strict JSON cannot be.
		if !json.Valid(body) && len(body) <= 16<<10 && got.problem.Type != api.InvalidRequest {
			t.Fatalf("%q was answered %v", body, got)
		}
	})
}
