package ohttp_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/mlkem"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/ohttp"
)

var allSuites = []ohttp.Suite{
	{KDF: ohttp.HKDFSHA256, AEAD: ohttp.AES128GCM}, {KDF: ohttp.HKDFSHA256, AEAD: ohttp.AES256GCM},
	{KDF: ohttp.HKDFSHA256, AEAD: ohttp.ChaCha20Poly1305},
}

// counting is a P-256 key that counts how often it is used, as one in a token would be.
type counting struct {
	*ecdh.PrivateKey
	used int
	err  error
}

func (c *counting) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	c.used++
	if c.err != nil {
		return nil, c.err
	}
	return c.PrivateKey.ECDH(peer)
}

type gateway struct {
	config  ohttp.KeyConfig
	private hpke.PrivateKey
	p256    *counting
}

func newGateway(t testing.TB, kem uint16, id uint8, suites ...ohttp.Suite) *gateway {
	t.Helper()
	scalar, err := ecdh.P256().GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{p256: &counting{PrivateKey: scalar}}
	if kem == ohttp.MLKEM768P256 {
		pq, err := mlkem.GenerateKey768()
		if err != nil {
			t.Fatal(err)
		}
		g.private, err = hpke.NewHybridPrivateKey(pq, g.p256)
		if err != nil {
			t.Fatal(err)
		}
	} else if g.private, err = hpke.NewDHKEMPrivateKey(g.p256); err != nil {
		t.Fatal(err)
	}
	if g.config, err = ohttp.NewKeyConfig(id, g.private.PublicKey(), suites...); err != nil {
		t.Fatal(err)
	}
	return g
}

func TestExchange(t *testing.T) {
	for _, kem := range []uint16{ohttp.DHKEMP256, ohttp.MLKEM768P256} {
		for i, suite := range allSuites {
			t.Run(fmt.Sprintf("KEM %#04x, AEAD %d", kem, suite.AEAD), func(t *testing.T) {
				g := newGateway(t, kem, uint8(i), suite)
				encoded, err := g.config.Encode()
				if err != nil {
					t.Fatal(err)
				}
				config, err := ohttp.ParseKeyConfig(encoded)
				if err != nil || !reflect.DeepEqual(config, g.config) {
					t.Fatalf("the configuration read again: %v", err)
				}
				capsule, sealed, err := config.Seal([]byte("a request"))
				if err != nil {
					t.Fatal(err)
				}
				other, otherSealed, err := config.Seal([]byte("a request"))
				if err != nil || bytes.Equal(capsule, other) {
					t.Fatalf("two capsules are alike: %v", err)
				}
				request, opened, err := g.config.Open(g.private, capsule)
				if err != nil || string(request) != "a request" || g.p256.used != 1 {
					t.Fatalf("opened %q after %d derivations: %v", request, g.p256.used, err)
				}
				for _, text := range []string{"an answer", "", strings.Repeat("long", 1<<14)} {
					answer, err := opened.Seal([]byte(text))
					if err != nil {
						t.Fatal(err)
					}
					if got, err := sealed.Open(answer); err != nil || string(got) != text {
						t.Fatalf("the answer: %v, %d bytes", err, len(got))
					}
					if _, err := otherSealed.Open(answer); !errors.Is(err, ohttp.ErrCapsule) {
						t.Fatalf("another request's client opened the answer: %v", err)
					}
				}
				// The same capsule again is the same request, and either answer serves.
				_, again, err := g.config.Open(g.private, capsule)
				if err != nil {
					t.Fatal(err)
				}
				answer, err := again.Seal([]byte("once more"))
				if err != nil {
					t.Fatal(err)
				}
				if got, err := sealed.Open(answer); err != nil || string(got) != "once more" {
					t.Fatalf("the second answer: %v", err)
				}
			})
		}
	}
}

// No byte of a capsule or an answer can be changed, left out or added.
func TestAlteredCapsules(t *testing.T) {
	for _, kem := range []uint16{ohttp.DHKEMP256, ohttp.MLKEM768P256} {
		g := newGateway(t, kem, 7, allSuites[1])
		capsule, sealed, err := g.config.Seal([]byte("a request"))
		if err != nil {
			t.Fatal(err)
		}
		_, opened, err := g.config.Open(g.private, capsule)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := opened.Seal([]byte("an answer"))
		if err != nil {
			t.Fatal(err)
		}
		for n := range capsule {
			if _, _, err := g.config.Open(g.private, capsule[:n]); !errors.Is(err, ohttp.ErrCapsule) {
				t.Fatalf("the first %d bytes: %v", n, err)
			}
			changed := bytes.Clone(capsule)
			changed[n] ^= byte(1 + rand.IntN(255))
			if _, _, err := g.config.Open(g.private, changed); !errors.Is(err, ohttp.ErrCapsule) && !errors.Is(err, ohttp.ErrUnknownKey) {
				t.Fatalf("byte %d changed: %v", n, err)
			}
		}
		if _, _, err := g.config.Open(g.private, append(bytes.Clone(capsule), 0)); !errors.Is(err, ohttp.ErrCapsule) {
			t.Fatalf("one byte more: %v", err)
		}
		for n := range answer {
			changed := bytes.Clone(answer)
			changed[n] ^= byte(1 + rand.IntN(255))
			for _, bad := range [][]byte{answer[:n], changed} {
				if _, err := sealed.Open(bad); !errors.Is(err, ohttp.ErrCapsule) {
					t.Fatalf("answer, byte %d: %v", n, err)
				}
			}
		}
	}
}

