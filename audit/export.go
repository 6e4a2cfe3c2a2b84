package audit

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/backup-key-vault/bkv/transcript"
)

// An export is a file of JSON lines (jsonlines.org), each with its type first:
//
//	log         what log this is, once, first
//	key         each certified audit key, before everything else
//	event       a sealed event
//	checkpoint  after its event; in an export that does not begin with event 1 also before the first event
//	end         how far it goes, once, last: a file without it was cut short
//
// Bytes are hexadecimal, times in RFC 3339 with microseconds. A line is accepted only if it is, byte for byte, as
// this package writes it.
const (
	// Format names the format, in the first line.
	Format = "bkv-audit/1"
	// maxLineBytes bounds a line. The longest event is below 8 KiB.
	maxLineBytes = 64 << 10
	timeLayout   = "2006-01-02T15:04:05.000000Z"
)

// hexBytes is hexadecimal in lower case; none is null or left out.
type hexBytes []byte

// MarshalText implements encoding.TextMarshaler.
func (h hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.AppendDecode(nil, text)
	return err
}

// into copies exactly len(out) bytes.
func (h hexBytes) into(out []byte) error {
	if len(h) != len(out) {
		return fmt.Errorf("want %d bytes, got %d", len(out), len(h))
	}
	copy(out, h)
	return nil
}

type logLine struct {
	Type        string   `json:"type"`
	Format      string   `json:"format"`
	Vault       string   `json:"vault"`
	IdentityKey hexBytes `json:"identity_key"`
	Fingerprint string   `json:"fingerprint"`
}

type keyLine struct {
	Type       string   `json:"type"`
	Generation uint32   `json:"generation"`
	PublicKey  hexBytes `json:"public_key"`
	Signature  hexBytes `json:"signature"`
}

type eventLine struct {
	Type          string   `json:"type"`
	Sequence      uint64   `json:"sequence,omitzero"` // left out: not sealed yet
	Hash          hexBytes `json:"hash,omitempty"`
	ID            uint64   `json:"id"`
	At            string   `json:"at"`
	Kind          string   `json:"kind"`
	Tenant        string   `json:"tenant,omitempty"`
	Pseudonym     hexBytes `json:"pseudonym,omitempty"`
	Generation    hexBytes `json:"generation,omitempty"`
	Attempt       uint32   `json:"attempt,omitzero"`
	Reason        string   `json:"reason,omitempty"`
	RequestID     string   `json:"request_id,omitempty"`
	Purpose       string   `json:"purpose,omitempty"`
	KeyGeneration uint32   `json:"key_generation,omitzero"`
	Operator      string   `json:"operator,omitempty"`
	Detail        string   `json:"detail,omitempty"`
	Login         string   `json:"login,omitempty"`
}

type checkpointLine struct {
	Type          string   `json:"type"`
	Sequence      uint64   `json:"sequence"`
	Hash          hexBytes `json:"hash"`
	At            string   `json:"at"`
	KeyGeneration uint32   `json:"key_generation"`
	Signature     hexBytes `json:"signature"`
}

type endLine struct {
	Type     string `json:"type"`
	Sequence uint64 `json:"sequence"`
}

// End is the last line of an export.
type End struct{ Sequence uint64 }

// EncodeLine writes a *Log, *Key, *Event, *Sealed, *Checkpoint or *End as a line, with its line break. An *Event is one that
// is not sealed yet; an export has none.
func EncodeLine(v any) ([]byte, error) {
	var wire any
	switch v := v.(type) {
	case *Log:
		wire = logLine{"log", Format, v.VaultID, v.IdentityKey[:], v.Fingerprint().String()}
	case *Key:
		wire = keyLine{"key", v.Generation, v.PublicKey[:], v.Signature[:]}
	case *Event:
		wire = wireEvent(v)
	case *Sealed:
		line := wireEvent(&v.Event)
		line.Sequence, line.Hash = v.Sequence, v.Hash[:]
		wire = line
	case *Checkpoint:
		wire = checkpointLine{"checkpoint", v.Sequence, v.Hash[:], stamp(v.At), v.KeyGeneration, v.Signature[:]}
	case *End:
		wire = endLine{"end", v.Sequence}
	default:
		return nil, fmt.Errorf("audit: %T is no line of an export", v)
	}
	line, err := json.Marshal(wire)
	if err != nil {
		return nil, fmt.Errorf("audit: writing a line: %w", err)
	}
	return append(line, '\n'), nil
}

