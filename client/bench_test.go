package client_test

import "testing"

// A recovery on a device, with a vault in memory: nearly all of it is Argon2id, as it should be.
func BenchmarkRecover(b *testing.B) {
	s := newService(b)
	d, _ := s.device("alice")
	if _, err := d.Enrol(b.Context(), "right"); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := d.Recover(b.Context(), "right"); err != nil {
			b.Fatal(err)
		}
	}
}
