package httpapi_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// derives counts the token's derivations of a service, from when it is called.
func (s *service) derives() func() int {
	var mu sync.Mutex
	n := 0
	s.token.FailWith(func(operation string) error {
		mu.Lock()
		defer mu.Unlock()
		if operation == "derive" {
			n++
		}
		return nil
	})
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}

// relayConfigs are the relay's keys, as GET /v1/relay/keys serves them.
func (s *service) relayConfigs() []ohttp.KeyConfig {
	s.t.Helper()
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, httptest.NewRequest("GET", "/v1/relay/keys", nil))
	if w.Code != 200 || w.Header().Get("Content-Type") != ohttp.KeysMediaType || w.Header().Get("Cache-Control") != "public, max-age=300" {
		s.t.Fatalf("the relay keys: %d %v", w.Code, w.Header())
	}
	configs, err := ohttp.ParseKeyConfigs(w.Body.Bytes())
	if err != nil {
		s.t.Fatal(err)
	}
	if len(configs) != 2 || configs[0].KEM != ohttp.MLKEM768P256 || configs[1].KEM != ohttp.DHKEMP256 {
		s.t.Fatalf("%d relay keys, or in another order", len(configs))
	}
	return configs
}

// capsuled seals a request; the path is as it is, and the token the user's.
func (s *service) capsuled(config ohttp.KeyConfig, user string, inside *ohttp.Request) (*http.Request, *ohttp.Sealed) {
	s.t.Helper()
	message, err := inside.Encode()
	if err != nil {
		s.t.Fatal(err)
	}
	capsule, sealed, err := config.Seal(ohttp.Pad(message))
	if err != nil {
		s.t.Fatal(err)
	}
	return s.outside(user, capsule), sealed
}

func (s *service) outside(user string, capsule []byte) *http.Request {
	r := httptest.NewRequest("POST", "/v1/relay", bytes.NewReader(capsule))
	r.Header.Set("Authorization", "Bearer "+s.tokenFor(user))
	r.Header.Set("Content-Type", ohttp.RequestMediaType)
	return r
}

