package opaque_test

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	"testing"

	"github.com/cloudflare/circl/expander"
	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/oprf"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
)

var curve = elliptic.P256().Params()

// number writes x in 32 bytes.
func number(x *big.Int) []byte { return x.FillBytes(make([]byte, 32)) }

func orderPlus(d int64) *big.Int { return new(big.Int).Add(curve.N, big.NewInt(d)) }

func TestScalarRange(t *testing.T) {
	allOnes := bytes.Repeat([]byte{0xff}, 32)
	for _, c := range []struct {
		name string
		b    []byte
		ok   bool
	}{
		{"zero", make([]byte, 32), false},
		{"one", number(big.NewInt(1)), true},
		{"n-1", number(orderPlus(-1)), true},
		{"n", number(curve.N), false},
		{"n+1", number(orderPlus(1)), false},
		{"2^256-1", allOnes, false},
		{"empty", nil, false},
		{"31 bytes", make([]byte, 31), false},
		{"33 bytes", append(make([]byte, 32), 1), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := opaque.ParseScalar(c.b)
			if (err == nil) != c.ok {
				t.Fatalf("ParseScalar: %v, want accepted: %v", err, c.ok)
			}
			if c.ok && !bytes.Equal(s[:], c.b) {
				t.Errorf("got %x, want %x", s[:], c.b)
			}
			if len(c.b) != 32 {
				return
			}
			// A scalar that was never parsed must not get through either.
			_, err = opaque.Scalar(c.b).Multiply(generator(t))
			if (err == nil) != c.ok {
				t.Errorf("Multiply: %v, want accepted: %v", err, c.ok)
			}
		})
	}
}