func wireEvent(e *Event) eventLine {
	return eventLine{
		Type: "event", ID: e.ID, At: stamp(e.At), Kind: e.Kind, Tenant: e.Tenant, Pseudonym: e.Pseudonym, Generation: e.Generation,
		Attempt: e.Attempt, Reason: e.Reason, RequestID: e.RequestID, Purpose: e.Purpose, KeyGeneration: e.KeyGeneration,
		Operator: e.Operator, Detail: e.Detail, Login: e.Login,
	}
}

// DecodeLine reads what EncodeLine wrote, and nothing else: a line that is spelt in any other way is refused.
func DecodeLine(line []byte) (any, error) {
	var head struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(line, &head); err != nil {
		return nil, errors.New("it is no JSON object with a type")
	}
	v, err := decode(head.Type, line)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", head.Type, err)
	}
	if again, err := EncodeLine(v); err != nil || !bytes.Equal(bytes.TrimSuffix(again, []byte("\n")), bytes.TrimSuffix(line, []byte("\n"))) {
		return nil, fmt.Errorf("%s: it is not written as an export is", head.Type)
	}
	return v, nil
}

func decode(kind string, line []byte) (any, error) {
	switch kind {
	case "log":
		var wire logLine
		var log Log
		err := json.Unmarshal(line, &wire, json.RejectUnknownMembers(true))
		switch {
		case err != nil:
		case wire.Format != Format:
			err = fmt.Errorf("its format is %q, and this program reads %s", wire.Format, Format)
		default:
			log.VaultID = wire.Vault
			err = wire.IdentityKey.into(log.IdentityKey[:])
		}
		return &log, err
	case "key":
		var wire keyLine
		if err := json.Unmarshal(line, &wire, json.RejectUnknownMembers(true)); err != nil {
			return nil, err
		}
		key := Key{Generation: wire.Generation}
		return &key, errors.Join(wire.PublicKey.into(key.PublicKey[:]), wire.Signature.into(key.Signature[:]))
	case "event":
		return decodeEvent(line)
	case "checkpoint":
		var wire checkpointLine
		if err := json.Unmarshal(line, &wire, json.RejectUnknownMembers(true)); err != nil {
			return nil, err
		}
		at, err := time.Parse(timeLayout, wire.At)
		c := Checkpoint{Sequence: wire.Sequence, At: at, KeyGeneration: wire.KeyGeneration}
		return &c, errors.Join(err, wire.Hash.into(c.Hash[:]), wire.Signature.into(c.Signature[:]))
	case "end":
		var wire endLine
		err := json.Unmarshal(line, &wire, json.RejectUnknownMembers(true))
		return &End{wire.Sequence}, err
	default:
		return nil, errors.New("there is no such type of line")
	}
}

func decodeEvent(line []byte) (any, error) {
	var wire eventLine
	if err := json.Unmarshal(line, &wire, json.RejectUnknownMembers(true)); err != nil {
		return nil, err
	}
	at, err := time.Parse(timeLayout, wire.At)
	if err != nil {
		return nil, err
	}
	e := Event{
		ID: wire.ID, At: at, Kind: wire.Kind, Tenant: wire.Tenant, Pseudonym: wire.Pseudonym, Generation: wire.Generation,
		Attempt: wire.Attempt, Reason: wire.Reason, RequestID: wire.RequestID, Purpose: wire.Purpose, KeyGeneration: wire.KeyGeneration,
		Operator: wire.Operator, Detail: wire.Detail, Login: wire.Login,
	}
	if wire.Sequence == 0 && wire.Hash == nil {
		return &e, nil
	}
	sealed := Sealed{Sequence: wire.Sequence, Event: e}
	return &sealed, wire.Hash.into(sealed.Hash[:])
}

// Damage says that a file is no export, or not a whole one, and where.
type Damage struct {
	File string // empty: the only one
	Line int
	What string
}

func (d *Damage) Error() string {
	if d.File == "" {
		return fmt.Sprintf("line %d: %s", d.Line, d.What)
	}
	return fmt.Sprintf("%s, line %d: %s", d.File, d.Line, d.What)
}

// File is one part of an export.
type File struct {
	Name string
	io.Reader
}

// ReadCheckpoint reads a file that holds one checkpoint, as vaultctl saves it.
func ReadCheckpoint(r io.Reader) (*Checkpoint, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxLineBytes))
	if err != nil {
		return nil, err
	}
	v, err := DecodeLine(text)
	if err != nil {
		return nil, err
	}
	c, ok := v.(*Checkpoint)
	if !ok {
		return nil, errors.New("it holds no checkpoint")
	}
	return c, nil
}

