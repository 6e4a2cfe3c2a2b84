package opaque_test

import (
	"bytes"
	"crypto/elliptic"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
)

// message describes a Parse function and where the points of its message lie.
type message struct {
	name   string
	parse  func([]byte) ([]byte, error)
	size   int
	points map[string]int // by the name that an error gives the field
}

// parser turns a Parse function into one that returns bytes. encode must be
// given because an array type parameter cannot be sliced.
func parser[T any](parse func([]byte) (T, error), encode func(*T) []byte) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		m, err := parse(b)
		return encode(&m), err
	}
}

var messages = []message{
	{
		"Element", parser(opaque.ParseElement, func(m *opaque.Element) []byte { return m[:] }),
		33, map[string]int{"point": 0},
	}, {
		"PublicKey", parser(opaque.ParsePublicKey, func(m *opaque.PublicKey) []byte { return m[:] }),
		33, map[string]int{"point": 0},
	}, {
		"RegistrationRequest", parser(opaque.ParseRegistrationRequest, func(m *opaque.RegistrationRequest) []byte { return m[:] }),
		33, map[string]int{"blinded_message": 0},
	}, {
		"RegistrationResponse", parser(opaque.ParseRegistrationResponse, func(m *opaque.RegistrationResponse) []byte { return m[:] }),
		66, map[string]int{"evaluated_message": 0, "server_public_key": 33},
	}, {
		"RegistrationRecord", parser(opaque.ParseRegistrationRecord, func(m *opaque.RegistrationRecord) []byte { return m[:] }),
		129, map[string]int{"client_public_key": 0},
	}, {
		"KE1", parser(opaque.ParseKE1, func(m *opaque.KE1) []byte { return m[:] }),
		98, map[string]int{"blinded_message": 0, "client_public_keyshare": 65},
	}, {
		"KE2", parser(opaque.ParseKE2, func(m *opaque.KE2) []byte { return m[:] }),
		259, map[string]int{"evaluated_message": 0, "server_public_keyshare": 194},
	}, {
		"KE3", parser(opaque.ParseKE3, func(m *opaque.KE3) []byte { return m[:] }),
		32, nil,
	},
}

// valid returns an acceptable message: G where a point belongs, and bytes that
// are no points elsewhere.
func (m message) valid(t testing.TB) []byte {
	t.Helper()
	g := generator(t)
	b := bytes.Repeat([]byte{0xa5}, m.size)
	for _, offset := range m.points {
		copy(b[offset:], g[:])
	}
	return b
}

func TestParseAccepts(t *testing.T) {
	for _, m := range messages {
		t.Run(m.name, func(t *testing.T) {
			want := m.valid(t)
			got, err := m.parse(want)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, m.name, got, want)
		})
	}
}

// refuse checks that b is refused as an invalid message, with nothing of it
// returned, and that the error names the field.
func refuse(t *testing.T, m message, b []byte, field string) {
	t.Helper()
	got, err := m.parse(b)
	if !errors.Is(err, opaque.ErrInvalidMessage) {
		t.Fatalf("error %v, want ErrInvalidMessage", err)
	}
	if !strings.Contains(err.Error(), field) {
		t.Errorf("error %q does not name %s", err, field)
	}
	if !bytes.Equal(got, make([]byte, m.size)) {
		t.Errorf("refused, and returned %x", got)
	}
}

func TestParseRefusesLengths(t *testing.T) {
	for _, m := range messages {
		t.Run(m.name, func(t *testing.T) {
			good := m.valid(t)
			for n := range 2*m.size + 40 {
				if n == m.size {
					continue
				}
				refuse(t, m, append(good, good[:]...)[:min(n, 2*m.size)], "bytes, want")
			}
			refuse(t, m, nil, "bytes, want")
			refuse(t, m, make([]byte, 1<<20), "bytes, want")
		})
	}
}

