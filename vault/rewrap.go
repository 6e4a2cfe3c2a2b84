package vault

import (
	"context"
	"errors"
	"fmt"
)

// Rewrap moves what older keys hold to the keys in use: it opens every record that is sealed under an
// older master key and seals it anew, and makes the MAC of every row that carries
// an older key's. The relay key's seeds are moved likewise, first. A record that is destroyed by then is erased and not sealed anew. Each account is changed as any other change is, by a
// compare-and-swap on its MAC, so that traffic goes on, any number of instances can rewrap at once,
// and a run that is cut short at any point is completed by the next. No counter is touched.
//
// pace is called before each account and can hold Rewrap back; its error ends it. Accounts that
// cannot be moved are passed over. It returns how many accounts were moved and how many were not, and the
// first error that explains why.
func (v *Vault) Rewrap(ctx context.Context, pace func(context.Context) error) (moved, failed int, err error) {
	if err := v.rewrapRelaySeeds(ctx); err != nil {
		return 0, 0, err
	}
	for _, purpose := range []string{purposeMaster, purposeMAC} {
		for _, generation := range v.token.Generations(purpose) {
			if generation >= v.token.Newest(purpose) {
				break
			}
			m, f, under := v.rewrapUnder(ctx, Key{purpose, generation}, pace)
			moved, failed = moved+m, failed+f
			if err == nil {
				err = under
			}
			if ctx.Err() != nil || errors.Is(under, ErrStoreUnavailable) || errors.Is(under, errPace) {
				return moved, failed, err
			}
		}
	}
	return moved, failed, err
}

// errPace marks an error of Rewrap's pace.
var errPace = errors.New("rewrapping was ended")

func (v *Vault) rewrapUnder(ctx context.Context, key Key, pace func(context.Context) error) (moved, failed int, first error) {
	const page = 100
	var after AccountID
	for {
		ids, err := v.store.Under(ctx, key, after, page)
		if err != nil {
			return moved, failed, storeFault("looking for records under an older key", err)
		}
		for _, id := range ids {
			if err := pace(ctx); err != nil {
				return moved, failed, fmt.Errorf("%w: %w", errPace, err)
			}
			switch err := v.rewrap(ctx, id); {
			case err == nil:
				moved++
			default:
				failed++
				if first == nil {
					first = fmt.Errorf("rewrapping an account of tenant %s: %w", id.Tenant, err)
				}
				if ctx.Err() != nil || errors.Is(err, ErrStoreUnavailable) || errors.Is(err, ErrTokenUnavailable) {
					return moved, failed, first
				}
			}
		}
		if len(ids) < page {
			return moved, failed, first
		}
		after = ids[len(ids)-1]
	}
}

// rewrap moves one account.
func (v *Vault) rewrap(ctx context.Context, id AccountID) error {
	_, err := v.change(ctx, Caller{Account: id}, false, func(e *edit) error {
		master := v.token.Newest(purposeMaster)
		for i := range e.Generations {
			g := &e.Generations[i]
			if g.State == Destroyed || SealedUnder(g.Sealed) >= master {
				continue
			}
			s, err := v.openSecrets(ctx, e.Account, g)
			if err != nil {
				return err
			}
			if g.Sealed, err = v.sealSecrets(ctx, id, g.ID, s); err != nil {
				return err
			}
			e.changed[g.Number] = true
			e.keys = append(e.keys, Key{purposeMaster, SealedUnder(g.Sealed)})
		}
		e.rewrite = e.MACKey < v.token.Newest(purposeMAC)
		return nil
	})
	return err
}