// What a header and a length can tell costs no use of the private key.
func TestCheapRefusals(t *testing.T) {
	g := newGateway(t, ohttp.DHKEMP256, 7, allSuites[0], allSuites[1])
	capsule, _, err := g.config.Seal([]byte("a request"))
	if err != nil {
		t.Fatal(err)
	}
	with := func(at int, b byte) []byte {
		out := bytes.Clone(capsule)
		out[at] = b
		return out
	}
	for id := range 256 {
		if _, _, err := g.config.Open(g.private, with(0, byte(id))); (err != nil) != (id != 7) || err != nil && !errors.Is(err, ohttp.ErrUnknownKey) {
			t.Errorf("key id %d: %v", id, err)
		}
	}
	used := g.p256.used
	for name, bad := range map[string][]byte{
		"another KEM": with(2, 0x50), "no KEM": with(2, 0xff), "another KDF": with(4, 2), "a suite that is not offered": with(6, 3), "no AEAD": with(6, 9),
		"empty": {}, "a header": capsule[:7], "no ciphertext": capsule[:7+65], "a short tag": capsule[:7+65+15],
		"no point": append(append(bytes.Clone(capsule[:7]), make([]byte, 65)...), capsule[72:]...),
	} {
		if _, _, err := g.config.Open(g.private, bad); !errors.Is(err, ohttp.ErrUnknownKey) && !errors.Is(err, ohttp.ErrCapsule) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if g.p256.used != used {
		t.Errorf("the private key was used %d times", g.p256.used-used)
	}
	away := errors.New("the token is away")
	g.p256.err = away
	if _, _, err := g.config.Open(g.private, capsule); !errors.Is(err, away) {
		t.Errorf("without the private key: %v", err)
	}
}

func TestKeyConfigLists(t *testing.T) {
	hybrid, plain := newGateway(t, ohttp.MLKEM768P256, 2, allSuites[1:]...), newGateway(t, ohttp.DHKEMP256, 3, allSuites...)
	list, err := ohttp.EncodeKeyConfigs([]ohttp.KeyConfig{hybrid.config, plain.config})
	if err != nil {
		t.Fatal(err)
	}
	got, err := ohttp.ParseKeyConfigs(list)
	if err != nil || !reflect.DeepEqual(got, []ohttp.KeyConfig{hybrid.config, plain.config}) {
		t.Fatalf("the list read again: %v", err)
	}
	// A KEM that we do not know is passed over.
	foreign := append([]byte{0, 12, 9, 0x7f, 0xff}, make([]byte, 9)...)
	if got, err := ohttp.ParseKeyConfigs(append(foreign, list...)); err != nil || len(got) != 2 {
		t.Errorf("a list with an unknown KEM: %v, %d", err, len(got))
	}
	for n := range list {
		got, err := ohttp.ParseKeyConfigs(list[:n])
		whole := n == 2+len(mustEncode(t, hybrid.config))
		if whole != (err == nil) || err != nil && !errors.Is(err, ohttp.ErrKeyConfig) {
			t.Fatalf("the first %d bytes: %v, %d", n, err, len(got))
		}
	}
	if _, _, err := (ohttp.KeyConfig{ID: 1, KEM: plain.config.KEM, PublicKey: plain.config.PublicKey, Suites: []ohttp.Suite{{KDF: 9, AEAD: 9}}}).Seal(nil); !errors.Is(err, ohttp.ErrUnsupported) {
		t.Errorf("sealing with no suite that we have: %v", err)
	}
	off := bytes.Clone(plain.config.PublicKey)
	off[64] ^= 1
	for name, bad := range map[string]ohttp.KeyConfig{
		"a point off the curve": {KEM: ohttp.DHKEMP256, PublicKey: off, Suites: allSuites},
		"no suites":             {KEM: ohttp.DHKEMP256, PublicKey: plain.config.PublicKey},
		"an unknown KEM":        {KEM: 0x7fff, PublicKey: plain.config.PublicKey, Suites: allSuites},
	} {
		if _, err := bad.Encode(); !errors.Is(err, ohttp.ErrKeyConfig) && !errors.Is(err, ohttp.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func mustEncode(t testing.TB, c ohttp.KeyConfig) []byte {
	t.Helper()
	b, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestInvalidMessages(t *testing.T) {
	request := func(change func(*ohttp.Request)) error {
		r := &ohttp.Request{Method: "POST", Scheme: "https", Path: "/", Header: []ohttp.Field{{Name: "accept", Value: "*/*"}}}
		change(r)
		_, err := r.Encode()
		return err
	}
	field := func(name, value string) func(*ohttp.Request) {
		return func(r *ohttp.Request) { r.Header = []ohttp.Field{{Name: name, Value: value}} }
	}
	for name, change := range map[string]func(*ohttp.Request){
		"no method": func(r *ohttp.Request) { r.Method = "" }, "a method of two words": func(r *ohttp.Request) { r.Method = "GET /" },
		"no scheme": func(r *ohttp.Request) { r.Scheme = "" }, "a scheme that begins with a digit": func(r *ohttp.Request) { r.Scheme = "1http" },
		"no path": func(r *ohttp.Request) { r.Path = "" }, "a path of two": func(r *ohttp.Request) { r.Path = "/ /" },
		"an authority with a line break": func(r *ohttp.Request) { r.Authority = "a\nb" },
		"no name":                        field("", "x"), "a name in upper case": field("Accept", "x"), "a pseudo-field": field(":path", "/x"), "a name with a space": field("a b", "x"),
		"a line break in a value": field("a", "x\r\nb: y"), "a zero in a value": field("a", "\x00"), "space before a value": field("a", " x"), "space after a value": field("a", "x\t"),
		"a bad trailer": func(r *ohttp.Request) { r.Trailer = []ohttp.Field{{Name: "A", Value: "x"}} },
	} {
		if err := request(change); !errors.Is(err, ohttp.ErrMessage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := request(func(*ohttp.Request) {}); err != nil {
		t.Fatal(err)
	}
	for _, status := range []int{0, 99, 100, 199, 600, 1 << 20} {
		if _, err := (&ohttp.Response{Status: status}).Encode(); !errors.Is(err, ohttp.ErrMessage) {
			t.Errorf("status %d: %v", status, err)
		}
	}
	many := &ohttp.Request{Method: "GET", Scheme: "https", Path: "/"}
	for range ohttp.MaxFields {
		many.Header = append(many.Header, ohttp.Field{Name: "a", Value: "b"})
	}
	for extra := range 2 {
		many.Trailer = make([]ohttp.Field, 0, extra)
		for range extra {
			many.Trailer = append(many.Trailer, ohttp.Field{Name: "a", Value: "b"})
		}
		b, err := many.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ohttp.DecodeRequest(b); (err == nil) != (extra == 0) {
			t.Errorf("%d fields: %v", ohttp.MaxFields+extra, err)
		}
	}
	for name, bad := range map[string]string{
		"empty": "", "framing 4": "\x04", "a response": "\x01\x40\xc8", "framing without more": "\x00", "a length beyond the end": "\x00\x3fGET",
		"a huge length":        "\x00\xff\xff\xff\xff\xff\xff\xff\xffGET",
		"padding of ones":      "\x00\x03GET\x05https\x00\x01/\x00\x00\x00\x01",
		"a nameless field":     "\x00\x03GET\x05https\x00\x01/\x02\x00\x00",
		"a section cut off":    "\x00\x03GET\x05https\x00\x01/\x04\x01a",
		"an endless section":   "\x02\x03GET\x05https\x00\x01/\x01a\x01b",
		"an unterminated body": "\x02\x03GET\x05https\x00\x01/\x00\x01a",
	} {
		if m, err := ohttp.DecodeRequest([]byte(bad)); !errors.Is(err, ohttp.ErrMessage) {
			t.Errorf("%s: %v, %+v", name, err, m)
		}
	}
	informational := "\x01" + strings.Repeat("\x40\x66\x00", 17) + "\x40\xc8"
	for name, bad := range map[string]string{
		"a request": "\x00\x03GET\x05https\x00\x01/", "status 99": "\x01\x40\x63", "status 600": "\x01\x42\x58", "no status": "\x01",
		"informational alone": "\x01\x40\x66\x00", "too many informational": informational,
	} {
		if m, err := ohttp.DecodeResponse([]byte(bad)); !errors.Is(err, ohttp.ErrMessage) {
			t.Errorf("%s: %v, %+v", name, err, m)
		}
	}
}

func TestPad(t *testing.T) {
	for n, want := range map[int]int{0: 4096, 1: 4096, 4095: 4096, 4096: 4096, 4097: 8192, 9000: 16384, 1 << 20: 1 << 20} {
		r := &ohttp.Request{Method: "GET", Scheme: "https", Path: "/", Content: bytes.Repeat([]byte{1}, n)}
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got := len(ohttp.Pad(make([]byte, n))); got != want {
			t.Errorf("%d bytes are padded to %d, want %d", n, got, want)
		}
		if got, err := ohttp.DecodeRequest(ohttp.Pad(b)); err != nil || !bytes.Equal(got.Content, r.Content) {
			t.Errorf("a padded request of %d bytes: %v", n, err)
		}
	}
}
