package e2e_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/cmd/internal/certtest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// testCA signs the certificates of these tests; trusted holds it alone.
var testCA, trusted = newTestCA()

func newTestCA() (*certtest.Issuer, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tests"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &certtest.Issuer{Cert: cert, Key: key}, pool
}

// tlsEnv gives the public listener a certificate.
func tlsEnv(t testing.TB, dir string) []string {
	t.Helper()
	cert, key, _ := testCA.Issue(t, "vault", nil)
	return []string{"BKV_TLS_CERT=" + write(t, dir, "tls.pem", string(cert)), "BKV_TLS_KEY=" + write(t, dir, "tls.key", string(key))}
}

// dialer is a client of its own, with a client certificate if it is given one.
func dialer(t testing.TB, edit func(*tls.Config), cert, key []byte) *http.Client {
	t.Helper()
	config := &tls.Config{RootCAs: trusted}
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		// The server's list of authorities would have Go leave a certificate out that does not fit.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	if edit != nil {
		edit(config)
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

// fetch returns what is answered, and by which certificate.
func fetch(client *http.Client, url string) (reply, *tls.ConnectionState, error) {
	response, err := client.Get(url)
	if err != nil {
		return reply{}, nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return reply{response.StatusCode, response.Header, body}, response.TLS, err
}

// TLS from files, for both listeners; clients by pinned authorities, of each listener its own; and what vaultctl does with it.
func TestTLS(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	file := func(name string, content []byte) string { return write(t, d.dir, name, string(content)) }
	serverCert, serverKey, _ := testCA.Issue(t, "vault", nil)
	backEndCA, _, backEnds := (*certtest.Issuer)(nil).Issue(t, "back ends", certtest.Authority)
	operatorCA, _, operators := (*certtest.Issuer)(nil).Issue(t, "operators", certtest.Authority)
	backEnd, backEndKey, _ := backEnds.Issue(t, "app", nil)
	ann, annKey, _ := operators.Issue(t, "ann", nil)
	v := d.start(t,
		"BKV_TLS_CERT="+file("s.pem", serverCert), "BKV_TLS_KEY="+file("s.key", serverKey), "BKV_TLS_CLIENT_CA="+file("backends.pem", backEndCA),
		"BKV_ADMIN_TLS_CERT="+d.dir+"/s.pem", "BKV_ADMIN_TLS_KEY="+d.dir+"/s.key", "BKV_ADMIN_TLS_CLIENT_CA="+file("operators.pem", operatorCA))
	if !strings.HasPrefix(v.url, "https://") || !strings.HasPrefix(v.admin, "https://") {
		t.Fatalf("vaultd serves %s and %s", v.url, v.admin)
	}

	app, operator := dialer(t, nil, backEnd, backEndKey), dialer(t, nil, ann, annKey)
	r, state, err := fetch(app, v.url+"/v1/vault")
	if err != nil || r.status != 200 || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" {
		t.Fatalf("a back end: %v %v %+v", err, r, state)
	}
	if r, _, err := fetch(operator, v.admin+"/readyz"); err != nil || r.status != 200 {
		t.Fatalf("an operator: %v %v", err, r)
	}
	for name, try := range map[string]func() (reply, *tls.ConnectionState, error){
		"no client certificate":      func() (reply, *tls.ConnectionState, error) { return fetch(dialer(t, nil, nil, nil), v.url+"/v1/vault") },
		"an operator, at the public": func() (reply, *tls.ConnectionState, error) { return fetch(operator, v.url+"/v1/vault") },
		"a back end, at the admin":   func() (reply, *tls.ConnectionState, error) { return fetch(app, v.admin+"/readyz") },
		"TLS 1.2": func() (reply, *tls.ConnectionState, error) {
			return fetch(dialer(t, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, backEnd, backEndKey), v.url+"/v1/vault")
		},
	} {
		if r, _, err := try(); err == nil {
			t.Errorf("%s: answered %v", name, r)
		}
	}
	if r, _, err := fetch(http.DefaultClient, "http"+strings.TrimPrefix(v.url, "https")+"/v1/vault"); err != nil || r.status != 400 {
		t.Errorf("plain HTTP: %v %v", err, r)
	}

	// vaultctl.
	ca := file("ca.pem", certPEM(testCA.Cert))
	env := []string{"BKV_ADMIN_URL=" + v.admin, "BKV_ADMIN_CA=" + ca, "BKV_ADMIN_CERT=" + file("ann.pem", ann), "BKV_ADMIN_KEY=" + file("ann.key", annKey)}
	if out := mustRun(t, env, "vaultctl", "key", "status"); !strings.Contains(out, "master/1") {
		t.Errorf("vaultctl key status: %s", out)
	}
	mustRun(t, env, "vaultctl", "ready")
	for problem, env := range map[string][]string{
		"certificate":        env[:2],                                      // none is shown
		"authority":          {env[0], env[2], env[3]},                     // not trusted
		"both or neither":    {env[0], env[1], env[2]},                     // no key
		"has no certificate": {env[0], "BKV_ADMIN_CA=" + d.dir + "/s.key"}, // not an authority's file
		"then say https":     {"BKV_ADMIN_URL=http" + strings.TrimPrefix(v.admin, "https")},
		"no such file":       {env[0], "BKV_ADMIN_CA=/nowhere"},
	} {
		if o := run(t, env, "vaultctl", "key", "status"); o.code != 1 || !strings.Contains(o.stderr, problem) {
			t.Errorf("want %q, got exit status %d: %s", problem, o.code, o.stderr)
		}
	}

	// Who did it is in the events.
	mustRun(t, env, "vaultctl", "key", "rotate", "audit")
	if who := query[string](t, d.database, `SELECT operator FROM events WHERE kind = 'key-current' AND operator IS NOT NULL`); who != "CN=ann" {
		t.Errorf("the event of a rotation names %q", who)
	}

	// A new certificate is taken by itself, and on SIGHUP; a bad one is not, and shows.
	serves := func(name string) func() bool {
		return func() bool {
			_, state, err := fetch(dialer(t, nil, backEnd, backEndKey), v.url+"/v1/vault")
			return err == nil && state.PeerCertificates[0].Subject.CommonName == name
		}
	}
	second, secondKey, _ := testCA.Issue(t, "second", nil)
	file("s.key", secondKey)
	file("s.pem", second)
	eventually(t, "the second certificate, by itself", serves("second"))
	third, thirdKey, _ := testCA.Issue(t, "third", nil)
	file("s.pem", third)
	if err := v.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "word of a certificate without its key", func() bool {
		return strings.Contains(v.log.String(), "the one before stays in use")
	})
	if !serves("second")() {
		t.Error("a certificate without its key is in use")
	}
	if r, _, err := fetch(operator, v.admin+"/metrics"); err != nil || !strings.Contains(string(r.body), `bkv_tls_reload_failing{listener="public"} 1`) {
		t.Error("the metrics do not show it")
	}
	if o := run(t, env, "vaultctl", "status"); o.code != 2 || !strings.Contains(o.stdout, "PROBLEM: the public listener's files hold what cannot be used") {
		t.Errorf("vaultctl status: exit status %d\n%s%s", o.code, o.stdout, o.stderr)
	}
	file("s.key", thirdKey)
	if err := v.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the third certificate, on SIGHUP", serves("third"))

	// An authority that is taken out of the file: its clients' connections end, new ones are refused.
	if r, _, err := fetch(app, v.url+"/v1/vault"); err != nil || r.status != 200 {
		t.Fatalf("%v %v", err, r)
	}
	file("backends.pem", operatorCA)
	if err := v.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of the back end's access", func() bool { _, _, err := fetch(app, v.url+"/v1/vault"); return err != nil })
	if r, _, err := fetch(operator, v.url+"/v1/vault"); err != nil || r.status != 200 {
		t.Errorf("a client of the new authority: %v %v", err, r)
	}
	v.stop(t)
	searchSecrets(t, v.log.String())
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// vaultd does not start with a certificate that could serve nobody.
func TestStartRefusesABadCertificate(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	good, key, _ := testCA.Issue(t, "good", nil)
	_, otherKey, _ := testCA.Issue(t, "other", nil)
	old, oldKey, _ := testCA.Issue(t, "old", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	for problem, c := range map[string]struct{ cert, key []byte }{
		"does not match public key": {good, otherKey}, "expired at": {old, oldKey}, "no such file": {nil, key},
	} {
		cert := "/nowhere"
		if c.cert != nil {
			cert = write(t, d.dir, "c.pem", string(c.cert))
		}
		for _, prefix := range []string{"", "ADMIN_"} {
			env := append(d.vaultd[:len(d.vaultd):len(d.vaultd)], "BKV_LISTEN=127.0.0.1:0", "BKV_ADMIN_LISTEN=127.0.0.1:0",
				"BKV_"+prefix+"TLS_CERT="+cert, "BKV_"+prefix+"TLS_KEY="+write(t, d.dir, "c.key", string(c.key)))
			flag := "--" + strings.ToLower(strings.ReplaceAll(prefix, "_", "-")) + "tls-cert"
			if o := run(t, env, "vaultd"); o.code != 1 || !strings.Contains(o.stderr, problem) || !strings.Contains(o.stderr, flag) {
				t.Errorf("want %q, got exit status %d: %s", problem, o.code, o.stderr)
			}
		}
	}
}

// Clients that send a byte now and then, open ten thousand connections, or never read: each is bounded, and everybody else is served.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t)
	host := strings.TrimPrefix(v.url, "http://")
	from := func(address string) (net.Conn, error) {
		return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}, Timeout: patience}).DialContext(t.Context(), "tcp", host)
	}
	token, err := d.mint("slow")
	if err != nil {
		t.Fatal(err)
	}
	header := "POST /v1/users/slow/backup-key/recovery HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token +
		"\r\nContent-Type: application/json\r\nContent-Length: 200\r\n\r\n"
	began := time.Now()
	ended := make(chan string, 500)
	started := 0
	slowly := func(kind, first string, read bool) {
		c, err := from("127.0.0.2")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		started++
		go func() {
			_, _ = io.WriteString(c, first)
			dead := make(chan struct{})
			if read {
				go func() { _, _ = io.Copy(io.Discard, c); close(dead) }()
			}
			for {
				select {
				case <-dead:
				case <-time.After(500 * time.Millisecond):
					if _, err := io.WriteString(c, "a"); err == nil && time.Since(began) < patience {
						continue
					}
				}
				ended <- kind
				return
			}
		}()
	}
	for range 10 {
		slowly("slow header", "GET /v1/vault HTTP/1.1\r\nX-Slow: ", true)
		slowly("slow body", header, true)
	}
	for range 10 { // asks for much and takes nothing
		c, err := from("127.0.0.2")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetReadBuffer(1 << 12)
		}
		go func() {
			for {
				_ = c.SetWriteDeadline(time.Now().Add(patience))
				if _, err := io.WriteString(c, strings.Repeat("GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n", 50)); err != nil {
					return
				}
			}
		}()
	}
	const flood = 10_000 // connections that ask for nothing
	open := make([]net.Conn, 0, flood)
	t.Cleanup(func() {
		for _, c := range open {
			c.Close()
		}
	})
	for range flood {
		c, err := from("127.0.0.2")
		if errors.Is(err, syscall.EMFILE) {
			t.Fatalf("this test needs %d open files: see ulimit -n", flood+1000)
		}
		if err == nil {
			open = append(open, c)
		}
	}
	// Everybody else.
	eve := d.phone(at(v), "eve")
	key, err := eve.enrol(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := eve.recover(t.Context(), "right"); err != nil || got != key {
		t.Fatalf("beside hostile clients: %v", err)
	}
	if n := d.started(t, "slow"); n != 0 {
		t.Errorf("%d attempts were charged for bodies that did not come", n)
	}
	for range started {
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatal("a slow connection was not ended")
		}
	}
	_, text := scrape(t, v)
	_, refused, _ := strings.Cut(text, `bkv_connections_refused_total{limit="address",listener="public"} `)
	refused, _, _ = strings.Cut(refused, "\n")
	if n, err := strconv.ParseFloat(refused, 64); err != nil || n < flood-1024 {
		t.Errorf("%s connections of %d were refused, of which 1024 may stay", refused, flood)
	}
	v.stop(t)
}

