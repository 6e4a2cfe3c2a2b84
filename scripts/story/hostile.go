package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// hostile is an app's back end that wants its users' passwords. It answers enrolments in the vault's place.
type hostile struct {
	client.Transport
	oprf     opaque.Scalar // its own, where the vault's is in the token
	server   opaque.PublicKey
	capsules int
	record   opaque.RegistrationRecord // what it was sent
	got      bool
}

// Evaluate is the step that the vault does with a key that nobody has.
func (h *hostile) Evaluate(_ context.Context, blinded opaque.Element) (opaque.Element, error) {
	return h.oprf.Multiply(blinded)
}

func (h *hostile) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	answer := func(v any) (*client.Response, error) {
		body, err := json.Marshal(v)
		return &client.Response{Status: 200, Header: map[string]string{"content-type": "application/json"}, Body: body}, err
	}
	switch {
	case r.Path == "/v1/relay":
		// It has a record for whoever sends it one; but this says nothing to it, and its answer nothing to the device.
		h.capsules++
		return answer(map[string]string{"registration_response": "…"})
	case r.Method == "POST" && strings.HasSuffix(r.Path, "/enrolment"):
		var start api.StartEnrolmentRequest
		if err := json.Unmarshal(r.Body, &start); err != nil {
			return nil, err
		}
		request, err := opaque.ParseRegistrationRequest(start.RegistrationRequest)
		if err != nil {
			return nil, err
		}
		response, err := opaque.CreateRegistrationResponse(ctx, request, h.server, h)
		if err != nil {
			return nil, err
		}
		out := api.StartEnrolmentResponse{RegistrationResponse: response[:], State: []byte("none"), ExpiresAt: time.Now().Add(time.Hour)}
		rand.Read(out.Generation[:])
		return answer(out)
	case r.Method == "PUT":
		var stage api.StageRequest
		if err := json.Unmarshal(r.Body, &stage); err != nil {
			return nil, err
		}
		record, err := opaque.ParseRegistrationRecord(stage.Record)
		if err != nil {
			return nil, err
		}
		h.record, h.got = record, true
		return &client.Response{Status: 400, Body: []byte(`{"type":"` + api.InvalidRequest + `","title":"Try again later","status":400}`)}, nil
	}
	return h.Transport.RoundTrip(ctx, r)
}

// maskingKey is where OPAQUE's masking key lies in a record (RFC 9807 section 5.1): after the client's public key. It depends on the
// password and the OPRF key alone.
const maskingKeyAt, maskingKeySize = 33, 32

// guess tries passwords on the record, with nobody counting.
func (h *hostile) guess(ctx context.Context, config opaque.ClientConfig, passwords []string) (string, error) {
	for _, p := range passwords {
		request, registration, err := opaque.StartRegistration(rand.Reader, []byte(p))
		if err != nil {
			return "", err
		}
		response, err := opaque.CreateRegistrationResponse(ctx, request, h.server, h)
		if err != nil {
			return "", err
		}
		made, err := registration.Finish(rand.Reader, response, config)
		if err != nil {
			return "", err
		}
		if string(made.Record[maskingKeyAt:maskingKeyAt+maskingKeySize]) == string(h.record[maskingKeyAt:maskingKeyAt+maskingKeySize]) {
			return p, nil
		}
	}
	return "", nil
}

// betray has a hostile back end try both ways.
func (s *story) betray(ctx context.Context) error {
	title("What could the app's own back end do, if it turned hostile?")
	honest, err := s.transport()
	if err != nil {
		return err
	}
	h := &hostile{Transport: honest}
	if h.oprf, err = opaque.RandomScalar(rand.Reader); err != nil {
		return err
	}
	var vault api.Vault
	answer, err := honest.RoundTrip(ctx, &client.Request{Method: "GET", Path: "/v1/vault"})
	if err == nil {
		err = json.Unmarshal(answer.Body, &vault)
	}
	if err != nil {
		return err
	}
	if h.server, err = opaque.ParsePublicKey(vault.Keys.Keys[0].PublicKey); err != nil {
		return err
	}
	say("All the above went over the relay channel: the back end carries capsules, all of")
	say("one size, that are sealed to a key in the vault's token. It answers one itself:")
	phone, err := s.deviceOver(h, s.Tenant, false)
	if err != nil {
		return err
	}
	if _, err = phone.Enrol(ctx, password); err == nil || h.got || h.capsules == 0 {
		return fmt.Errorf("an enrolment that the back end answered: %w", err)
	}
	say("  the phone: %v", errorsHead(err))
	say("Had the app left the channel out, the vault would not have taken the enrolment:")
	if phone, err = s.deviceOver(honest, s.Tenant, true); err != nil {
		return err
	}
	if _, err = phone.Enrol(ctx, password); !errors.Is(err, client.ErrRelayRequired) {
		return fmt.Errorf("an enrolment on the direct route: %w", err)
	}
	say("  the vault: %v", client.ErrRelayRequired)
	say("Tenant %q is declared to trust its back end with passwords (direct-enrolment).", s.Trusted)
	say("There the same back end answers the phone in the vault's place, with an OPRF key of its own:")
	if phone, err = s.deviceOver(h, s.Trusted, true); err != nil {
		return err
	}
	if _, err = phone.Enrol(ctx, password); err == nil || !h.got {
		return fmt.Errorf("an enrolment that the back end answered: %w", err)
	}
	found, err := h.guess(ctx, opaque.ClientConfig{
		Context: vault.Context, ServerIdentity: []byte(vault.ID), ClientIdentity: transcript.ClientIdentity(s.Trusted, user), KSF: opaque.DefaultArgon2id,
	}, []string{"123456", "password", newPassword, password, "correct horse battery staple"})
	if err != nil {
		return err
	}
	if found != password {
		return errors.New("the back end did not guess the password from the record")
	}
	say("  the phone sent it a record; offline, uncounted, it tries passwords on that: %q", found)
	say("So that is for development, and for back ends that hold the passwords anyway.")
	return nil
}

// errorsHead is an error's first sentence.
func errorsHead(err error) string {
	head, _, _ := strings.Cut(err.Error(), " (")
	return head
}
