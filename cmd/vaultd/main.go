// Command vaultd is the backup key vault.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/cmd/internal/commandline"
	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/httpapi"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "vaultd:", err)
		stop()
		os.Exit(1)
	}
}

// run serves until ctx is over, and then stops cleanly: not ready, finish what runs,
// close the database, log out of the token.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c config
	_, err := commandline.Parse(&c, "vaultd", description, args, stdout, stderr)
	if errors.Is(err, commandline.ErrHelp) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("settings (see --help):\n%w", err)
	}
	level, err := c.level()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: level}))

	url, err := c.Database.URL()
	if err != nil {
		return err
	}
	if err := migrations.Check(ctx, url); err != nil {
		return err
	}
	if err := migrations.CheckRights(ctx, url); err != nil {
		return err
	}
	db, err := store.Open(ctx, store.Config{URL: url, MaxConns: c.Conns})
	if err != nil {
		return err
	}
	defer db.Close()

	token, err := c.Token.Config()
	if err != nil {
		return err
	}
	m := newMetrics()
	token.Sessions, token.Logger, token.Observe = c.Sessions, log, m.call
	keys, err := pkcs11util.Open(ctx, token)
	if err != nil {
		return fmt.Errorf("opening the token: %w", err)
	}
	defer func() {
		if err := keys.Close(); err != nil {
			log.Error("closing the token", "error", err)
		}
	}()

	v, err := vault.New(vault.Config{ID: c.VaultID, Context: []byte(c.Context), Store: db, Token: keys, Log: log, Observer: m})
	if err != nil {
		return err
	}
	var weakness []string
	if w := keys.Weakness(); w != "" {
		weakness = []string{w}
	}
	rotation, err := vault.NewRotation(vault.RotationConfig{
		Store: db, Token: keys, Vault: v, Log: log, StateEvery: c.StateKey, RelayEvery: c.RelayKey, RewrapsPerSecond: c.Rewraps, Warnings: weakness,
	})
	if err != nil {
		return err
	}
	if err := rotation.Start(ctx); err != nil {
		return fmt.Errorf("comparing the token's keys with the database: %w", err)
	}
	sequencer, err := vault.NewSequencer(vault.SequencerConfig{
		Store: db, Token: keys, VaultID: c.VaultID, Log: log, CheckpointEvery: c.Checkpoints,
	})
	if err != nil {
		return err
	}
	identity, err := v.Identity(ctx, time.Now())
	if err != nil {
		return err
	}
	for _, what := range notCovered(&c, keys.Model(), keys.Weakness()) {
		log.Warn(what)
	}
	m.watchToken(keys.Stats)
	m.watchStore(db.Stats)
	m.watchAudit(sequencer.Status)
	return serve(ctx, &c, log, m, v, rotation, sequencer, keys, db, identity)
}

