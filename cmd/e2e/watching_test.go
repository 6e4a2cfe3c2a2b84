package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/backup-key-vault/bkv/store/storetest"
)

// tool is where a program of the Debian package prometheus is.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", name)
		}
		t.Skipf("%s is not installed; ./scripts/test installs it", name)
	}
	return path
}

const opsDir = "../../ops"

// The alert rules are well-formed, each raises what it should and not what it should not, and there is a case for each.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	promtool := tool(t, "promtool")
	for _, args := range [][]string{
		{"check", "rules", opsDir + "/alerts.yml"},
		{"check", "config", opsDir + "/prometheus.yml"},
		{"test", "rules", opsDir + "/alerts_test.yml"},
	} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
	rules, err := os.ReadFile(opsDir + "/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	cases, err := os.ReadFile(opsDir + "/alerts_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(string(rules), -1)
	if len(names) == 0 {
		t.Fatal("no alert found")
	}
	for _, name := range names {
		if !regexp.MustCompile(`alertname: ` + name[1] + `\n +exp_alerts:`).Match(cases) {
			t.Errorf("no case raises %s", name[1])
		}
	}
}

// series is a line of the text format: a name, labels, a value.
var series = regexp.MustCompile(`^(\w+)(?:\{(.*)\})? \S+$`)

var label = regexp.MustCompile(`(\w+)="((?:[^"\\]|\\.)*)"`)

// scrape reads /metrics: the labels of each family, and the whole text.
func scrape(t testing.TB, v *vaultd) (families map[string][]string, text string) {
	t.Helper()
	r := get(t, v.admin+"/metrics")
	if r.status != 200 {
		t.Fatalf("/metrics: %v", r)
	}
	families = map[string][]string{}
	for line := range strings.Lines(string(r.body)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		parts := series.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if parts == nil {
			t.Fatalf("cannot read %q", line)
		}
		name := parts[1]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, suffix)
		}
		labels := []string{}
		for _, l := range label.FindAllStringSubmatch(parts[2], -1) {
			if l[1] != "le" {
				labels = append(labels, l[1])
			}
		}
		slices.Sort(labels)
		families[name] = labels
	}
	return families, string(r.body)
}

// busy makes one of everything that a dashboard shows.
func busy(t testing.TB, d *deployment, v *vaultd) {
	t.Helper()
	ctx := t.Context()
	ann := d.phone(at(v), "ann-Nightjar")
	if _, err := ann.enrol(ctx, "right"); err != nil {
		t.Fatal(err)
	}
	if _, err := ann.recover(ctx, "right"); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		_, err := ann.recover(ctx, "wrong")
		if want := []string{"wrong-password", "key-destroyed"}[i/9]; !isRefused(err, want) {
			t.Fatalf("guess %d: %v", i+1, err)
		}
	}
	if _, err := ann.send(ctx, "GET", "", nil); err != nil {
		t.Fatal(err)
	}
	if r := get(t, v.url+"/ann-Nightjar/no-such-path"); r.status != 404 {
		t.Fatal(r)
	}
}

// A running vaultd has the metrics of the golden list, with these labels, and nothing of a user is in them.
func TestMetricsOfARunningVault(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t, tlsEnv(t, d.dir)...)
	busy(t, d, v)
	golden, err := os.ReadFile("../vaultd/testdata/metrics.golden")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{}
	for line := range strings.Lines(string(golden)) {
		name, rest, _ := strings.Cut(line, "{")
		labels, _, _ := strings.Cut(rest, "}")
		want[name] = strings.FieldsFunc(labels, func(r rune) bool { return r == ',' })
		slices.Sort(want[name])
	}
	var families map[string][]string
	var text string
	eventually(t, "the keys were read", func() bool {
		families, text = scrape(t, v)
		return families["bkv_key_generation"] != nil
	})
	for name, labels := range families {
		if !strings.HasPrefix(name, "bkv_") {
			continue
		}
		if w, ok := want[name]; !ok || !slices.Equal(w, labels) {
			t.Errorf("%s has labels %v, want %v", name, labels, w)
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("%s is not there", name)
	}
	if strings.Contains(text, "Nightjar") {
		t.Error("a user id, or a path that a client chose, is in the metrics")
	}
	for _, line := range []string{
		`bkv_account_events_total{kind="attempt"} 11`, `bkv_account_events_total{kind="success"} 1`, `bkv_account_events_total{kind="failure"} 10`,
		`bkv_destructions_total{reason="exhausted"} 1`,
		`bkv_http_requests_total{method="POST",problem="wrong-password",route="/v1/users/{user}/backup-key/recovery/finish",status="403"} 9`,
		`bkv_http_requests_total{method="GET",problem="not-found",route="",status="404"} 1`,
		`bkv_token_up 1`, `bkv_database_up 1`, `bkv_key_generation{purpose="master"} 1`, `bkv_account_faults_total 0`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("want %s in\n%s", line, text)
		}
	}
	v.stop(t)
}

