package httpapi

import (
	"context"
	"net/http"
	"net/url"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// Why huma's registration is not used: what it makes of a request differs from what
// the vault owes its clients in each of its steps. It takes bodies of any or no
// content type, takes names in any case and the last of several, answers 422 and
// repeats the refused value, writes the text of unknown errors into a 500, adds
// $schema, panics where an answer does not marshal, and takes its error type from
// a package variable. Everything switched off, nothing of it would run. So an
// operation here is a few lines on chi, and huma makes what it makes well, the
// OpenAPI document, from the same types.

// operation describes a route.
type operation struct {
	method, path, id string
	summary, doc     string
	// public: no token is asked for.
	public bool
	// registration: part of an enrolment, which whoever answers it in the vault's place can guess the
	// password from. It is taken over the relay channel alone, unless the tenant trusts its back end.
	registration bool
	query        []param
	// problems are those that the handler can answer; see problemsOf for the rest.
	problems []string
	// cacheControl, if set, replaces Cache-Control: no-store.
	cacheControl string
}

// param is a query parameter.
type param struct {
	name     string
	required bool
	schema   any // a value of the type whose text form it has
	doc      string
}

// none is the body of a request that has none.
type none struct{}

// call is what a handler knows of a request besides its body.
type call struct {
	vault.Caller
	query map[string]string
}

// add registers an operation. in is decoded from the body, strictly, unless it is none.
func add[In, Out any](s *server, op operation, handle func(ctx context.Context, c call, in *In) (*Out, error)) {
	required := document[In, Out](s.document, op)
	_, bodiless := any(*new(In)).(none)
	s.router.Method(op.method, op.path, s.endpoint(op, func(w http.ResponseWriter, r *http.Request, c call) (any, error) {
		var in In
		if bodiless {
			if err := refuseBody(r); err != nil {
				return nil, err
			}
		} else {
			body, err := readBody(w, r)
			if err != nil {
				return nil, err
			}
			if err := decode(body, required, &in); err != nil {
				return nil, err
			}
		}
		giveBack, err := s.places.take(exchangeOf(r.Context()))
		if err != nil {
			return nil, err
		}
		defer giveBack()
		return handle(r.Context(), c, &in)
	}))
}

// endpoint is what all operations share: token, user, query, answer.
func (s *server) endpoint(op operation, run func(http.ResponseWriter, *http.Request, call) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := exchangeOf(r.Context())
		x.route = op.path
		if op.cacheControl != "" {
			w.Header().Set("Cache-Control", op.cacheControl)
		}
		out, err := func() (any, error) {
			c, err := s.admit(op, r, x)
			if err != nil {
				return nil, err
			}
			return run(w, r, c)
		}()
		if err != nil {
			w.Header().Set("Cache-Control", "no-store")
			s.refuse(w, x, refusalOf(x.client, err))
			return
		}
		s.answer(w, x, out)
	}
}

// admit authenticates, and checks path and query.
func (s *server) admit(op operation, r *http.Request, x *exchange) (call, error) {
	var c call
	if !op.public {
		who, err := s.caller(r, x)
		if err != nil {
			return c, err
		}
		if op.registration && x.relayed == nil && !who.direct {
			return c, refuse(api.RelayRequired, "enrolments and password changes come over the relay channel, POST /v1/relay (RFC 9458); "+
				"where the app's back end is trusted with passwords, the vault's operator can declare the tenant direct-enrolment (vaultctl tenant)")
		}
		x.tenant = who.account.Tenant
		user, err := pathUser(r)
		if err != nil {
			return c, err
		}
		if user != who.account.User {
			return c, refuse(api.Forbidden, "the token's user (sub) is not the user in the path")
		}
		if err := who.account.Validate(); err != nil {
			return c, err
		}
		if x.relayed == nil { // the capsule was counted
			if err := s.requests.take(who.account); err != nil {
				return c, err
			}
		}
		c.Caller = vault.Caller{Account: who.account, Policy: who.policy, RequestID: x.id}
	}
	var err error
	c.query, err = query(r.URL.RawQuery, op.query)
	return c, err
}

// caller is who sent the request: by its token, or, inside a capsule, by that of the capsule's sender.
func (s *server) caller(r *http.Request, x *exchange) (identity, error) {
	if x.relayed != nil {
		return *x.relayed, nil
	}
	return s.authority.authenticate(r.Context(), r.Header)
}

// pathUser is the user's segment of the path, percent-decoded exactly once: the
// router is made to see the path as it was sent (see server.ServeHTTP), so "%2F" is
// part of a user id and "%252F" is the user "%2F".
func pathUser(r *http.Request) (string, error) {
	user, err := url.PathUnescape(r.PathValue("user"))
	if err != nil {
		return "", invalid("user", "the user id is not percent-encoded correctly")
	}
	return user, nil
}
