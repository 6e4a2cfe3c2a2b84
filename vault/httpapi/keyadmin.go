package httpapi

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strconv"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// NewKeyAdmin makes the handler of the admin listener for the token's keys. Whoever
// reaches it is taken for an operator; requests that a web page makes from an operator's browser are refused.
//
//	GET  /keys/                                all keys, and what is to be done
//	POST /keys/{purpose}/rotate                the next generation is used from now on
//	POST /keys/{purpose}/{generation}/destroy  one that nothing needs is destroyed
//	POST /keys/tokens/{serial}/forget          a token that is not used any more holds nothing up
//
// Refusals are 400 and 409, faults 503, as {"error": …}. Each request can be sent again.
func NewKeyAdmin(log *slog.Logger, rotation *vault.Rotation) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, do func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := do(claimOperator(r))
			if err == nil {
				writeAdmin(w, http.StatusOK, answer)
				return
			}
			status, text := keyProblem(err)
			log.ErrorContext(r.Context(), "key administration", "path", r.URL.Path, "status", status, "error", err)
			writeAdmin(w, status, struct {
				Error string `json:"error"`
			}{text})
		})
	}
	handle("GET /keys/{$}", func(r *http.Request) (any, error) {
		status, err := rotation.Status(r.Context())
		if err != nil {
			return nil, err
		}
		return wireKeyStatus(status), nil
	})
	handle("POST /keys/{purpose}/rotate", func(r *http.Request) (any, error) {
		key, err := rotation.Rotate(r.Context(), r.PathValue("purpose"))
		return api.RotatedKey(key), err
	})
	handle("POST /keys/{purpose}/{generation}/destroy", func(r *http.Request) (any, error) {
		generation, err := strconv.ParseUint(r.PathValue("generation"), 10, 32)
		if err != nil {
			return nil, &vault.InvalidRequest{Field: "generation", Reason: "want a number from 1 on"}
		}
		key := vault.Key{Purpose: r.PathValue("purpose"), Generation: uint32(generation)}
		return api.RotatedKey(key), rotation.Destroy(r.Context(), key)
	})
	handle("POST /keys/tokens/{serial}/forget", func(r *http.Request) (any, error) {
		serial := r.PathValue("serial")
		return api.ForgottenToken{Token: serial}, rotation.ForgetToken(r.Context(), serial)
	})
	return http.NewCrossOriginProtection().Handler(mux)
}

// claimOperator has the events of a request say who asked: whoever a certificate proved, or who the request says it is, with
// the address that it came from.
func claimOperator(r *http.Request) *http.Request {
	if vault.OperatorOf(r.Context()) != "" {
		return r
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	who := "somebody at " + host
	if claimed := r.Header.Get(api.OperatorHeader); claimed != "" {
		who = claimed + " (unproven) at " + host
	}
	return r.WithContext(vault.WithOperator(r.Context(), who))
}

// keyProblem says to an operator what is wrong. Operators see causes, which hold no secrets; tenants never do.
func keyProblem(err error) (status int, text string) {
	var invalid *vault.InvalidRequest
	var refused *vault.KeyRefusal
	switch {
	case errors.As(err, &invalid):
		return http.StatusBadRequest, invalid.Error()
	case errors.As(err, &refused):
		return http.StatusConflict, refused.Reason
	case errors.Is(err, vault.ErrTokenUnavailable), errors.Is(err, vault.ErrStoreUnavailable):
		return http.StatusServiceUnavailable, err.Error()
	default:
		return http.StatusInternalServerError, err.Error()
	}
}

func wireKeyStatus(s *vault.KeyStatus) *api.KeyStatus {
	out := &api.KeyStatus{
		Now: s.Now, Token: s.Token, Tokens: s.Tokens, Keys: []api.TokenKey{},
		RewrapLeft: s.RewrapLeft, Rewrapping: s.Rewrapping != "", OldestUncovered: timeOrNil(s.OldestUncovered),
		Warnings: append([]string{}, s.Warnings...),
	}
	for i := range s.Keys {
		k := &s.Keys[i]
		wire := api.TokenKey{
			Purpose: k.Purpose, Generation: k.Generation, State: string(k.State), CreatedAt: k.CreatedAt,
			CurrentSince: timeOrNil(k.CurrentSince), RetiredAt: timeOrNil(k.RetiredAt), DestroyedAt: timeOrNil(k.DestroyedAt),
			RewrappedAt: timeOrNil(k.RewrappedAt), Seals: k.Seals, Records: k.Dependents, Tokens: []string{},
		}
		for _, t := range k.Tokens {
			if !t.Gone && !t.Left {
				wire.Tokens = append(wire.Tokens, t.Serial)
			}
		}
		out.Keys = append(out.Keys, wire)
	}
	return out
}
