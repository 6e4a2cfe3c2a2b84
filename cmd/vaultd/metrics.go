package main

import (
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/backup-key-vault/bkv/cmd/internal/version"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

// maxTenantLabels bounds the label tenant. Tenants beyond it are counted together, as "other".
const maxTenantLabels = 200

var (
	// A recovery takes milliseconds; a request is given up after 15 s.
	requestBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 15}
	// SoftHSM answers in tens of microseconds, hardware over a network in tens of milliseconds.
	tokenBuckets = []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5}
)

// metrics are what vaultd tells Prometheus. The libraries know nothing of it: they report
// to small hooks, or are asked for their counts at each scrape. No label has a value that a user or
// a client chooses; testdata/metrics.golden lists them all.
type metrics struct {
	registry *prometheus.Registry

	requests     *prometheus.CounterVec
	durations    *prometheus.HistogramVec
	inFlight     prometheus.Gauge
	tenants      *prometheus.CounterVec
	events       *prometheus.CounterVec
	destructions *prometheus.CounterVec
	faults       prometheus.Counter
	sweeps       *prometheus.CounterVec
	swept        prometheus.Counter
	operations   *prometheus.CounterVec
	operating    *prometheus.HistogramVec
	waiting      prometheus.Histogram

	mu     sync.Mutex // guards known
	known  map[string]bool
	tokens map[pkcs11util.Operation]tokenMetrics // never changed
}

// tokenMetrics are those of one operation, looked up once.
type tokenMetrics struct {
	took    prometheus.Observer
	results map[pkcs11util.Result]prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "bkv_http_requests_total",
			Help: "Requests to the public listener by what was answered; problem is empty for a success, status 499 means that the client had left."},
			[]string{"route", "method", "status", "problem"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "bkv_http_request_duration_seconds", Buckets: requestBuckets,
			Help: "From a request's header to its answer."}, []string{"route", "method"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "bkv_http_requests_in_flight",
			Help: "Requests to the public listener that run."}),
		tenants: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "bkv_tenant_requests_total",
			Help: "Authenticated requests by tenant and result (ok, refused, fault); tenants beyond 200 are counted as other."}, []string{"tenant", "result"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "bkv_account_events_total",
			Help: "Changes of accounts by this instance. An attempt that is never finished has no event failure."}, []string{"kind"}),
		destructions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "bkv_destructions_total",
			Help: "Generations of backup keys destroyed by this instance, by reason."}, []string{"reason"}),
		faults: prometheus.NewCounter(prometheus.CounterOpts{Name: "bkv_account_faults_total",
			Help: "Times that an account's row was not what the vault wrote."}),
		sweeps: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "bkv_sweeps_total",
			Help: "Searches for keys that are due for destruction, by result (ok, error)."}, []string{"result"}),
		swept: prometheus.NewCounter(prometheus.CounterOpts{Name: "bkv_swept_accounts_total",
			Help: "Accounts in which something due was done without a request."}),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "bkv_token_operations_total",
			Help: "Calls to the token by operation and result (ok, refused, fault, gave-up)."}, []string{"operation", "result"}),
		operating: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "bkv_token_operation_duration_seconds", Buckets: tokenBuckets,
			Help: "Time inside the token, without the wait for a session."}, []string{"operation"}),
		waiting: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "bkv_token_session_wait_seconds", Buckets: tokenBuckets,
			Help: "Waits for a session with the token."}),
		known: map[string]bool{}, tokens: map[pkcs11util.Operation]tokenMetrics{},
	}
	build := version.Of()
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "bkv_build_info", Help: "1, with what this program was built from.",
		ConstLabels: prometheus.Labels{"version": build.Version, "revision": build.Revision, "go": build.Go}})
	info.Set(1)
	m.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), info,
		m.requests, m.durations, m.inFlight, m.tenants, m.events, m.destructions, m.faults, m.sweeps, m.swept,
		m.operations, m.operating, m.waiting,
	)
	// What can be counted is there from the start, as a rate needs a zero to begin with.
	for _, kind := range []vault.EventKind{vault.EventStaged, vault.EventActivated, vault.EventFrozen, vault.EventReinstated, vault.EventTurnedOff,
		vault.EventAttempt, vault.EventSuccess, vault.EventFailure, vault.EventDestroyed} {
		m.events.WithLabelValues(string(kind))
	}
	for _, why := range []vault.Reason{vault.Exhausted, vault.Failures, vault.Replaced, vault.Overruled, vault.TurnedOff,
		vault.GraceOver, vault.NotInTime, vault.Superseded} {
		m.destructions.WithLabelValues(string(why))
	}
	for _, result := range []string{"ok", "error"} {
		m.sweeps.WithLabelValues(result)
	}
	for _, op := range pkcs11util.Operations() {
		t := tokenMetrics{took: m.operating.WithLabelValues(string(op)), results: map[pkcs11util.Result]prometheus.Counter{}}
		for _, result := range pkcs11util.Results() {
			t.results[result] = m.operations.WithLabelValues(string(op), string(result))
		}
		m.tokens[op] = t
	}
	return m
}

