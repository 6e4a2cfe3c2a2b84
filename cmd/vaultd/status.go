package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/cmd/internal/version"
	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

const (
	// masterKeyAge is how long a master key is to be used at most: a destroyed record can be read from older dumps for as long.
	masterKeyAge = 30 * 24 * time.Hour
	// uncoveredAge leaves ten days to rotate and destroy the old key.
	uncoveredAge = masterKeyAge + 10*24*time.Hour
	// auditLag is how long an event may wait to be sealed; it takes a second or two if all is well.
	auditLag = time.Minute
	// keysStale is when what was read of keys is too old to go by.
	keysStale = 5 * time.Minute
)

// statusReport tells operators how this instance is. All of it answers while token and database are away, too.
type statusReport struct {
	config   *config
	identity *vault.Identity
	started  time.Time
	stopping context.Context
	log      *slog.Logger
	now      func() time.Time

	checks       []httpapi.Check // what it cannot serve without
	model        func() string
	serial       func() string
	strategy     func() string
	token        func() pkcs11util.Stats
	pool         func() store.Stats
	server       func(context.Context) (store.ServerStatus, error)
	keys         *watcher
	audit        func() vault.AuditStatus
	weakness     func() string
	certificates []*certificates // without those of listeners that have none

}

// notCovered says what this deployment does not protect against, by the way it is set up.
func notCovered(c *config, model, weakness string) []string {
	var out []string
	if strings.Contains(model, "SoftHSM") {
		out = append(out, "the token is SoftHSM, a folder of files: whoever copies it, the PIN file and the database can guess passwords offline; use a hardware HSM in production")
	}
	if weakness != "" {
		out = append(out, "the token's profile is of lower assurance than others: "+weakness)
	}
	out = append(out, "no witness keeps a second record of the attempts: whoever can replay old rows of the database has unlimited guesses")
	if c.TLS.Cert == "" && !onLoopback(c.Listen) {
		out = append(out, "the public listener speaks plain HTTP, and not only on loopback: without a proxy that ends TLS, whoever is on the way reads tenants' tokens; see --tls-cert")
	}
	if c.AdminTLS.ClientCA == "" && !onLoopback(c.Admin) {
		out = append(out, "the admin listener asks for no client certificate, and is not only on loopback: whoever reaches it can rotate and destroy keys; see --admin-tls-client-ca")
	}
	return out
}

func onLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// problems are what an operator should look at, from memory.
func (s *statusReport) problems() []string {
	problems := []string{}
	for _, c := range s.certificates {
		r := c.report()
		if r.Problem != "" {
			problems = append(problems, fmt.Sprintf("the %s listener's files hold what cannot be used: %s", r.Listener, r.Problem))
		}
		if r.Ends {
			problems = append(problems, fmt.Sprintf("the %s listener's certificate ends at %s", r.Listener, r.NotAfter.Format(time.RFC3339)))
		}
	}
	if a := s.audit(); a.Fault != "" {
		problems = append(problems, "the audit log is not as the vault wrote it, and nothing is sealed any more: "+a.Fault)
	} else if a.Lag > auditLag {
		problems = append(problems, fmt.Sprintf("%d events wait to be sealed into the audit log, the oldest for %v", a.Waiting, a.Lag.Round(time.Second)))
	}
	overview, at, err := s.keys.last()
	if overview == nil || s.now().Sub(at) > keysStale {
		if err == nil {
			err = errors.New("not read yet")
		}
		return append(problems, "the keys' state is not known: "+err.Error())
	}
	problems = append(problems, overview.Warnings...)
	for i := range overview.Keys {
		if k := &overview.Keys[i]; k.State == vault.KeyCurrent && k.Purpose == pkcs11util.Master && overview.Now.Sub(k.CurrentSince) > masterKeyAge {
			problems = append(problems, fmt.Sprintf("key %v has been in use for more than 30 days: vaultctl key rotate master --destroy-old", k.Key))
		}
	}
	if at := overview.OldestUncovered; !at.IsZero() && overview.Now.Sub(at) > uncoveredAge {
		problems = append(problems, fmt.Sprintf("records destroyed since %s can still be opened from older dumps: rotate master and destroy the old keys", at.UTC().Format(time.RFC3339)))
	}
	return problems
}

// state sums up.
func (s *statusReport) state(failing, problems []string) string {
	switch {
	case s.stopping.Err() != nil:
		return api.StateStopping
	case len(failing) > 0:
		return api.StateUnavailable
	case len(problems) > 0:
		return api.StateDegraded
	default:
		return api.StateOK
	}
}

// failing runs the checks and returns the errors of those that fail, by name.
func (s *statusReport) failing(ctx context.Context) map[string]error {
	failing := map[string]error{}
	for i, err := range httpapi.RunChecks(ctx, s.checks) {
		if err != nil {
			failing[s.checks[i].Name] = err
		}
	}
	return failing
}

