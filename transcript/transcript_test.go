package transcript

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"strings"
	"testing"
)

// No two lists of fields give the same string.
func TestFieldsAreUnambiguous(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, fields := range [][][]byte{
		{}, {nil}, {nil, nil}, {[]byte("ab")}, {[]byte("a"), []byte("b")}, {[]byte("ab"), nil}, {nil, []byte("ab")},
	} {
		s := string(Fields("label", fields...))
		if seen[s] {
			t.Errorf("%q is ambiguous", fields)
		}
		seen[s] = true
	}
	if bytes.Equal(Fields("la", []byte("bel")), Fields("label")) {
		t.Error("label and field run together")
	}
}

// Fixed for good: records, signatures and sealed blobs in the field depend on these.
func TestFixedStrings(t *testing.T) {
	t.Parallel()
	statement := Statement{Action: Activate, Vault: "v", Tenant: "t", User: "u", Old: [16]byte{1}, New: [16]byte{2}, Digest: [32]byte{3}}
	reinstatement := Statement{Action: Reinstate, Vault: "v", Tenant: "t", User: "u", Old: [16]byte{1}, New: [16]byte{2}, Digest: [32]byte{3}, FrozenUntil: 1<<56 | 4}
	material := Material{Record: []byte{1}, WrappedKey: []byte{2}, Time: 3, MemoryKiB: 4, Threads: 5, OwnerKey: []byte{6}, ServerKey: []byte{7}}
	list := KeyList{Vault: "v", Serial: 2, NotBefore: 3, Expires: 4, Keys: []ListedKey{{"server", 1, []byte{9}}}}
	digest, listed := material.Digest(), list.Digest()
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"client identity", ClientIdentity("t", "u"), "00000016" + hex.EncodeToString([]byte("bkv/v1/client-identity")) + "0000000174" + "0000000175"},
		{"wrap context", WrapContext("v", "t", "u"), "00000012" + hex.EncodeToString([]byte("bkv/v1/wrapped-key")) + "0000000176" + "0000000174" + "0000000175"},
		{"statement", statement.Bytes(), "00000016" + hex.EncodeToString([]byte("bkv/v1/owner-statement")) + "00000008" + hex.EncodeToString([]byte("activate")) +
			"000000017600000001740000000175" + "0000001001" + strings.Repeat("00", 15) + "0000001002" + strings.Repeat("00", 15) + "0000002003" + strings.Repeat("00", 31) + "000000080000000000000000"},
		{"reinstatement", reinstatement.Bytes(), "00000016" + hex.EncodeToString([]byte("bkv/v1/owner-statement")) + "00000009" + hex.EncodeToString([]byte("reinstate")) +
			"000000017600000001740000000175" + "0000001001" + strings.Repeat("00", 15) + "0000001002" + strings.Repeat("00", 15) + "0000002003" + strings.Repeat("00", 31) + "000000080100000000000004"},
		{"digest", digest[:], "d7023fce329822860f3b0f8371e13950f582190fc530536a444413d5e9a26a4e"},
		{"key list", listed[:], "e6c26d0c680a434924eef2689bfa9781bfa54ab1b37f14ed37d62e814fe1342b"},
	} {
		if hex.EncodeToString(c.got) != c.want {
			t.Errorf("%s: got %x, want %s", c.name, c.got, c.want)
		}
	}
	if got := FingerprintOf("v", []byte{1}).String(); got != "a2sj-iix3-7a2k-c3v3-6gih-6zdb-q4e5-3kcz-nvmb-zmvp" {
		t.Errorf("fingerprint: %s", got)
	}
}

func TestDigestCoversEveryField(t *testing.T) {
	t.Parallel()
	base := Material{Record: []byte("r"), WrappedKey: []byte("w"), Time: 1, MemoryKiB: 2, Threads: 3, OwnerKey: []byte("o"), ServerKey: []byte("s")}
	for name, change := range map[string]func(*Material){
		"record":  func(m *Material) { m.Record = []byte("x") },
		"wrapped": func(m *Material) { m.WrappedKey = []byte("x") },
		"time":    func(m *Material) { m.Time++ },
		"memory":  func(m *Material) { m.MemoryKiB++ },
		"threads": func(m *Material) { m.Threads++ },
		"owner":   func(m *Material) { m.OwnerKey = []byte("x") },
		"server":  func(m *Material) { m.ServerKey = []byte("x") },
	} {
		m := base
		if change(&m); m.Digest() == base.Digest() {
			t.Errorf("%s is not covered", name)
		}
	}
}

func TestStatementsVerifyOnlyWhatWasSigned(t *testing.T) {
	t.Parallel()
	public, owner, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	base := Statement{Action: TurnOff, Vault: "v", Tenant: "t", User: "u", Old: [16]byte{1}, New: [16]byte{2}, Digest: [32]byte{3}}
	signature := base.Sign(owner)
	if !base.VerifiedBy(public, signature) {
		t.Fatal("its own signature does not verify")
	}
	for name, change := range map[string]func(*Statement){
		"action": func(s *Statement) { s.Action = Replace },
		"vault":  func(s *Statement) { s.Vault = "w" },
		"tenant": func(s *Statement) { s.Tenant = "w" },
		"user":   func(s *Statement) { s.User = "w" },
		"old":    func(s *Statement) { s.Old[0]++ },
		"new":    func(s *Statement) { s.New[0]++ },
		"digest": func(s *Statement) { s.Digest[0]++ },
		"until":  func(s *Statement) { s.FrozenUntil++ },
	} {
		s := base
		if change(&s); s.VerifiedBy(public, signature) {
			t.Errorf("%s is not covered", name)
		}
	}
	for n := range len(signature) {
		if base.VerifiedBy(public, signature[:n]) || n < 32 && base.VerifiedBy(public[:n], signature) {
			t.Fatalf("cut to %d bytes, it verifies", n)
		}
	}
}

func TestFingerprint(t *testing.T) {
	t.Parallel()
	f := FingerprintOf("vault.example", bytes.Repeat([]byte{7}, 33))
	text := f.String()
	for _, spelled := range []string{text, strings.ToUpper(text), strings.ReplaceAll(text, "-", " "), strings.ReplaceAll(text, "-", "")} {
		if got, err := ParseFingerprint(spelled); err != nil || got != f {
			t.Errorf("%q: %v", spelled, err)
		}
	}
	// Any one letter copied wrongly is found.
	for i := range len(text) {
		if text[i] == '-' {
			continue
		}
		for _, c := range []byte("abcdefghijklmnopqrstuvwxyz234567") {
			if c == text[i] {
				continue
			}
			if _, err := ParseFingerprint(text[:i] + string(c) + text[i+1:]); err == nil {
				t.Fatalf("letter %d copied as %c was accepted", i+1, c)
			}
		}
	}
	for _, bad := range []string{"", text[:len(text)-1], text + "a", text[:3] + "0" + text[4:], text[:3] + "ü" + text[4:], strings.Repeat("a", 40)} {
		if _, err := ParseFingerprint(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func FuzzParseFingerprint(f *testing.F) {
	f.Add(FingerprintOf("v", []byte{1}).String())
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseFingerprint(s)
		if err != nil {
			return
		}
		again, err := ParseFingerprint(got.String())
		if err != nil || again != got {
			t.Fatalf("%q does not come back", s)
		}
	})
}
