package pkcs11util

import (
	"bytes"
	"testing"
)

func validSealed() []byte {
	b := sealedHeader{generation: 7, scheme: 1, id: [16]byte{1, 2, 3}}.append(nil)
	return append(b, bytes.Repeat([]byte{9}, ivBytes+1+tagBytes)...)
}

func FuzzParseSealed(f *testing.F) {
	f.Add([]byte{})
	f.Add(validSealed())
	f.Add(validSealed()[:len(validSealed())-1])
	f.Add(append(validSealed(), make([]byte, maxPlaintextBytes)...))
	other := validSealed()
	other[0] = 2
	f.Add(other)
	other = validSealed()
	other[5] = 2
	f.Add(other)
	other = append(validSealed(), make([]byte, longIVBytes-ivBytes)...)
	other[5] = 0x43
	f.Add(other)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, iv, ciphertext, ok := parseSealed(b)
		if !ok {
			return
		}
		if len(iv) != ivBytes && len(iv) != longIVBytes || len(ciphertext) <= tagBytes || len(ciphertext) > maxPlaintextBytes+tagBytes {
			t.Fatalf("accepted an IV of %d bytes and a ciphertext of %d", len(iv), len(ciphertext))
		}
		if again := append(append(h.append(nil), iv...), ciphertext...); !bytes.Equal(again, b) {
			t.Fatalf("%x encodes back to %x", b, again)
		}
	})
}

func TestParseSealedRefuses(t *testing.T) {
	good := validSealed()
	if _, _, _, ok := parseSealed(good); !ok {
		t.Fatal("refused a sealed value of the least size")
	}
	change := func(i int, v byte) []byte {
		b := bytes.Clone(good)
		b[i] = v
		return b
	}
	for name, b := range map[string][]byte{
		"empty":            nil,
		"one byte short":   good[:len(good)-1],
		"too long":         append(bytes.Clone(good), make([]byte, maxPlaintextBytes)...),
		"version 0":        change(0, 0),
		"version 2":        change(0, 2),
		"unknown IV":       change(5, 5),
		"our IV, long":     append(change(5, 0x41), 0, 0, 0, 0),
		"IV of 13 bytes":   append(change(5, 0x12), 0),
		"no room for IV":   change(5, 0x43),
		"IV scheme zero":   change(5, 0),
		"header and no IV": good[:headerBytes],
	} {
		if _, _, _, ok := parseSealed(b); ok {
			t.Errorf("%s: accepted", name)
		}
	}
}

// The purpose's length keeps purpose and associated data apart, and the header's bytes are in front.
func TestAssociatedDataIsInjective(t *testing.T) {
	h := sealedHeader{generation: 1}
	seen := map[string]string{}
	for _, c := range [][2]string{{"state", ""}, {"stat", "e"}, {"", "state"}, {"s", "tate"}, {"state", "\x00"}, {"stale", ""}} {
		a := string(h.associated(c[0], []byte(c[1])))
		if before, ok := seen[a]; ok {
			t.Errorf("%q and %q have the same associated data", before, c)
		}
		seen[a] = c[0] + "|" + c[1]
	}
	for _, other := range []sealedHeader{{generation: 2}, {generation: 1, scheme: 1}, {generation: 1, id: [16]byte{1}}} {
		if bytes.Equal(h.associated(Master, nil), other.associated(Master, nil)) {
			t.Errorf("%v and %v have the same associated data", h, other)
		}
	}
}