// through sends a request in a capsule, checks what everybody on the way sees of the answer, and reads it.
func (s *service) through(config ohttp.KeyConfig, user string, inside *ohttp.Request) reply {
	s.t.Helper()
	r, sealed := s.capsuled(config, user, inside)
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	if w.Code != 200 || w.Header().Get("Content-Type") != ohttp.ResponseMediaType || w.Header().Get("Cache-Control") != "no-store" ||
		w.Header().Get("Content-Length") != strconv.Itoa(w.Body.Len()) || len(w.Header()) != 5 {
		s.t.Fatalf("outside: %d %v %s", w.Code, w.Header(), w.Body)
	}
	nonce := map[uint16]int{ohttp.AES128GCM: 16, ohttp.AES256GCM: 32}[config.Suites[0].AEAD] // RFC 9458 section 4.4
	if w.Body.Len() != nonce+ohttp.MinSizeClass+16 {
		s.t.Fatalf("outside: %d bytes", w.Body.Len())
	}
	message, err := sealed.Open(w.Body.Bytes())
	if err != nil {
		s.t.Fatal(err)
	}
	m, err := ohttp.DecodeResponse(message)
	if err != nil {
		s.t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	for _, f := range m.Header {
		answer.Header().Add(f.Name, f.Value)
	}
	answer.WriteHeader(m.Status)
	_, _ = answer.Write(m.Content)
	return read(s.t, answer.Result())
}

func inside(method, path string, body []byte, fields ...string) *ohttp.Request {
	r := &ohttp.Request{Method: method, Scheme: "https", Authority: "vault.example", Path: path, Content: body}
	if body != nil {
		r.Header = append(r.Header, ohttp.Field{Name: "content-type", Value: "application/json"})
	}
	for i := 0; i < len(fields); i += 2 {
		r.Header = append(r.Header, ohttp.Field{Name: fields[i], Value: fields[i+1]})
	}
	return r
}

// Every route answers in a capsule as it does outside, to both keys.
func TestRelayedRoutes(t *testing.T) {
	s := newService(t, nil)
	for i, config := range s.relayConfigs() {
		user := fmt.Sprint("Zoë/%2F ", i)
		if got := into[api.Vault](t, s.through(config, user, inside("GET", "/v1/vault", nil))); got.ID != vaultID {
			t.Errorf("the vault in a capsule: %+v", got)
		}
		wantProblem(t, s.through(config, user, inside("GET", pathOf(user, ""), nil)), api.NotEnrolled)
		request, _, err := opaque.StartRegistration(rand.Reader, []byte("password"))
		if err != nil {
			t.Fatal(err)
		}
		body := fmt.Sprintf(`{"registration_request":%q}`, mustText(t, request[:]))
		started := into[api.StartEnrolmentResponse](t, s.through(config, user, inside("POST", pathOf(user, "/enrolment"), []byte(body),
			"content-length", fmt.Sprint(len(body)), "x-request-id", "mine", "accept", "application/json")))
		if started.Generation.IsZero() {
			t.Error("no generation")
		}
	}
	var relayed int
	for _, r := range s.records() {
		if r["relayed"] == true {
			relayed++
			if r["route"] == "/v1/relay" {
				t.Errorf("the log does not say what was in the capsule: %v", r)
			}
		}
	}
	if relayed != 6 {
		t.Errorf("%d relayed requests in the log", relayed)
	}
}

func mustText(t testing.TB, b api.Bytes) string {
	t.Helper()
	text, err := b.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// What a request in a capsule cannot be is refused, inside, and does nothing.
func TestRefusedInside(t *testing.T) {
	s := newService(t, nil)
	hybrid := s.relayConfigs()[0]
	anna := pathOf("anna", "")
	for name, c := range map[string]struct {
		request *ohttp.Request
		want    string
	}{
		"another user":           {inside("GET", pathOf("berta", ""), nil), api.Forbidden},
		"the relay":              {inside("POST", "/v1/relay", []byte("{}")), api.InvalidRequest},
		"the relay, of its type": {&ohttp.Request{Method: "POST", Scheme: "https", Path: "/v1/relay", Header: []ohttp.Field{{Name: "content-type", Value: ohttp.RequestMediaType}}, Content: make([]byte, 100)}, api.InvalidRequest},
		"no such path":           {inside("GET", "/v1/nothing", nil), api.NotFound},
		"the admin's path":       {inside("GET", "/keys/", nil), api.NotFound},
		"another method":         {inside("PATCH", anna, nil), api.MethodNotAllowed},
		"a method of nonsense":   {inside("G!T", anna, nil), api.MethodNotAllowed},
		"CONNECT":                {inside("CONNECT", "vault.example:443", nil), api.InvalidRequest},
		"a whole URL":            {inside("GET", "https://vault.example"+anna, nil), api.InvalidRequest},
		"a bad escape":           {inside("GET", "/v1/users/%zz/backup-key", nil), api.InvalidRequest},
		"an asterisk":            {inside("OPTIONS", "*", nil), api.InvalidRequest},
		"an unknown query":       {inside("GET", anna+"?x=1", nil), api.InvalidRequest},
		"a trailer":              {&ohttp.Request{Method: "GET", Scheme: "https", Path: anna, Trailer: []ohttp.Field{{Name: "a", Value: "b"}}}, api.InvalidRequest},
		"another length":         {inside("GET", anna, nil, "content-length", "7"), api.InvalidRequest},
		"two lengths":            {inside("GET", anna, nil, "content-length", "0", "content-length", "1"), api.InvalidRequest},
		"a body that is no JSON": {inside("POST", anna+"/recovery", []byte("ke1")), api.InvalidRequest},
		"a body over the limit":  {inside("POST", anna+"/recovery", make([]byte, 17<<10)), api.TooLarge},
		"another media type":     {inside("POST", anna+"/recovery", nil, "content-type", "text/plain"), api.MediaType},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			r, sealed := s.capsuled(hybrid, "anna", c.request)
			w := httptest.NewRecorder()
			s.handler.ServeHTTP(w, r)
			message, err := sealed.Open(w.Body.Bytes())
			if w.Code != 200 || err != nil {
				t.Fatalf("outside: %d %s, %v", w.Code, w.Body, err)
			}
			m, err := ohttp.DecodeResponse(message)
			if err != nil || !bytes.Contains(m.Content, []byte(c.want)) {
				t.Fatalf("want %s, got %d %s, %v", c.want, m.Status, m.Content, err)
			}
			if slices.ContainsFunc(m.Header, func(f ohttp.Field) bool { return f.Name == "connection" }) {
				t.Error("a field about the connection is inside")
			}
		})
	}
	for _, field := range []string{
		"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect", "authorization", "proxy-authorization", "cookie",
	} {
		r := s.through(hybrid, "anna", inside("GET", anna, nil, field, "x"))
		wantProblem(t, r, api.InvalidRequest)
		if !strings.Contains(r.problem.Detail, field) {
			t.Errorf("%s is refused without saying so: %s", field, r.problem.Detail)
		}
	}
	// A token inside does not make one another user.
	r := s.through(hybrid, "anna", inside("GET", pathOf("berta", ""), nil, "authorization", "Bearer "+s.tokenFor("berta")))
	wantProblem(t, r, api.InvalidRequest)
	// What is no HTTP at all.
	for _, message := range [][]byte{{}, {1}, []byte("GET / HTTP/1.1\r\n\r\n"), bytes.Repeat([]byte{0xff}, 5000)} {
		capsule, sealed, err := hybrid.Seal(message)
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		s.handler.ServeHTTP(w, s.outside("anna", capsule))
		if answer, err := sealed.Open(w.Body.Bytes()); w.Code != 200 || err != nil || !bytes.Contains(answer, []byte(api.InvalidRequest)) {
			t.Errorf("no HTTP inside: %d %s, %v", w.Code, answer, err)
		}
	}
	if len(s.store.Events()) != 0 || s.token.Evaluated() != 0 {
		t.Error("something was done")
	}
}

