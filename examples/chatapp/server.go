package main

import (
	"embed"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"
)

//go:embed schema.sql
var schema string

//go:embed page
var page embed.FS

type config struct {
	db          *pgxpool.Pool
	log         *slog.Logger
	sdk         fs.FS
	tokens      tokens
	vaultURL    string
	fingerprint string
}

type server struct {
	config
	vaultClient *http.Client
	logins      logins
}

// policy lets the page load its own files and nothing else. WebAssembly needs its own word;
// eval stays forbidden.
const policy = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; " +
	"img-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

func newServer(c config) http.Handler {
	s := &server{config: c, vaultClient: &http.Client{
		Timeout:       25 * time.Second, // less than the SDK waits
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	r := chi.NewRouter()
	r.Use(s.logged, headers, http.NewCrossOriginProtection().Handler)

	r.Post("/api/accounts", s.do(s.signUp))
	r.Post("/api/session", s.do(s.signIn))
	r.Delete("/api/session", s.do(s.signOut))
	r.Get("/api/me", s.asUser(s.me))
	r.Put("/api/device-key", s.asUser(s.putDeviceKey))
	r.Get("/api/people/{name}", s.asUser(s.person))
	r.Get("/api/messages", s.asUser(s.getMessages))
	r.Post("/api/messages", s.asUser(s.postMessage))
	r.Get("/api/backup", s.asUser(s.getBackup))
	r.Get("/api/backup/blob", s.asUser(s.getBlob))
	r.Put("/api/backup", s.asUser(s.putBackup))
	r.Delete("/api/backup", s.asUser(s.deleteBackup))

	// The vault, for the page's SDK: these two and no other.
	r.Get("/vault/v1/vault", s.asUser(s.forward))
	r.Post("/vault/v1/relay", s.asUser(s.forward))

	files, err := fs.Sub(page, "page")
	if err != nil {
		panic(err) // it is compiled in
	}
	r.Get("/sdk/*", compressed(http.StripPrefix("/sdk/", http.FileServerFS(c.sdk)), c.sdk))
	r.Get("/*", http.FileServerFS(files).ServeHTTP)
	return r
}

// compressed sends NAME.gz in the place of NAME where it is there and wanted.
func compressed(next http.Handler, files fs.FS) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(path.Clean(r.URL.Path), "/sdk/")
		if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			if f, err := files.Open(name + ".gz"); err == nil {
				defer func() { _ = f.Close() }()
				if path.Ext(name) == ".wasm" {
					w.Header().Set("Content-Type", "application/wasm")
				}
				w.Header().Set("Content-Encoding", "gzip")
				_, _ = io.Copy(w, f) // the page is gone, or not
				return
			}
		}
		next.ServeHTTP(w, r)
	}
}

func headers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), microphone=(), geolocation=(), publickey-credentials-create=(self), publickey-credentials-get=(self)")
		if strings.HasPrefix(r.URL.Path, "/api/") || strings.HasPrefix(r.URL.Path, "/vault/") {
			h.Set("Cache-Control", "no-store")
		} else {
			h.Set("Cache-Control", "no-cache")
		}
		next.ServeHTTP(w, r)
	})
}

// logged writes one line for each request, which names neither user nor anything of a body.
func (s *server) logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start, out := time.Now(), &statusWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(out, r)
		s.log.Info("request", "method", r.Method, "route", chi.RouteContext(r.Context()).RoutePattern(),
			"status", out.status, "milliseconds", time.Since(start).Milliseconds())
	})
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// refusal is an answer for the user: its text can be shown.
type refusal struct {
	status int
	text   string
}

func (r *refusal) Error() string { return r.text }

func refuse(status int, text string) error { return &refusal{status, text} }

func (s *server) do(f func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		err := f(w, r)
		if err == nil {
			return
		}
		var known *refusal
		if !errors.As(err, &known) {
			if r.Context().Err() == nil {
				s.log.Error("a request failed", "error", err.Error())
			}
			known = &refusal{http.StatusServiceUnavailable, "The chat server has a problem. Please try again in a minute."}
		}
		body := map[string]string{"error": known.text}
		if known.status == http.StatusUnauthorized {
			body["type"] = "urn:bkv:problem:unauthenticated" // for the SDK, which then says the same of itself
		}
		answer(w, known.status, body)
	}
}

func (s *server) asUser(f func(http.ResponseWriter, *http.Request, account) error) http.HandlerFunc {
	return s.do(func(w http.ResponseWriter, r *http.Request) error {
		a, err := s.session(r)
		if err != nil {
			return err
		}
		return f(w, r, a)
	})
}

func answer(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		status, body = http.StatusInternalServerError, []byte(`{"error":"The chat server has a problem."}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // the page is gone, or not
}

// read decodes a request's JSON, strictly.
func read(w http.ResponseWriter, r *http.Request, limit int64, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
	d.DisallowUnknownFields()
	var tooLarge *http.MaxBytesError
	switch err := d.Decode(v); {
	case errors.As(err, &tooLarge):
		return refuse(http.StatusRequestEntityTooLarge, "That is too large.")
	case err != nil, d.More():
		return refuse(http.StatusBadRequest, "The request is malformed.")
	}
	return nil
}

// logins slows guessing at account passwords.
type logins struct {
	mu    sync.Mutex // names holds at most maxNames limiters
	names map[string]*rate.Limiter
}

const maxNames = 10_000

func (l *logins) allow(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.names == nil || len(l.names) >= maxNames {
		l.names = map[string]*rate.Limiter{}
	}
	if l.names[name] == nil {
		l.names[name] = rate.NewLimiter(rate.Every(6*time.Second), 20)
	}
	return l.names[name].Allow()
}
