package vault

import (
	"context"

	"github.com/backup-key-vault/bkv/opaque"
)

// ExpectedKE3 reads the right KE3 out of a recovery state, so that tests of many
// thousand runs need not stretch and unblind.
func (v *Vault) ExpectedKE3(ctx context.Context, id AccountID, state []byte) (opaque.KE3, error) {
	_, r, err := v.openState(ctx, labelRecoveryState, id, state)
	if err != nil {
		return opaque.KE3{}, err
	}
	var s recoveryState
	if err := s.decode(r); err != nil {
		return opaque.KE3{}, err
	}
	return opaque.KE3(s.expect.ClientMAC), nil
}

// Tick is what Run does every few seconds.
func (r *Rotation) Tick(ctx context.Context) error { return r.tick(ctx) }