// health answers GET /health, for load balancers: the state, and a status code for it. By itself that is 200
// where the instance serves and 503 where it does not; the query can give each state another one, as in
// ?degraded=429&stopping=410.
func (s *statusReport) health(w http.ResponseWriter, r *http.Request) {
	codes := map[string]int{api.StateOK: 200, api.StateDegraded: 200, api.StateUnavailable: 503, api.StateStopping: 503}
	for name, values := range r.URL.Query() {
		code, err := strconv.Atoi(values[0])
		if _, known := codes[name]; !known || len(values) != 1 || err != nil || code < 200 || code > 599 {
			answerAdmin(w, http.StatusBadRequest, struct {
				Error string `json:"error"`
			}{"want ok, degraded, unavailable or stopping, each once, with a status code from 200 to 599"})
			return
		}
		codes[name] = code
	}
	failing := s.failing(r.Context())
	answer := api.Health{Failing: slices.AppendSeq([]string{}, maps.Keys(failing))}
	slices.Sort(answer.Failing)
	answer.State = s.state(answer.Failing, s.problems())
	for name, err := range failing {
		s.log.WarnContext(r.Context(), "not healthy", "check", name, "error", err)
	}
	answerAdmin(w, codes[answer.State], answer)
}

// report answers GET /status.
func (s *statusReport) report(w http.ResponseWriter, r *http.Request) {
	build, token, pool := version.Of(), s.token(), s.pool()
	failing := s.failing(r.Context())
	out := api.ServiceStatus{
		Problems: s.problems(), NotCovered: notCovered(s.config, s.model(), s.weakness()), Now: s.now().UTC(),
		VaultID: s.config.VaultID, Fingerprint: s.identity.Fingerprint.String(),
		Version: build.Version, Revision: build.Revision, Go: build.Go, StartedAt: s.started.UTC(),
		Token: api.TokenStatus{
			Available: token.Available, Model: s.model(), Label: s.config.Token.Label, Serial: s.serial(), Profile: s.config.Token.Profile,
			Strategy: s.strategy(), Sessions: token.Sessions, Lost: token.Lost, Recoveries: token.SessionsReplaced + token.LoggedIn + token.Reinitialised,
		},
		Database: api.DatabaseStatus{Connections: pool.Open, InUse: pool.InUse, Most: pool.Max},
		Keys:     []api.KeyInUse{}, Certificates: []api.Certificate{}, Audit: *httpapi.WireAuditStatus(s.audit()),
	}
	if err := failing["token"]; err != nil {
		out.Token.Available, out.Token.Error = false, err.Error()
		out.Problems = append(out.Problems, "the token cannot be used: "+err.Error())
	}
	s.database(r.Context(), &out)
	for _, c := range s.certificates {
		out.Certificates = append(out.Certificates, c.report())
	}
	s.keysInUse(&out)
	names := slices.Collect(maps.Keys(failing))
	if !out.Database.Available && !slices.Contains(names, "store") {
		names = append(names, "store")
	}
	out.State = s.state(names, out.Problems)
	answerAdmin(w, http.StatusOK, out)
}

// database fills in what Postgres says of itself.
func (s *statusReport) database(ctx context.Context, out *api.ServiceStatus) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	d := &out.Database
	server, err := s.server(ctx)
	if err != nil {
		d.Error = err.Error()
		out.Problems = append(out.Problems, "the database cannot be used: "+d.Error)
		return
	}
	d.Available, d.Server, d.Schema, d.Standby, d.Replicas = !server.Standby, server.Server, server.Schema, server.Standby, server.Replicas
	if server.Standby {
		out.Problems = append(out.Problems, "the database is a standby, and takes no writes")
	}
	if known, err := migrations.Latest(); err == nil && server.Schema != known {
		out.Problems = append(out.Problems, fmt.Sprintf("the database is at migration %d, and this program knows %d", server.Schema, known))
	}
	if d.Synchronous = server.Synchronous; !d.Synchronous {
		out.NotCovered = append(out.NotCovered, "no replica of the database holds a commit before it is acknowledged (synchronous_standby_names): an enrolment may be lost with the database's machine")
	}
	if server.Visible {
		lag := server.Lag.Seconds()
		d.LagSeconds = &lag
	}
}

func (s *statusReport) keysInUse(out *api.ServiceStatus) {
	overview, at, _ := s.keys.last()
	if overview == nil {
		return
	}
	at = at.UTC()
	out.KeysReadAt, out.RewrapLeft = &at, overview.RewrapLeft
	if !overview.OldestUncovered.IsZero() {
		out.Uncovered = &overview.OldestUncovered
	}
	older := map[string]int{}
	for i := range overview.Keys {
		if k := &overview.Keys[i]; k.State == vault.KeyRetired || k.State == vault.KeyClosing {
			older[k.Purpose]++
		}
	}
	for i := range overview.Keys {
		if k := &overview.Keys[i]; k.State == vault.KeyCurrent {
			out.Keys = append(out.Keys, api.KeyInUse{Purpose: k.Purpose, Generation: k.Generation, Since: k.CurrentSince, Seals: k.Seals, Older: older[k.Purpose]})
		}
	}
}

func answerAdmin(w http.ResponseWriter, status int, answer any) {
	body, err := json.Marshal(answer)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(body) // who cannot receive it cannot be told
}
