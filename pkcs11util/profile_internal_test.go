package pkcs11util

import "testing"

func FuzzParseProfile(f *testing.F) {
	good, err := DefaultProfile().File()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte(`{"gcm_mechanism":"0x80001087","iv":"appended","iv_bytes":16,"ecdh":"derive-wrap","derive_value_len":"left-out","peer_point":"der","max_data_bytes":512}`))
	f.Add([]byte("null"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseProfile(b)
		if err != nil {
			return
		}
		file, err := p.File()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseProfile(file); err != nil || again != p {
			t.Errorf("%+v reads back as %+v, %v", p, again, err)
		}
		if n, ok := schemeIVBytes(p.scheme()); !ok || n != p.IVBytes {
			t.Errorf("%+v has the IV scheme %#x", p, p.scheme())
		}
	})
}
