package ohttp

import (
	"crypto/ecdh"
	"crypto/hpke"
	"reflect"
	"testing"
)

// What a decoder accepts says the same after it was encoded and decoded again.
func FuzzDecodeRequest(f *testing.F) {
	for _, b := range figures(f) {
		f.Add(b)
	}
	f.Add(unhex(f, vectors[exchange](f, "rfc9458.json").Request))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeRequest(b)
		if err != nil {
			return
		}
		again, err := r.Encode()
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		if len(again) > len(b)+16 { // the shortest form, but for the lengths of sections that b left out or had none of
			t.Fatalf("%d bytes became %d", len(b), len(again))
		}
		if second, err := DecodeRequest(again); err != nil || !reflect.DeepEqual(r, second) {
			t.Fatalf("decoded again: %v, %+v and %+v", err, r, second)
		}
	})
}

func FuzzDecodeResponse(f *testing.F) {
	for _, b := range figures(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeResponse(b)
		if err != nil {
			return
		}
		again, err := r.Encode()
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		if second, err := DecodeResponse(again); err != nil || !reflect.DeepEqual(r, second) {
			t.Fatalf("decoded again: %v, %+v and %+v", err, r, second)
		}
	})
}

// Every encoding of a list of known algorithms is the only one.
func FuzzParseKeyConfigs(f *testing.F) {
	one := unhex(f, vectors[exchange](f, "rfc9458.json").KeyConfig)
	f.Add(append([]byte{0, byte(len(one))}, one...))
	f.Add(append([]byte{0, 3, 9, 9, 9, 0, byte(len(one))}, one...))
	f.Fuzz(func(t *testing.T, b []byte) {
		configs, err := ParseKeyConfigs(b)
		if err != nil {
			return
		}
		again, err := EncodeKeyConfigs(configs)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if len(again) > len(b) {
			t.Fatalf("%d bytes became %d", len(b), len(again))
		}
		if len(configs) == 0 {
			return
		}
		if second, err := ParseKeyConfigs(again); err != nil || !reflect.DeepEqual(configs, second) {
			t.Fatalf("read again: %v", err)
		}
	})
}

// Nobody without a key's public half makes a capsule, or an answer, that opens.
func FuzzOpen(f *testing.F) {
	scalar, err := ecdh.P256().GenerateKey(nil)
	if err != nil {
		f.Fatal(err)
	}
	private, err := hpke.NewDHKEMPrivateKey(scalar)
	if err != nil {
		f.Fatal(err)
	}
	config, err := NewKeyConfig(1, private.PublicKey(), Suite{HKDFSHA256, AES128GCM})
	if err != nil {
		f.Fatal(err)
	}
	own, sealed, err := config.Seal([]byte("a request"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own[:60])
	f.Add(append(own[:headerSize:headerSize], own[headerSize:]...)[:90])
	f.Fuzz(func(t *testing.T, b []byte) {
		if request, _, err := config.Open(private, b); err == nil && string(request) != "a request" {
			t.Fatalf("a capsule opened: %q", request)
		}
		if _, err := sealed.Open(b); err == nil {
			t.Fatal("an answer opened")
		}
	})
}
