package store

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/vault"
)

const someAttempts = `[{"n": 7, "claim": "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff", "outcome": "succeeded",` +
	` "charged_at": "2026-05-06T07:08:09.000001Z", "expires_at": "2026-05-06T07:13:09.000001Z"},` +
	` {"n": 8, "claim": "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100", "outcome": "open",` +
	` "charged_at": "2026-05-06T07:09:00.999999Z", "expires_at": "2026-05-06T07:14:00.999999Z"}]`

func TestDecodeAttempts(t *testing.T) {
	t.Parallel()
	got, err := decodeAttempts([]byte(someAttempts))
	if err != nil || len(got) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	second := got[1]
	if second.Number != 8 || second.Claim[0] != 0xff || second.Outcome != vault.Open ||
		!second.ChargedAt.Equal(time.Date(2026, 5, 6, 7, 9, 0, 999_999_000, time.UTC)) ||
		second.ExpiresAt.Sub(second.ChargedAt) != 5*time.Minute {
		t.Fatalf("got %+v", second)
	}
	if got, err := decodeAttempts([]byte(`[]`)); got != nil || err != nil {
		t.Fatalf("none: %v, %v", got, err)
	}
	for name, edit := range map[string][2]string{
		"unknown member":      {`"n": 7`, `"n": 7, "x": 1`},
		"member twice":        {`"n": 7`, `"n": 7, "n": 7`},
		"member in capitals":  {`"n"`, `"N"`},
		"number missing":      {`"n": 7, `, ``},
		"number zero":         {`"n": 7`, `"n": 0`},
		"number negative":     {`"n": 7`, `"n": -7`},
		"number too large":    {`"n": 7`, `"n": 4294967296`},
		"number with a point": {`"n": 7`, `"n": 7.5`},
		"number as a string":  {`"n": 7`, `"n": "7"`},
		"claim short":         {`0011`, `11`},
		"claim in capitals":   {`aabb`, `AABB`},
		"claim not hex":       {`0011`, `0g11`},
		"outcome unknown":     {`succeeded`, `refunded`},
		"outcome missing":     {`"outcome": "open",`, ``},
		"time to the second":  {`07:08:09.000001Z`, `07:08:09Z`},
		"time finer":          {`07:08:09.000001Z`, `07:08:09.0000012Z`},
		"time with offset":    {`07:08:09.000001Z`, `07:08:09.000001+00:00`},
		"time with comma":     {`07:08:09.000001Z`, `07:08:09,000001Z`},
		"no such day":         {`2026-05-06T07:08`, `2026-02-30T07:08`},
		"time missing":        {`, "expires_at": "2026-05-06T07:14:00.999999Z"`, ``},
		"an element is null":  {`[{`, `[null, {`},
		"null":                {someAttempts, `null`},
		"an object":           {someAttempts, `{}`},
		"nothing":             {someAttempts, ``},
		"something after":     {someAttempts, someAttempts + `[]`},
	} {
		text := strings.Replace(someAttempts, edit[0], edit[1], 1)
		if text == someAttempts {
			t.Fatalf("%s: the case changes nothing", name)
		}
		if got, err := decodeAttempts([]byte(text)); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}

// It never panics, and what it accepts encodes back to the same attempts.
func FuzzDecodeAttempts(f *testing.F) {
	for _, seed := range []string{someAttempts, `[]`, `null`, `{}`, `[null]`, `[{"n":1}]`, `[[]]`, "[\x00]",
		strings.Replace(someAttempts, "2026", "0000", 1), strings.Replace(someAttempts, `"open"`, `"\u006fpen"`, 1)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		decoded, err := decodeAttempts(text)
		if err != nil {
			return
		}
		encoded, err := encodeAttempts(decoded)
		if err != nil {
			t.Fatalf("what was accepted does not encode: %v", err)
		}
		again, err := decodeAttempts([]byte(encoded))
		if err != nil || !reflect.DeepEqual(again, decoded) {
			t.Fatalf("%s comes back as %+v, %v", encoded, again, err)
		}
	})
}
