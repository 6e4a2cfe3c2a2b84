package httpapi

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

const (
	// maxTokenBytes bounds a token; one with a 4096-bit RSA signature has about 1000 bytes.
	maxTokenBytes = 4 << 10
	// tokenLifetime is the furthest that exp may lie ahead.
	tokenLifetime = 10 * time.Minute
	// clockLeeway is granted on exp, nbf and iat (RFC 7519 §4.1.4).
	clockLeeway = 30 * time.Second
)

// authority checks tenants' tokens: JWTs (RFC 7519) signed with EdDSA, ES256 or
// RS256. iss is the tenant, aud the vault, sub the user.
type authority struct {
	keys   *keyring
	parser *jwt.Parser
	now    func() time.Time
}

func newAuthority(keys *keyring, vaultID string, now func() time.Time) *authority {
	return &authority{keys: keys, now: now, parser: jwt.NewParser(
		jwt.WithValidMethods([]string{"EdDSA", "ES256", "RS256"}),
		jwt.WithStrictDecoding(),
		jwt.WithAudience(vaultID),
		jwt.WithExpirationRequired(),
		jwt.WithIssuedAt(),
		jwt.WithLeeway(clockLeeway),
		jwt.WithTimeFunc(now),
	)}
}

// identity is what a token proves.
type identity struct {
	account vault.AccountID
	policy  vault.Policy
	direct  bool // the tenant's back end is trusted with passwords
}

// claims are those that the vault reads; others may be there.
type claims struct {
	Issuer    string           `json:"iss"`
	Subject   string           `json:"sub"`
	Audience  jwt.ClaimStrings `json:"aud"`
	ExpiresAt *jwt.NumericDate `json:"exp"`
	NotBefore *jwt.NumericDate `json:"nbf"`
	IssuedAt  *jwt.NumericDate `json:"iat"`
}

// UnmarshalJSON reads claims by their exact names, none of them twice, in valid
// UTF-8. The standard library takes "SUB" for "sub", the last of several, and turns
// invalid bytes into U+FFFD: a token would name a user that its signer did not mean.
func (c *claims) UnmarshalJSON(b []byte) error {
	type plain claims
	return json.Unmarshal(b, (*plain)(c))
}

func (c *claims) GetExpirationTime() (*jwt.NumericDate, error) { return c.ExpiresAt, nil }
func (c *claims) GetIssuedAt() (*jwt.NumericDate, error)       { return c.IssuedAt, nil }
func (c *claims) GetNotBefore() (*jwt.NumericDate, error)      { return c.NotBefore, nil }
func (c *claims) GetIssuer() (string, error)                   { return c.Issuer, nil }
func (c *claims) GetSubject() (string, error)                  { return c.Subject, nil }
func (c *claims) GetAudience() (jwt.ClaimStrings, error)       { return c.Audience, nil }

var errUnknownKey = errors.New("unknown key")

// authenticate returns who sent the request. It answers an unauthenticated
// problem, or the keyring's error if the keys cannot be read.
func (a *authority) authenticate(ctx context.Context, h http.Header) (identity, error) {
	raw, err := bearer(h)
	if err != nil {
		return identity{}, err
	}
	var c claims
	var key *verifyingKey
	var unread error
	_, err = a.parser.ParseWithClaims(raw, &c, func(t *jwt.Token) (any, error) {
		// RFC 7515 §4.1.11: extensions that must be understood; none is.
		if _, critical := t.Header["crit"]; critical {
			return nil, errUnknownKey
		}
		kid, _ := t.Header["kid"].(string)
		if kid == "" || c.Issuer == "" {
			return nil, errUnknownKey
		}
		if key, unread = a.keys.find(ctx, keyName{c.Issuer, kid}); unread != nil {
			return nil, unread
		}
		if key == nil || key.public == nil || key.algorithm != t.Method.Alg() {
			return nil, errUnknownKey
		}
		return key.public, nil
	})
	switch {
	case unread != nil:
		return identity{}, unread
	case err != nil:
		return identity{}, badToken(whatIsWrong(err))
	case c.ExpiresAt.After(a.now().Add(tokenLifetime + clockLeeway)):
		return identity{}, badToken("the token expires too late; exp may be at most 10 minutes ahead")
	case c.Subject == "":
		return identity{}, badToken("the token names no user (sub)")
	}
	return identity{account: vault.AccountID{Tenant: c.Issuer, User: c.Subject}, policy: key.policy, direct: key.direct}, nil
}

// whatIsWrong says it in general terms: which key was sought and why a signature
// fails is not the caller's to know.
func whatIsWrong(err error) string {
	switch {
	case errors.Is(err, jwt.ErrTokenMalformed):
		return "the token is not a well-formed JWT"
	case errors.Is(err, jwt.ErrTokenUnverifiable), errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return "the token is not signed by a key that the vault knows for its issuer (iss, kid), with EdDSA, ES256 or RS256 as the key demands"
	case errors.Is(err, jwt.ErrTokenInvalidAudience):
		return "the token is not for this vault (aud)"
	case errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return "the token lacks one of the claims aud and exp"
	case errors.Is(err, jwt.ErrTokenExpired):
		return "the token has expired"
	case errors.Is(err, jwt.ErrTokenNotValidYet), errors.Is(err, jwt.ErrTokenUsedBeforeIssued):
		return "the token is not valid yet (nbf, iat); compare the clocks"
	default:
		return "the token is not valid"
	}
}

// bearer finds the token (RFC 6750 §2.1).
func bearer(h http.Header) (string, error) {
	values := h.Values("Authorization")
	switch {
	case len(values) == 0:
		r := refuse(api.Unauthenticated, "send the tenant's token as Authorization: Bearer")
		r.header.Set("WWW-Authenticate", "Bearer")
		return "", r
	case len(values) > 1:
		return "", badToken("there is more than one Authorization header")
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	token = strings.TrimLeft(token, " ")
	switch {
	case !ok || !strings.EqualFold(scheme, "Bearer") || token == "":
		return "", badToken("want Authorization: Bearer and one token")
	case len(token) > maxTokenBytes:
		return "", badToken("the token is too long")
	}
	for _, c := range []byte(token) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return "", badToken("the token is not a well-formed JWT")
		}
	}
	return token, nil
}

func badToken(detail string) *refusal {
	r := refuse(api.Unauthenticated, detail)
	r.header.Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	return r
}