// A tenant's key that is withdrawn while its tokens are out: they are refused within the time that the documents promise.
func TestWithdrawnKey(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t)
	ann := d.phone(at(v), "ann")
	if r, err := ann.send(t.Context(), "GET", "", nil); err != nil || r.problem() != "not-enrolled" {
		t.Fatalf("%v %v", r, err)
	}
	mustRun(t, ownerEnv(t, d.dir, d.database), "vaultctl", "tenant", "key", "revoke", tenant, "--kid="+kid)
	eventually(t, "the tokens are refused", func() bool {
		r, err := ann.send(t.Context(), "GET", "", nil)
		return err == nil && r.problem() == "unauthenticated"
	})
	v.stop(t)
}

// vaultctl status tells in words, in JSON and by its exit status; so does /health by its codes.
func TestStatus(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	cert, key, _ := testCA.Issue(t, "brief", func(c *x509.Certificate) {
		c.NotAfter = time.Now().Add(time.Hour)
		c.NotBefore = time.Now().Add(-9 * time.Hour)
	})
	fresh, freshKey, _ := testCA.Issue(t, "fresh", nil)
	v := d.start(t, "BKV_TLS_CERT="+write(t, d.dir, "t.pem", string(fresh)), "BKV_TLS_KEY="+write(t, d.dir, "t.key", string(freshKey)))
	env := []string{"BKV_ADMIN_URL=" + v.admin}
	status := func() outcome { t.Helper(); return run(t, env, "vaultctl", "status") }
	health := func(query string, code int, state string) {
		t.Helper()
		if r := get(t, v.admin+"/health"+query); r.status != code || state != "" && !strings.Contains(string(r.body), `"state":"`+state+`"`) {
			t.Errorf("/health%s: got %v, want %d %s", query, r, code, state)
		}
	}
	var o outcome
	eventually(t, "all is well", func() bool { o = status(); return o.code == 0 })
	for _, part := range []string{vaultID + ", ok", v.fingerprint, "SoftHSM", "Postgres 1", "migration ", "master/1 in use for", "CN=fresh", "NOT COVERED: the token is SoftHSM", "NOT COVERED: no witness"} {
		if !strings.Contains(o.stdout, part) {
			t.Errorf("want %q in\n%s", part, o.stdout)
		}
	}
	if strings.Contains(o.stdout, "PROBLEM") || o.stderr != "" {
		t.Errorf("all is well, and yet\n%s%s", o.stdout, o.stderr)
	}
	if out := mustRun(t, env, "vaultctl", "status", "--json"); !strings.Contains(out, `"state": "ok"`) || !strings.Contains(out, `"schema": `) {
		t.Errorf("--json: %s", out)
	}
	if out := mustRun(t, env, "vaultctl", "ready"); out != "vaultd serves\n" {
		t.Errorf("vaultctl ready: %s", out)
	}
	if o := run(t, []string{"BKV_ADMIN_URL=" + v.url, "BKV_ADMIN_CA=" + write(t, d.dir, "ca.pem", string(certPEM(testCA.Cert)))}, "vaultctl", "ready"); o.code != 1 || !strings.Contains(o.stderr, "is that vaultd's admin listener?") {
		t.Errorf("vaultctl ready at the public listener: exit status %d: %s", o.code, o.stderr)
	}
	health("", 200, "ok")
	health("?ok=204", 204, "")
	for _, bad := range []string{"?ok=99", "?ok=600", "?ok=x", "?fine=200", "?ok=200&ok=201"} {
		health(bad, 400, "")
	}

	write(t, d.dir, "t.key", string(key))
	write(t, d.dir, "t.pem", string(cert))
	eventually(t, "a certificate near its end", func() bool { o = status(); return o.code == 2 })
	if !strings.Contains(o.stdout, "PROBLEM: the public listener's certificate ends at") || !strings.Contains(o.stdout, ", degraded") {
		t.Errorf("degraded:\n%s", o.stdout)
	}
	health("", 200, "degraded")
	health("?degraded=429&unavailable=502", 429, "degraded")

	d.directory.Vanish(t)
	if o = status(); o.code != 3 || !strings.Contains(o.stdout, ", unavailable") || !strings.Contains(o.stdout, "token         DOWN") {
		t.Errorf("without a token: exit status %d\n%s%s", o.code, o.stdout, o.stderr)
	}
	if o := run(t, env, "vaultctl", "ready"); o.code != 1 || !strings.Contains(o.stderr, "does not serve: token") {
		t.Errorf("vaultctl ready without a token: exit status %d: %s", o.code, o.stderr)
	}
	health("", 503, "unavailable")
	health("?degraded=429&unavailable=502", 502, "unavailable")
	d.directory.Return(t)
	eventually(t, "the token is back", func() bool { return status().code == 2 })
	v.stop(t)
	if o = status(); o.code != 1 || o.stdout != "" || !strings.Contains(o.stderr, "asking vaultd") {
		t.Errorf("without vaultd: exit status %d\n%s%s", o.code, o.stdout, o.stderr)
	}
}
