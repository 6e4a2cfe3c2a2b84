package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/ohttp"
)

// Every request is made once and then sent as often as it takes: the same bytes,
// which the vault takes for the same request. Only faults are tried again, where the
// request or its answer may have been lost. A refusal is an answer; in particular 429 is
// never tried again by itself, because its waits are a person's to know of.
const (
	maxTries = 4
	// firstBackoff is doubled after each try, and half of each is chance, so that
	// devices which failed together do not come back together.
	firstBackoff = 250 * time.Millisecond
	// maxRetryAfter is the longest wait that the vault can ask for within an operation.
	maxRetryAfter = 10 * time.Second
)

// call sends a request with the user's token and decodes the answer into out.
func (c *Client) call(ctx context.Context, method, path string, body []byte, out any) error {
	token, err := c.token.get(ctx, "")
	if err != nil {
		return err
	}
	r := &Request{Method: method, Path: path, Body: body, Header: map[string]string{}}
	if body != nil {
		r.Header["content-type"] = "application/json"
	}
	if c.direct {
		return c.send(ctx, r, token, nil, out)
	}
	v, err := c.identity(ctx)
	if err != nil {
		return err
	}
	return c.send(ctx, r, token, v.relay, out)
}

var errNothing = errors.New("the transport returned neither an answer nor an error")

// send is call for a request with this token, or with none if it is empty, in a capsule to this key, or as it is if that
// is nil.
//
// Errors: the context's; ErrUnavailable after the last try; what refusal makes of an
// answer; ErrBadResponse; ErrRelay; when the relay key is fetched again, those of fetchIdentity.
func (c *Client) send(ctx context.Context, r *Request, token string, key *ohttp.KeyConfig, out any) error {
	r.Header["accept"] = "application/json"
	for try, renewed, refreshed := 1, false, false; ; try++ {
		if token != "" {
			r.Header["authorization"] = "Bearer " + token
		}
		response, err := c.roundTrip(ctx, r, key)
		wait := backoff(try)
		var outside *outsideError
		switch {
		case err == nil && response == nil:
			return errNothing
		case err != nil && ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errRelayKey) && !refreshed:
			v, err := c.fetchIdentity(ctx)
			if err != nil {
				return err
			}
			key, refreshed = v.relay, true
			try-- // a key that ran out is no fault
			continue
		case errors.As(err, &outside) && outside.answer.Status == 401 && token != "" && !renewed:
			if token, err = c.token.get(ctx, token); err != nil {
				return err
			}
			renewed = true
			try-- // as below
			continue
		case outside != nil:
			var again bool
			p := outside.problem()
			if err, again = p.again(err, outside.refusal()); !again {
				return err
			}
			wait += p.wait()
		case err != nil:
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		case len(response.Body) > MaxResponseBytes:
			return fmt.Errorf("%w: over %d bytes", ErrBadResponse, MaxResponseBytes)
		case response.Status >= 200 && response.Status < 300:
			// Members that this version does not know are a newer vault's, and passed over.
			if err := json.Unmarshal(response.Body, out); err != nil {
				return fmt.Errorf("%w: not the JSON that was expected", ErrBadResponse)
			}
			return nil
		case response.Status == 401 && token != "" && !renewed:
			if token, err = c.token.get(ctx, token); err != nil {
				return err
			}
			renewed = true
			try-- // a token that ran out is no fault
			continue
		default:
			var again bool
			p := problemOf(response)
			if err, again = p.again(p, refusal(response)); !again {
				return err
			}
			wait += p.wait()
		}
		if try == maxTries {
			return err
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

// fault reports whether the request was not carried out, or perhaps not, and may be
// when it is sent again. An account fault stays until somebody looks at it.
func (p *Problem) fault() bool {
	return p.Status == 502 || p.Status == 503 && p.Type != api.AccountFault || p.Status == 504
}

// again reports whether the request may be sent again within this operation, after p.wait(): after a fault, and where too many
// came in a short time. It returns the error for when that does not help.
func (p *Problem) again(fault, refusal error) (error, bool) {
	soon := p.wait() <= maxRetryAfter
	if p.fault() {
		return fmt.Errorf("%w: %w", ErrUnavailable, fault), soon
	}
	return refusal, soon && p.Type == api.RateLimited
}

func backoff(try int) time.Duration {
	d := firstBackoff << (try - 1)
	return d/2 + rand.N(d/2)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
