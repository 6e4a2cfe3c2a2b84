package opaque_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
)

// account is a registered client and its server.
type account struct {
	password     []byte
	config       opaque.ClientConfig
	session      opaque.Session
	static       opaquetest.Key
	eval         opaquetest.Key
	registration opaque.Registration
}

// register enrols a client that does not stretch.
func register(t testing.TB, session opaque.Session) account {
	t.Helper()
	return registerWith(t, session, opaquetest.IdentityKSF{})
}

func registerWith(t testing.TB, session opaque.Session, ksf opaque.KSF) account {
	t.Helper()
	a := account{
		password: []byte("correct horse battery staple"),
		config: opaque.ClientConfig{
			Context:        session.Context,
			ServerIdentity: session.ServerIdentity,
			ClientIdentity: session.ClientIdentity,
			KSF:            ksf,
		},
		session: session,
		static:  opaquetest.RandomKey(t),
		eval:    opaquetest.RandomKey(t),
	}
	request, client, err := opaque.StartRegistration(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	response, err := opaque.CreateRegistrationResponse(context.Background(), request, a.static.PublicKey(), a.eval)
	if err != nil {
		t.Fatal(err)
	}
	a.registration, err = client.Finish(rand.Reader, response, a.config)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

var named = opaque.Session{
	Context:        []byte("context"),
	ServerIdentity: []byte("vault"),
	ClientIdentity: []byte("tenant and user"),
}

// start opens a login with the password and gets the server's answer.
func (a account) start(t testing.TB, password []byte) (*opaque.ClientLogin, opaque.KE2, opaque.ExpectedFinish) {
	t.Helper()
	ke1, login, err := opaque.StartLogin(rand.Reader, password)
	if err != nil {
		t.Fatal(err)
	}
	ke2, expected, err := opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, a.static, a.eval)
	if err != nil {
		t.Fatal(err)
	}
	return login, ke2, expected
}

func TestLogin(t *testing.T) {
	for name, session := range map[string]opaque.Session{
		"named":     named,
		"unnamed":   {},
		"longest":   {Context: make([]byte, 65535), ServerIdentity: make([]byte, 65535), ClientIdentity: make([]byte, 65535)},
		"no client": {ServerIdentity: []byte("vault")},
	} {
		t.Run(name, func(t *testing.T) {
			a := register(t, session)
			if a.registration.ServerPublicKey != a.static.PublicKey() {
				t.Error("registration yields another server public key")
			}
			var lastSessionKey opaque.SessionKey
			for range 3 {
				login, ke2, expected := a.start(t, a.password)
				result, err := login.Finish(ke2, a.config)
				if err != nil {
					t.Fatal(err)
				}
				sessionKey, err := expected.Verify(result.KE3)
				if err != nil {
					t.Fatal(err)
				}
				if sessionKey != result.SessionKey {
					t.Error("session keys differ")
				}
				if sessionKey == lastSessionKey {
					t.Error("two logins have one session key")
				}
				lastSessionKey = sessionKey
				if result.ExportKey != a.registration.ExportKey {
					t.Error("login yields another export key than registration")
				}
				if result.ServerPublicKey != a.static.PublicKey() {
					t.Error("login yields another server public key")
				}
			}
		})
	}
}

// One KE1 may be answered twice, as when the first answer is lost: the client
// takes either, and the server must take the KE3 that belongs to it.
func TestSameKE1Twice(t *testing.T) {
	a := register(t, named)
	ke1, login, err := opaque.StartLogin(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	var results [2]opaque.Login
	var expected [2]opaque.ExpectedFinish
	for i := range results {
		var ke2 opaque.KE2
		ke2, expected[i], err = opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, a.static, a.eval)
		if err != nil {
			t.Fatal(err)
		}
		if results[i], err = login.Finish(ke2, a.config); err != nil {
			t.Fatal(err)
		}
	}
	for i := range results {
		if got, err := expected[i].Verify(results[i].KE3); err != nil || got != results[i].SessionKey {
			t.Errorf("answer %d: %v", i, err)
		}
		if _, err := expected[i].Verify(results[1-i].KE3); !errors.Is(err, opaque.ErrWrongClientMAC) {
			t.Errorf("answer %d with the other's KE3: %v", i, err)
		}
	}
}

// The password given to StartRegistration and StartLogin is the caller's to
// wipe.
func TestPasswordIsCopied(t *testing.T) {
	a := register(t, named)
	password := bytes.Clone(a.password)
	login, ke2, _ := a.start(t, password)
	clear(password)
	result, err := login.Finish(ke2, a.config)
	if err != nil {
		t.Fatal(err)
	}
	if result.ExportKey != a.registration.ExportKey {
		t.Error("export key depends on what became of the caller's slice")
	}
}

func TestPasswordLength(t *testing.T) {
	for n, ok := range map[int]bool{0: false, 1: true, 65535: true, 65536: false} {
		_, _, err := opaque.StartRegistration(rand.Reader, make([]byte, n))
		if ok && err != nil || !ok && !errors.Is(err, opaque.ErrInvalidPassword) {
			t.Errorf("StartRegistration with %d bytes: %v", n, err)
		}
		_, _, err = opaque.StartLogin(rand.Reader, make([]byte, n))
		if ok && err != nil || !ok && !errors.Is(err, opaque.ErrInvalidPassword) {
			t.Errorf("StartLogin with %d bytes: %v", n, err)
		}
	}
}

// failed checks a login that must fail with want, and with nothing else.
func failed(t *testing.T, result opaque.Login, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
	if result != (opaque.Login{}) {
		t.Error("failed, and returned something")
	}
}

func TestWrongPassword(t *testing.T) {
	a := register(t, named)
	for _, password := range []string{"wrong", "correct horse battery stapl", "correct horse battery staple ", "\x00"} {
		login, ke2, expected := a.start(t, []byte(password))
		result, err := login.Finish(ke2, a.config)
		failed(t, result, err, opaque.ErrWrongPasswordOrServer)
		if _, err := expected.Verify(result.KE3); !errors.Is(err, opaque.ErrWrongClientMAC) {
			t.Errorf("zero KE3: %v", err)
		}
	}
}

func TestVerifyRefusesEveryOtherKE3(t *testing.T) {
	a := register(t, named)
	login, ke2, expected := a.start(t, a.password)
	result, err := login.Finish(ke2, a.config)
	if err != nil {
		t.Fatal(err)
	}
	for i := range result.KE3 {
		for bit := range 8 {
			ke3 := result.KE3
			ke3[i] ^= 1 << bit
			if key, err := expected.Verify(ke3); !errors.Is(err, opaque.ErrWrongClientMAC) || key != (opaque.SessionKey{}) {
				t.Fatalf("byte %d, bit %d: %v", i, bit, err)
			}
		}
	}
}

// Two ends that disagree on what surrounds the messages do not get together.
// Identities are part of the envelope, the context of the transcript alone.
func TestDifferentSurroundings(t *testing.T) {
	a := register(t, named)
	for name, c := range map[string]struct {
		change func(*opaque.ClientConfig)
		want   error
	}{
		"context":            {func(c *opaque.ClientConfig) { c.Context = []byte("other") }, opaque.ErrServerAuthentication},
		"no context":         {func(c *opaque.ClientConfig) { c.Context = nil }, opaque.ErrServerAuthentication},
		"server identity":    {func(c *opaque.ClientConfig) { c.ServerIdentity = []byte("other") }, opaque.ErrWrongPasswordOrServer},
		"no server identity": {func(c *opaque.ClientConfig) { c.ServerIdentity = nil }, opaque.ErrWrongPasswordOrServer},
		"client identity":    {func(c *opaque.ClientConfig) { c.ClientIdentity = []byte("other") }, opaque.ErrWrongPasswordOrServer},
		"no client identity": {func(c *opaque.ClientConfig) { c.ClientIdentity = nil }, opaque.ErrWrongPasswordOrServer},
		"shifted identities": {func(c *opaque.ClientConfig) {
			c.ServerIdentity, c.ClientIdentity = []byte("vaultt"), []byte("enant and user")
		}, opaque.ErrWrongPasswordOrServer},
		"stretching": {func(c *opaque.ClientConfig) { c.KSF = reverse{} }, opaque.ErrWrongPasswordOrServer},
	} {
		t.Run(name, func(t *testing.T) {
			login, ke2, _ := a.start(t, a.password)
			config := a.config
			c.change(&config)
			result, err := login.Finish(ke2, config)
			failed(t, result, err, c.want)
		})
	}
	// The client agrees with its registration, the server is the odd one out.
	for name, session := range map[string]opaque.Session{
		"context":         {Context: []byte("other"), ServerIdentity: named.ServerIdentity, ClientIdentity: named.ClientIdentity},
		"server identity": {Context: named.Context, ServerIdentity: []byte("other"), ClientIdentity: named.ClientIdentity},
		"client identity": {Context: named.Context, ServerIdentity: named.ServerIdentity, ClientIdentity: []byte("other")},
	} {
		t.Run("server/"+name, func(t *testing.T) {
			b := a
			b.session = session
			login, ke2, _ := b.start(t, a.password)
			result, err := login.Finish(ke2, a.config)
			failed(t, result, err, opaque.ErrServerAuthentication)
		})
	}
}

// reverse is a KSF that is not the one of the registration.
type reverse struct{}

func (reverse) Stretch(input []byte) ([]byte, error) {
	out := make([]byte, len(input))
	for i, b := range input {
		out[len(input)-1-i] = b
	}
	return out, nil
}

func TestOtherKeys(t *testing.T) {
	a := register(t, named)

	b := a
	b.eval = opaquetest.RandomKey(t) // its OPRF key is gone
	login, ke2, _ := b.start(t, a.password)
	result, err := login.Finish(ke2, a.config)
	failed(t, result, err, opaque.ErrWrongPasswordOrServer)

	b = a
	b.static = opaquetest.RandomKey(t) // another server with the record
	login, ke2, _ = b.start(t, a.password)
	result, err = login.Finish(ke2, a.config)
	failed(t, result, err, opaque.ErrWrongPasswordOrServer)

	b = a
	b.registration = register(t, named).registration // another client's record
	login, ke2, _ = b.start(t, a.password)
	result, err = login.Finish(ke2, a.config)
	failed(t, result, err, opaque.ErrWrongPasswordOrServer)

	// A thief of record and OPRF key who claims the static key's public half.
	ke1, login, err := opaque.StartLogin(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	thief := claimed{opaquetest.RandomKey(t), a.static.PublicKey()}
	ke2, _, err = opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, thief, a.eval)
	if err != nil {
		t.Fatal(err)
	}
	result, err = login.Finish(ke2, a.config)
	failed(t, result, err, opaque.ErrServerAuthentication)
}

// claimed is a static key under another's public key.
type claimed struct {
	opaquetest.Key
	public opaque.PublicKey
}

func (c claimed) PublicKey() opaque.PublicKey { return c.public }

// No byte of KE2 can be changed, and the error says which part was: what lies
// under the envelope cannot be told from a wrong password, what lies after it
// can.
func TestTamperedKE2(t *testing.T) {
	a := register(t, named)
	login, ke2, _ := a.start(t, a.password)
	if _, err := login.Finish(ke2, a.config); err != nil {
		t.Fatal(err)
	}
	for i := range ke2 {
		inPoint := i < 33 || 194 <= i && i < 227
		want := opaque.ErrWrongPasswordOrServer
		if i >= 162 {
			want = opaque.ErrServerAuthentication
		}
		for _, flip := range []byte{0x01, 0x80} {
			tampered := ke2
			tampered[i] ^= flip
			result, err := login.Finish(tampered, a.config)
			if _, parseErr := opaque.ParseKE2(tampered[:]); parseErr != nil {
				if !inPoint {
					t.Fatalf("byte %d: %v", i, parseErr)
				}
				want := opaque.ErrInvalidMessage
				failed(t, result, err, want)
				continue
			}
			failed(t, result, err, want)
			if t.Failed() {
				t.Fatalf("byte %d, flipped %#x", i, flip)
			}
		}
	}
}

// A response that was never parsed is still refused by the client, before it
// stretches anything.
func TestClientRefusesMalformed(t *testing.T) {
	a := register(t, named)
	a.config.KSF = forbidden{t}
	_, registration, err := opaque.StartRegistration(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	login, ke2, _ := a.start(t, a.password)
	for name, bad := range badPoints(t) {
		if len(bad) != opaque.ElementSize {
			continue
		}
		g := generator(t)
		for _, response := range [][]byte{append(bytes.Clone(bad), g[:]...), append(g[:33:33], bad...)} {
			got, err := registration.Finish(rand.Reader, opaque.RegistrationResponse(response), a.config)
			if !errors.Is(err, opaque.ErrInvalidMessage) || got != (opaque.Registration{}) {
				t.Errorf("registration response with %s: %v", name, err)
			}
		}
		for _, offset := range []int{0, 194} {
			tampered := ke2
			copy(tampered[offset:], bad)
			result, err := login.Finish(tampered, a.config)
			failed(t, result, err, opaque.ErrInvalidMessage)
		}
	}
}

// forbidden is a KSF that must not be reached.
type forbidden struct{ t *testing.T }

func (f forbidden) Stretch([]byte) ([]byte, error) {
	f.t.Error("stretched")
	return nil, errors.New("forbidden")
}

var errFault = errors.New("fault")

// token counts what it is asked, and fails or answers nonsense when told to.
type token struct {
	opaquetest.Key
	evaluations     atomic.Int32
	multiplications atomic.Int32
	evaluateErr     error
	multiplyErr     error
	answer          *opaque.Element
}

func (k *token) Evaluate(ctx context.Context, e opaque.Element) (opaque.Element, error) {
	k.evaluations.Add(1)
	if k.answer != nil {
		return *k.answer, nil
	}
	if k.evaluateErr != nil {
		return e, k.evaluateErr // a point that must not be used
	}
	return k.Key.Evaluate(ctx, e)
}

func (k *token) Multiply(ctx context.Context, e opaque.Element) (opaque.Element, error) {
	k.multiplications.Add(1)
	if k.multiplyErr != nil {
		return e, k.multiplyErr // a point that must not be used
	}
	return k.Key.Multiply(ctx, e)
}

func TestFaultyToken(t *testing.T) {
	a := register(t, named)
	ke1, _, err := opaque.StartLogin(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	request := opaque.RegistrationRequest(ke1[:33])
	for name, k := range map[string]*token{
		"evaluate fails":        {Key: a.eval, evaluateErr: errFault},
		"evaluate answers junk": {Key: a.eval, answer: &opaque.Element{}},
	} {
		t.Run(name, func(t *testing.T) {
			wrapped := k.evaluateErr
			response, err := opaque.CreateRegistrationResponse(context.Background(), request, a.static.PublicKey(), k)
			if err == nil || !errors.Is(err, wrapped) && wrapped != nil {
				t.Errorf("CreateRegistrationResponse: %v", err)
			}
			if errors.Is(err, opaque.ErrInvalidMessage) {
				t.Errorf("a fault of the token is put down to the client: %v", err)
			}
			if response != (opaque.RegistrationResponse{}) {
				t.Error("failed, and returned something")
			}
			ke2, expected, err := opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, a.static, k)
			if err == nil || !errors.Is(err, wrapped) && wrapped != nil {
				t.Errorf("GenerateKE2: %v", err)
			}
			if errors.Is(err, opaque.ErrInvalidMessage) {
				t.Errorf("a fault of the token is put down to the client: %v", err)
			}
			if ke2 != (opaque.KE2{}) || expected != (opaque.ExpectedFinish{}) {
				t.Error("failed, and returned something")
			}
		})
	}
	t.Run("multiply fails", func(t *testing.T) {
		k := &token{Key: a.static, multiplyErr: errFault}
		ke2, expected, err := opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, k, a.eval)
		if !errors.Is(err, errFault) {
			t.Errorf("GenerateKE2: %v", err)
		}
		if ke2 != (opaque.KE2{}) || expected != (opaque.ExpectedFinish{}) {
			t.Error("failed, and returned something")
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, _, err := opaque.GenerateKE2(ctx, a.session, rand.Reader, a.registration.Record, ke1, a.static, a.eval)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("GenerateKE2: %v", err)
		}
	})
}

// Nothing that is wrong with the input reaches the token, and a good request
// reaches it once for each key.
func TestTokenIsAskedLast(t *testing.T) {
	a := register(t, named)
	good, _, err := opaque.StartLogin(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	k := &token{Key: a.eval}
	serve := func(session opaque.Session, random io.Reader, record opaque.RegistrationRecord, ke1 opaque.KE1) error {
		_, _, err := opaque.GenerateKE2(ctx, session, random, record, ke1, k, k)
		return err
	}
	for name, bad := range badPoints(t) {
		if len(bad) != opaque.ElementSize {
			continue
		}
		for _, offset := range []int{0, 65} {
			ke1 := good
			copy(ke1[offset:], bad)
			if err := serve(a.session, rand.Reader, a.registration.Record, ke1); !errors.Is(err, opaque.ErrInvalidMessage) {
				t.Errorf("KE1 with %s: %v", name, err)
			}
		}
		record := a.registration.Record
		copy(record[:], bad)
		if err := serve(a.session, rand.Reader, record, good); !errors.Is(err, opaque.ErrInvalidMessage) {
			t.Errorf("record with %s: %v", name, err)
		}
		if _, err := opaque.CreateRegistrationResponse(ctx, opaque.RegistrationRequest(bad), a.static.PublicKey(), k); !errors.Is(err, opaque.ErrInvalidMessage) {
			t.Errorf("registration request with %s: %v", name, err)
		}
		if _, err := opaque.CreateRegistrationResponse(ctx, opaque.RegistrationRequest(good[:33]), opaque.PublicKey(bad), k); err == nil {
			t.Errorf("server public key with %s was accepted", name)
		}
	}
	ke1 := good
	copy(ke1[65:], minusGenerator(t))
	if err := serve(a.session, rand.Reader, a.registration.Record, ke1); !errors.Is(err, opaque.ErrInvalidMessage) {
		t.Errorf("keyshare −G: %v", err)
	}
	long := make([]byte, 65536)
	for name, session := range map[string]opaque.Session{
		"context": {Context: long}, "server identity": {ServerIdentity: long}, "client identity": {ClientIdentity: long},
	} {
		if err := serve(session, rand.Reader, a.registration.Record, good); err == nil {
			t.Errorf("%s of 65536 bytes was accepted", name)
		}
	}
	for n := range 96 {
		random := io.MultiReader(bytes.NewReader(make([]byte, n)), iotest.ErrReader(errFault))
		if err := serve(a.session, random, a.registration.Record, good); !errors.Is(err, errFault) {
			t.Errorf("%d bytes of randomness: %v", n, err)
		}
	}
	if n, m := k.evaluations.Load(), k.multiplications.Load(); n != 0 || m != 0 {
		t.Fatalf("refused input was evaluated %d times and multiplied %d times", n, m)
	}
	if err := serve(a.session, rand.Reader, a.registration.Record, good); err != nil {
		t.Fatal(err)
	}
	if n, m := k.evaluations.Load(), k.multiplications.Load(); n != 1 || m != 1 {
		t.Errorf("good input was evaluated %d times and multiplied %d times, want 1 and 1", n, m)
	}
}

func TestClientRandomnessFails(t *testing.T) {
	a := register(t, named)
	after := func(n int) io.Reader {
		return io.MultiReader(bytes.NewReader(bytes.Repeat([]byte{1}, n)), iotest.ErrReader(errFault))
	}
	for n := range 32 {
		if _, state, err := opaque.StartRegistration(after(n), a.password); !errors.Is(err, errFault) || state != nil {
			t.Errorf("StartRegistration after %d bytes: %v", n, err)
		}
	}
	for n := range 96 {
		if _, state, err := opaque.StartLogin(after(n), a.password); !errors.Is(err, errFault) || state != nil {
			t.Errorf("StartLogin after %d bytes: %v", n, err)
		}
	}
	request, client, err := opaque.StartRegistration(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	response, err := opaque.CreateRegistrationResponse(context.Background(), request, a.static.PublicKey(), a.eval)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 32 {
		if got, err := client.Finish(after(n), response, a.config); !errors.Is(err, errFault) || got != (opaque.Registration{}) {
			t.Errorf("Finish after %d bytes: %v", n, err)
		}
	}
}

type ksfFunc func([]byte) ([]byte, error)

func (f ksfFunc) Stretch(b []byte) ([]byte, error) { return f(b) }

func TestBadConfig(t *testing.T) {
	a := register(t, named)
	request, registration, err := opaque.StartRegistration(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	response, err := opaque.CreateRegistrationResponse(context.Background(), request, a.static.PublicKey(), a.eval)
	if err != nil {
		t.Fatal(err)
	}
	login, ke2, _ := a.start(t, a.password)
	long := make([]byte, 65536)
	for name, c := range map[string]struct {
		change func(*opaque.ClientConfig)
		want   string
	}{
		"no KSF":      {func(c *opaque.ClientConfig) { c.KSF = nil }, "no key stretching function"},
		"failing KSF": {func(c *opaque.ClientConfig) { c.KSF = ksfFunc(func([]byte) ([]byte, error) { return nil, errFault }) }, "fault"},
		"silent KSF":  {func(c *opaque.ClientConfig) { c.KSF = ksfFunc(func([]byte) ([]byte, error) { return nil, nil }) }, "0 bytes"},
		"long KSF": {func(c *opaque.ClientConfig) {
			c.KSF = ksfFunc(func([]byte) ([]byte, error) { return make([]byte, 33), nil })
		}, "33 bytes"},
		"weak Argon2id":        {func(c *opaque.ClientConfig) { c.KSF = opaque.Argon2id{Time: 1, MemoryKiB: 8, Threads: 1} }, "out of bounds"},
		"long context":         {func(c *opaque.ClientConfig) { c.Context = long }, "65535"},
		"long server identity": {func(c *opaque.ClientConfig) { c.ServerIdentity = long }, "65535"},
		"long client identity": {func(c *opaque.ClientConfig) { c.ClientIdentity = long }, "65535"},
	} {
		t.Run(name, func(t *testing.T) {
			config := a.config
			c.change(&config)
			registered, err := registration.Finish(rand.Reader, response, config)
			if err == nil || !strings.Contains(err.Error(), c.want) || registered != (opaque.Registration{}) {
				t.Errorf("registration: %v", err)
			}
			result, err := login.Finish(ke2, config)
			if err == nil || !strings.Contains(err.Error(), c.want) || result != (opaque.Login{}) {
				t.Errorf("login: %v", err)
			}
		})
	}
}

// One client state and one server's keys serve many goroutines.
func TestConcurrentUse(t *testing.T) {
	a := register(t, named)
	ke1, login, err := opaque.StartLogin(rand.Reader, a.password)
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			ke2, expected, err := opaque.GenerateKE2(context.Background(), a.session, rand.Reader, a.registration.Record, ke1, a.static, a.eval)
			if err != nil {
				t.Error(err)
				return
			}
			result, err := login.Finish(ke2, a.config)
			if err != nil {
				t.Error(err)
				return
			}
			if key, err := expected.Verify(result.KE3); err != nil || key != result.SessionKey {
				t.Error("no agreement:", err)
			}
		})
	}
	group.Wait()
}

// FuzzGenerateKE2 feeds the server what a client or a spoilt database could.
func FuzzGenerateKE2(f *testing.F) {
	real, fake := opaquetest.Vectors(f)
	for _, v := range append(real[:], fake) {
		ke1, record := v.KE1(f), v.Record(f)
		f.Add(ke1[:], record[:])
	}
	static, eval := opaquetest.RandomKey(f), opaquetest.RandomKey(f)
	f.Fuzz(func(t *testing.T, ke1Bytes, recordBytes []byte) {
		var ke1 opaque.KE1
		var record opaque.RegistrationRecord
		copy(ke1[:], ke1Bytes)
		copy(record[:], recordBytes)
		_, ke1Err := opaque.ParseKE1(ke1[:])
		_, recordErr := opaque.ParseRegistrationRecord(record[:])
		ke2, _, err := opaque.GenerateKE2(context.Background(), named, rand.Reader, record, ke1, static, eval)
		if ke1Err != nil || recordErr != nil {
			if !errors.Is(err, opaque.ErrInvalidMessage) {
				t.Fatalf("error %v, want ErrInvalidMessage", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := opaque.ParseKE2(ke2[:]); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzClientFinish feeds the client what a hostile server could. Only the one
// true KE2 may succeed.
func FuzzClientFinish(f *testing.F) {
	real, fake := opaquetest.Vectors(f)
	in := real[0].Inputs
	_, login, err := opaque.StartLogin(join(in.BlindLogin, in.ClientNonce, in.ClientKeyshareSeed), in.Password)
	if err != nil {
		f.Fatal(err)
	}
	config := opaque.ClientConfig{Context: real[0].Config.Context, KSF: opaquetest.IdentityKSF{}}
	f.Add([]byte(real[0].Outputs.KE2))
	f.Add([]byte(real[1].Outputs.KE2))
	f.Add([]byte(fake.Outputs.KE2))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var ke2 opaque.KE2
		copy(ke2[:], b)
		result, err := login.Finish(ke2, config)
		if bytes.Equal(ke2[:], real[0].Outputs.KE2) {
			if err != nil || !bytes.Equal(result.KE3[:], real[0].Outputs.KE3) {
				t.Fatalf("the true KE2 fails: %v", err)
			}
			return
		}
		if !errors.Is(err, opaque.ErrInvalidMessage) && !errors.Is(err, opaque.ErrWrongPasswordOrServer) && !errors.Is(err, opaque.ErrServerAuthentication) {
			t.Fatalf("error %v", err)
		}
		if result != (opaque.Login{}) {
			t.Fatal("failed, and returned something")
		}
	})
}
