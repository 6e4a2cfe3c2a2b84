package backup

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
)

// counting is the key 000102…1f.
func counting() (k Key) {
	for i := range k {
		k[i] = byte(i)
	}
	return k
}

const countingDigits = "0001 0203 0405 0607\n" +
	"0809 0a0b 0c0d 0e0f\n" +
	"1011 1213 1415 1617\n" +
	"1819 1a1b 1c1d 1e1f"

func TestDigitsAreSixteenGroupsOfFour(t *testing.T) {
	if got := counting().Digits(); got != countingDigits {
		t.Errorf("got %q", got)
	}
}

func TestParseDigits(t *testing.T) {
	plain := strings.NewReplacer(" ", "", "\n", "").Replace(countingDigits)
	for name, s := range map[string]string{
		"as shown":              countingDigits,
		"plain":                 plain,
		"upper case":            strings.ToUpper(countingDigits),
		"CR LF":                 strings.ReplaceAll(countingDigits, "\n", "\r\n"),
		"old Mac line breaks":   strings.ReplaceAll(countingDigits, "\n", "\r"),
		"tabs":                  strings.ReplaceAll(countingDigits, " ", "\t"),
		"no-break spaces":       strings.ReplaceAll(countingDigits, " ", "\u00a0"),
		"ideographic spaces":    strings.ReplaceAll(countingDigits, " ", "\u3000"),
		"line separators":       strings.ReplaceAll(countingDigits, "\n", "\u2028"),
		"spaces inside a group": strings.Join(strings.Split(plain, ""), " "),
		"around":                " \n\t" + plain + "\u00a0\n\n",
	} {
		if got, err := ParseDigits(s); err != nil || got != counting() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseDigitsRefuses(t *testing.T) {
	plain := strings.NewReplacer(" ", "", "\n", "").Replace(countingDigits)
	for name, test := range map[string]struct {
		in   string
		want DigitsError
	}{
		"nothing":             {"", DigitsError{}},
		"white space alone":   {" \n ", DigitsError{}},
		"one too few":         {plain[:63], DigitsError{Found: 63}},
		"one too many":        {plain + "0", DigitsError{Found: 65}},
		"many too many":       {strings.Repeat(plain, 3), DigitsError{Found: 192}},
		"letter O for 0":      {"O" + plain[1:], DigitsError{1, 1, 1, 0}},
		"g":                   {plain[:10] + "g" + plain[11:], DigitsError{11, 1, 11, 10}},
		"on the third line":   {strings.Replace(countingDigits, "1415", "14x5", 1), DigitsError{53, 3, 13, 42}},
		"after CR LF":         {"00\r\n0-", DigitsError{6, 2, 2, 3}},
		"dash":                {strings.Replace(countingDigits, " ", "-", 1), DigitsError{5, 1, 5, 4}},
		"prefix 0x":           {"0x" + plain, DigitsError{2, 1, 2, 1}},
		"full-width digit":    {"0\uff11" + plain[2:], DigitsError{2, 1, 2, 1}},
		"Arabic-Indic digit":  {"\u0661" + plain[1:], DigitsError{1, 1, 1, 0}},
		"after a wide space":  {"0\u30000!", DigitsError{4, 1, 4, 2}},
		"zero-width space":    {"00\u200b" + plain[2:], DigitsError{3, 1, 3, 2}},
		"byte order mark":     {"\ufeff" + plain, DigitsError{1, 1, 1, 0}},
		"NUL":                 {plain[:4] + "\x00" + plain[4:], DigitsError{5, 1, 5, 4}},
		"invalid UTF-8":       {plain[:4] + "\xff" + plain[4:], DigitsError{5, 1, 5, 4}},
		"cut-off UTF-8":       {plain + "\xe3\x80", DigitsError{65, 1, 65, 64}},
		"bad after too many":  {plain + plain + "?", DigitsError{129, 1, 129, 128}},
		"replacement itself":  {plain + "\ufffd", DigitsError{65, 1, 65, 64}},
		"combining character": {"0\u0301" + plain[1:], DigitsError{2, 1, 2, 1}},
	} {
		k, err := ParseDigits(test.in)
		var got *DigitsError
		if !errors.As(err, &got) || *got != test.want {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
		if k != (Key{}) {
			t.Errorf("%s: a key came with the error", name)
		}
	}
}

func TestDigitsErrorSaysWhereAndNotWhat(t *testing.T) {
	_, err := ParseDigits("00\nab\u2603")
	if got := err.Error(); !strings.Contains(got, "character 6 (line 2, column 3, after 4 digits)") || strings.Contains(got, "\u2603") {
		t.Error(got)
	}
	_, err = ParseDigits("0123")
	if got := err.Error(); !strings.HasSuffix(got, "found 4") || strings.Contains(got, "0123") {
		t.Error(got)
	}
}

func FuzzParseDigits(f *testing.F) {
	for _, s := range []string{countingDigits, strings.ToUpper(countingDigits), "", "0x", "\xff", "\u00a0", strings.Repeat("a", 65)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseDigits(s)
		if err != nil {
			var e *DigitsError
			if !errors.As(err, &e) || k != (Key{}) {
				t.Fatalf("%v", err)
			}
			if e.Position > len(s) || e.Line > e.Position || e.Column > e.Position || e.Found > len(s) {
				t.Fatalf("%+v in %q", e, s)
			}
			return
		}
		want := strings.ToLower(strings.Join(strings.Fields(s), ""))
		if got := strings.Join(strings.Fields(k.Digits()), ""); got != want {
			t.Fatalf("read %q as %q", want, got)
		}
		if again, err := ParseDigits(k.Digits()); err != nil || again != k {
			t.Fatalf("what it shows it does not read: %v", err)
		}
	})
}

func TestNewKey(t *testing.T) {
	a, err := NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if a == b || a == (Key{}) {
		t.Error("keys are not random")
	}
	if k, err := NewKey(bytes.NewReader(make([]byte, 31))); !errors.Is(err, io.ErrUnexpectedEOF) || k != (Key{}) {
		t.Errorf("31 bytes of randomness made a key: %v", err)
	}
}

// The derivations are part of what is stored at vaults: these values can never change.
func TestOwnerKeyVectors(t *testing.T) {
	for _, test := range []struct {
		key                 Key
		vault, tenant, user string
		public              string
	}{
		{counting(), "vault.example", "chat", "alice", "c696bd28037d77943ae648209c044db2d884be85e3d7f21ece786c542266b67a"},
		{counting(), "vault.example", "chat", "Zoë/7", "e77dc8bcf199f055b9b3ead66ba553c08d0fdfd58672e446fa79783984e7c659"},
		{counting(), "vault.examplec", "hat", "alice", "7fdb41c80b9c98915e7d62a29d7a697be4b9e0a4b0685f11a7b5f86ef009b63a"},
		{Key{}, "", "", "", "9916c30892619af3788f03eeb0874c3a2eb4e96980ccca5652bbd1b3b5b7fc3d"},
	} {
		got := test.key.OwnerKey(test.vault, test.tenant, test.user).Public().(ed25519.PublicKey)
		if hex.EncodeToString(got) != test.public {
			t.Errorf("%q %q %q: got %x", test.vault, test.tenant, test.user, got)
		}
	}
}

// The derivation once more, spelt out byte for byte.
func TestOwnerKeyIsHKDF(t *testing.T) {
	k := counting()
	info := "\x00\x00\x00\x10bkv/v1/owner-key\x00\x00\x00\x01v\x00\x00\x00\x02te\x00\x00\x00\x03use"
	seed, err := hkdf.Key(sha256.New, k[:], nil, info, 32)
	if err != nil {
		t.Fatal(err)
	}
	if !k.OwnerKey("v", "te", "use").Equal(ed25519.NewKeyFromSeed(seed)) {
		t.Error("differs from HKDF-SHA-256 over the info as documented")
	}
}

func TestKeyHidesItself(t *testing.T) {
	k := counting()
	wrapped := struct {
		Key Key
		Ptr *Key
	}{k, &k}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%T"} {
		fmt.Fprintf(&out, verb+verb+verb, k, &k, wrapped)
	}
	out.WriteString(k.String())
	slog.New(slog.NewTextHandler(&out, nil)).Info("m", "key", k, "ptr", &k, "wrapped", wrapped)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "key", k, "ptr", &k, "wrapped", wrapped)
	for _, secret := range []string{"0001", "0 1 2", "0, 1", "0,1,2", "0x0", "AAEC", "\x00\x01\x02"} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("%q is in %q", secret, out.String())
		}
	}
	if b, err := json.Marshal(wrapped); err == nil {
		t.Errorf("marshalled to %s", b)
	}
}

func BenchmarkOwnerKey(b *testing.B) {
	k := counting()
	for b.Loop() {
		k.OwnerKey("vault.example", "chat", "alice")
	}
}
