package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/ohttp"
)

// purposeRelay marks the relay channel's key configurations in the key list.
const purposeRelay = "relay"

// relayKey finds the key that requests are sealed to among those that the identity key signed: the newest
// hybrid with ML-KEM-768, or nil if there is none. There is no falling back to a plain one: whoever records the
// traffic could open it when there are quantum computers.
func relayKey(listed []api.Key) (newest *ohttp.KeyConfig, err error) {
	var generation uint32
	for _, k := range listed {
		if k.Purpose != purposeRelay || newest != nil && k.Generation <= generation {
			continue
		}
		config, err := ohttp.ParseKeyConfig(k.PublicKey)
		if errors.Is(err, ohttp.ErrUnsupported) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%w: a listed relay key: %w", ErrWrongVault, err)
		}
		if config.KEM == ohttp.MLKEM768P256 {
			newest, generation = &config, k.Generation
		}
	}
	return newest, nil
}

// roundTrip sends a request as it is, or in a capsule.
func (c *Client) roundTrip(ctx context.Context, r *Request, key *ohttp.KeyConfig) (*Response, error) {
	if key == nil {
		return c.transport.RoundTrip(ctx, r)
	}
	return c.relay(ctx, r, key)
}

// errRelayKey: the vault does not have the key, or not any more.
var errRelayKey = errors.New("the vault does not know the relay key")

// outsideError is an answer of whoever is between, or of the vault before it could open the capsule. It is not
// sealed: anybody on the way could have made it. So it decides nothing, and no more is
// taken from it than that the request has to be sent again, later or with another token.
type outsideError struct{ answer *Response }

func (e *outsideError) Error() string { return "not sealed: " + e.problem().Error() }

func (e *outsideError) problem() *Problem { return problemOf(e.answer) }

// refusal is what an operation ends with.
func (e *outsideError) refusal() error {
	switch p := e.problem(); {
	case p.Status == 401 && p.Type == api.Unauthenticated:
		return p
	case p.Status == 429:
		return &RateLimitedError{Wait: p.wait()}
	default:
		return fmt.Errorf("%w (%w)", ErrRelay, e)
	}
}

// relay seals a request, has it carried, and opens the answer. Each time that it is called the capsule is another.
// Errors but errRelayKey and *outsideError mean that it is unknown whether the request arrived.
func (c *Client) relay(ctx context.Context, r *Request, key *ohttp.KeyConfig) (*Response, error) {
	inside := &ohttp.Request{Method: r.Method, Scheme: "https", Path: r.Path, Content: r.Body}
	outside := &Request{Method: "POST", Path: "/v1/relay", Header: map[string]string{
		"content-type": ohttp.RequestMediaType, "accept": ohttp.ResponseMediaType,
	}}
	for name, value := range r.Header {
		if name == "authorization" {
			outside.Header[name] = value // whose the request is, is said outside alone
			continue
		}
		inside.Header = append(inside.Header, ohttp.Field{Name: name, Value: value})
	}
	slices.SortFunc(inside.Header, func(a, b ohttp.Field) int { return strings.Compare(a.Name, b.Name) })
	message, err := inside.Encode()
	if err != nil {
		return nil, err
	}
	capsule, sealed, err := key.Seal(ohttp.Pad(message))
	if err != nil {
		return nil, err
	}
	outside.Body = capsule
	answer, err := c.transport.RoundTrip(ctx, outside)
	switch {
	case err != nil || answer == nil:
		return nil, err
	case len(answer.Body) > MaxResponseBytes:
		return answer, nil
	case answer.Status == 200:
		return openAnswer(sealed, answer.Body)
	case isKeyProblem(answer):
		return nil, errRelayKey
	default:
		return nil, &outsideError{answer}
	}
}

// openAnswer undoes what the vault did to its answer. What does not open was altered, cut off or exchanged on its
// way, and as good as lost.
func openAnswer(sealed *ohttp.Sealed, capsule []byte) (*Response, error) {
	message, err := sealed.Open(capsule)
	if err != nil {
		return nil, fmt.Errorf("the answer was altered on its way: %w", err)
	}
	answer, err := ohttp.DecodeResponse(message)
	if err != nil {
		return nil, err
	}
	out := &Response{Status: answer.Status, Header: map[string]string{}, Body: answer.Content}
	for _, f := range answer.Header {
		if _, first := out.Header[f.Name]; !first {
			out.Header[f.Name] = f.Value
		}
	}
	return out, nil
}

func isKeyProblem(r *Response) bool {
	var p api.Problem
	return r.Status == 400 && json.Unmarshal(r.Body, &p) == nil && p.Type == api.OHTTPKey
}
