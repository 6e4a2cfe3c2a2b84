package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/crypto/argon2"
)

type account struct{ id, name string }

type credentials struct {
	Name     string `json:"name"`
	Password string `json:"password"`
}

const (
	sessionCookie  = "session"
	sessionLife    = 30 * 24 * time.Hour
	minPassword    = 8
	maxPassword    = 256
	maxSmallBody   = 4 << 10
	errNameTaken   = "This name is taken. Choose another one, or sign in."
	errWrongSignIn = "Name or account password is wrong."
)

var nameSyntax = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{1,29}$`)

// hashAccountPassword is Argon2id with OWASP's least parameters: it guards a login, where
// the server itself sees the password. A backup's password never comes here.
func hashAccountPassword(password string, salt []byte) []byte {
	return argon2.IDKey([]byte(password), salt, 2, 19*1024, 1, 32)
}

func (s *server) signUp(w http.ResponseWriter, r *http.Request) error {
	var c credentials
	if err := read(w, r, maxSmallBody, &c); err != nil {
		return err
	}
	c.Name = strings.ToLower(strings.TrimSpace(c.Name))
	switch {
	case !nameSyntax.MatchString(c.Name):
		return refuse(http.StatusBadRequest, "A name has 2 to 30 letters (a to z), digits, dots or dashes.")
	case len(c.Password) < minPassword || len(c.Password) > maxPassword:
		return refuse(http.StatusBadRequest, "An account password has 8 to 256 characters.")
	}
	salt := make([]byte, 16)
	_, _ = rand.Read(salt) // never fails
	a := account{id: rand.Text(), name: c.Name}
	_, err := s.db.Exec(r.Context(), `INSERT INTO accounts (id, name, password_hash, password_salt) VALUES ($1, $2, $3, $4)`,
		a.id, a.name, hashAccountPassword(c.Password, salt), salt)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "23505" { // unique_violation
		return refuse(http.StatusConflict, errNameTaken)
	}
	if err != nil {
		return err
	}
	return s.startSession(w, r, a)
}

func (s *server) signIn(w http.ResponseWriter, r *http.Request) error {
	var c credentials
	if err := read(w, r, maxSmallBody, &c); err != nil {
		return err
	}
	c.Name = strings.ToLower(strings.TrimSpace(c.Name))
	if !s.logins.allow(c.Name) {
		return refuse(http.StatusTooManyRequests, "Too many sign-ins. Wait a minute and try again.")
	}
	var a account
	var hash, salt []byte
	err := s.db.QueryRow(r.Context(), `SELECT id, name, password_hash, password_salt FROM accounts WHERE name = $1`, c.Name).
		Scan(&a.id, &a.name, &hash, &salt)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	// Without an account the same work is done for nothing.
	if subtle.ConstantTimeCompare(hashAccountPassword(c.Password, salt), hash) != 1 {
		return refuse(http.StatusForbidden, errWrongSignIn)
	}
	return s.startSession(w, r, a)
}

func (s *server) startSession(w http.ResponseWriter, r *http.Request, a account) error {
	token := rand.Text()
	hash := sha256.Sum256([]byte(token))
	if _, err := s.db.Exec(r.Context(), `INSERT INTO sessions (token_hash, account, expires_at) VALUES ($1, $2, now() + $3)`,
		hash[:], a.id, sessionLife); err != nil {
		return err
	}
	http.SetCookie(w, &http.Cookie{
		Name: sessionCookie, Value: token, Path: "/", MaxAge: int(sessionLife.Seconds()),
		HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: !localhost(r),
	})
	return s.me(w, r, a)
}

// localhost reports whether the page is opened on this machine, without TLS.
func localhost(r *http.Request) bool {
	return r.Host == "localhost" || strings.HasPrefix(r.Host, "localhost:") || strings.HasPrefix(r.Host, "127.0.0.1:")
}

func (s *server) signOut(w http.ResponseWriter, r *http.Request) error {
	if c, err := r.Cookie(sessionCookie); err == nil {
		hash := sha256.Sum256([]byte(c.Value))
		if _, err := s.db.Exec(r.Context(), `DELETE FROM sessions WHERE token_hash = $1 OR expires_at < now()`, hash[:]); err != nil {
			return err
		}
	}
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Path: "/", MaxAge: -1})
	answer(w, http.StatusOK, struct{}{})
	return nil
}

// session returns who is logged in.
func (s *server) session(r *http.Request) (account, error) {
	var a account
	c, err := r.Cookie(sessionCookie)
	if err != nil {
		return a, refuse(http.StatusUnauthorized, "Please sign in.")
	}
	hash := sha256.Sum256([]byte(c.Value))
	err = s.db.QueryRow(r.Context(), `SELECT a.id, a.name FROM sessions s JOIN accounts a ON a.id = s.account
		WHERE s.token_hash = $1 AND s.expires_at > now()`, hash[:]).Scan(&a.id, &a.name)
	if errors.Is(err, pgx.ErrNoRows) {
		return a, refuse(http.StatusUnauthorized, "Please sign in again.")
	}
	return a, err
}

// me is what the page needs to know: who the user is, to the app and to the vault.
func (s *server) me(w http.ResponseWriter, _ *http.Request, a account) error {
	answer(w, http.StatusOK, map[string]string{
		"name": a.name, "user": a.id, "tenant": s.tokens.tenant, "fingerprint": s.fingerprint,
	})
	return nil
}

func (s *server) putDeviceKey(w http.ResponseWriter, r *http.Request, a account) error {
	var body struct {
		Key []byte `json:"key"`
	}
	if err := read(w, r, maxSmallBody, &body); err != nil {
		return err
	}
	if len(body.Key) != 65 {
		return refuse(http.StatusBadRequest, "A device key is a P-256 point of 65 bytes.")
	}
	if _, err := s.db.Exec(r.Context(), `UPDATE accounts SET device_key = $2 WHERE id = $1`, a.id, body.Key); err != nil {
		return err
	}
	answer(w, http.StatusOK, struct{}{})
	return nil
}

// person answers what a sender needs: whether there is such a user, and the device's key.
func (s *server) person(w http.ResponseWriter, r *http.Request, _ account) error {
	name := strings.ToLower(chi.URLParam(r, "name"))
	_, key, err := s.lookUp(r.Context(), name)
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, map[string]any{"name": name, "key": key})
	return nil
}

func (s *server) lookUp(ctx context.Context, name string) (id string, key []byte, err error) {
	err = s.db.QueryRow(ctx, `SELECT id, device_key FROM accounts WHERE name = $1 AND device_key IS NOT NULL`, name).Scan(&id, &key)
	if errors.Is(err, pgx.ErrNoRows) {
		err = refuse(http.StatusNotFound, "There is nobody of this name here.")
	}
	return id, key, err
}
