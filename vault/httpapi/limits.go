package httpapi

import (
	"container/list"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// RateLimit is a token bucket.
type RateLimit struct {
	// PerSecond is how many are allowed in the long run.
	PerSecond float64
	// Burst is how many are allowed at once.
	Burst int
}

// Limits of requests, and besides of enrolment starts: the one route that evaluates and does not count.
// They hold for this process. A user's own limit is looked at first, so that what it refuses takes nothing from others
// of the tenant.
type Limits struct {
	// RequestsPerUser, on all routes together: default 120 a minute, 120 at once. A recovery takes two or three.
	RequestsPerUser RateLimit
	// RequestsPerTenant: default 1000 a second, 2000 at once.
	RequestsPerTenant RateLimit
	// EnrolmentsPerUser: default ten an hour, ten at once.
	EnrolmentsPerUser RateLimit
	// EnrolmentsPerTenant: default 50 a second, 100 at once.
	EnrolmentsPerTenant RateLimit
	// RequestsAtOnce are those of all tenants that the vault works on at the same time: default 512. What comes
	// beyond is refused at once, rather than after a wait in which it would go stale like all others.
	RequestsAtOnce int
}

func (l Limits) withDefaults() Limits {
	if l.RequestsPerUser == (RateLimit{}) {
		l.RequestsPerUser = RateLimit{PerSecond: 2, Burst: 120}
	}
	if l.RequestsPerTenant == (RateLimit{}) {
		l.RequestsPerTenant = RateLimit{PerSecond: 1000, Burst: 2000}
	}
	if l.EnrolmentsPerUser == (RateLimit{}) {
		l.EnrolmentsPerUser = RateLimit{PerSecond: 10.0 / 3600, Burst: 10}
	}
	if l.EnrolmentsPerTenant == (RateLimit{}) {
		l.EnrolmentsPerTenant = RateLimit{PerSecond: 50, Burst: 100}
	}
	if l.RequestsAtOnce == 0 {
		l.RequestsAtOnce = 512
	}
	return l
}

// places are for the requests that are worked on. Only one that has arrived whole takes a place, so that
// slow clients cannot hold them.
type places chan struct{}

// busyRetry is how soon a request that found no place may be sent again.
const busyRetry = time.Second

// take takes a place until it is given back, or answers busy. What comes in a capsule has the capsule's place.
func (p places) take(x *exchange) (giveBack func(), err error) {
	if x.relayed != nil {
		return func() {}, nil
	}
	select {
	case p <- struct{}{}:
		return func() { <-p }, nil
	default:
		return nil, refuse(api.Busy, "the vault works on as many requests as it can; nothing was done or charged: send the same bytes again").after(busyRetry)
	}
}

// limits are those of users and of tenants, for one kind of request.
type limits struct {
	perUser   *limiter[vault.AccountID]
	perTenant *limiter[string]
}

// take takes one token of the user's and one of the tenant's, or answers rate-limited.
func (l limits) take(account vault.AccountID) error {
	if err := l.perUser.take(account); err != nil {
		return err
	}
	return l.perTenant.take(account.Tenant)
}

// maxBuckets bounds each limiter's memory, to about 20 MB. Beyond it the bucket that was
// used longest ago is forgotten, that is, full again.
const maxBuckets = 1 << 16

// limiter keeps a bucket for each key, in this process: N instances allow N times as many.
type limiter[K comparable] struct {
	limit RateLimit
	now   func() time.Time
	what  string // too many of what there were, as a problem says it

	// mu guarantees that buckets and order hold the same entries, the latest used first.
	mu      sync.Mutex
	buckets map[K]*list.Element // of bucket[K]
	order   *list.List
}

type bucket[K comparable] struct {
	key     K
	tokens  *rate.Limiter
	touched time.Time
}

func newLimiter[K comparable](limit RateLimit, what string, now func() time.Time) *limiter[K] {
	return &limiter[K]{limit: limit, now: now, what: what, buckets: map[K]*list.Element{}, order: list.New()}
}

// take takes one token, or answers rate-limited with the time until there is one.
func (l *limiter[K]) take(key K) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	e := l.buckets[key]
	if e == nil {
		l.forget(now)
		e = l.order.PushFront(&bucket[K]{key: key, tokens: rate.NewLimiter(rate.Limit(l.limit.PerSecond), l.limit.Burst)})
		l.buckets[key] = e
	}
	l.order.MoveToFront(e)
	b := e.Value.(*bucket[K])
	b.touched = now
	if b.tokens.AllowN(now, 1) {
		return nil
	}
	taken := b.tokens.ReserveN(now, 1)
	wait := taken.DelayFrom(now)
	taken.CancelAt(now)
	return refuse(api.RateLimited, "too many "+l.what+"; wait for the time in retry_after, nothing was charged").after(wait)
}

// forget drops the buckets that are full again by now, and one more if there is no room.
func (l *limiter[K]) forget(now time.Time) {
	full := time.Duration(float64(l.limit.Burst) / l.limit.PerSecond * float64(time.Second))
	for e := l.order.Back(); e != nil; e = l.order.Back() {
		b := e.Value.(*bucket[K])
		if len(l.buckets) < maxBuckets && now.Sub(b.touched) < full {
			return
		}
		l.order.Remove(e)
		delete(l.buckets, b.key)
	}
}
