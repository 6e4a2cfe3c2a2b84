package httpapi

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
)

const (
	backupKey    = "/v1/users/{user}/backup-key"
	ownerKeySize = 32 // Ed25519 public key (RFC 8032 §5.1.5)
	ownerSigSize = 64 // Ed25519 signature (RFC 8032 §5.1.6)
	// cacheForAWhile is for what is public and the same for all.
	cacheForAWhile = "public, max-age=300"
	// identityKeptFor is how long one signed key list is handed out; it holds for days.
	identityKeptFor = time.Hour
)

// overRelay ends the description of what is refused on the direct route.
const overRelay = " Over the relay channel alone, unless the tenant is declared direct-enrolment."

// routes registers every operation.
func (s *server) routes() {
	s.relayRoutes()
	add(s, operation{
		method: http.MethodGet, path: "/v1/vault", id: "get-vault", public: true, cacheControl: cacheForAWhile,
		summary: "Who the vault is and what it asks of clients",
		doc:     "Clients pin the fingerprint, and take the vault's keys only from the list that its identity key signs.",
	}, s.getVault)
	add(s, operation{
		method: http.MethodGet, path: backupKey, id: "get-backup-key",
		summary:  "A user's generations, attempts left, and next attempt",
		problems: []string{api.NotEnrolled},
	}, s.getStatus)
	add(s, operation{
		method: http.MethodPost, path: backupKey + "/enrolment", id: "start-enrolment",
		summary:      "Start an enrolment or a password change",
		doc:          "Stores nothing and counts nothing; it can be repeated, within a rate limit of its own." + overRelay,
		registration: true,
	}, s.startEnrolment)
	add(s, operation{
		method: http.MethodPut, path: backupKey, id: "stage-backup-key",
		summary:  "Stage a record",
		doc:      "Nobody can attempt it before it is activated. A state stages one record: the same request again gets the same answer, another record is a conflict." + overRelay,
		problems: []string{api.Conflict}, registration: true,
	}, s.stage)
	add(s, operation{
		method: http.MethodPost, path: backupKey + "/activation", id: "activate-backup-key",
		summary:  "Activate a staged generation",
		doc:      "With the present owner's signature too, the active generation is destroyed at once; without it, it stays frozen for the grace time. The same request again is harmless." + overRelay,
		problems: []string{api.NotEnrolled, api.Conflict, api.KeyDestroyed}, registration: true,
	}, s.activate)
	add(s, operation{
		method: http.MethodPost, path: backupKey + "/recovery", id: "start-recovery",
		summary: "Make an attempt",
		doc: "The attempt is counted before it is answered. The same KE1, sent again while its attempt is open, is answered again and not counted: " +
			"after a 503 or a lost answer, send the same bytes.",
		problems: []string{api.NotEnrolled, api.Conflict, api.KeyDestroyed, api.TooEarly},
	}, s.startRecovery)
	add(s, operation{
		method: http.MethodPost, path: backupKey + "/recovery/finish", id: "finish-recovery",
		summary:  "Prove the password and receive the wrapped key",
		doc:      "Sending it again is harmless. A client that could not open KE2 sends 32 random bytes.",
		problems: []string{api.NotEnrolled, api.WrongPassword, api.Conflict, api.KeyDestroyed},
	}, s.finishRecovery)
	add(s, operation{
		method: http.MethodDelete, path: backupKey, id: "turn-off-backup-key",
		summary: "Turn a generation off",
		doc:     "With its owner's signature it is destroyed at once; without, the active generation is frozen for the grace time. The same request again is harmless.",
		query: []param{
			{name: "generation", required: true, schema: api.GenerationID{}, doc: "The generation to turn off."},
			{name: "signature", schema: api.Bytes{}, doc: "By the owner key of this generation: Ed25519, 64 bytes."},
		},
		problems: []string{api.NotEnrolled, api.Conflict},
	}, s.turnOff)
	add(s, operation{
		method: http.MethodPost, path: backupKey + "/reinstatement", id: "reinstate-backup-key",
		summary:  "Bring a frozen generation back",
		doc:      "The generation that is active then is destroyed. Counters stay as they are. The same request again is harmless; after a later freezing it is a conflict, and changes nothing.",
		problems: []string{api.NotEnrolled, api.Conflict, api.KeyDestroyed},
	}, s.reinstate)
}

// identityCache keeps the vault's signed key list for a while.
type identityCache struct {
	// turn holds one token, and whoever has it may use the fields below. It is no
	// mutex, so that requests that wait for a slow token still have their time-out.
	turn   chan struct{}
	answer *api.Vault
	made   time.Time
	relay  []byte // what vault.Outdated asks for
}