// What can be refused before the token is asked is.
func TestRefusedOutside(t *testing.T) {
	s := newService(t, nil)
	configs := s.relayConfigs()
	good := func() []byte {
		r, _ := s.capsuled(configs[0], "anna", inside("GET", pathOf("anna", ""), nil))
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}()
	derives := s.derives()
	refused := func(name string, r *http.Request, want string) reply {
		t.Helper()
		got := s.send(r)
		if got.problem.Type != want {
			t.Errorf("%s: want %s, got %v", name, want, got)
		}
		return got
	}
	with := func(change func(r *http.Request)) *http.Request {
		r := s.outside("anna", good)
		change(r)
		return r
	}
	refused("no token", with(func(r *http.Request) { r.Header.Del("Authorization") }), api.Unauthenticated)
	refused("a token of nonsense", with(func(r *http.Request) { r.Header.Set("Authorization", "Bearer x.y.z") }), api.Unauthenticated)
	refused("a query", with(func(r *http.Request) { r.URL.RawQuery = "a=b" }), api.InvalidRequest)
	chunked := refused("chunks", with(func(r *http.Request) { r.Header.Set("Content-Type", "message/ohttp-chunked-req") }), api.MediaType)
	if !strings.Contains(chunked.problem.Detail, "chunks") {
		t.Errorf("chunks are refused without saying so: %s", chunked.problem.Detail)
	}
	for _, kind := range []string{"application/json", "message/bhttp", "message/ohttp-req; a=b", "", "nonsense/"} {
		refused(kind, with(func(r *http.Request) { r.Header.Set("Content-Type", kind) }), api.MediaType)
	}
	refused("two types", with(func(r *http.Request) { r.Header.Add("Content-Type", ohttp.RequestMediaType) }), api.MediaType)
	refused("an encoding", with(func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }), api.MediaType)
	refused("GET", httptest.NewRequest("GET", "/v1/relay", nil), api.MethodNotAllowed)
	huge := append(bytes.Clone(good), make([]byte, 1<<20)...)
	refused("1 MiB", s.outside("anna", huge), api.TooLarge)
	unsaid := s.outside("anna", nil)
	unsaid.Body, unsaid.ContentLength = io.NopCloser(bytes.NewReader(huge)), -1
	refused("1 MiB of unsaid length", unsaid, api.TooLarge)
	for name, capsule := range map[string][]byte{
		"empty": {}, "six bytes": good[:6], "a header": good[:7], "no ciphertext": good[:7+1088+65], "half a tag": good[:7+1088+65+8],
		"another KDF": changed(good, 4, 2), "a suite of the plain key": changed(good, 6, 1), "no AEAD": changed(good, 6, 77),
		"the KEM of the plain key": changed(good, 2, 0x10), "an unknown KEM": changed(good, 2, 0x77), "a point off the curve": changed(good, 7+1088+64, good[7+1088+64]^1),
	} {
		refused(name, s.outside("anna", capsule), api.OHTTPKey)
	}
	known := 0
	for id := range 256 {
		for _, kem := range []uint16{ohttp.MLKEM768P256, ohttp.DHKEMP256, 0x0020} {
			if id == int(configs[0].ID) && kem == ohttp.MLKEM768P256 || id == int(configs[1].ID) && kem == ohttp.DHKEMP256 {
				known++
				continue
			}
			capsule := changed(good, 0, byte(id))
			binary.BigEndian.PutUint16(capsule[1:], kem)
			refused(fmt.Sprintf("key id %d, KEM %#x", id, kem), s.outside("anna", capsule), api.OHTTPKey)
		}
	}
	if n := derives(); n != 0 || known != 2 {
		t.Errorf("%d derivations for nothing, %d keys known", n, known)
	}
	// A forged ciphertext costs one derivation; no more.
	refused("a changed ciphertext", s.outside("anna", changed(good, len(good)-1, good[len(good)-1]^1)), api.OHTTPKey)
	refused("a byte more", s.outside("anna", append(bytes.Clone(good), 0)), api.OHTTPKey)
	if n := derives(); n != 2 {
		t.Errorf("%d derivations for two forgeries", n)
	}
	// Without token or store the answer is that it can be tried again.
	s.token.FailWith(func(operation string) error {
		if operation == "derive" {
			return errors.New("gone")
		}
		return nil
	})
	refused("without the token", s.outside("anna", good), api.TokenUnavailable)
	s.token.FailWith(nil)
	if w := httptest.NewRecorder(); true {
		s.handler.ServeHTTP(w, s.outside("anna", good))
		if w.Code != 200 {
			t.Errorf("after all: %d %s", w.Code, w.Body)
		}
	}
	if strings.Contains(s.log.String(), `"status":500`) {
		t.Errorf("a refusal was taken for an error of its own:\n%s", s.log)
	}
}

