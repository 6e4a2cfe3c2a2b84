package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

// allMetrics are vaultd's with nothing behind them.
func allMetrics() *metrics {
	m := newMetrics()
	m.watchToken(func() pkcs11util.Stats { return pkcs11util.Stats{} })
	m.watchStore(func() store.Stats { return store.Stats{} })
	m.watchAudit(func() vault.AuditStatus { return vault.AuditStatus{} })
	m.watchKeys(&watcher{})
	m.watchCertificates()
	m.watchConnections(nil)
	return m
}

var described = regexp.MustCompile(`^Desc\{fqName: "([^"]*)", help: "(.*)", unit: ".*", constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// constLabel is a label in a Desc's text.
var constLabel = regexp.MustCompile(`(\w+)="[^"]*"`)

// The names, labels and meanings of all metrics. Whoever changes one breaks somebody's dashboard; whoever adds a
// label answers for the number of its values.
func TestMetricsAreTheGoldenOnes(t *testing.T) {
	descs := make(chan *prometheus.Desc, 1000)
	allMetrics().registry.Describe(descs)
	close(descs)
	var lines []string
	for d := range descs {
		parts := described.FindStringSubmatch(d.String())
		if parts == nil {
			t.Fatalf("cannot read %s", d)
		}
		name, help, labels := parts[1], parts[2], parts[4]
		if !strings.HasPrefix(name, "bkv_") {
			continue // Go's own, and the process's
		}
		var fixed []string
		for _, label := range constLabel.FindAllStringSubmatch(parts[3], -1) {
			fixed = append(fixed, label[1])
		}
		slices.Sort(fixed)
		labels = strings.Join(append(fixed, strings.FieldsFunc(labels, func(r rune) bool { return r == ',' })...), ",")
		lines = append(lines, fmt.Sprintf("%s{%s} %s\n", name, labels, help))
	}
	slices.Sort(lines)
	got := strings.Join(slices.Compact(lines), "")
	const golden = "testdata/metrics.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the metrics are not those of %s; if that is meant, write it anew with: go test ./cmd/vaultd -update\n%s", golden, got)
	}
}

// sum adds up the series of a counter that have a label's value.
func sum(t *testing.T, m *metrics, name, label, value string) (total float64) {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, series := range f.Metric {
			for _, l := range series.Label {
				if l.GetName() == label && l.GetValue() == value {
					total += series.GetCounter().GetValue() + series.GetGauge().GetValue()
				}
			}
		}
	}
	return total
}

// However many tenants there are, the label has a bounded number of values.
func TestTenantLabelIsBounded(t *testing.T) {
	m := allMetrics()
	for range 2 {
		for i := range maxTenantLabels + 50 {
			m.exchange(httpapi.Exchange{Route: "/r", Method: "GET", Status: 200, Tenant: fmt.Sprint("tenant-", i)})
		}
	}
	if n := sum(t, m, "bkv_tenant_requests_total", "tenant", "tenant-3"); n != 2 {
		t.Errorf("tenant-3 has %v requests, want 2", n)
	}
	if n := sum(t, m, "bkv_tenant_requests_total", "tenant", "other"); n != 100 {
		t.Errorf("the others have %v requests, want 100", n)
	}
}

// A database that does not answer leaves the last metrics of keys where they are, and shows.
func TestWatcherKeepsWhatItSaw(t *testing.T) {
	overview := &vault.KeyOverview{RewrapLeft: 7, KeyTable: vault.KeyTable{Keys: []vault.KeyGeneration{
		{Key: vault.Key{Purpose: "master", Generation: 1}, State: vault.KeyRetired},
		{Key: vault.Key{Purpose: "master", Generation: 2}, State: vault.KeyCurrent, CurrentSince: time.Unix(1000, 0), Seals: 5},
	}}}
	var err error
	w := &watcher{log: slog.New(slog.DiscardHandler), overview: func(context.Context) (*vault.KeyOverview, error) { return overview, err }}
	m := newMetrics()
	m.watchKeys(w)
	up := func() float64 {
		families, err := m.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "bkv_database_up" {
				return f.Metric[0].GetGauge().GetValue()
			}
		}
		t.Fatal("there is no bkv_database_up")
		return 0
	}
	if up() != 0 {
		t.Error("the database is up before it was asked")
	}
	w.look(t.Context())
	if up() != 1 || sum(t, m, "bkv_key_generation", "purpose", "master") != 2 || sum(t, m, "bkv_key_seals", "purpose", "master") != 5 || sum(t, m, "bkv_keys", "state", "retired") != 1 {
		t.Error("what was read does not show")
	}
	overview, err = nil, errors.New("the database is away")
	w.look(t.Context())
	if up() != 0 || sum(t, m, "bkv_key_generation", "purpose", "master") != 2 {
		t.Error("without the database")
	}
}

// BenchmarkMetrics is what the metrics of one recovery cost: two requests, two events, the token's work.
func BenchmarkMetrics(b *testing.B) {
	m := allMetrics()
	for b.Loop() {
		for _, route := range []string{"/v1/users/{user}/backup-key/recovery", "/v1/users/{user}/backup-key/recovery/finish"} {
			m.exchange(httpapi.Exchange{Route: route, Method: "POST", Status: 200, Tenant: "chat", Took: 20 * time.Millisecond})
		}
		m.Recorded(vault.EventAttempt, "")
		m.Recorded(vault.EventSuccess, "")
		for range 12 {
			m.call(pkcs11util.Call{Operation: pkcs11util.OpMAC, Result: pkcs11util.ResultOK, Waited: time.Microsecond, Took: time.Millisecond})
		}
	}
}
