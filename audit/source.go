package audit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/backup-key-vault/bkv/transcript"
)

// Source is a database that holds a log.
type Source interface {
	// AuditKeys returns the certified keys.
	AuditKeys(ctx context.Context) ([]Key, error)
	// SealedEvents and Checkpoints return at most limit of them after a sequence number, by sequence number.
	SealedEvents(ctx context.Context, after uint64, limit int) ([]Sealed, error)
	Checkpoints(ctx context.Context, after uint64, limit int) ([]Checkpoint, error)
	// StrayEvents looks at the next limit events after an id; it returns the ids of those that are neither sealed nor wait for it,
	// and where the next page begins (0: nowhere).
	StrayEvents(ctx context.Context, after uint64, limit int) (stray []uint64, next uint64, err error)
	// LostEvents returns the ids of at most limit events that wait to be sealed and are gone.
	LostEvents(ctx context.Context, limit int) ([]uint64, error)
}

const sourcePage = 1000

// VerifySource proves the log in a database against the fingerprint and, unless it is nil, a checkpoint that was
// remembered. It can run beside vaultd. progress is told the sequence number of the last event of each page. An error
// means that no verdict was reached.
func VerifySource(ctx context.Context, src Source, log Log, want transcript.Fingerprint, remembered *Checkpoint, progress func(sequence uint64)) (*Result, error) {
	if log.Fingerprint() != want {
		return nil, fmt.Errorf("the database has the log of vault %q with fingerprint %v, and not of the one with %v", log.VaultID, log.Fingerprint(), want)
	}
	ring, err := NewKeyring(log)
	if err != nil {
		return nil, err
	}
	keys, err := src.AuditKeys(ctx)
	if err != nil {
		return nil, err
	}
	var uncertified []error
	for _, k := range keys {
		if err := ring.Add(k); err != nil {
			uncertified = append(uncertified, fmt.Errorf("audit key %d: %w", k.Generation, err))
		}
	}
	v, err := NewVerifier(ring, nil)
	if err != nil {
		return nil, err
	}
	if remembered != nil {
		if err := v.Remember(remembered); err != nil {
			return nil, err
		}
	}
	for _, err := range uncertified {
		v.find(0, 0, "%v", err)
	}
	err = walk(ctx, src, 0, math.MaxInt64, func(e *Sealed) error { v.Event(e); return nil }, func(c *Checkpoint) error { v.Checkpoint(c); return nil }, progress)
	if err != nil {
		return nil, err
	}
	result := v.Finish()
	// What is not in the chain at all.
	lost, err := src.LostEvents(ctx, maxFindings)
	if err != nil {
		return nil, err
	}
	if len(lost) > 0 {
		v.find(0, 0, "rows of events that waited to be sealed are gone: ids %v", lost)
	}
	for after, more := uint64(0), true; more; {
		stray, next, err := src.StrayEvents(ctx, after, 10*sourcePage)
		if err != nil {
			return nil, err
		}
		if len(stray) > 0 {
			v.find(0, 0, "rows of events were neither sealed nor do they wait for it: %d, ids from %d to %d", len(stray), stray[0], stray[len(stray)-1])
		}
		after, more = next, next != 0
	}
	return result, nil
}

// walk goes through the sealed events after a sequence number and up to another, and the checkpoints between them.
func walk(ctx context.Context, src Source, after, until uint64, event func(*Sealed) error, checkpoint func(*Checkpoint) error, progress func(uint64)) error {
	signed := after // sequence number of the last checkpoint that was given
	for after < until {
		events, err := src.SealedEvents(ctx, after, sourcePage)
		if err != nil {
			return err
		}
		checkpoints, err := src.Checkpoints(ctx, signed, sourcePage)
		if err != nil {
			return err
		}
		if len(events) == 0 {
			// A checkpoint is written after its event: if one is ahead now, its event is missing or has come meanwhile.
			if events, err = src.SealedEvents(ctx, after, sourcePage); err != nil {
				return err
			}
			if len(events) == 0 {
				for i := range checkpoints {
					if err := checkpoint(&checkpoints[i]); err != nil {
						return err
					}
				}
				return nil
			}
		}
		for i := range events {
			e := &events[i]
			if e.Sequence > until {
				return nil
			}
			for len(checkpoints) > 0 && checkpoints[0].Sequence < e.Sequence {
				if err := checkpoint(&checkpoints[0]); err != nil {
					return err
				}
				signed, checkpoints = checkpoints[0].Sequence, checkpoints[1:]
			}
			if err := event(e); err != nil {
				return err
			}
			if len(checkpoints) > 0 && checkpoints[0].Sequence == e.Sequence {
				if err := checkpoint(&checkpoints[0]); err != nil {
					return err
				}
				signed, checkpoints = e.Sequence, checkpoints[1:]
			}
			after = e.Sequence
		}
		if progress != nil {
			progress(after)
		}
	}
	return nil
}

// Export writes the log in a database up to a checkpoint of it, from the beginning or, if start is not nil, from an earlier
// checkpoint. It does not verify; but what it cannot write, because it is not there, is an error.
func Export(ctx context.Context, src Source, log Log, start, end *Checkpoint, w io.Writer, progress func(sequence uint64)) error {
	out := bufio.NewWriter(w)
	write := func(v any) error {
		line, err := EncodeLine(v)
		if err != nil {
			return err
		}
		_, err = out.Write(line)
		return err
	}
	keys, err := src.AuditKeys(ctx)
	if err != nil {
		return err
	}
	if err := write(&log); err != nil {
		return err
	}
	for i := range keys {
		if err := write(&keys[i]); err != nil {
			return err
		}
	}
	var last uint64
	if start != nil {
		last = start.Sequence
		if err := write(start); err != nil {
			return err
		}
	}
	err = walk(ctx, src, last, end.Sequence, func(e *Sealed) error {
		if e.Sequence != last+1 || e.ID == 0 {
			return fmt.Errorf("event %d is missing: the log was tampered with; verify it, and export what a backup of the database has", last+1)
		}
		last = e.Sequence
		return write(e)
	}, func(c *Checkpoint) error { return write(c) }, progress)
	if err != nil {
		return err
	}
	if last < end.Sequence {
		return fmt.Errorf("event %d is missing: the log was tampered with; verify it, and export what a backup of the database has", last+1)
	}
	return errors.Join(write(&End{last}), out.Flush())
}
