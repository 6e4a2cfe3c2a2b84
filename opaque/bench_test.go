package opaque_test

import (
	"context"
	"crypto/rand"
	"testing"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
)

// The server's part. With software keys: a token's time comes on top.

func BenchmarkParseKE1(b *testing.B) {
	real, _ := opaquetest.Vectors(b)
	for b.Loop() {
		if _, err := opaque.ParseKE1(real[0].Outputs.KE1); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScalarMultiply(b *testing.B) {
	s, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	e := generator(b)
	for b.Loop() {
		if e, err = s.Multiply(e); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreateRegistrationResponse(b *testing.B) {
	a := register(b, named)
	request, _, err := opaque.StartRegistration(rand.Reader, a.password)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := opaque.CreateRegistrationResponse(context.Background(), request, a.static.PublicKey(), a.eval); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGenerateKE2(b *testing.B) {
	a := register(b, named)
	ke1, _, err := opaque.StartLogin(rand.Reader, a.password)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, _, err := opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, a.static, a.eval); err != nil {
			b.Fatal(err)
		}
	}
}

// The client's part.

func BenchmarkStartLogin(b *testing.B) {
	for b.Loop() {
		if _, _, err := opaque.StartLogin(rand.Reader, []byte("correct horse battery staple")); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkClientFinish(b *testing.B) {
	a := register(b, named)
	login, ke2, _ := a.start(b, a.password)
	for b.Loop() {
		if _, err := login.Finish(ke2, a.config); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkArgon2idDefault(b *testing.B) {
	for b.Loop() {
		if _, err := opaque.DefaultArgon2id.Stretch(make([]byte, 32)); err != nil {
			b.Fatal(err)
		}
	}
}