func changed(b []byte, at int, to byte) []byte {
	out := bytes.Clone(b)
	out[at] = to
	return out
}

// A retired key serves until it is destroyed; then the standard's problem says so.
func TestRetiredRelayKey(t *testing.T) {
	s := newService(t, nil)
	old := s.relayConfigs()
	s.token.RotateRelay()
	fresh := s.relayConfigs()
	if fresh[0].ID == old[0].ID || fresh[1].ID == old[1].ID {
		t.Fatal("the new keys have old ids")
	}
	for _, config := range slices.Concat(old, fresh) {
		wantProblem(t, s.through(config, "anna", inside("GET", pathOf("anna", ""), nil)), api.NotEnrolled)
	}
	s.token.DestroyRelays()
	for _, config := range old {
		r, _ := s.capsuled(config, "anna", inside("GET", pathOf("anna", ""), nil))
		got := s.send(r)
		wantProblem(t, got, "https://iana.org/assignments/http-problem-types#ohttp-key")
		if got.status != http.StatusBadRequest {
			t.Errorf("status %d", got.status)
		}
	}
	for _, config := range fresh {
		wantProblem(t, s.through(config, "anna", inside("GET", pathOf("anna", ""), nil)), api.NotEnrolled)
	}
}

// On the direct route a tenant enrols only if its back end is trusted with passwords.
func TestDirectEnrolment(t *testing.T) {
	s := newService(t, nil)
	hybrid := s.relayConfigs()[0]
	trusted := s.tenants.tenants[0]
	strict := trusted
	strict.DirectEnrolment = false
	s.tenants.set(nil, strict)
	p := s.phone("anna")
	request, _, err := opaque.StartRegistration(rand.Reader, []byte("password"))
	if err != nil {
		t.Fatal(err)
	}
	body := fmt.Sprintf(`{"registration_request":%q}`, mustText(t, request[:]))
	for rest, method := range map[string]string{"/enrolment": "POST", "": "PUT", "/activation": "POST"} {
		r := s.send(s.newRequest(method, pathOf("anna", rest), "anna", body))
		wantProblem(t, r, api.RelayRequired)
		for _, hint := range []string{"POST /v1/relay", "direct-enrolment"} {
			if !strings.Contains(r.problem.Detail, hint) {
				t.Errorf("the problem does not say what to do: %s", r.problem.Detail)
			}
		}
	}
	if s.token.Evaluated() != 0 {
		t.Error("a refused enrolment was evaluated")
	}
	into[api.StartEnrolmentResponse](t, s.through(hybrid, "anna", inside("POST", pathOf("anna", "/enrolment"), []byte(body))))
	// Everything else goes directly.
	wantProblem(t, s.call("GET", "anna", "", nil), api.NotEnrolled)
	wantProblem(t, s.call("POST", "anna", "/recovery", p.guess("x").request), api.NotEnrolled)
	s.tenants.set(nil, trusted)
	s.clock.advance(30 * time.Second) // the tenants are read again
	into[api.StartEnrolmentResponse](t, s.send(s.newRequest("POST", pathOf("anna", "/enrolment"), "anna", body)))
}