// prometheus is Debian's, on loopback, scraping a vaultd every second.
type prometheus struct{ url string }

func startPrometheus(t testing.TB, v *vaultd) *prometheus {
	t.Helper()
	path, dir := tool(t, "prometheus"), t.TempDir()
	rules, err := filepath.Abs(opsDir + "/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	config := write(t, dir, "prometheus.yml", fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
  - job_name: vaultd
    static_configs: [{targets: [%q]}]
`, rules, strings.TrimPrefix(v.admin, "http://")))
	// It has no way to say which port it took.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	var log bytes.Buffer
	cmd := exec.Command(path, "--config.file="+config, "--storage.tsdb.path="+dir+"/data", "--web.listen-address="+address, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("Prometheus's log:\n%s", &log)
		}
	})
	p := &prometheus{"http://" + address}
	eventually(t, "Prometheus is ready", func() bool {
		response, err := crowd.Get(p.url + "/-/ready")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == 200
	})
	return p
}

// query evaluates an expression now and returns how many series it gives.
func (p *prometheus) query(t testing.TB, expr string) (n int, problem string) {
	t.Helper()
	var answer struct {
		Status, Error string
		Warnings      []string
		Data          struct{ Result []json.RawMessage }
	}
	r := get(t, p.url+"/api/v1/query?query="+url.QueryEscape(expr))
	if err := json.Unmarshal(r.body, &answer); err != nil {
		t.Fatalf("%v in %v", err, r)
	}
	if answer.Status != "success" || len(answer.Warnings) > 0 {
		return 0, answer.Error + strings.Join(answer.Warnings, "; ")
	}
	return len(answer.Data.Result), ""
}

// metricName is what may be the name of a metric of ours, or of the libraries that vaultd is made of.
var metricName = regexp.MustCompile(`\b(?:bkv|go|process)_\w+`)

// Each query of the dashboard and of the alert rules is answered by a Prometheus that scrapes a
// running vaultd, the dashboard's with something to show, and asks for metrics that are there.
func TestDashboardAndRulesOnARunningVault(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t, tlsEnv(t, d.dir)...)
	p := startPrometheus(t, v)
	eventually(t, "a first scrape", func() bool { n, _ := p.query(t, `bkv_key_generation`); return n > 0 })
	busy(t, d, v)
	eventually(t, "a scrape of the traffic", func() bool {
		n, _ := p.query(t, `bkv_account_events_total{kind="failure"} == 10 and on() rate(bkv_http_requests_total{problem="wrong-password"}[1m]) >= 0`)
		return n > 0
	})

	raw, err := os.ReadFile(opsDir + "/grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(raw, &dashboard); err != nil {
		t.Fatal(err)
	}
	var exprs []string
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			expr := strings.NewReplacer("$instance", ".*", "$__rate_interval", "1m").Replace(target.Expr)
			exprs = append(exprs, expr)
			switch n, problem := p.query(t, expr); {
			case problem != "":
				t.Errorf("%s: %s: %s", panel.Title, expr, problem)
			case n == 0:
				t.Errorf("%s: %s shows nothing", panel.Title, expr)
			}
		}
	}
	if len(exprs) < 20 {
		t.Fatalf("the dashboard has %d queries", len(exprs))
	}

	var rules struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Query, Health, LastError, State string }
			}
		}
	}
	eventually(t, "all rules were evaluated", func() bool {
		if err := json.Unmarshal(get(t, p.url+"/api/v1/rules").body, &rules); err != nil {
			t.Fatal(err)
		}
		for _, group := range rules.Data.Groups {
			for _, rule := range group.Rules {
				if rule.Health == "unknown" {
					return false
				}
			}
		}
		return len(rules.Data.Groups) > 0
	})
	for _, group := range rules.Data.Groups {
		for _, rule := range group.Rules {
			exprs = append(exprs, rule.Query)
			if rule.Health != "ok" || rule.State == "firing" {
				t.Errorf("rule %s: health %s, state %s: %s", rule.Name, rule.Health, rule.State, rule.LastError)
			}
		}
	}
	for _, expr := range exprs {
		for _, name := range metricName.FindAllString(expr, -1) {
			if n, problem := p.query(t, name); n == 0 {
				t.Errorf("there is no metric %s %s, which %s asks for", name, problem, expr)
			}
		}
	}
	v.stop(t)
}