// VerifyExport proves an export, in one file or in several that follow each other, against the fingerprint and, unless it is nil, a
// checkpoint that was remembered. progress is told the sequence number of each event. An error means that no verdict was
// reached: Damage, another log, or a file that cannot be read.
func VerifyExport(want transcript.Fingerprint, remembered *Checkpoint, progress func(sequence uint64), files ...File) (*Result, error) {
	x := exportVerifier{want: want, remembered: remembered, progress: progress}
	for i, f := range files {
		x.file, x.line, x.inHead, x.ended = f.Name, 0, true, false
		scanner := bufio.NewScanner(f)
		scanner.Buffer(nil, maxLineBytes)
		for scanner.Scan() {
			x.line++
			v, err := DecodeLine(scanner.Bytes())
			if err == nil {
				err = x.take(v)
			}
			if err != nil {
				return nil, x.damage("%v", err)
			}
		}
		x.line++
		switch err := scanner.Err(); {
		case errors.Is(err, bufio.ErrTooLong):
			return nil, x.damage("longer than any line of an export")
		case err != nil:
			return nil, fmt.Errorf("reading %s: %w", f.Name, err)
		case !x.ended:
			return nil, x.damage("the file ends before its last line: it was cut short")
		}
		if i == 0 && x.verifier == nil {
			x.begin(nil)
		}
	}
	if x.verifier == nil {
		return nil, errors.New("no file was given")
	}
	return x.verifier.Finish(), x.err
}

type exportVerifier struct {
	want       transcript.Fingerprint
	remembered *Checkpoint
	progress   func(uint64)

	ring     *Keyring
	verifier *Verifier
	err      error

	file   string
	line   int
	inHead bool // no event of this file was seen yet
	ended  bool
}

func (x *exportVerifier) damage(format string, args ...any) error {
	return &Damage{x.file, x.line, fmt.Sprintf(format, args...)}
}

// begin makes the verifier, for what follows start.
func (x *exportVerifier) begin(start *Checkpoint) error {
	v, err := NewVerifier(x.ring, start)
	if err != nil {
		return err
	}
	x.verifier = v
	if x.remembered == nil {
		return nil
	}
	if start != nil && x.remembered.Sequence < start.Sequence {
		return fmt.Errorf("the export begins after event %d, and the remembered checkpoint is at %d: nothing shows that one follows from the other",
			start.Sequence, x.remembered.Sequence)
	}
	return x.verifier.Remember(x.remembered)
}

func (x *exportVerifier) take(v any) error {
	if x.ended {
		return errors.New("it stands after the end")
	}
	if log, ok := v.(*Log); ok != (x.line == 1) {
		return errors.New("want the line of type log first, and once")
	} else if ok {
		return x.open(log)
	}
	switch v := v.(type) {
	case *Key:
		if err := x.ring.Add(*v); err != nil {
			return fmt.Errorf("audit key %d: %w", v.Generation, err)
		}
	case *Checkpoint:
		return x.checkpoint(v)
	case *Sealed:
		if x.verifier == nil {
			if err := x.begin(nil); err != nil {
				return err
			}
		}
		x.inHead = false
		x.verifier.Event(v)
		if x.progress != nil {
			x.progress(v.Sequence)
		}
	case *Event:
		return errors.New("the event is not sealed")
	case *End:
		x.ended = true
		if x.verifier == nil {
			if err := x.begin(nil); err != nil {
				return err
			}
		}
		if v.Sequence > x.verifier.result.Last {
			x.verifier.settle()
			x.verifier.find(x.verifier.result.Last+1, v.Sequence, "missing at the end of the export")
		}
	}
	return nil
}

func (x *exportVerifier) open(log *Log) error {
	if log.Fingerprint() != x.want {
		return fmt.Errorf("this is the log of vault %q with fingerprint %v, and not of the one with %v", log.VaultID, log.Fingerprint(), x.want)
	}
	if x.ring != nil {
		return nil // keys were certified by this very log
	}
	ring, err := NewKeyring(*log)
	x.ring = ring
	return err
}

// checkpoint takes one after its event, or before the first: there it says where a partial export begins.
func (x *exportVerifier) checkpoint(c *Checkpoint) error {
	switch {
	case x.verifier == nil:
		return x.begin(c)
	case x.inHead && c.Sequence != x.verifier.result.Last:
		return fmt.Errorf("this file begins after event %d, and the one before ends with %d", c.Sequence, x.verifier.result.Last)
	}
	x.verifier.Checkpoint(c)
	return nil
}