func (s *server) getVault(ctx context.Context, _ call, _ *none) (*api.Vault, error) {
	select {
	case <-s.identity.turn:
		defer func() { s.identity.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	now := s.now()
	if a := s.identity.answer; a != nil && now.Sub(s.identity.made) < identityKeptFor && !s.vault.Outdated(ctx, a.Keys.Serial, s.identity.relay) {
		return a, nil
	}
	id, err := s.vault.Identity(ctx, now)
	if err != nil {
		return nil, err
	}
	answer := &api.Vault{
		ID: id.ID, Suite: api.Suite, Context: id.Context, IdentityKey: id.IdentityKey[:], Fingerprint: id.Fingerprint.String(),
		Keys: api.KeyList{
			Serial: id.Keys.Serial, NotBefore: time.Unix(id.Keys.NotBefore, 0).UTC(), Expires: time.Unix(id.Keys.Expires, 0).UTC(),
			Signature: id.Signature[:],
		},
		KSFFloor: ksfOf(opaque.MinArgon2id), KSFCeiling: ksfOf(opaque.MaxArgon2id),
		Lifetimes: api.Lifetimes{
			EnrolmentState:   int64(vault.EnrolmentStateLifetime / time.Second),
			StagedGeneration: int64(vault.StagedLifetime / time.Second),
			Attempt:          int64(vault.AttemptLifetime / time.Second),
		},
	}
	for _, k := range id.Keys.Keys {
		answer.Keys.Keys = append(answer.Keys.Keys, api.Key{Purpose: k.Purpose, Generation: k.Generation, PublicKey: k.Key})
	}
	s.identity.answer, s.identity.made, s.identity.relay = answer, now, id.Relay
	return answer, nil
}

func ksfOf(a opaque.Argon2id) api.KSF {
	return api.KSF{Algorithm: api.Argon2id, Time: a.Time, MemoryKiB: a.MemoryKiB, Threads: uint32(a.Threads)}
}

func (s *server) getStatus(ctx context.Context, c call, _ *none) (*api.Status, error) {
	return c.status(s.vault.Status(ctx, c.Caller))
}

func (s *server) startEnrolment(ctx context.Context, c call, in *api.StartEnrolmentRequest) (*api.StartEnrolmentResponse, error) {
	request, err := message("registration_request", in.RegistrationRequest, opaque.ParseRegistrationRequest)
	if err != nil {
		return nil, err
	}
	if err := s.enrolments.take(c.Account); err != nil {
		return nil, err
	}
	started, err := s.vault.StartEnrolment(ctx, c.Caller, request)
	if err != nil {
		return nil, err
	}
	return &api.StartEnrolmentResponse{
		RegistrationResponse: started.Response[:], State: started.State,
		Generation: api.GenerationID(started.Generation), Follows: api.GenerationID(started.Follows),
		ExpiresAt: started.ExpiresAt.UTC(),
	}, nil
}

func (s *server) stage(ctx context.Context, c call, in *api.StageRequest) (*api.StageResponse, error) {
	record, err := message("record", in.Record, opaque.ParseRegistrationRecord)
	if err != nil {
		return nil, err
	}
	if err := sized("wrapped_key", in.WrappedKey, transcript.WrappedKeySize); err != nil {
		return nil, err
	}
	if err := sized("owner_key", in.OwnerKey, ownerKeySize); err != nil {
		return nil, err
	}
	if in.KSF.Algorithm != api.Argon2id {
		return nil, invalid("ksf.algorithm", "want "+api.Argon2id)
	}
	g, err := s.vault.Stage(ctx, c.Caller, vault.Staging{
		State: in.State, Record: record,
		WrappedKey: [transcript.WrappedKeySize]byte(in.WrappedKey),
		KSF:        vault.KSF{Time: in.KSF.Time, MemoryKiB: in.KSF.MemoryKiB, Threads: in.KSF.Threads},
		OwnerKey:   [ownerKeySize]byte(in.OwnerKey),
	})
	if err != nil {
		return nil, err
	}
	return &api.StageResponse{
		Generation: api.GenerationID(g.ID), Follows: api.GenerationID(g.Follows), Digest: g.Digest[:], ExpiresAt: timeOrNil(g.ExpiresAt),
	}, nil
}

func (s *server) activate(ctx context.Context, c call, in *api.ActivateRequest) (*api.Status, error) {
	if err := sized("signature", in.Signature, ownerSigSize); err != nil {
		return nil, err
	}
	if in.PreviousSignature != nil {
		if err := sized("previous_signature", in.PreviousSignature, ownerSigSize); err != nil {
			return nil, err
		}
	}
	return c.status(s.vault.Activate(ctx, c.Caller, vault.Activation{
		Generation: vault.GenerationID(in.Generation), Signature: in.Signature, PreviousSignature: in.PreviousSignature,
	}))
}

func (s *server) startRecovery(ctx context.Context, c call, in *api.StartRecoveryRequest) (*api.StartRecoveryResponse, error) {
	ke1, err := message("ke1", in.KE1, opaque.ParseKE1)
	if err != nil {
		return nil, err
	}
	req := vault.RecoveryStart{KE1: ke1}
	// To the domain, zero means "not said"; said, it is a mistake.
	if in.Generation != nil {
		if in.Generation.IsZero() {
			return nil, invalid("generation", "zero names no generation; leave it out for the active one")
		}
		req.Generation = vault.GenerationID(*in.Generation)
	}
	if in.Attempt != nil {
		if *in.Attempt == 0 {
			return nil, invalid("attempt", "attempts are numbered from 1")
		}
		req.Attempt = *in.Attempt
	}
	started, err := s.vault.StartRecovery(ctx, c.Caller, req)
	if err != nil {
		return nil, err
	}
	return &api.StartRecoveryResponse{
		KE2: started.KE2[:], State: started.State, Generation: api.GenerationID(started.Generation),
		Attempt: started.Attempt, AttemptsLeft: started.AttemptsLeft, ExpiresAt: started.ExpiresAt.UTC(), KSF: wireKSF(started.KSF),
	}, nil
}

func (s *server) finishRecovery(ctx context.Context, c call, in *api.FinishRecoveryRequest) (*api.FinishRecoveryResponse, error) {
	ke3, err := message("ke3", in.KE3, opaque.ParseKE3)
	if err != nil {
		return nil, err
	}
	got, err := s.vault.FinishRecovery(ctx, c.Caller, ke3, in.State)
	if err != nil {
		return nil, err
	}
	return &api.FinishRecoveryResponse{
		Generation: api.GenerationID(got.Generation), SealedKey: got.SealedKey[:],
		FailuresSince: got.FailuresSince, FailuresTotal: got.FailuresTotal,
	}, nil
}

func (s *server) turnOff(ctx context.Context, c call, _ *none) (*api.Status, error) {
	var generation api.GenerationID
	if err := generation.UnmarshalText([]byte(c.query["generation"])); err != nil {
		return nil, invalid("generation", "want 32 lower-case hexadecimal digits")
	}
	var signature api.Bytes
	if raw, ok := c.query["signature"]; ok {
		if err := signature.UnmarshalText([]byte(raw)); err != nil {
			return nil, invalid("signature", "want base64url without padding")
		}
		if err := sized("signature", signature, ownerSigSize); err != nil {
			return nil, err
		}
	}
	return c.status(s.vault.TurnOff(ctx, c.Caller, vault.GenerationID(generation), signature))
}

func (s *server) reinstate(ctx context.Context, c call, in *api.ReinstateRequest) (*api.Status, error) {
	if err := sized("signature", in.Signature, ownerSigSize); err != nil {
		return nil, err
	}
	return c.status(s.vault.Reinstate(ctx, c.Caller, vault.Reinstatement{
		Generation: vault.GenerationID(in.Generation), Replaces: vault.GenerationID(in.Replaces), FrozenUntil: in.FrozenUntil, Signature: in.Signature,
	}))
}

// message parses an OPAQUE message: exact length, and every point in it valid.
func message[M any](field string, b api.Bytes, parse func([]byte) (M, error)) (M, error) {
	m, err := parse(b)
	if err != nil {
		return m, invalid(field, err.Error())
	}
	return m, nil
}

func sized(field string, b api.Bytes, size int) error {
	if len(b) != size {
		return invalid(field, fmt.Sprintf("want %d bytes, got %d", size, len(b)))
	}
	return nil
}

func wireKSF(k vault.KSF) api.KSF {
	return api.KSF{Algorithm: api.Argon2id, Time: k.Time, MemoryKiB: k.MemoryKiB, Threads: k.Threads}
}

// status is what the caller hears of an account of its own.
func (c call) status(s *vault.Status, err error) (*api.Status, error) {
	if err != nil {
		return nil, err
	}
	out := &api.Status{
		Tenant:      c.Account.Tenant,
		Generations: make([]api.Generation, len(s.Generations)), Follow: api.GenerationID(s.Follow),
		AttemptsLeft: s.AttemptsLeft, MaxAttempts: s.MaxAttempts, NextAttemptAt: timeOrNil(s.NextAttempt),
	}
	for i := range s.Generations {
		g := &s.Generations[i]
		out.Generations[i] = api.Generation{
			ID: api.GenerationID(g.ID), State: string(g.State), Reason: string(g.Reason), Digest: g.Digest[:], KSF: wireKSF(g.KSF),
			NextAttempt: g.Started + 1, FailuresSince: uint32(g.Used()), FailuresTotal: uint32(g.Failures()),
			CreatedAt: g.CreatedAt.UTC(), ExpiresAt: timeOrNil(g.ExpiresAt),
		}
	}
	return out, nil
}