func serve(ctx context.Context, c *config, log *slog.Logger, m *metrics, v *vault.Vault, rotation *vault.Rotation, sequencer *vault.Sequencer, keys *pkcs11util.Keyset, db *store.Store, identity *vault.Identity) error {
	public, err := httpapi.New(httpapi.Config{
		Vault: v, VaultID: c.VaultID, Tenants: db, Log: log, Observe: m.exchange,
		Limits: httpapi.Limits{
			RequestsPerUser:     httpapi.RateLimit{PerSecond: float64(c.RequestsPerUser) / 60, Burst: c.RequestsPerUser},
			RequestsPerTenant:   httpapi.RateLimit{PerSecond: float64(c.RequestsPerTenant), Burst: 2 * c.RequestsPerTenant},
			EnrolmentsPerUser:   httpapi.RateLimit{PerSecond: float64(c.EnrolmentsPerUser) / 3600, Burst: c.EnrolmentsPerUser},
			EnrolmentsPerTenant: httpapi.RateLimit{PerSecond: float64(c.EnrolmentsPerTenant), Burst: 2 * c.EnrolmentsPerTenant},
			RequestsAtOnce:      c.RequestsAtOnce,
		},
	})
	if err != nil {
		return err
	}
	stopping, notReady := context.WithCancel(context.Background())
	defer notReady()
	checks := []httpapi.Check{{Name: "token", Run: keys.Check}, {Name: "store", Run: db.Ping}}
	health, err := httpapi.NewAdmin(log, append(slices.Clone(checks),
		httpapi.Check{Name: "serving", Run: func(context.Context) error { return stopping.Err() }})...)
	if err != nil {
		return err
	}

	admin := http.NewServeMux()
	admin.Handle("/", health)
	admin.Handle("/keys/", httpapi.NewKeyAdmin(log, rotation))
	admin.Handle("/audit/", httpapi.NewAuditAdmin(sequencer))
	admin.Handle("GET /metrics", m.handler(log))

	publicCerts, err := newCertificates("public", c.TLS, log)
	if err != nil {
		return fmt.Errorf("--tls-cert: %w", err)
	}
	adminCerts, err := newCertificates("admin", c.AdminTLS, log)
	if err != nil {
		return fmt.Errorf("--admin-tls-cert: %w", err)
	}
	publicListener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer publicListener.Close()
	adminListener, err := net.Listen("tcp", c.Admin)
	if err != nil {
		return fmt.Errorf("--admin-listen: %w", err)
	}
	defer adminListener.Close()
	certs := slices.DeleteFunc([]*certificates{publicCerts, adminCerts}, func(c *certificates) bool { return c == nil })
	m.watchCertificates(certs...)
	watch := &watcher{overview: rotation.Overview, log: log}
	m.watchKeys(watch)
	status := &statusReport{
		config: c, identity: identity, started: time.Now(), stopping: stopping, log: log, now: time.Now, checks: checks,
		model: keys.Model, serial: keys.Serial, strategy: keys.Strategy, token: keys.Stats, pool: db.Stats, server: db.ServerStatus,
		keys: watch, audit: sequencer.Status, weakness: keys.Weakness, certificates: certs,
	}
	admin.HandleFunc("GET /health", status.health)
	admin.HandleFunc("GET /status", status.report)

	servers := []*http.Server{
		newServer(until(stopping, promhttp.InstrumentHandlerInFlight(m.inFlight, public)), publicCerts, log), newServer(byOperator(admin), adminCerts, log),
	}
	failed := make(chan error, len(servers))
	listeners := []*bounded{
		bound(publicListener, c.Connections, c.ConnectionsPerAddress), bound(adminListener, adminConnections, adminConnections),
	}
	m.watchConnections(map[string]*bounded{"public": listeners[0], "admin": listeners[1]})
	for i, listener := range listeners {
		go func() {
			if servers[i].TLSConfig != nil {
				failed <- servers[i].ServeTLS(listener, "", "")
			} else {
				failed <- servers[i].Serve(listener)
			}
		}()
	}
	sweepCtx, stopSweeping := context.WithCancel(ctx)
	// Rotation ends after the last request, to report its seals, and the sequencer, to seal what it did.
	rotationCtx, stopRotation := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRotation()
	var sweeper sync.WaitGroup
	sweeper.Go(func() { watch.run(sweepCtx) })
	sweeper.Go(func() { keepCertificates(sweepCtx, log, certs) })
	sweeper.Go(func() { sweep(sweepCtx, v, c.Sweep, log, m) })
	sweeper.Go(func() { rotation.Run(rotationCtx) })
	sweeper.Go(func() { sequencer.Run(rotationCtx) })
	log.Info("serving", "vault_id", c.VaultID, "fingerprint", identity.Fingerprint.String(),
		"listen", publicListener.Addr().String(), "admin_listen", adminListener.Addr().String(),
		"tls", publicCerts != nil, "admin_tls", adminCerts != nil)

	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	}
	log.Info("stopping")
	notReady()
	deadline, cancel := context.WithTimeout(context.Background(), c.Stop)
	defer cancel()
	for _, s := range servers {
		if stopErr := s.Shutdown(deadline); stopErr != nil {
			err = errors.Join(err, fmt.Errorf("requests were still running after %v: %w", c.Stop, stopErr), s.Close())
		}
	}
	stopSweeping()
	stopRotation()
	sweeper.Wait()
	if err == nil {
		log.Info("stopped")
	}
	return err
}

// until refuses the requests that begin after stopping is over. Shutdown waits for those that
// run; but net/http can read one from a connection that Shutdown is closing as
// idle at that moment. It would be carried out, an attempt counted, and nobody told.
func until(stopping context.Context, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if stopping.Err() == nil {
			h.ServeHTTP(w, r)
			return
		}
		header := w.Header()
		header.Set("Connection", "close")
		header.Set("Content-Type", api.ProblemMediaType)
		header.Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"type":"about:blank","title":"The vault is stopping","status":503}`) // who cannot receive it cannot be told
	})
}

// Time-outs and limits of a connection. A request takes milliseconds; these bound what a
// slow or silent peer can hold.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 30 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 32 << 10
	// maxStreams bounds the requests that run at one time on a connection of HTTP/2; on one of HTTP/1.1 it is one.
	maxStreams = 100
	// adminConnections bounds those of the admin listener: operators, load balancers, Prometheus.
	adminConnections = 256
)

// newServer serves h, with TLS if there are certificates.
func newServer(h http.Handler, certs *certificates, log *slog.Logger) *http.Server {
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	if certs != nil {
		s.Handler, s.TLSConfig = certs.admit(h), certs.serverConfig()
	}
	return s
}

// sweep destroys what is due, every interval, until ctx is over.
func sweep(ctx context.Context, v *vault.Vault, every time.Duration, log *slog.Logger, m *metrics) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		swept, err := v.Sweep(ctx)
		if ctx.Err() == nil {
			m.sweep(swept, err)
		}
		if swept > 0 {
			log.Info("swept", "accounts", swept)
		}
		if err != nil && ctx.Err() == nil {
			log.Error("sweeping", "error", err)
		}
	}
}
