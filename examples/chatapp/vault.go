package main

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// tokens signs what the vault knows users by.
type tokens struct {
	vault, tenant, kid string
	key                crypto.PrivateKey
}

// mint makes a token for one user. The vault takes it for ten minutes at most.
func (t tokens) mint(user string) (string, error) {
	now := time.Now()
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: t.tenant, Audience: jwt.ClaimStrings{t.vault}, Subject: user,
		IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(5 * time.Minute)),
	})
	token.Header["kid"] = t.kid
	return token.SignedString(t.key)
}

// What the vault and its clients send each other is smaller.
const maxForwardBytes = 128 << 10

// forward carries a request of the page's SDK to the vault and its answer back, as they
// are: under the token of the user who is logged in, whatever the page sent. Both are
// sealed, so that nobody here can read, answer or alter them.
func (s *server) forward(w http.ResponseWriter, r *http.Request, user account) error {
	path := strings.TrimPrefix(r.URL.EscapedPath(), "/vault")
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxForwardBytes))
	if err != nil {
		return refuse(http.StatusRequestEntityTooLarge, "The request is too large.")
	}
	out, err := http.NewRequestWithContext(r.Context(), r.Method, s.vaultURL+path, bytes.NewReader(body))
	if err != nil {
		return refuse(http.StatusBadRequest, "The request cannot be forwarded.")
	}
	token, err := s.tokens.mint(user.id)
	if err != nil {
		return fmt.Errorf("signing a token: %w", err)
	}
	out.Header.Set("Authorization", "Bearer "+token)
	copyHeader(out.Header, r.Header, "Content-Type", "Accept")

	in, err := s.vaultClient.Do(out)
	if err != nil {
		if r.Context().Err() == nil {
			s.log.Warn("the vault cannot be reached", "error", withoutURL(err))
		}
		return refuse(http.StatusBadGateway, "The vault cannot be reached.")
	}
	defer func() { _ = in.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(in.Body, maxForwardBytes))
	if err != nil {
		return refuse(http.StatusBadGateway, "The vault's answer broke off.")
	}
	copyHeader(w.Header(), in.Header, "Content-Type", "Retry-After", "WWW-Authenticate", "Date")
	w.WriteHeader(in.StatusCode)
	_, _ = w.Write(answer) // the page is gone, or not
	return nil
}

func copyHeader(to, from http.Header, names ...string) {
	for _, name := range names {
		if v := from.Get(name); v != "" {
			to.Set(name, v)
		}
	}
}

// withoutURL drops what net/http writes around an error: the URL may hold the user's id.
func withoutURL(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}
