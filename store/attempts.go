package store

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/backup-key-vault/bkv/vault"
)

// attempt is how a row shows an attempt: readable, and exact to the microsecond.
type attempt struct {
	Number    uint32        `json:"n"`
	Claim     string        `json:"claim"` // lower-case hexadecimal
	Outcome   vault.Outcome `json:"outcome"`
	ChargedAt string        `json:"charged_at"`
	ExpiresAt string        `json:"expires_at"`
}

const timeFormat = "2006-01-02T15:04:05.000000Z"

func encodeAttempts(attempts []vault.Attempt) (string, error) {
	out := make([]attempt, len(attempts))
	for i, a := range attempts {
		out[i] = attempt{
			Number: a.Number, Claim: hex.EncodeToString(a.Claim[:]), Outcome: a.Outcome,
			ChargedAt: a.ChargedAt.UTC().Format(timeFormat), ExpiresAt: a.ExpiresAt.UTC().Format(timeFormat),
		}
	}
	text, err := json.Marshal(out)
	return string(text), err
}

// decodeAttempts accepts what encodeAttempts makes, in any spacing and order of
// members (jsonb keeps neither), and nothing else. Its errors have no values.
func decodeAttempts(text []byte) ([]vault.Attempt, error) {
	var in []attempt
	// Names are case-sensitive, and duplicates refused, by default.
	if err := json.Unmarshal(text, &in, json.RejectUnknownMembers(true)); err != nil || in == nil {
		return nil, errors.New("attempts: not as the vault writes them")
	}
	var out []vault.Attempt // nil if there are none
	for i, a := range in {
		t := vault.Attempt{Number: a.Number, Outcome: a.Outcome}
		if a.Number == 0 {
			return nil, fmt.Errorf("attempt %d: no number", i)
		}
		switch a.Outcome {
		case vault.Open, vault.Succeeded, vault.Failed:
		default:
			return nil, fmt.Errorf("attempt %d: unknown outcome", i)
		}
		claim, err := hex.DecodeString(a.Claim)
		if err != nil || len(claim) != len(t.Claim) || hex.EncodeToString(claim) != a.Claim {
			return nil, fmt.Errorf("attempt %d: malformed claim", i)
		}
		copy(t.Claim[:], claim)
		if t.ChargedAt, err = parseTime(a.ChargedAt); err != nil {
			return nil, fmt.Errorf("attempt %d: charged_at: %w", i, err)
		}
		if t.ExpiresAt, err = parseTime(a.ExpiresAt); err != nil {
			return nil, fmt.Errorf("attempt %d: expires_at: %w", i, err)
		}
		out = append(out, t)
	}
	return out, nil
}

func parseTime(s string) (time.Time, error) {
	t, err := time.Parse(timeFormat, s)
	if err != nil || t.Format(timeFormat) != s {
		return time.Time{}, errors.New("malformed time")
	}
	return t, nil
}