func TestParseRefusesPoints(t *testing.T) {
	for _, m := range messages {
		for field, offset := range m.points {
			for name, bad := range badPoints(t) {
				t.Run(m.name+"/"+field+"/"+name, func(t *testing.T) {
					// In the point's place, whatever its length: with the right
					// one the point is at fault, else the message's length.
					b := slices.Concat(m.valid(t)[:offset], bad, m.valid(t)[offset+33:])
					if len(b) == m.size {
						refuse(t, m, b, field)
					} else {
						refuse(t, m, b, "bytes, want")
					}
				})
			}
		}
	}
}

func TestParseKE1RefusesMinusGenerator(t *testing.T) {
	b := make([]byte, opaque.KE1Size)
	g := generator(t)
	copy(b, g[:])
	copy(b[65:], minusGenerator(t))
	if _, err := opaque.ParseKE1(b); !errors.Is(err, opaque.ErrInvalidMessage) || !strings.Contains(err.Error(), "client_public_keyshare") {
		t.Errorf("keyshare −G: %v", err)
	}
	// In the other place it is a point like any other.
	copy(b, minusGenerator(t))
	copy(b[65:], g[:])
	if _, err := opaque.ParseKE1(b); err != nil {
		t.Errorf("blinded message −G: %v", err)
	}
}

// acceptable is an opinion on b of its own, by the standard library.
func (m message) acceptable(t testing.TB, b []byte) bool {
	if len(b) != m.size {
		return false
	}
	for _, offset := range m.points {
		if x, _ := elliptic.UnmarshalCompressed(elliptic.P256(), b[offset:offset+33]); x == nil {
			return false
		}
	}
	return m.name != "KE1" || !bytes.Equal(b[65:], minusGenerator(t))
}

// fuzzParse checks that Parse does not panic, accepts what the standard
// library finds acceptable and nothing else, and gives it back unchanged.
func fuzzParse(f *testing.F, name string) {
	m := messages[slices.IndexFunc(messages, func(m message) bool { return m.name == name })]
	f.Add(m.valid(f))
	f.Add([]byte{})
	f.Add(m.valid(f)[:m.size-1])
	f.Add(append(m.valid(f), 0))
	for _, bad := range badPoints(f) {
		for _, offset := range m.points {
			b := m.valid(f)
			copy(b[offset:offset+33], bad)
			f.Add(b)
		}
	}
	if name == "KE1" {
		b := m.valid(f)
		copy(b[65:], minusGenerator(f))
		f.Add(b)
	}
	real, fake := opaquetest.Vectors(f)
	for _, b := range [][]byte{
		real[0].Outputs.RegistrationRequest, real[0].Outputs.RegistrationResponse, real[0].Outputs.RegistrationUpload,
		real[0].Outputs.KE1, real[0].Outputs.KE2, real[0].Outputs.KE3, fake.Inputs.KE1, fake.Outputs.KE2,
	} {
		if len(b) == m.size {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := m.parse(b)
		if want := m.acceptable(t, b); (err == nil) != want {
			t.Fatalf("error %v, want accepted: %v", err, want)
		}
		if err == nil && !bytes.Equal(got, b) {
			t.Fatalf("accepted %x, gave back %x", b, got)
		}
		if err != nil && !errors.Is(err, opaque.ErrInvalidMessage) {
			t.Fatalf("not an ErrInvalidMessage: %v", err)
		}
	})
}

func FuzzParseElement(f *testing.F)              { fuzzParse(f, "Element") }
func FuzzParsePublicKey(f *testing.F)            { fuzzParse(f, "PublicKey") }
func FuzzParseRegistrationRequest(f *testing.F)  { fuzzParse(f, "RegistrationRequest") }
func FuzzParseRegistrationResponse(f *testing.F) { fuzzParse(f, "RegistrationResponse") }
func FuzzParseRegistrationRecord(f *testing.F)   { fuzzParse(f, "RegistrationRecord") }
func FuzzParseKE1(f *testing.F)                  { fuzzParse(f, "KE1") }
func FuzzParseKE2(f *testing.F)                  { fuzzParse(f, "KE2") }
func FuzzParseKE3(f *testing.F)                  { fuzzParse(f, "KE3") }
