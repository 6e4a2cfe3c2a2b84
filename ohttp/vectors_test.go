package ohttp

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"encoding/hex"
	"encoding/json"
	"os"
	"reflect"
	"testing"
)

func vectors[T any](t testing.TB, file string) (v T) {
	t.Helper()
	b, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// figures are the messages of RFC 9292 section 5, by figure.
func figures(t testing.TB) map[int][]byte {
	t.Helper()
	v := vectors[struct {
		Messages []struct {
			Figure int
			Hex    string
		}
	}](t, "rfc9292.json")
	if len(v.Messages) != 4 {
		t.Fatalf("%d messages, want 4", len(v.Messages))
	}
	out := map[int][]byte{}
	for _, m := range v.Messages {
		out[m.Figure] = unhex(t, m.Hex)
	}
	return out
}

func TestMessagesOfRFC9292(t *testing.T) {
	all := figures(t)
	get := &Request{Method: "GET", Scheme: "https", Path: "/hello.txt", Header: []Field{
		{"user-agent", "curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"}, {"host", "www.example.com"}, {"accept-language", "en, mi"},
	}}
	for _, figure := range []int{8, 9} {
		// Section 5.1: the last 2 bytes of the one, and 12 of the other, can be cut off.
		for cut := range map[int]int{8: 2, 9: 12}[figure] + 1 {
			got, err := DecodeRequest(all[figure][:len(all[figure])-cut])
			if err != nil || !reflect.DeepEqual(got, get) {
				t.Errorf("figure %d without %d bytes: %v, %+v", figure, cut, err, got)
			}
		}
	}
	if b, err := get.Encode(); err != nil || !bytes.Equal(b, all[8]) {
		t.Errorf("figure 8: %v, %x", err, b)
	}
	for cut := 13; cut < len(all[9]); cut++ {
		if m, err := DecodeRequest(all[9][:len(all[9])-cut]); err == nil && m.Header != nil {
			t.Fatalf("figure 9 without %d bytes was read: %+v", cut, m)
		}
	}

	long, err := DecodeResponse(all[11])
	if err != nil {
		t.Fatal(err)
	}
	if len(long.Informational) != 2 || long.Informational[0].Status != 102 || long.Informational[1].Status != 103 ||
		len(long.Informational[1].Header) != 2 || long.Status != 200 || len(long.Header) != 8 ||
		string(long.Content) != "Hello World! My content includes a trailing CRLF.\r\n" || long.Trailer != nil {
		t.Errorf("figure 11: %+v", long)
	}
	short := &Response{Status: 200, Content: []byte("This content contains CRLF.\r\n"), Trailer: []Field{{"trailer", "text"}}}
	if got, err := DecodeResponse(all[13]); err != nil || !reflect.DeepEqual(got, short) {
		t.Errorf("figure 13: %v, %+v", err, got)
	}
	if b, err := short.Encode(); err != nil || !bytes.Equal(b, all[13]) {
		t.Errorf("figure 13: %v, %x", err, b)
	}
}

type exchange struct {
	PrivateKey           string `json:"private_key"`
	KeyConfig            string `json:"key_config"`
	Request              string `json:"request"`
	EncapsulatedRequest  string `json:"encapsulated_request"`
	Response             string `json:"response"`
	ResponseNonce        string `json:"response_nonce"`
	EncapsulatedResponse string `json:"encapsulated_response"`
}

// The RFC's example, but for the client's ephemeral key, which crypto/hpke does not take: what the client sealed
// is opened, its answer is sealed with the example's nonce, and opened as the client does.
func TestExchangeOfRFC9458(t *testing.T) {
	v := vectors[exchange](t, "rfc9458.json")
	scalar, err := ecdh.X25519().NewPrivateKey(unhex(t, v.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	private, err := hpke.NewDHKEMPrivateKey(scalar)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKeyConfig(1, private.PublicKey(), Suite{HKDFSHA256, AES128GCM}, Suite{HKDFSHA256, ChaCha20Poly1305})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := key.Encode(); err != nil || !bytes.Equal(b, unhex(t, v.KeyConfig)) {
		t.Fatalf("the key configuration: %v, %x", err, b)
	}
	config, err := ParseKeyConfig(unhex(t, v.KeyConfig))
	if err != nil || !reflect.DeepEqual(config, key) {
		t.Fatalf("the key configuration read: %v, %+v", err, config)
	}
	request, opened, err := key.Open(private, unhex(t, v.EncapsulatedRequest))
	if err != nil || !bytes.Equal(request, unhex(t, v.Request)) {
		t.Fatalf("the request: %v, %x", err, request)
	}
	if r, err := DecodeRequest(request); err != nil || r.Method != "GET" || r.Authority != "example.com" || r.Path != "/" {
		t.Fatalf("the request read: %v, %+v", err, r)
	}
	answer, err := opened.seal(unhex(t, v.Response), unhex(t, v.ResponseNonce))
	if err != nil || !bytes.Equal(answer, unhex(t, v.EncapsulatedResponse)) {
		t.Fatalf("the answer: %v, %x", err, answer)
	}
	// Both ends of an HPKE context export the same.
	client := &Sealed{opened.suite, opened.enc, opened.exporter}
	if got, err := client.Open(answer); err != nil || !bytes.Equal(got, unhex(t, v.Response)) {
		t.Fatalf("the answer opened: %v, %x", err, got)
	}
	if r, err := DecodeResponse(unhex(t, v.Response)); err != nil || r.Status != 200 {
		t.Fatalf("the answer read: %v, %+v", err, r)
	}
}
