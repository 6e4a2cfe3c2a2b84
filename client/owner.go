package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/transcript"
)

// TurnOff destroys, at once and for good, every generation that key owns, frozen or
// active: from then on the backup can be read by whoever holds the key, and by nobody else.
//
// Errors: ErrForbidden if key owns none; ErrNotEnrolled or ErrKeyDestroyed if there is nothing
// to turn off, perhaps because an earlier call did; those of Status.
func (c *Client) TurnOff(ctx context.Context, key backup.Key) error {
	status, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if _, err := active(status); err != nil && !errors.Is(err, ErrFrozen) {
		return err
	}
	owned := false
	for _, g := range status.Generations {
		if g.State != stateActive && g.State != stateFrozen {
			continue
		}
		signature, err := c.sign(ctx, key, transcript.Statement{Action: transcript.TurnOff, Old: g.ID}, g.Digest)
		if err != nil {
			return err
		}
		switch err := c.turnOff(ctx, g.ID, signature); {
		case err == nil:
			owned = true
		case !errors.Is(err, ErrForbidden):
			return err
		}
	}
	if !owned {
		return ErrForbidden
	}
	return nil
}

// TurnOffWithoutProof freezes the active generation: for a user who has lost both device and
// password. Until its time is over it can still be recovered by its id, and its owner
// can bring it back.
//
// Errors: ErrNotEnrolled or ErrKeyDestroyed if there is nothing to turn off; ErrFrozen if it is
// frozen already, perhaps because an earlier call did it; ErrConflict if another one is
// frozen besides the active one; those of Status.
func (c *Client) TurnOffWithoutProof(ctx context.Context) error {
	status, err := c.Status(ctx)
	if err != nil {
		return err
	}
	g, err := active(status)
	if err != nil {
		return err
	}
	return c.turnOff(ctx, g.ID, nil)
}

func (c *Client) turnOff(ctx context.Context, id api.GenerationID, signature []byte) error {
	path := c.resource + "?generation=" + id.String()
	if signature != nil {
		path += "&signature=" + base64.RawURLEncoding.EncodeToString(signature)
	}
	err := c.call(ctx, "DELETE", path, nil, &api.Status{})
	if errors.Is(err, ErrConflict) {
		// The vault forgets a frozen generation when it is destroyed. So if the
		// first answer was lost, the same request again is about nothing.
		status, statusErr := c.Status(ctx)
		if statusErr == nil && !lives(status, id) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("turning off: %w", err)
	}
	return nil
}

func lives(s *api.Status, id api.GenerationID) bool {
	for _, g := range s.Generations {
		if g.ID == id && g.State != stateDestroyed {
			return true
		}
	}
	return false
}

// Reinstate brings the frozen generation back, by its key. The generation that is active then
// is destroyed: it was made by somebody who could not prove to own this one.
//
// Errors: ErrForbidden if key does not own the frozen generation; ErrConflict if none is
// frozen, perhaps because an earlier call brought it back, or if the account changed
// meanwhile; those of Status.
func (c *Client) Reinstate(ctx context.Context, key backup.Key) error {
	status, err := c.Status(ctx)
	if err != nil {
		return err
	}
	frozen := find(status, stateFrozen)
	if frozen == nil {
		return fmt.Errorf("%w: no generation is frozen", ErrConflict)
	}
	if frozen.ExpiresAt == nil {
		return fmt.Errorf("%w: a frozen generation without its end", ErrBadResponse)
	}
	request := api.ReinstateRequest{Generation: frozen.ID, FrozenUntil: *frozen.ExpiresAt}
	if g := find(status, stateActive); g != nil {
		request.Replaces = g.ID
	}
	if request.Signature, err = c.sign(ctx, key, transcript.Statement{
		Action: transcript.Reinstate, Old: request.Replaces, New: frozen.ID, FrozenUntil: frozen.ExpiresAt.UnixMicro(),
	}, frozen.Digest); err != nil {
		return err
	}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if err := c.call(ctx, "POST", c.resource+"/reinstatement", body, &api.Status{}); err != nil {
		return fmt.Errorf("reinstating: %w", err)
	}
	return nil
}

// sign signs an owner's statement on this account, with a digest as the vault reports it. A false digest makes
// a signature that verifies nowhere.
func (c *Client) sign(ctx context.Context, key backup.Key, s transcript.Statement, digest []byte) ([]byte, error) {
	if len(digest) != transcript.DigestSize {
		return nil, fmt.Errorf("%w: a digest of %d bytes", ErrBadResponse, len(digest))
	}
	v, err := c.identity(ctx)
	if err != nil {
		return nil, err
	}
	s.Vault, s.Tenant, s.User, s.Digest = v.id, c.tenant, c.user, [transcript.DigestSize]byte(digest)
	return s.Sign(key.OwnerKey(v.id, c.tenant, c.user)), nil
}
