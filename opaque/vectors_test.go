package opaque_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
)

// equal compares one value of a vector, which must be there.
func equal(t *testing.T, name string, got, want []byte) {
	t.Helper()
	if len(want) == 0 {
		t.Fatalf("%s: the vector has none", name)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n got %x\nwant %x", name, got, want)
	}
}

func join(b ...[]byte) *bytes.Reader { return bytes.NewReader(bytes.Join(b, nil)) }

func TestVectorsReal(t *testing.T) {
	real, _ := opaquetest.Vectors(t)
	for i, name := range []string{"C.1.5", "C.1.6"} {
		t.Run(name, func(t *testing.T) { testReal(t, real[i]) })
	}
}

func testReal(t *testing.T, v opaquetest.Vector) {
	ctx := context.Background()
	in, mid, out := v.Inputs, v.Intermediates, v.Outputs
	session := v.Session()
	config := opaque.ClientConfig{
		Context:        session.Context,
		ServerIdentity: session.ServerIdentity,
		ClientIdentity: session.ClientIdentity,
		KSF:            opaquetest.IdentityKSF{},
	}
	oprfKey := v.OPRFKey(t)
	equal(t, "oprf_key", oprfKey[:], mid.OPRFKey)
	eval := opaquetest.NewKey(t, oprfKey)
	static := opaquetest.NewKey(t, v.ServerPrivateKey(t))
	serverPublicKey := static.PublicKey()
	equal(t, "server_public_key", serverPublicKey[:], in.ServerPublicKey)

	request, clientRegistration, err := opaque.StartRegistration(join(in.BlindRegistration), in.Password)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "registration_request", request[:], out.RegistrationRequest)
	response, err := opaque.CreateRegistrationResponse(ctx, request, serverPublicKey, eval)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "registration_response", response[:], out.RegistrationResponse)
	registration, err := clientRegistration.Finish(join(in.EnvelopeNonce), response, config)
	if err != nil {
		t.Fatal(err)
	}
	record := registration.Record
	equal(t, "registration_upload", record[:], out.RegistrationUpload)
	equal(t, "client_public_key", record[:33], mid.ClientPublicKey)
	equal(t, "masking_key", record[33:65], mid.MaskingKey)
	equal(t, "envelope", record[65:], mid.Envelope)
	equal(t, "export_key", registration.ExportKey[:], out.ExportKey)
	equal(t, "server_public_key", registration.ServerPublicKey[:], in.ServerPublicKey)

	ke1, login, err := opaque.StartLogin(join(in.BlindLogin, in.ClientNonce, in.ClientKeyshareSeed), in.Password)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "KE1", ke1[:], out.KE1)
	ke2, expected, err := opaque.GenerateKE2(ctx, session, v.ServerRandomness(), record, ke1, static, eval)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "KE2", ke2[:], out.KE2)
	equal(t, "expected_client_mac", expected.ClientMAC[:], out.KE3)
	equal(t, "server session_key", expected.SessionKey[:], out.SessionKey)
	finished, err := login.Finish(ke2, config)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "KE3", finished.KE3[:], out.KE3)
	equal(t, "client session_key", finished.SessionKey[:], out.SessionKey)
	equal(t, "export_key", finished.ExportKey[:], out.ExportKey)
	equal(t, "server_public_key", finished.ServerPublicKey[:], in.ServerPublicKey)
	verified, err := expected.Verify(finished.KE3)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "verified session_key", verified[:], out.SessionKey)

	r, err := login.RandomizedPassword(opaque.Element(ke2[:33]), config.KSF)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "randomized_password", r[:], mid.RandomizedPassword)
	authKey, err := opaque.AuthKey(r, in.EnvelopeNonce)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "auth_key", authKey[:], mid.AuthKey)

	serverKeyshare, _, err := opaque.DeriveDiffieHellmanKeyPair([32]byte(in.ServerKeyshareSeed))
	if err != nil {
		t.Fatal(err)
	}
	clientKeyshare, clientPublicKey := opaque.Element(ke1[65:]), opaque.Element(record[:33])
	dh1 := multiply(t, serverKeyshare, clientKeyshare)
	dh2 := multiply(t, v.ServerPrivateKey(t), clientKeyshare)
	dh3 := multiply(t, serverKeyshare, clientPublicKey)
	k := opaque.DeriveKeys(dh1, dh2, dh3, session, serverPublicKey, opaque.PublicKey(clientPublicKey), ke1, ke2)
	equal(t, "handshake_secret", k.HandshakeSecret[:], mid.HandshakeSecret)
	equal(t, "server_mac_key", k.Km2[:], mid.ServerMACKey)
	equal(t, "client_mac_key", k.Km3[:], mid.ClientMACKey)
	equal(t, "session_key", k.SessionKey[:], out.SessionKey)
}

// A server without the client answers like one with it: C.2.3.
func TestVectorFake(t *testing.T) {
	_, v := opaquetest.Vectors(t)
	clientKey := opaquetest.NewKey(t, opaque.Scalar(v.Inputs.ClientPrivateKey)).PublicKey()
	equal(t, "client_public_key", clientKey[:], v.Inputs.ClientPublicKey)
	static := opaquetest.NewKey(t, v.ServerPrivateKey(t))
	serverKey := static.PublicKey()
	equal(t, "server_public_key", serverKey[:], v.Inputs.ServerPublicKey)
	_, keyshare, err := opaque.DeriveDiffieHellmanKeyPair([32]byte(v.Inputs.ClientKeyshareSeed))
	if err != nil {
		t.Fatal(err)
	}
	ke1 := v.KE1(t)
	equal(t, "client_public_keyshare", keyshare[:], ke1[65:])

	ke2, _, err := opaque.GenerateKE2(context.Background(), v.Session(), v.ServerRandomness(), v.Record(t), ke1,
		static, opaquetest.NewKey(t, v.OPRFKey(t)))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "KE2", ke2[:], v.Outputs.KE2)
}

func multiply(t *testing.T, s opaque.Scalar, e opaque.Element) opaque.Element {
	t.Helper()
	p, err := s.Multiply(e)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
