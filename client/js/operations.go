package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/transcript"
)

// errToken: the page could not get a token for the user.
var errToken = errors.New("the app gave no token")

// sdk performs operations. It is safe for concurrent use.
type sdk struct {
	// transport reaches the vault under a base URL.
	transport func(base string) client.Transport
	// token asks the page for a token of the user of this vault.
	token func(ctx context.Context, vault int) (string, error)

	mu      sync.Mutex // the maps hold what open and pending put there until close, forget or an end
	last    int        // the number given out last
	vaults  map[int]*openVault
	pending map[int]pending
}

// openVault is a client and the clock of its answers.
type openVault struct {
	*client.Client
	clock *clocked
}

// pending is an operation whose end is not known.
type pending struct {
	vault  *openVault
	kind   string
	resume func(context.Context) (any, error)
}

func newSDK(transport func(string) client.Transport, token func(context.Context, int) (string, error)) *sdk {
	return &sdk{transport: transport, token: token, vaults: map[int]*openVault{}, pending: map[int]pending{}}
}

// params are those of all operations; each reads its own.
type params struct {
	Vault       int              `json:"vault"`
	Pending     int              `json:"pending"`
	Base        string           `json:"base"`
	Fingerprint string           `json:"fingerprint"`
	Tenant      string           `json:"tenant"`
	User        string           `json:"user"`
	LastSerial  string           `json:"lastSerial"`
	Password    string           `json:"password"`
	Key         api.Bytes        `json:"key"`
	NewKey      api.Bytes        `json:"newKey"`
	Digits      string           `json:"digits"`
	Secret      api.Bytes        `json:"secret"`
	Wrapped     api.Bytes        `json:"wrapped"`
	Context     []string         `json:"context"`
	Generation  api.GenerationID `json:"generation"`
}

func (p *params) key() (backup.Key, error) { return backupKey(p.Key) }

func backupKey(b api.Bytes) (backup.Key, error) {
	if len(b) != backup.KeySize {
		return backup.Key{}, fmt.Errorf("%w: a backup key has %d bytes", errUnusable, backup.KeySize)
	}
	return backup.Key(b), nil
}

// What operations return.
type (
	opened struct {
		Vault int `json:"vault"`
	}
	keyResult struct {
		Key           api.Bytes         `json:"key"`
		Generation    *api.GenerationID `json:"generation,omitempty"`
		FailuresSince uint32            `json:"failuresSince"`
		FailuresTotal uint32            `json:"failuresTotal"`
	}
	text struct {
		Text string `json:"text"`
	}
	wrappedResult struct {
		Wrapped api.Bytes `json:"wrapped"`
	}
	statusResult struct {
		AttemptsLeft int                `json:"attemptsLeft"`
		MaxAttempts  int                `json:"maxAttempts"`
		WaitSeconds  *int64             `json:"waitSeconds"`
		Generations  []generationResult `json:"generations"`
	}
	generationResult struct {
		ID             api.GenerationID `json:"id"`
		State          string           `json:"state"`
		Reason         string           `json:"reason,omitempty"`
		CreatedAt      time.Time        `json:"createdAt"`
		ExpiresSeconds *int64           `json:"expiresSeconds,omitempty"`
		FailuresSince  uint32           `json:"failuresSince"`
		FailuresTotal  uint32           `json:"failuresTotal"`
	}
)

// do performs one operation. raw is JSON; data and the bytes returned are a backup's.
func (s *sdk) do(ctx context.Context, op string, raw, data []byte) (any, []byte, *failure) {
	var p params
	if err := json.Unmarshal(raw, &p); err != nil {
		// Not the error's own text: it could quote a password.
		f := describe(fmt.Errorf("%w: the parameters of %s are malformed", errUnusable, strconv.Quote(op)), time.Now())
		return nil, nil, &f
	}
	var result any
	var err error
	var of *openVault
	if f, ok := local[op]; ok {
		result, data, err = f(&p, data)
	} else {
		data = nil
		result, of, err = s.remote(ctx, op, &p)
	}
	if err == nil {
		return result, data, nil
	}
	f := s.failed(err, of)
	return nil, nil, &f
}