func TestRandomScalarRejects(t *testing.T) {
	last := number(orderPlus(-1))
	source := join(make([]byte, 32), number(curve.N), bytes.Repeat([]byte{0xff}, 32), last, make([]byte, 7))
	s, err := opaque.RandomScalar(source)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(s[:], last) {
		t.Errorf("got %x, want n-1", s[:])
	}
	if source.Len() != 7 {
		t.Errorf("%d bytes left, want 7", source.Len())
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestRandomScalarBrokenSource(t *testing.T) {
	if _, err := opaque.RandomScalar(zeros{}); err == nil {
		t.Error("a source of zeros gave a scalar")
	}
	if _, err := opaque.RandomScalar(join(make([]byte, 31))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short source: %v", err)
	}
}

// circl's arithmetic, which is not ours, is the reference.
func TestMultiplyAgainstReference(t *testing.T) {
	for range 50 {
		s, err := opaque.RandomScalar(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		p := opaque.Element(opaquetest.RandomKey(t).PublicKey())
		got, err := s.Multiply(p)
		if err != nil {
			t.Fatal(err)
		}
		scalar, point := group.P256.NewScalar(), group.P256.NewElement()
		if err := errors.Join(scalar.UnmarshalBinary(s[:]), point.UnmarshalBinary(p[:])); err != nil {
			t.Fatal(err)
		}
		want, err := group.P256.NewElement().Mul(point, scalar).MarshalBinaryCompress()
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "product", got[:], want)
	}
}

// The vault's OPRF key is a product of two scalars, applied one after the
// other in either order.
func TestMultiplyCommutes(t *testing.T) {
	p := generator(t)
	a, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ab, ba := multiply(t, b, multiply(t, a, p)), multiply(t, a, multiply(t, b, p))
	if ab != ba {
		t.Errorf("b(aP) = %x, a(bP) = %x", ab, ba)
	}
}

func TestMultiplyRefusesBadPoints(t *testing.T) {
	s, err := opaque.RandomScalar(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range badPoints(t) {
		if len(b) != opaque.ElementSize {
			continue
		}
		if _, err := s.Multiply(opaque.Element(b)); !errors.Is(err, opaque.ErrInvalidMessage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExpandMessageAgainstReference(t *testing.T) {
	for _, dst := range []string{"", "x", opaque.DSTDeriveKeyPair, string(bytes.Repeat([]byte("d"), 255))} {
		for _, n := range []int{0, 1, 31, 32, 63, 64, 65, 1000} {
			msg := make([]byte, n)
			if _, err := rand.Read(msg); err != nil {
				t.Fatal(err)
			}
			got := opaque.ExpandMessageXMD(msg, dst)
			equal(t, "expanded", got[:], expander.NewExpanderMD(crypto.SHA256, []byte(dst)).Expand(msg, 48))

			scalar := opaque.HashToScalar(msg, dst)
			want, err := group.P256.HashToScalar(msg, []byte(dst)).MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "scalar", scalar[:], want)
		}
	}
}

// Random input never meets the edges of the reduction, so they are set here.
func TestReduceModOrder(t *testing.T) {
	top := new(big.Int).Lsh(big.NewInt(1), 384)
	quotient := new(big.Int).Div(top, curve.N)
	multiple := new(big.Int).Mul(quotient, curve.N) // the largest multiple of n below 2^384
	for _, base := range []*big.Int{new(big.Int), curve.N, multiple, top, new(big.Int).Lsh(curve.N, 64), new(big.Int).Lsh(curve.N, 128)} {
		for d := int64(-2); d <= 2; d++ {
			x := new(big.Int).Add(base, big.NewInt(d))
			if x.Sign() < 0 || x.Cmp(top) >= 0 {
				continue
			}
			var b [48]byte
			x.FillBytes(b[:])
			got := opaque.ReduceModOrder(b)
			equal(t, x.Text(16), got[:], number(new(big.Int).Mod(x, curve.N)))
		}
	}
}

func TestDeriveDiffieHellmanKeyPairAgainstReference(t *testing.T) {
	for i := range uint64(50) {
		var seed [32]byte
		binary.BigEndian.PutUint64(seed[:], i)
		private, public, err := opaque.DeriveDiffieHellmanKeyPair(seed)
		if err != nil {
			t.Fatal(err)
		}
		k, err := oprf.DeriveKey(oprf.SuiteP256, oprf.BaseMode, seed[:], []byte("OPAQUE-DeriveDiffieHellmanKeyPair"))
		if err != nil {
			t.Fatal(err)
		}
		wantPrivate, err := k.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		wantPublic, err := k.Public().MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "private key", private[:], wantPrivate)
		equal(t, "public key", public[:], wantPublic)
	}
}

// generator returns G.
func generator(t testing.TB) opaque.Element {
	t.Helper()
	e, err := opaque.ParseElement(elliptic.MarshalCompressed(elliptic.P256(), curve.Gx, curve.Gy))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// minusGenerator returns −G.
func minusGenerator(t testing.TB) []byte {
	t.Helper()
	g := generator(t)
	g[0] ^= 1
	return g[:]
}

// badPoints are encodings that are not the compressed form of a point.
func badPoints(t testing.TB) map[string][]byte {
	t.Helper()
	g := generator(t)
	with := func(prefix byte, x *big.Int) []byte { return append([]byte{prefix}, number(x)...) }

	// The least x that no point of the curve has.
	offCurve := new(big.Int)
	for {
		if x, _ := elliptic.UnmarshalCompressed(elliptic.P256(), with(2, offCurve)); x == nil {
			break
		}
		offCurve.Add(offCurve, big.NewInt(1))
	}
	// An x of the curve that is small enough to be written a second time, with
	// p added, in 32 bytes.
	small := big.NewInt(0)
	for {
		if x, _ := elliptic.UnmarshalCompressed(elliptic.P256(), with(2, small)); x != nil {
			break
		}
		small.Add(small, big.NewInt(1))
	}
	notReduced := new(big.Int).Add(small, curve.P)

	uncompressed := append([]byte{4}, append(number(curve.Gx), number(curve.Gy)...)...)
	return map[string][]byte{
		"empty":               {},
		"identity":            {0},
		"identity, padded":    make([]byte, 33),
		"off the curve, even": with(2, offCurve),
		"off the curve, odd":  with(3, offCurve),
		"x not reduced":       with(2, notReduced),
		"x = p":               with(2, curve.P),
		"x = 2^256-1":         append([]byte{2}, bytes.Repeat([]byte{0xff}, 32)...),
		"prefix 0":            append([]byte{0}, g[1:]...),
		"prefix 1":            append([]byte{1}, g[1:]...),
		"prefix 4":            append([]byte{4}, g[1:]...),
		"prefix 5":            append([]byte{5}, g[1:]...),
		"hybrid prefix 6":     append([]byte{6}, g[1:]...),
		"hybrid prefix 7":     append([]byte{7}, g[1:]...),
		"prefix 0x82":         append([]byte{0x82}, g[1:]...),
		"uncompressed":        uncompressed,
		"uncompressed, cut":   uncompressed[:33],
		"x alone":             g[1:],
		"one byte short":      g[:32],
		"one byte more":       append(g[:33:33], 0),
		"two points":          append(g[:33:33], g[:]...),
	}
}
