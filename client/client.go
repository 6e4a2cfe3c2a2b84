package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// Config is what a Client is made of. All fields are required but those that name a default.
type Config struct {
	// Transport ends at the vault, or at an app's back end that forwards to it GET /v1/vault and POST /v1/relay,
	// the latter under a token of its own for the user if it likes.
	Transport Transport
	// Direct sends requests as they are, and not in capsules over the relay channel. Then the Transport must end at
	// the vault, or at somebody who is trusted with passwords; and the vault takes enrolments only if its operator
	// has declared the tenant direct-enrolment. It is for development, and for back ends that speak for their users.
	Direct bool
	// Fingerprint is what the vault is known by. It comes with the app, or from a
	// person who read it off the vault; never from the connection that it is to check.
	Fingerprint transcript.Fingerprint
	// Tenant is the app and User one of its users, byte for byte as the vault knows
	// them: no case folding, no normalisation. Both are bound into the record, so
	// neither can change later.
	Tenant, User string
	// Token returns a JWT for the user, for instance from the app's back end. It is called
	// again after the vault refused one, and must return a fresh one each time; the
	// Client keeps a token while it works. It may be called concurrently.
	Token func(context.Context) (string, error)
	// KSF stretches the passwords of enrolments and password changes from now on:
	// opaque.DefaultArgon2id by default. Less than that in passes or memory is refused.
	KSF opaque.Argon2id
	// LastSerial is what Serial returned when the app ran last; 0 if it never did.
	// With it an old key list is not believed even after a restart.
	LastSerial uint64
	// Random is crypto/rand.Reader by default. It must be safe for concurrent use.
	Random io.Reader
	// Now tells the time that key lists are checked against; time.Now by default.
	Now func() time.Time
}

// Client speaks to one vault for one user. It is safe for concurrent use.
type Client struct {
	transport    Transport
	direct       bool
	fingerprint  transcript.Fingerprint
	tenant, user string
	resource     string // escaped path of the user's backup key
	token        *tokenCache
	ksf          opaque.Argon2id
	random       io.Reader
	now          func() time.Time

	mu     sync.Mutex // serial never goes back, and vault is never older than serial; not held over a request
	serial uint64
	vault  *vaultIdentity // nil until it was fetched
}

// New checks the configuration. It sends nothing.
func New(c Config) (*Client, error) {
	switch {
	case c.Transport == nil:
		return nil, errors.New("a client needs a transport")
	case c.Fingerprint == transcript.Fingerprint{}:
		return nil, errors.New("a client needs the vault's fingerprint: without it anybody could pass for the vault")
	case c.Tenant == "" || c.User == "":
		return nil, errors.New("a client needs a tenant and a user")
	case !utf8.ValidString(c.User):
		return nil, errors.New("the user is not valid UTF-8")
	case c.Token == nil:
		return nil, errors.New("a client needs a source of tokens")
	}
	if c.KSF == (opaque.Argon2id{}) {
		c.KSF = opaque.DefaultArgon2id
	}
	if err := c.KSF.Validate(); err != nil {
		return nil, fmt.Errorf("key stretching: %w", err)
	}
	if c.Random == nil {
		c.Random = rand.Reader
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Client{
		transport: c.Transport, direct: c.Direct, fingerprint: c.Fingerprint, tenant: c.Tenant, user: c.User,
		resource: "/v1/users/" + escapeSegment(c.User) + "/backup-key",
		token:    &tokenCache{source: c.Token},
		ksf:      c.KSF, random: c.Random, now: c.Now, serial: c.LastSerial,
	}, nil
}

// Format prints for whom the client is: fmt would else go down to the token.
func (c *Client) Format(f fmt.State, _ rune) {
	_, _ = fmt.Fprintf(f, "vault client for a user of %q", c.tenant)
}

// escapeSegment writes a user id as one path segment. Dots alone would be taken for a
// step up the path.
func escapeSegment(s string) string {
	if s == "." || s == ".." {
		return strings.ReplaceAll(s, ".", "%2E")
	}
	return url.PathEscape(s)
}

// Status is what the vault knows of the user's backup key. It charges nothing. The
// generations are checked no further than that they could be decoded.
//
// Errors: ErrNotEnrolled, and those of every operation: ErrWrongVault, ErrStaleKeys, ErrNoRelayKey,
// ErrUnauthenticated, ErrForbidden, ErrWrongTenant, *RateLimitedError, ErrRelay, ErrUnavailable, ErrBadResponse,
// *Problem, and the context's.
func (c *Client) Status(ctx context.Context) (*api.Status, error) {
	// Who the vault is comes first: not even the token goes to another one.
	if _, err := c.identity(ctx); err != nil {
		return nil, err
	}
	s := &api.Status{}
	if err := c.call(ctx, "GET", c.resource, nil, s); err != nil {
		return nil, fmt.Errorf("asking for the status: %w", err)
	}
	if s.Tenant != c.tenant { // no attempt could succeed
		return nil, fmt.Errorf("%w: the token's is %q, this client's %q", ErrWrongTenant, s.Tenant, c.tenant)
	}
	return s, nil
}

// States of a generation on the wire.
const (
	stateActive    = "active"
	stateFrozen    = "frozen"
	stateDestroyed = "destroyed"
)

// find returns the first generation in a state, or nil.
func find(s *api.Status, state string) *api.Generation {
	for i := range s.Generations {
		if s.Generations[i].State == state {
			return &s.Generations[i]
		}
	}
	return nil
}

// active returns the active generation, or says why there is none.
func active(s *api.Status) (*api.Generation, error) {
	if g := find(s, stateActive); g != nil {
		return g, nil
	}
	if find(s, stateFrozen) != nil {
		return nil, ErrFrozen
	}
	if g := find(s, stateDestroyed); g != nil && (g.Reason == "exhausted" || g.Reason == "failures") {
		return nil, ErrKeyDestroyed
	}
	return nil, ErrNotEnrolled
}
