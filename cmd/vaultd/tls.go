package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// tlsFiles says where a listener's certificate is.
type tlsFiles struct {
	Cert     string `env:"CERT" placeholder:"FILE" help:"PEM file with the certificate of ${listener}, and those of its issuers. None: plain HTTP. It is read anew when it changes, and on SIGHUP."`
	Key      string `env:"KEY" placeholder:"FILE" help:"PEM file with its private key."`
	ClientCA string `name:"client-ca" env:"CLIENT_CA" placeholder:"FILE" help:"PEM file with the authorities whose client certificates are taken; none others are, and nobody without one. None: no client certificate is asked for."`
}

// problems names what is wrong. flag begins the names of the flags.
func (f tlsFiles) problems(flag string) (problems []error) {
	for _, named := range []struct{ name, file string }{{"cert", f.Cert}, {"key", f.Key}, {"client-ca", f.ClientCA}} {
		if named.file == "" {
			continue
		}
		if file, err := os.Open(named.file); err != nil {
			problems = append(problems, fmt.Errorf("%s%s: %w", flag, named.name, err))
		} else {
			_ = file.Close() // it was not read yet
		}
	}
	if (f.Cert == "") != (f.Key == "") {
		problems = append(problems, fmt.Errorf("%scert and %skey: want both or neither", flag, flag))
	}
	if f.ClientCA != "" && f.Cert == "" {
		problems = append(problems, fmt.Errorf("%sclient-ca: needs %scert and %skey: client certificates are a part of TLS", flag, flag, flag))
	}
	return problems
}

// minTLSVersion is 1.3 (RFC 8446): the other side is a back end or a proxy, and every library that is
// maintained has spoken it for years. It leaves no cipher suite, signature or renegotiation to be chosen badly, and
// encrypts the client's certificate.
const minTLSVersion = tls.VersionTLS13

const (
	// tlsReloadEvery is how often the files are looked at.
	tlsReloadEvery = 5 * time.Second
	// expiryWarning is how long ahead a certificate's end is warned of, but for one that lives shortly: there
	// it is a quarter of its life.
	expiryWarning = 14 * 24 * time.Hour
	// expiryRepeat is how often the warning is logged.
	expiryRepeat = 24 * time.Hour
)

// identity is what a listener shows and asks for at one time. It never changes.
type identity struct {
	config  *tls.Config
	leaf    *x509.Certificate
	clients []*x509.Certificate // the authorities of clients
}

// loadIdentity reads and checks the files. No handshake with what passes fails for the certificate's sake.
func loadIdentity(cert, key, clientCA []byte, now time.Time) (*identity, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err // it tells what does not match, and nothing of the key
	}
	id := &identity{leaf: pair.Leaf, config: &tls.Config{
		MinVersion: minTLSVersion, Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2", "http/1.1"},
	}}
	switch {
	case now.After(id.leaf.NotAfter):
		return nil, fmt.Errorf("the certificate expired at %s", id.leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(id.leaf.NotBefore):
		return nil, fmt.Errorf("the certificate is not valid before %s", id.leaf.NotBefore.UTC().Format(time.RFC3339))
	case len(id.leaf.DNSNames) == 0 && len(id.leaf.IPAddresses) == 0:
		return nil, errors.New("the certificate names no host (subjectAltName): every client would refuse it")
	}
	if len(clientCA) == 0 {
		return id, nil
	}
	pool := x509.NewCertPool()
	for block, rest := pem.Decode(clientCA); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		ca, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("client CA: %w", err)
		}
		if !ca.IsCA {
			return nil, fmt.Errorf("client CA: %s is no certificate of an authority", ca.Subject)
		}
		if now.After(ca.NotAfter) {
			return nil, fmt.Errorf("client CA: %s expired at %s", ca.Subject, ca.NotAfter.UTC().Format(time.RFC3339))
		}
		pool.AddCert(ca)
		id.clients = append(id.clients, ca)
	}
	if len(id.clients) == 0 {
		return nil, errors.New("client CA: the file has no certificate")
	}
	id.config.ClientAuth, id.config.ClientCAs = tls.RequireAndVerifyClientCert, pool
	return id, nil
}

// warnFrom is from when on the end of the certificate is warned of.
func warnFrom(leaf *x509.Certificate) time.Time {
	return leaf.NotAfter.Add(-min(expiryWarning, leaf.NotAfter.Sub(leaf.NotBefore)/4))
}

// certificates keeps a listener's identity as its files have it. A change that does not pass the
// checks changes nothing, and shows in log, metrics and status until it is mended.
type certificates struct {
	listener string // for log, metrics and status
	files    tlsFiles
	log      *slog.Logger
	now      func() time.Time
	current  atomic.Pointer[identity]

	mu       sync.Mutex // one reload at a time; guards all below
	seen     [sha256.Size]byte
	failure  error // why the files, as they are now, are not in use
	taken    uint64
	failed   uint64
	warnedAt time.Time
}

// newCertificates reads the files for the first time. It returns nil if there are none to read.
func newCertificates(listener string, files tlsFiles, log *slog.Logger) (*certificates, error) {
	if files.Cert == "" {
		return nil, nil
	}
	c := &certificates{listener: listener, files: files, log: log.With("listener", listener), now: time.Now}
	if err := c.reload(true); err != nil {
		return nil, err
	}
	return c, nil
}