// handler answers GET /metrics.
func (m *metrics) handler(log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError), MaxRequestsInFlight: 4, Timeout: 10 * time.Second,
	})
}

// exchange is for httpapi.Config.Observe.
func (m *metrics) exchange(x httpapi.Exchange) {
	m.requests.WithLabelValues(x.Route, x.Method, strconv.Itoa(x.Status), x.Problem).Inc()
	m.durations.WithLabelValues(x.Route, x.Method).Observe(x.Took.Seconds())
	if x.Tenant == "" {
		return
	}
	result := "ok"
	switch {
	case x.Status >= http.StatusInternalServerError:
		result = "fault"
	case x.Status >= http.StatusBadRequest:
		result = "refused"
	}
	m.tenants.WithLabelValues(m.tenantLabel(x.Tenant), result).Inc()
}

func (m *metrics) tenantLabel(tenant string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.known[tenant] {
		if len(m.known) >= maxTenantLabels {
			return "other"
		}
		m.known[tenant] = true
	}
	return tenant
}

// Recorded implements vault.Observer.
func (m *metrics) Recorded(kind vault.EventKind, why vault.Reason) {
	m.events.WithLabelValues(string(kind)).Inc()
	if kind == vault.EventDestroyed {
		m.destructions.WithLabelValues(string(why)).Inc()
	}
}

// AccountFault implements vault.Observer.
func (m *metrics) AccountFault() { m.faults.Inc() }

// call is for pkcs11util.Config.Observe.
func (m *metrics) call(c pkcs11util.Call) {
	t := m.tokens[c.Operation]
	t.results[c.Result].Inc()
	m.waiting.Observe(c.Waited.Seconds())
	if c.Result == pkcs11util.ResultOK || c.Result == pkcs11util.ResultFault && c.Took > 0 {
		t.took.Observe(c.Took.Seconds())
	}
}

// sweep notes one search for what is due.
func (m *metrics) sweep(accounts int, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.sweeps.WithLabelValues(result).Inc()
	m.swept.Add(float64(accounts))
}

// gauge describes one value that is read at each scrape.
type gauge struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func newGauge(name, help string, labels ...string) gauge {
	return gauge{prometheus.NewDesc(name, help, labels, nil), prometheus.GaugeValue}
}

func newCount(name, help string, labels ...string) gauge {
	return gauge{prometheus.NewDesc(name, help, labels, nil), prometheus.CounterValue}
}

func (g gauge) is(out chan<- prometheus.Metric, value float64, labels ...string) {
	out <- prometheus.MustNewConstMetric(g.desc, g.kind, value, labels...)
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// seconds is a time as Prometheus has it; 0 for none.
func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}

// collected makes a collector of what is read at each scrape.
type collected struct {
	gauges []gauge
	read   func(out chan<- prometheus.Metric)
}

// Describe implements prometheus.Collector.
func (c collected) Describe(out chan<- *prometheus.Desc) {
	for _, g := range c.gauges {
		out <- g.desc
	}
}

// Collect implements prometheus.Collector.
func (c collected) Collect(out chan<- prometheus.Metric) { c.read(out) }

// watchToken adds what the token says of itself.
func (m *metrics) watchToken(stats func() pkcs11util.Stats) {
	up := newGauge("bkv_token_up", "1 while there is a login with the token, else 0.")
	sessions := newGauge("bkv_token_sessions", "Sessions with the token for calls.")
	idle := newGauge("bkv_token_sessions_idle", "Sessions with the token that no call uses at present.")
	objects := newGauge("bkv_token_session_objects", "Session objects made since the PKCS#11 module was initialised; SoftHSM keeps memory of each.")
	lost := newCount("bkv_token_losses_total", "Times that the token was given up for lost.")
	recovered := newCount("bkv_token_recoveries_total", "Recoveries of the token by level: session (one was replaced), login (a new one), module (initialised anew, then a new login).", "level")
	failed := newCount("bkv_token_recovery_failures_total", "Attempts to recover the token that failed.")
	recycled := newCount("bkv_token_recycled_total", "Times that the PKCS#11 module was initialised anew for the memory that it keeps.")
	m.registry.MustRegister(collected{[]gauge{up, sessions, idle, objects, lost, recovered, failed, recycled}, func(out chan<- prometheus.Metric) {
		s := stats()
		up.is(out, truth(s.Available))
		sessions.is(out, float64(s.Sessions))
		idle.is(out, float64(s.Idle))
		objects.is(out, float64(s.SessionObjects))
		lost.is(out, float64(s.Lost))
		recovered.is(out, float64(s.SessionsReplaced), "session")
		recovered.is(out, float64(s.LoggedIn), "login")
		recovered.is(out, float64(s.Reinitialised), "module")
		failed.is(out, float64(s.FailedRecoveries))
		recycled.is(out, float64(s.Recycled))
	}})
}

