package interop_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	bytemare "github.com/bytemare/opaque"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
)

// agreement is what both ends must know alike.
type agreement struct {
	password                                string
	context, clientIdentity, serverIdentity []byte
}

// Every length around those that a length prefix could get wrong, without key
// stretching and with keys in memory: record by one client, login by either.
func TestLengths(t *testing.T) {
	long := func(n int) []byte { return bytes.Repeat([]byte{0xa5}, n) }
	usual := agreement{"password", []byte("context"), []byte("client"), []byte("server")}
	cases := map[string]agreement{
		"usual":              usual,
		"nothing but a word": {password: "password"}, // the public keys are the identities
	}
	for _, n := range []int{1, 127, 128, 255, 256, 257, 32767, 32768, 65535} {
		a := usual
		a.context = long(n)
		cases[fmt.Sprintf("context of %d", n)] = a
		a = usual
		a.clientIdentity = long(n)
		cases[fmt.Sprintf("client identity of %d", n)] = a
		a = usual
		a.serverIdentity = long(n)
		cases[fmt.Sprintf("server identity of %d", n)] = a
		a = usual
		a.password = strings.Repeat("p", n)
		cases[fmt.Sprintf("password of %d", n)] = a
	}
	for name, a := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := server{t: t, oprf: opaquetest.RandomKey(t), static: opaquetest.RandomKey(t)}
			theirs, theirExport := s.theirRecord(a)
			ours, ourExport := s.ourRecord(a)
			must(t, s.theirLogin(a, a, theirs, theirExport))
			must(t, s.theirLogin(a, a, ours, ourExport))
			s.ourLogin(a, theirs, theirExport)
		})
	}
}

// What the ends do not know alike, the device notices.
func TestDisagreements(t *testing.T) {
	right := agreement{"password", []byte("context"), []byte("client"), []byte("server")}
	for name, change := range map[string]func(*agreement){
		"password":        func(a *agreement) { a.password = "Password" },
		"context":         func(a *agreement) { a.context = []byte("contexts") },
		"no context":      func(a *agreement) { a.context = nil },
		"client identity": func(a *agreement) { a.clientIdentity = []byte("clients") },
		"server identity": func(a *agreement) { a.serverIdentity = []byte("servers") },
		"swapped":         func(a *agreement) { a.clientIdentity, a.serverIdentity = a.serverIdentity, a.clientIdentity },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := server{t: t, oprf: opaquetest.RandomKey(t), static: opaquetest.RandomKey(t)}
			record, export := s.ourRecord(right)
			device := right
			change(&device)
			if err := s.theirLogin(right, device, record, export); !errors.Is(err, bytemare.ErrAuthentication) {
				t.Fatalf("the ends disagree, and the device says: %v", err)
			}
		})
	}
}

// server is our side of OPAQUE without a vault around it.
type server struct {
	t            *testing.T
	oprf, static opaquetest.Key
}

func (s server) register(request []byte) []byte {
	s.t.Helper()
	parsed, err := opaque.ParseRegistrationRequest(request)
	must(s.t, err)
	response, err := opaque.CreateRegistrationResponse(s.t.Context(), parsed, s.static.PublicKey(), s.oprf)
	must(s.t, err)
	return response[:]
}

func (s server) answer(a agreement, record opaque.RegistrationRecord, ke1 []byte) (opaque.KE2, opaque.ExpectedFinish) {
	s.t.Helper()
	parsed, err := opaque.ParseKE1(ke1)
	must(s.t, err)
	session := opaque.Session{Context: a.context, ClientIdentity: a.clientIdentity, ServerIdentity: a.serverIdentity}
	ke2, expected, err := opaque.GenerateKE2(s.t.Context(), session, rand.Reader, record, parsed, s.static, s.oprf)
	must(s.t, err)
	return ke2, expected
}

func (s server) theirRecord(a agreement) (opaque.RegistrationRecord, []byte) {
	s.t.Helper()
	c, err := configuration(a.context, 0).Client()
	must(s.t, err)
	request, err := c.RegistrationInit([]byte(a.password))
	must(s.t, err)
	response, err := c.Deserialize.RegistrationResponse(s.register(request.Serialize()))
	must(s.t, err)
	made, export, err := c.RegistrationFinalize(response, a.clientIdentity, a.serverIdentity)
	must(s.t, err)
	record, err := opaque.ParseRegistrationRecord(made.Serialize())
	must(s.t, err)
	return record, export
}

func (a agreement) config() opaque.ClientConfig {
	return opaque.ClientConfig{
		Context: a.context, ClientIdentity: a.clientIdentity, ServerIdentity: a.serverIdentity, KSF: opaquetest.IdentityKSF{},
	}
}

func (s server) ourRecord(a agreement) (opaque.RegistrationRecord, []byte) {
	s.t.Helper()
	request, registration, err := opaque.StartRegistration(rand.Reader, []byte(a.password))
	must(s.t, err)
	response, err := opaque.ParseRegistrationResponse(s.register(request[:]))
	must(s.t, err)
	made, err := registration.Finish(rand.Reader, response, a.config())
	must(s.t, err)
	return made.Record, made.ExportKey[:]
}

// theirLogin logs a device in that knows what is in device, at a server that knows a. It
// returns the device's error. If there is none, both ends must have the same keys.
func (s server) theirLogin(a, device agreement, record opaque.RegistrationRecord, export []byte) error {
	s.t.Helper()
	c, err := configuration(device.context, 0).Client()
	must(s.t, err)
	ke1, err := c.GenerateKE1([]byte(device.password))
	must(s.t, err)
	ke2, expected := s.answer(a, record, ke1.Serialize())
	parsed, err := c.Deserialize.KE2(ke2[:])
	must(s.t, err)
	ke3, session, gotExport, err := c.GenerateKE3(parsed, device.clientIdentity, device.serverIdentity)
	if err != nil {
		return err
	}
	s.finish(expected, ke3.Serialize(), session, gotExport, export)
	return nil
}

func (s server) ourLogin(a agreement, record opaque.RegistrationRecord, export []byte) {
	s.t.Helper()
	ke1, login, err := opaque.StartLogin(rand.Reader, []byte(a.password))
	must(s.t, err)
	ke2, expected := s.answer(a, record, ke1[:])
	done, err := login.Finish(ke2, a.config())
	must(s.t, err)
	if done.ServerPublicKey != s.static.PublicKey() {
		s.t.Fatal("the login yields another server key")
	}
	s.finish(expected, done.KE3[:], done.SessionKey[:], done.ExportKey[:], export)
}

// finish is the end of a login that succeeded at the device.
func (s server) finish(expected opaque.ExpectedFinish, ke3, session, export, wantExport []byte) {
	s.t.Helper()
	parsed, err := opaque.ParseKE3(ke3)
	must(s.t, err)
	got, err := expected.Verify(parsed)
	must(s.t, err)
	if !bytes.Equal(got[:], session) {
		s.t.Fatal("the ends have different session keys")
	}
	if !bytes.Equal(export, wantExport) {
		s.t.Fatal("the login yields another export key than the registration")
	}
}
