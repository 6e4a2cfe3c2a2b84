package browsertest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// deployment is a vault, the chat app, and what stands between.
type deployment struct {
	t       *testing.T
	vaultDB *storetest.Database
	chatDB  *storetest.Database
	vaultd  *process
	chatapp *process
	env     []string // of chatapp
	front   *link    // between browser and chatapp
	back    *link    // between chatapp and vaultd
	url     string   // of the page
}

const tenant = "chat"

// deploy starts everything. Delays are the vault's defaults unless given.
func deploy(t *testing.T, tenantArgs ...string) *deployment {
	t.Helper()
	needBrowser(t)
	d := &deployment{t: t, vaultDB: storetest.New(t), chatDB: storetest.Empty(t)}
	dir, tokens := t.TempDir(), tokentest.NewDirectory(t)
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	env := []string{
		tokens.Env(), "BKV_TOKEN_MODULE=" + tokens.Module, "BKV_TOKEN_PIN_FILE=" + file("pin", "pin-Quetzal-58"),
		"BKV_TOKEN_SO_PIN_FILE=" + file("so-pin", "so-pin-Axolotl-77"), "BKV_VAULT_ID=browser.vault",
		"BKV_DATABASE_URL_FILE=" + file("owner.url", d.vaultDB.OwnerURL),
	}
	run(t, env, "vaultctl", "token", "init")
	run(t, env, "vaultctl", "migrate")
	run(t, env, "vaultctl", "dev", "key", dir+"/tenant.key")
	run(t, env, "vaultctl", append([]string{"tenant", "add", tenant}, tenantArgs...)...)
	run(t, env, "vaultctl", "tenant", "key", "add", tenant, "--kid=1", "--public-key="+dir+"/tenant.key.pub")
	fingerprint := strings.TrimSpace(run(t, env, "vaultctl", "identity"))

	vaultdEnv := append(slices.Clone(env), "BKV_DATABASE_URL_FILE="+file("vaultd.url", d.vaultDB.RuntimeURL),
		"BKV_LISTEN=127.0.0.1:0", "BKV_ADMIN_LISTEN=127.0.0.1:0", "BKV_LOG_LEVEL=debug", "BKV_ENROLMENTS_PER_USER=1000", "BKV_REQUESTS_PER_USER=100000")
	d.vaultd = start(t, vaultdEnv, "vaultd")
	d.back = newLink(t, d.vaultd.listen)
	d.env = []string{
		"CHATAPP_DATABASE_URL_FILE=" + file("chat.url", d.chatDB.OwnerURL), "CHATAPP_SDK=" + sdk,
		"CHATAPP_VAULT_URL=" + d.back.url, "CHATAPP_VAULT_ID=browser.vault", "CHATAPP_FINGERPRINT=" + fingerprint,
		"CHATAPP_TENANT=" + tenant, "CHATAPP_KID=1", "CHATAPP_KEY=" + dir + "/tenant.key",
	}
	d.chatapp = start(t, append(slices.Clone(d.env), "CHATAPP_LISTEN=127.0.0.1:0"), "chatapp")
	d.front = newLink(t, d.chatapp.listen)
	// Passkeys need a name, and take no address.
	d.url = strings.Replace(d.front.url, "127.0.0.1", "localhost", 1)
	return d
}

// restartChatapp ends the back end in whatever state it is, and starts it where it was.
func (d *deployment) restartChatapp() {
	d.t.Helper()
	d.chatapp.kill()
	d.chatapp = start(d.t, append(slices.Clone(d.env), "CHATAPP_LISTEN="+d.chatapp.listen), "chatapp")
}

// program makes a command of ours, which dies with the tests.
func program(ctx context.Context, env []string, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, name), args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := program(ctx, env, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, &stderr)
	}
	return string(out)
}

// process is a running server.
type process struct {
	listen string
	cmd    *exec.Cmd
	exited chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *process) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.exited
}