// failed describes an error, and keeps the operation that it leaves pending.
func (s *sdk) failed(err error, of *openVault) failure {
	now := time.Now()
	if of != nil {
		now = of.clock.now()
	}
	f := describe(err, now)
	var recovery *client.PendingRecovery
	var enrolment *client.PendingEnrolment
	switch {
	case errors.As(err, &recovery):
		f.Kind = "recovery"
		f.Pending = s.keep(pending{of, f.Kind, func(ctx context.Context) (any, error) { return recovered(recovery.Resume(ctx)) }})
	case errors.As(err, &enrolment):
		f.Kind = "enrolment"
		f.Pending = s.keep(pending{of, f.Kind, func(ctx context.Context) (any, error) { return enrolled(enrolment.Resume(ctx)) }})
	}
	return f
}

func (s *sdk) keep(p pending) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	s.pending[s.last] = p
	return s.last
}

// remote performs what needs a vault, and says which one.
func (s *sdk) remote(ctx context.Context, op string, p *params) (any, *openVault, error) {
	switch op {
	case "open":
		n, err := s.open(p)
		return opened{n}, nil, err
	case "resume", "forget":
		s.mu.Lock()
		pending, ok := s.pending[p.Pending]
		delete(s.pending, p.Pending)
		s.mu.Unlock()
		if !ok {
			return nil, nil, fmt.Errorf("%w: nothing is pending under this number", errUnusable)
		}
		if op == "forget" {
			return nil, nil, nil
		}
		result, err := pending.resume(ctx)
		return result, pending.vault, err
	}
	s.mu.Lock()
	v := s.vaults[p.Vault]
	if op == "close" {
		delete(s.vaults, p.Vault)
	}
	s.mu.Unlock()
	if v == nil {
		return nil, nil, fmt.Errorf("%w: no such vault is open", errUnusable)
	}
	result, err := v.do(ctx, op, p)
	return result, v, err
}

func (s *sdk) open(p *params) (int, error) {
	pin, err := transcript.ParseFingerprint(p.Fingerprint)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errUnusable, err)
	}
	var serial uint64
	if p.LastSerial != "" {
		if serial, err = strconv.ParseUint(p.LastSerial, 10, 64); err != nil {
			return 0, fmt.Errorf("%w: lastSerial is not what serial() returned", errUnusable)
		}
	}
	s.mu.Lock()
	s.last++
	n := s.last
	s.mu.Unlock()
	v := &openVault{clock: &clocked{next: s.transport(p.Base)}}
	v.Client, err = client.New(client.Config{
		Transport: v.clock, Fingerprint: pin, Tenant: p.Tenant, User: p.User, LastSerial: serial,
		Token: func(ctx context.Context) (string, error) { return s.token(ctx, n) },
	})
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errUnusable, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vaults[n] = v
	return n, nil
}

// do performs an operation on a vault.
func (v *openVault) do(ctx context.Context, op string, p *params) (any, error) {
	switch op {
	case "close":
		return nil, nil
	case "status":
		return v.status(ctx)
	case "serial":
		return text{strconv.FormatUint(v.Serial(), 10)}, nil
	case "enrol":
		return enrolled(v.Enrol(ctx, p.Password))
	case "recover":
		return recovered(v.Recover(ctx, p.Password))
	case "recoverGeneration":
		return recovered(v.RecoverGeneration(ctx, p.Password, p.Generation))
	case "turnOffWithoutProof":
		return nil, v.TurnOffWithoutProof(ctx)
	}
	key, err := p.key()
	if err != nil {
		return nil, err
	}
	switch op {
	case "enrolKey":
		return enrolled(v.EnrolKey(ctx, p.Password, key))
	case "changePassword":
		return enrolled(v.ChangePassword(ctx, key, p.Password))
	case "replaceWithoutProof":
		return enrolled(v.ReplaceWithoutProof(ctx, p.Password, key))
	case "changePasswordAndKey":
		newKey, err := backupKey(p.NewKey)
		if err != nil {
			return nil, err
		}
		return enrolled(v.ChangePasswordAndKey(ctx, key, p.Password, newKey))
	case "turnOff":
		return nil, v.TurnOff(ctx, key)
	case "reinstate":
		return nil, v.Reinstate(ctx, key)
	}
	return nil, fmt.Errorf("%w: there is no operation %s", errUnusable, strconv.Quote(op))
}

