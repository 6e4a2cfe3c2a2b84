package store_test

import "testing"

func BenchmarkAccount(b *testing.B) {
	s := database(b).Store(b)
	ch := newAccount(ann)
	mustWrite(b, s, ch)
	mustWrite(b, s, charged(ch.Account))
	for b.Loop() {
		mustRead(b, s, ann)
	}
}

// BenchmarkWrite charges and credits by turns, as a user's recoveries do.
func BenchmarkWrite(b *testing.B) {
	s := database(b).Store(b)
	ch := newAccount(ann)
	mustWrite(b, s, ch)
	a, n := ch.Account, uint32(0)
	for b.Loop() {
		next := charged(a)
		if n++; n%2 == 0 {
			next = credited(a)
		}
		next.Account.MAC = [32]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}
		mustWrite(b, s, next)
		a = next.Account
		a.Generations = next.Changed
	}
}