// A thousand capsules at once, one in ten of them broken: each gets its own answer.
func TestManyCapsules(t *testing.T) {
	s := newService(t, nil)
	configs := s.relayConfigs()
	var group sync.WaitGroup
	work := make(chan int)
	for range 16 {
		group.Go(func() {
			for i := range work {
				user := fmt.Sprint("user ", i)
				r, sealed := s.capsuled(configs[i%2], user, inside("GET", pathOf(user, ""), nil))
				if i%10 == 0 {
					capsule, _ := io.ReadAll(r.Body)
					r = s.outside(user, capsule[:len(capsule)-1])
				}
				w := httptest.NewRecorder()
				s.handler.ServeHTTP(w, r)
				if i%10 == 0 {
					if w.Code != 400 {
						t.Errorf("%d: broken, and answered %d", i, w.Code)
					}
					continue
				}
				answer, err := sealed.Open(w.Body.Bytes())
				if w.Code != 200 || err != nil || !bytes.Contains(answer, []byte(api.NotEnrolled)) {
					t.Errorf("%d: %d, %v", i, w.Code, err)
				}
			}
		})
	}
	for i := range 1000 {
		work <- i
	}
	close(work)
	group.Wait()
}

// A panic behind a capsule is answered in it.
func TestPanicInside(t *testing.T) {
	soft := vaulttest.NewSoftToken()
	s := newServiceOver(t, soft, &faultyToken{SoftToken: soft, multiply: func() ([33]byte, error) { panic("behind a capsule") }}, nil)
	request, _, err := opaque.StartRegistration(rand.Reader, []byte("password"))
	if err != nil {
		t.Fatal(err)
	}
	r := s.through(s.relayConfigs()[0], "anna", inside("POST", pathOf("anna", "/enrolment"), fmt.Appendf(nil, `{"registration_request":%q}`, mustText(t, request[:]))))
	wantProblem(t, r, api.Internal)
}