func (v *openVault) status(ctx context.Context) (any, error) {
	s, err := v.Status(ctx)
	if err != nil {
		return nil, err
	}
	now := v.clock.now()
	out := statusResult{
		AttemptsLeft: s.AttemptsLeft, MaxAttempts: s.MaxAttempts,
		WaitSeconds: new(int64), Generations: []generationResult{},
	}
	if s.NextAttemptAt != nil {
		out.WaitSeconds = untilSeconds(*s.NextAttemptAt, now)
	}
	for _, g := range s.Generations {
		r := generationResult{
			ID: g.ID, State: g.State, Reason: g.Reason, CreatedAt: g.CreatedAt,
			FailuresSince: g.FailuresSince, FailuresTotal: g.FailuresTotal,
		}
		if g.ExpiresAt != nil {
			r.ExpiresSeconds = untilSeconds(*g.ExpiresAt, now)
		}
		out.Generations = append(out.Generations, r)
	}
	return out, nil
}

func enrolled(e client.Enrolled, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return keyResult{Key: e.Key[:], Generation: &e.Generation}, nil
}

func recovered(r client.Recovered, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return keyResult{Key: r.Key[:], Generation: &r.Generation, FailuresSince: r.FailuresSince, FailuresTotal: r.FailuresTotal}, nil
}

// local are the operations that need no vault.
var local = map[string]func(*params, []byte) (any, []byte, error){
	"newKey": func(*params, []byte) (any, []byte, error) {
		key, err := backup.NewKey(rand.Reader)
		return keyResult{Key: key[:]}, nil, err
	},
	"digits": withKey(func(key backup.Key, _ *params, _ []byte) (any, []byte, error) {
		return text{key.Digits()}, nil, nil
	}),
	"parseDigits": func(p *params, _ []byte) (any, []byte, error) {
		key, err := backup.ParseDigits(p.Digits)
		return keyResult{Key: key[:]}, nil, err
	},
	"seal": withKey(func(key backup.Key, _ *params, data []byte) (any, []byte, error) {
		sealed, err := key.Seal(rand.Reader, data)
		return nil, sealed, err
	}),
	"unseal": withKey(func(key backup.Key, _ *params, data []byte) (any, []byte, error) {
		plain, err := key.Unseal(data)
		return nil, plain, err
	}),
	"wrapKey": withKey(func(key backup.Key, p *params, _ []byte) (any, []byte, error) {
		wrapped, err := key.WrapUnder(rand.Reader, p.Secret, p.Context...)
		return wrappedResult{wrapped}, nil, err
	}),
	"unwrapKey": func(p *params, _ []byte) (any, []byte, error) {
		key, err := backup.UnwrapUnder(p.Wrapped, p.Secret, p.Context...)
		return keyResult{Key: key[:]}, nil, err
	},
}

func withKey(f func(backup.Key, *params, []byte) (any, []byte, error)) func(*params, []byte) (any, []byte, error) {
	return func(p *params, data []byte) (any, []byte, error) {
		key, err := p.key()
		if err != nil {
			return nil, nil, err
		}
		return f(key, p, data)
	}
}