// reload reads the files, and takes what they hold if it is new, or if asked to. It returns why it is not in use.
func (c *certificates) reload(asked bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.warn()
	cert, certErr := os.ReadFile(c.files.Cert)
	key, keyErr := os.ReadFile(c.files.Key)
	defer clear(key)
	var clientCA []byte
	var caErr error
	if c.files.ClientCA != "" {
		if clientCA, caErr = os.ReadFile(c.files.ClientCA); caErr == nil && len(clientCA) == 0 {
			caErr = fmt.Errorf("%s is empty", c.files.ClientCA)
		}
	}
	err := errors.Join(certErr, keyErr, caErr)
	sum := sha256.New()
	for _, part := range [][]byte{cert, key, clientCA, fmt.Append(nil, err)} {
		fmt.Fprintf(sum, "%d:", len(part))
		sum.Write(part)
	}
	seen := [sha256.Size]byte(sum.Sum(nil))
	if !asked && seen == c.seen {
		return c.failure
	}
	c.seen = seen
	var next *identity
	if err == nil {
		next, err = loadIdentity(cert, key, clientCA, c.now())
	}
	if err != nil {
		c.failure = fmt.Errorf("certificate %s: %w", c.files.Cert, err)
		if c.current.Load() != nil {
			c.failed++
			c.log.Error("the changed certificate is not taken, the one before stays in use", "error", c.failure)
		}
		return c.failure
	}
	again := c.current.Swap(next) != nil
	c.failure, c.warnedAt = nil, time.Time{}
	if again {
		c.taken++
		c.log.Info("certificate taken into use", "subject", next.leaf.Subject.String(), "not_after", next.leaf.NotAfter.UTC())
	}
	return nil
}

// warn logs that the certificate's end is near, once a day. The caller holds mu.
func (c *certificates) warn() {
	id, now := c.current.Load(), c.now()
	if id == nil || now.Before(warnFrom(id.leaf)) || now.Sub(c.warnedAt) < expiryRepeat {
		return
	}
	c.warnedAt = now
	c.log.Warn("the certificate is near its end, or past it: put a new one in its place", "not_after", id.leaf.NotAfter.UTC())
}

// keepCertificates looks at the files of all listeners, now and then and on SIGHUP, until ctx is over.
func keepCertificates(ctx context.Context, log *slog.Logger, all []*certificates) {
	hangUp := make(chan os.Signal, 1)
	signal.Notify(hangUp, syscall.SIGHUP)
	defer signal.Stop(hangUp)
	ticker := time.NewTicker(tlsReloadEvery)
	defer ticker.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-hangUp:
			asked = true
			log.Info("SIGHUP: reading certificates anew", "listeners_with_tls", len(all))
		}
		for _, c := range all {
			_ = c.reload(asked) // it is logged and kept
		}
	}
}

// serverConfig is for the listener. Each handshake takes the identity of its moment. As each has a
// configuration of its own, no session of an earlier one can be resumed.
func (c *certificates) serverConfig() *tls.Config {
	return &tls.Config{MinVersion: minTLSVersion, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return c.current.Load().config, nil
	}}
}

// admit passes on the requests of clients whose certificate would be taken now, too: a connection can outlive an
// authority that was taken out of the file, and the certificate itself. The others' connections end.
func (c *certificates) admit(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !c.current.Load().admits(r.TLS, c.now()) {
			panic(http.ErrAbortHandler)
		}
		h.ServeHTTP(w, r)
	})
}

func (id *identity) admits(state *tls.ConnectionState, now time.Time) bool {
	if len(id.clients) == 0 {
		return true
	}
	if state == nil {
		return false
	}
	for _, chain := range state.VerifiedChains {
		root := chain[len(chain)-1]
		if slices.ContainsFunc(id.clients, func(ca *x509.Certificate) bool { return bytes.Equal(ca.Raw, root.Raw) }) &&
			!slices.ContainsFunc(chain, func(link *x509.Certificate) bool { return now.After(link.NotAfter) }) {
			return true
		}
	}
	return false
}

// byOperator says who asks, for the events of what operators do: the subject of the client certificate, where one
// was demanded. Nobody knows who comes over plain HTTP.
func byOperator(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
			who := r.TLS.PeerCertificates[0].Subject.String()
			r = r.WithContext(vault.WithOperator(r.Context(), who))
		}
		h.ServeHTTP(w, r)
	})
}

// report is for the status.
func (c *certificates) report() api.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := c.current.Load()
	out := api.Certificate{
		Listener: c.listener, Subject: id.leaf.Subject.String(), NotBefore: id.leaf.NotBefore.UTC(), NotAfter: id.leaf.NotAfter.UTC(),
		Ends: !c.now().Before(warnFrom(id.leaf)), Clients: len(id.clients) > 0,
	}
	if c.failure != nil {
		out.Problem = c.failure.Error()
	}
	return out
}

// watchCertificates adds what is to be known of certificates.
func (m *metrics) watchCertificates(all ...*certificates) {
	notBefore := newGauge("bkv_tls_certificate_not_before_timestamp_seconds", "When the certificate in use begins.", "listener")
	notAfter := newGauge("bkv_tls_certificate_not_after_timestamp_seconds", "When the certificate in use ends.", "listener")
	failing := newGauge("bkv_tls_reload_failing", "1 while the files hold something that is not taken into use.", "listener")
	reloads := newCount("bkv_tls_reloads_total", "Changes of the certificate's files by what became of them (ok, error).", "listener", "result")
	m.registry.MustRegister(collected{[]gauge{notBefore, notAfter, failing, reloads}, func(out chan<- prometheus.Metric) {
		for _, c := range all {
			c.mu.Lock()
			leaf, failure, taken, failed := c.current.Load().leaf, c.failure, c.taken, c.failed
			c.mu.Unlock()
			notBefore.is(out, seconds(leaf.NotBefore), c.listener)
			notAfter.is(out, seconds(leaf.NotAfter), c.listener)
			failing.is(out, truth(failure != nil), c.listener)
			reloads.is(out, float64(taken), c.listener, "ok")
			reloads.is(out, float64(failed), c.listener, "error")
		}
	}})
}
