package api

import (
	"encoding/base64"
	"testing"
)

func TestBytesHaveOneSpelling(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{"": "", "AA": "\x00", "_-8": "\xff\xef", "YWJj": "abc"} {
		var b Bytes
		if err := b.UnmarshalText([]byte(text)); err != nil || string(b) != want {
			t.Errorf("%q: %x, %v", text, b, err)
		}
		if out, err := Bytes(want).MarshalText(); err != nil || string(out) != text {
			t.Errorf("%x: %q, %v", want, out, err)
		}
	}
	for _, bad := range []string{"AA==", "AB", "/+8", "A", "AA\n", "A\rA", " AA", "AA ", "Ä"} {
		var b Bytes
		if b.UnmarshalText([]byte(bad)) == nil {
			t.Errorf("%q was accepted as %x", bad, b)
		}
	}
}

func TestGenerationID(t *testing.T) {
	t.Parallel()
	var g GenerationID
	if err := g.UnmarshalText([]byte("000102030405060708090a0b0c0d0e0f")); err != nil || g[15] != 15 || g.IsZero() {
		t.Fatal(g, err)
	}
	for _, bad := range []string{"", "00", "000102030405060708090A0B0C0D0E0F", "000102030405060708090a0b0c0d0e0", "000102030405060708090a0b0c0d0e0f0", "g00102030405060708090a0b0c0d0e0f"} {
		if g.UnmarshalText([]byte(bad)) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func FuzzBytes(f *testing.F) {
	for _, s := range []string{"", "AA", "AA==", "_-8", "AB", "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var b Bytes
		if b.UnmarshalText(text) != nil {
			return
		}
		if out, _ := b.MarshalText(); string(out) != string(text) {
			t.Fatalf("%q comes back as %q", text, out)
		}
		if want, err := base64.RawURLEncoding.DecodeString(string(text)); err != nil || string(want) != string(b) {
			t.Fatalf("%q: %x, encoding/base64 says %x, %v", text, b, want, err)
		}
	})
}
