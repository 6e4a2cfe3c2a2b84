package store_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/vault"
)

func BenchmarkAccount(b *testing.B) {
	s := database(b).Store(b)
	ch := newAccount(ann)
	mustWrite(b, s, ch)
	mustWrite(b, s, charged(ch.Account))
	for b.Loop() {
		mustRead(b, s, ann)
	}
}

// BenchmarkWrite charges and credits by turns, as a user's recoveries do, one account with the events that say
// so, as always, and one without, in turn: x-without is what the audit log costs.
func BenchmarkWrite(b *testing.B) {
	s := database(b).Store(b)
	var accounts [2]vault.Account
	for i := range accounts {
		id := ann
		id.User += strconv.Itoa(i)
		ch := newAccount(id)
		mustWrite(b, s, ch)
		accounts[i] = ch.Account
	}
	var took [2]time.Duration
	var n uint32
	for b.Loop() {
		n++
		for i, a := range accounts {
			next := charged(a)
			if n%2 == 0 {
				next = credited(a)
			}
			if i == 1 {
				next.Events = nil
			}
			next.Account.MAC = [32]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}
			began := time.Now()
			mustWrite(b, s, next)
			took[i] += time.Since(began)
			accounts[i] = next.Account
			accounts[i].Generations = next.Changed
		}
	}
	b.ReportMetric(float64(took[0].Nanoseconds())/float64(n), "ns/op")
	b.ReportMetric(float64(took[0])/float64(took[1]), "x-without")
}
