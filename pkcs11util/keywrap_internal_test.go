package pkcs11util

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
)

// wrapVectors are RFC 3394's with a key of 256 bits (sections 4.3, 4.5, 4.6).
var wrapVectors = []struct{ section, wrapped, data string }{
	{"4.3", "64e8c3f9ce0f5ba263e9777905818a2a93c8191e7d6e8ae7", "00112233445566778899aabbccddeeff"},
	{"4.5", "a8f9bc1612c68b3ff6e6f4fbe30e71e4769c8b80a32cb8958cd5d17d6b254da1", "00112233445566778899aabbccddeeff0001020304050607"},
	{"4.6", "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21", "00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f"},
}

func wrapVectorKey() (key [secretKeyBytes]byte) {
	for i := range key {
		key[i] = byte(i)
	}
	return key
}

func TestUnwrap(t *testing.T) {
	key := wrapVectorKey()
	for _, v := range wrapVectors {
		wrapped, err := hex.DecodeString(v.wrapped)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := unwrap(key, wrapped); err != nil || hex.EncodeToString(got) != v.data {
			t.Errorf("section %s: %x, %v", v.section, got, err)
		}
		for i := range wrapped {
			bad := bytes.Clone(wrapped)
			bad[i] ^= 1
			if _, err := unwrap(key, bad); !errors.Is(err, errFaulty) {
				t.Errorf("section %s, byte %d changed: %v", v.section, i, err)
			}
		}
	}
}

func FuzzUnwrap(f *testing.F) {
	for _, v := range wrapVectors {
		wrapped, err := hex.DecodeString(v.wrapped)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wrapped)
		f.Add(wrapped[:len(wrapped)-1])
	}
	f.Add([]byte{})
	f.Add(wrapIV)
	known := map[string]bool{}
	for _, v := range wrapVectors {
		known[v.wrapped] = true
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := unwrap(wrapVectorKey(), b); err == nil && !known[hex.EncodeToString(b)] {
			t.Errorf("unwrapped %x", b)
		}
	})
}