// watchStore adds what the pool of database connections says of itself.
func (m *metrics) watchStore(stats func() store.Stats) {
	most := newGauge("bkv_database_connections_max", "Most connections to the database that may be open.")
	open := newGauge("bkv_database_connections", "Connections to the database that are open.")
	used := newGauge("bkv_database_connections_in_use", "Connections to the database that run a statement.")
	acquired := newCount("bkv_database_acquires_total", "Times that a connection was taken.")
	waited := newCount("bkv_database_waits_total", "Times that a connection had to be waited for or made first.")
	waitedFor := newCount("bkv_database_wait_seconds_total", "Time spent waiting for connections.")
	gaveUp := newCount("bkv_database_wait_failures_total", "Times that no connection came in time.")
	m.registry.MustRegister(collected{[]gauge{most, open, used, acquired, waited, waitedFor, gaveUp}, func(out chan<- prometheus.Metric) {
		s := stats()
		most.is(out, float64(s.Max))
		open.is(out, float64(s.Open))
		used.is(out, float64(s.InUse))
		acquired.is(out, float64(s.Acquired))
		waited.is(out, float64(s.Waited))
		waitedFor.is(out, s.WaitedFor.Seconds())
		gaveUp.is(out, float64(s.GaveUp))
	}})
}

// watchAudit adds what the sequencer knows of the audit log.
func (m *metrics) watchAudit(status func() vault.AuditStatus) {
	sealing := newGauge("bkv_audit_sealing", "1 at the instance that seals events, else 0.")
	waiting := newGauge("bkv_audit_unsealed_events", "Events that wait to be sealed, up to 100000.")
	lag := newGauge("bkv_audit_lag_seconds", "How long the oldest of the events that wait has waited.")
	sealed := newGauge("bkv_audit_sealed_events", "Number of the event that was sealed last.")
	signed := newGauge("bkv_audit_signed_events", "Number of the event that the newest checkpoint signed.")
	signedAt := newGauge("bkv_audit_signed_timestamp_seconds", "When the newest checkpoint was signed; 0: none is.")
	fault := newGauge("bkv_audit_fault", "1 at the instance that seals, if the audit log is not as the vault wrote it, else 0.")
	m.registry.MustRegister(collected{[]gauge{sealing, waiting, lag, sealed, signed, signedAt, fault}, func(out chan<- prometheus.Metric) {
		s := status()
		sealing.is(out, truth(s.Sealing))
		waiting.is(out, float64(s.Waiting))
		lag.is(out, s.Lag.Seconds())
		sealed.is(out, float64(s.Sequence))
		signed.is(out, float64(s.Signed))
		signedAt.is(out, seconds(s.SignedAt))
		fault.is(out, truth(s.Fault != ""))
	}})
}

// watchKeys adds what was last read of the keys.
func (m *metrics) watchKeys(w *watcher) {
	up := newGauge("bkv_database_up", "1 if the database answered when it was last asked, else 0.")
	readAt := newGauge("bkv_keys_read_timestamp_seconds", "When the table of keys was last read; the metrics of keys are as old.")
	generation := newGauge("bkv_key_generation", "Generation of the key that is in use.", "purpose")
	since := newGauge("bkv_key_in_use_since_timestamp_seconds", "Since when the key is in use.", "purpose")
	seals := newGauge("bkv_key_seals", "Values that were sealed under the key in use, by all instances; it may seal 2^32.", "purpose")
	keys := newGauge("bkv_keys", "Generations of keys by state; those that are destroyed are not counted.", "purpose", "state")
	left := newGauge("bkv_rewrap_records_left", "Records and rows under older keys than those in use.")
	moved := newCount("bkv_rewrapped_accounts_total", "Accounts that this instance moved to newer keys (ok), or could not (error).", "result")
	uncovered := newGauge("bkv_oldest_uncovered_destruction_timestamp_seconds", "When the first record was destroyed that old dumps can still give back; 0: none.")
	m.registry.MustRegister(collected{[]gauge{up, readAt, generation, since, seals, keys, left, moved, uncovered}, func(out chan<- prometheus.Metric) {
		o, at, err := w.last()
		up.is(out, truth(err == nil && o != nil))
		readAt.is(out, seconds(at))
		if o == nil {
			return
		}
		counted := map[[2]string]int{}
		for i := range o.Keys {
			k := &o.Keys[i]
			if k.State == vault.KeyDestroyed {
				continue
			}
			counted[[2]string{k.Purpose, string(k.State)}]++
			if k.State != vault.KeyCurrent {
				continue
			}
			generation.is(out, float64(k.Generation), k.Purpose)
			since.is(out, seconds(k.CurrentSince), k.Purpose)
			if k.Purpose == pkcs11util.Master || k.Purpose == pkcs11util.State {
				seals.is(out, float64(k.Seals), k.Purpose)
			}
		}
		for which, n := range counted {
			keys.is(out, float64(n), which[0], which[1])
		}
		left.is(out, float64(o.RewrapLeft))
		moved.is(out, float64(o.Moved), "ok")
		moved.is(out, float64(o.Unmoved), "error")
		uncovered.is(out, seconds(o.OldestUncovered))
	}})
}
