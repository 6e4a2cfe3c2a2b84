package httpapi

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// problemKinds gives each problem type its status and title.
var problemKinds = map[string]struct {
	status int
	title  string
}{
	api.InvalidRequest:   {http.StatusBadRequest, "The request is not valid"},
	api.Unauthenticated:  {http.StatusUnauthorized, "A valid token is needed"},
	api.Forbidden:        {http.StatusForbidden, "Not allowed"},
	api.WrongPassword:    {http.StatusForbidden, "Wrong password"},
	api.RelayRequired:    {http.StatusForbidden, "Not on this route"},
	api.OHTTPKey:         {http.StatusBadRequest, "The relay key is not known, or not any more"},
	api.NotEnrolled:      {http.StatusNotFound, "No backup key is enrolled"},
	api.NotFound:         {http.StatusNotFound, "No such resource"},
	api.MethodNotAllowed: {http.StatusMethodNotAllowed, "The resource does not have this method"},
	api.Conflict:         {http.StatusConflict, "The request does not fit the account's state"},
	api.KeyDestroyed:     {http.StatusGone, "The backup key is destroyed"},
	api.TooLarge:         {http.StatusRequestEntityTooLarge, "The body is too large"},
	api.MediaType:        {http.StatusUnsupportedMediaType, "The body's media type is not supported"},
	api.TooEarly:         {http.StatusTooManyRequests, "Too early for the next attempt"},
	api.RateLimited:      {http.StatusTooManyRequests, "Too many requests"},
	api.Internal:         {http.StatusInternalServerError, "Internal error"},
	api.TokenUnavailable: {http.StatusServiceUnavailable, "The vault's token is not available"},
	api.StoreUnavailable: {http.StatusServiceUnavailable, "The vault's store is not available"},
	api.Busy:             {http.StatusServiceUnavailable, "The vault has too much to do"},
	api.AccountFault:     {http.StatusServiceUnavailable, "The account's record is damaged"},
}

// refusal is an answer other than success. It is the one error type of this package.
type refusal struct {
	problem api.Problem
	header  http.Header // besides what every answer has
	// cause is for the log alone.
	cause error
	// gone: the client left before the answer.
	gone bool
}

func (r *refusal) Error() string { return r.problem.Type + ": " + r.problem.Detail }

// refuse makes a problem of the given type.
func refuse(kind, detail string) *refusal {
	k := problemKinds[kind]
	return &refusal{
		problem: api.Problem{Type: kind, Title: k.title, Status: k.status, Detail: detail},
		header:  http.Header{},
	}
}

// invalid refuses one member or parameter of a request; field may be empty.
func invalid(field, detail string) *refusal {
	r := refuse(api.InvalidRequest, detail)
	r.problem.Field = field
	return r
}

// after tells the client when to come again, in whole seconds, rounded up.
func (r *refusal) after(wait time.Duration) *refusal {
	seconds := max(1, int64((wait+time.Second-1)/time.Second))
	r.problem.RetryAfter = &seconds
	r.header.Set("Retry-After", strconv.FormatInt(seconds, 10))
	return r
}

func (r *refusal) because(cause error) *refusal {
	r.cause = cause
	return r
}

// faultRetry is how soon a request that met a fault may be sent again.
const faultRetry = 2 * time.Second

// refusalOf translates an error of the domain. ctx is the request's own, before its
// time-out was put on it: only if that is cancelled has the client gone.
//
// The order matters: a refusal of the domain first, then a client that left (its
// cancelled context makes store and token fail), then faults, then a time-out by
// itself; what is left is unknown and said to nobody but the log.
func refusalOf(ctx context.Context, err error) *refusal {
	var (
		own      *refusal
		bad      *vault.InvalidRequest
		conflict *vault.Conflict
		wrong    *vault.WrongPassword
		early    *vault.TooEarly
	)
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &bad):
		return invalid(bad.Field, bad.Reason)
	case errors.As(err, &conflict):
		return refuse(api.Conflict, conflict.Reason)
	case errors.As(err, &wrong):
		r := refuse(api.WrongPassword, "the password is wrong; the attempt was counted when it was started")
		r.problem.AttemptsLeft = &wrong.AttemptsLeft
		r.problem.NextAttemptAt = timeOrNil(wrong.NextAttempt)
		return r
	case errors.As(err, &early):
		r := refuse(api.TooEarly, "no attempt is answered before next_attempt_at; this one was not counted").after(early.Wait)
		r.problem.NextAttemptAt = timeOrNil(early.Next)
		return r
	case errors.Is(err, vault.ErrBadSignature):
		return refuse(api.Forbidden, "the owner's signature does not verify")
	case errors.Is(err, vault.ErrNotEnrolled):
		return refuse(api.NotEnrolled, "this user has no backup key in the vault")
	case errors.Is(err, vault.ErrKeyDestroyed):
		return refuse(api.KeyDestroyed, "the backup key is gone for good; enrol a new one")
	case errors.Is(err, vault.ErrAccountFault):
		// The domain has logged what is wrong with the row.
		return refuse(api.AccountFault, "the stored account is not what the vault wrote; nothing was done with it; the vault's operator must look at it")

	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		r := refuse(api.StoreUnavailable, "the request was given up").after(faultRetry).because(err)
		r.gone = true
		return r
	case errors.Is(err, vault.ErrTokenUnavailable):
		return refuse(api.TokenUnavailable, sendAgain).after(faultRetry).because(err)
	case errors.Is(err, vault.ErrStoreUnavailable), errors.Is(err, context.DeadlineExceeded):
		return refuse(api.StoreUnavailable, sendAgain).after(faultRetry).because(err)
	default:
		return refuse(api.Internal, "the instance of this problem is the request id under which the vault logged it").because(err)
	}
}

const sendAgain = "send the same request again, byte for byte: an attempt that was counted stays open to it and is not counted twice"

func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// refuse writes a refusal.
func (s *server) refuse(w http.ResponseWriter, x *exchange, r *refusal) {
	r.problem.Instance = x.id
	x.refused = r
	body, err := json.Marshal(r.problem)
	if err != nil { // strings and numbers: it cannot, and must not recurse
		x.refused = r.because(errors.Join(r.cause, err))
		body = nil
	}
	maps.Copy(w.Header(), r.header)
	write(w, x, r.problem.Status, api.ProblemMediaType, body)
}

// kindsByStatus groups problem types for the OpenAPI document.
func kindsByStatus(kinds []string) map[int][]string {
	out := map[int][]string{}
	for _, k := range kinds {
		status := problemKinds[k].status
		if !slices.Contains(out[status], k) {
			out[status] = append(out[status], k)
		}
	}
	return out
}