// start starts a server, and waits until it says where it listens.
func start(t *testing.T, env []string, name string) *process {
	t.Helper()
	p := &process{exited: make(chan struct{})}
	p.cmd = program(context.Background(), env, name)
	p.cmd.Stderr = p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait() // the state tells
	}()
	t.Cleanup(func() {
		p.kill()
		log := p.String()
		for _, sign := range []string{"DATA RACE", "goroutine ", "panic"} {
			if strings.Contains(log, sign) {
				t.Errorf("%q in %s's log:\n%s", sign, name, log)
			}
		}
		if t.Failed() {
			lines := strings.SplitAfter(log, "\n")
			t.Logf("the end of %s's log:\n%s", name, strings.Join(lines[max(0, len(lines)-15):], ""))
		}
	})
	eventually(t, name+" serves", func() bool {
		select {
		case <-p.exited:
			t.Fatalf("%s ended: %s", name, p)
		default:
		}
		for line := range strings.Lines(p.String()) {
			var record struct{ Msg, Listen string }
			if json.Unmarshal([]byte(line), &record) == nil && record.Msg == "serving" {
				p.listen = record.Listen
			}
		}
		return p.listen != ""
	})
	return p
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", patience, what)
		}
	}
}

// verdict is what a link does with a request.
type verdict int

const (
	pass        verdict = iota
	loseRequest         // it never arrives
	loseAnswer          // it arrives, and the answer does not
	unavailable         // 503, as a vault says it whose token is gone
)

// link forwards requests, and records them.
type link struct {
	url    string
	decide atomic.Pointer[func(*http.Request) verdict]
	edit   atomic.Pointer[func(path string, body []byte) []byte]

	mu       sync.Mutex
	requests []string // method and path
	traffic  bytes.Buffer
}

func newLink(t *testing.T, to string) *link {
	t.Helper()
	l := &link{}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: to})
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { hangUp(w) }
	proxy.ModifyResponse = func(r *http.Response) error {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		if edit := l.edit.Load(); edit != nil && r.Header.Get("Content-Encoding") == "" {
			body = (*edit)(r.Request.URL.Path, body)
			r.Header.Set("Content-Length", fmt.Sprint(len(body)))
			r.ContentLength = int64(len(body))
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		return nil
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			hangUp(w)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		l.mu.Lock()
		l.requests = append(l.requests, r.Method+" "+r.URL.Path)
		l.traffic.WriteString(r.URL.String())
		l.traffic.Write(body)
		l.mu.Unlock()
		v := pass
		if decide := l.decide.Load(); decide != nil {
			v = (*decide)(r)
		}
		switch v {
		case loseRequest:
			hangUp(w)
		case loseAnswer:
			proxy.ServeHTTP(httptest.NewRecorder(), r)
			hangUp(w)
		case unavailable:
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, `{"type":"urn:bkv:problem:token-unavailable","title":"Token unavailable","status":503}`)
		default:
			proxy.ServeHTTP(w, r)
		}
	}))
	// A browser's connections would keep it waiting.
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	l.url = server.URL
	return l
}

func hangUp(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		_ = conn.Close()
	}
}

// set decides about requests from now on; nil lets all pass.
func (l *link) set(decide func(*http.Request) verdict) {
	if decide == nil {
		l.decide.Store(nil)
		return
	}
	l.decide.Store(&decide)
}

// hold keeps requests about backups waiting, until it is released.
func (l *link) hold() (release func()) {
	held := make(chan struct{})
	l.set(func(r *http.Request) verdict {
		if about(r) {
			<-held
		}
		return pass
	})
	return func() {
		l.set(nil)
		close(held)
	}
}

// sent returns what was sent since it was last called, without what the page asks by the clock.
func (l *link) sent() (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.requests {
		if r != "GET /api/messages" {
			out = append(out, r)
		}
	}
	l.requests = nil
	return out
}

// dump is everything that a database holds, and every request that a link saw.
func (d *deployment) dump() map[string][]byte {
	d.t.Helper()
	out := map[string][]byte{"chatapp's log": []byte(d.chatapp.String()), "vaultd's log": []byte(d.vaultd.String())}
	for name, db := range map[string]*storetest.Database{"the chat app's database": d.chatDB, "the vault's database": d.vaultDB} {
		out[name] = dumpDatabase(d.t, db)
	}
	for name, l := range map[string]*link{"what the browser sent": d.front, "what the vault was sent": d.back} {
		l.mu.Lock()
		out[name] = bytes.Clone(l.traffic.Bytes())
		l.mu.Unlock()
	}
	return out
}
