package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/cmd/internal/certtest"
)

// self signs itself.
var self *certtest.Issuer

func writeFile(t testing.TB, dir, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What cannot serve is refused, with what is wrong.
func TestCertificatesThatCannotServe(t *testing.T) {
	good, key, _ := self.Issue(t, "good", nil)
	_, otherKey, _ := self.Issue(t, "other", nil)
	old, oldKey, _ := self.Issue(t, "old", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	early, earlyKey, _ := self.Issue(t, "early", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
	nameless, namelessKey, _ := self.Issue(t, "nameless", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, nil })
	ca, caKey, _ := self.Issue(t, "ca", certtest.Authority)
	oldCA, _, _ := self.Issue(t, "old ca", func(c *x509.Certificate) { certtest.Authority(c); c.NotAfter = time.Now().Add(-time.Minute) })
	for name, c := range map[string]struct {
		cert, key, ca []byte
		problem       string
	}{
		"good":                {good, key, nil, ""},
		"good, with clients":  {good, key, ca, ""},
		"another key":         {good, otherKey, nil, "private key does not match"},
		"no certificate":      {key, key, nil, "PEM"},
		"no key":              {good, good, nil, "private key"},
		"nothing":             {nil, nil, nil, "PEM"},
		"expired":             {old, oldKey, nil, "expired at"},
		"not valid yet":       {early, earlyKey, nil, "not valid before"},
		"names no host":       {nameless, namelessKey, nil, "names no host"},
		"clients of nobody":   {good, key, []byte("nothing"), "has no certificate"},
		"clients of no CA":    {good, key, good, "no certificate of an authority"},
		"clients of a key":    {good, key, caKey, "has no certificate"},
		"clients of an old":   {good, key, oldCA, "expired at"},
		"clients of two, one": {good, key, append(bytes.Clone(ca), good...), "no certificate of an authority"},
	} {
		_, err := loadIdentity(c.cert, c.key, c.ca, time.Now())
		if (err == nil) != (c.problem == "") || err != nil && !strings.Contains(err.Error(), c.problem) {
			t.Errorf("%s: got %v, want %q", name, err, c.problem)
		}
		if err != nil && strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: the error shows what was read: %v", name, err)
		}
	}
}

// Files of TLS come together, and are looked for before anything else is done.
func TestTLSSettings(t *testing.T) {
	there := writeFile(t, t.TempDir(), "file", nil)
	for _, c := range []struct {
		files tlsFiles
		want  []string
	}{
		{tlsFiles{}, nil},
		{tlsFiles{Cert: there, Key: there, ClientCA: there}, nil},
		{tlsFiles{Cert: there}, []string{"--x-cert and --x-key: want both"}},
		{tlsFiles{Key: there}, []string{"--x-cert and --x-key: want both"}},
		{tlsFiles{ClientCA: there}, []string{"--x-client-ca: needs --x-cert"}},
		{tlsFiles{Cert: "/nowhere", Key: there}, []string{"--x-cert: open /nowhere"}},
	} {
		got := c.files.problems("--x-")
		if len(got) != len(c.want) || len(got) == 1 && !strings.HasPrefix(got[0].Error(), c.want[0]) {
			t.Errorf("%+v: got %v, want %v", c.files, got, c.want)
		}
	}
}

// A changed pair is taken into use; one that cannot serve is not, and shows until it is mended.
func TestCertificatesAreReloaded(t *testing.T) {
	dir := t.TempDir()
	first, firstKey, _ := self.Issue(t, "first", nil)
	second, secondKey, _ := self.Issue(t, "second", nil)
	files := tlsFiles{Cert: writeFile(t, dir, "cert", first), Key: writeFile(t, dir, "key", firstKey)}
	var log bytes.Buffer
	c, err := newCertificates("public", files, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c.now = func() time.Time { return now }
	is := func(name string, taken, failed uint64, failing bool) {
		t.Helper()
		r := c.report()
		if r.Subject != "CN="+name || c.taken != taken || c.failed != failed || (r.Problem != "") != failing {
			t.Errorf("want %s, taken %d, failed %d, failing %v; got %+v, %d, %d", name, taken, failed, failing, r, c.taken, c.failed)
		}
	}
	_ = c.reload(false)
	is("first", 0, 0, false)

	writeFile(t, dir, "cert", second) // its key comes later, as files are written one after the other
	for range 3 {                     // and is looked at in between, counted and logged once
		if err := c.reload(false); err == nil {
			t.Error("a certificate was taken with another's key")
		}
	}
	is("first", 0, 1, true)
	if n := strings.Count(log.String(), "stays in use"); n != 1 {
		t.Errorf("it was logged %d times", n)
	}
	writeFile(t, dir, "key", secondKey)
	if err := c.reload(false); err != nil {
		t.Error(err)
	}
	is("second", 1, 1, false)

	files.Cert = writeFile(t, dir, "cert", []byte("garbage"))
	_ = c.reload(false)
	is("second", 1, 2, true)
	writeFile(t, dir, "cert", second) // put back
	_ = c.reload(false)
	is("second", 2, 2, false)
	_ = c.reload(true) // SIGHUP takes the same again
	is("second", 3, 2, false)

	// Its end is warned of ahead, once a day.
	for _, step := range []struct {
		after time.Duration
		ends  bool
		lines int
	}{{75 * 24 * time.Hour, false, 0}, {77 * 24 * time.Hour, true, 1}, {77*24*time.Hour + time.Hour, true, 1}, {79 * 24 * time.Hour, true, 2}, {100 * 24 * time.Hour, true, 3}} {
		now = time.Now().Add(step.after)
		_ = c.reload(false)
		if c.report().Ends != step.ends || strings.Count(log.String(), "near its end") != step.lines {
			t.Errorf("after %v: %+v, %d warnings, want %v, %d", step.after, c.report(), strings.Count(log.String(), "near its end"), step.ends, step.lines)
		}
	}
}

// A connection does not outlive the authority that its certificate was taken for, nor the certificate.
func TestClientsAreAdmittedByWhatHoldsNow(t *testing.T) {
	server, serverKey, _ := self.Issue(t, "server", nil)
	ca, _, a := self.Issue(t, "a", certtest.Authority)
	otherCA, _, _ := self.Issue(t, "b", certtest.Authority)
	_, _, client := a.Issue(t, "client", nil)
	state := &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{client.Cert, a.Cert}}}
	load := func(ca []byte) *identity {
		id, err := loadIdentity(server, serverKey, ca, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	for name, c := range map[string]struct {
		id    *identity
		state *tls.ConnectionState
		at    time.Time
		want  bool
	}{
		"its authority":               {load(ca), state, time.Now(), true},
		"with another":                {load(append(bytes.Clone(otherCA), ca...)), state, time.Now(), true},
		"another alone":               {load(otherCA), state, time.Now(), false},
		"none asked for":              {load(nil), state, time.Now(), true},
		"it has ended":                {load(ca), state, time.Now().Add(91 * 24 * time.Hour), false},
		"asked for since, none shown": {load(ca), &tls.ConnectionState{}, time.Now(), false},
		"no TLS":                      {load(ca), nil, time.Now(), false},
	} {
		if got := c.id.admits(c.state, c.at); got != c.want {
			t.Errorf("%s: admitted is %v", name, got)
		}
	}
}
