package pkcs11util

import (
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"testing"

	"filippo.io/nistec"
)

func scalarFor(t *testing.T) []byte {
	t.Helper()
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key.Bytes()
}

func times(t *testing.T, p *nistec.P256Point, k []byte) *nistec.P256Point {
	t.Helper()
	r, err := nistec.NewP256Point().ScalarMult(p, k)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func xOf(t *testing.T, p *nistec.P256Point) [fieldBytes]byte {
	t.Helper()
	x, err := p.BytesX()
	if err != nil {
		t.Fatal(err)
	}
	return [fieldBytes]byte(x)
}

func TestFullPoint(t *testing.T) {
	signs := map[byte]int{}
	for range 200 {
		k := scalarFor(t)
		g := nistec.NewP256Point().SetGenerator()
		q := times(t, g, k)
		p := times(t, g, scalarFor(t))
		pg := nistec.NewP256Point().Add(p, g)
		x1, x2 := xOf(t, times(t, p, k)), xOf(t, times(t, pg, k))

		got, err := fullPoint(x1, x2, q)
		if err != nil {
			t.Fatal(err)
		}
		want := [pointBytes]byte(times(t, p, k).BytesCompressed())
		if got != want {
			t.Fatalf("got %x, want %x", got, want)
		}
		signs[got[0]]++
	}
	if signs[2] == 0 || signs[3] == 0 {
		t.Errorf("only one of the two candidates was ever right: %v", signs)
	}
}

// A token that lies, or answers under another key, is caught whichever of its two answers is wrong.
func TestFullPointCatchesLies(t *testing.T) {
	g := nistec.NewP256Point().SetGenerator()
	k, other := scalarFor(t), scalarFor(t)
	q := times(t, g, k)
	p := times(t, g, scalarFor(t))
	pg := nistec.NewP256Point().Add(p, g)
	x1, x2 := xOf(t, times(t, p, k)), xOf(t, times(t, pg, k))

	// x of kP − Q, which the wrong candidate's sum has but for its sign: x(−R+Q) = x(R−Q).
	minus := nistec.NewP256Point().Add(times(t, p, k), nistec.NewP256Point().Negate(q))
	got, err := fullPoint(x1, xOf(t, minus), q)
	if want := nistec.NewP256Point().Negate(times(t, p, k)).BytesCompressed(); err != nil || got != [pointBytes]byte(want) {
		t.Errorf("x of the other candidate's sum: got %x, %v; want that candidate", got, err)
	}

	// The documented limit: answers to another question under the same key.
	sum := nistec.NewP256Point().Add(times(t, p, k), q)
	got, err = fullPoint(x2, x1, q)
	if want := sum.Negate(sum).BytesCompressed(); err != nil || got != [pointBytes]byte(want) {
		t.Errorf("x1 and x2 exchanged: got %x, %v; want k·(−P−G)", got, err)
	}

	flipped := x2
	flipped[31] ^= 1
	for name, c := range map[string]struct {
		x1, x2 [fieldBytes]byte
		q      *nistec.P256Point
	}{
		"x2 flipped":             {x1, flipped, q},
		"x2 is x1":               {x1, x1, q},
		"x2 of another key":      {x1, xOf(t, times(t, pg, other)), q},
		"x1 of another key":      {xOf(t, times(t, p, other)), x2, q},
		"both of another key":    {xOf(t, times(t, p, other)), xOf(t, times(t, pg, other)), q},
		"public of another key":  {x1, x2, times(t, g, other)},
		"sum is the identity":    {xOf(t, q), [fieldBytes]byte{}, q},
		"x2 zero":                {x1, [fieldBytes]byte{}, q},
		"x1 of no point":         {notOnCurve(t), x2, q},
		"x1 above the field's p": {[fieldBytes]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, x2, q},
	} {
		if got, err := fullPoint(c.x1, c.x2, c.q); !errors.Is(err, errFaulty) || got != [pointBytes]byte{} {
			t.Errorf("%s: got %x, %v", name, got, err)
		}
	}
}

func notOnCurve(t *testing.T) [fieldBytes]byte {
	t.Helper()
	for i := range 256 {
		x := [fieldBytes]byte{31: byte(i)}
		if _, err := nistec.NewP256Point().SetBytes(append([]byte{2}, x[:]...)); err != nil {
			return x
		}
	}
	t.Fatal("every small number is an x-coordinate")
	return [fieldBytes]byte{}
}

func BenchmarkPointArithmetic(b *testing.B) {
	g := nistec.NewP256Point().SetGenerator()
	k := append(make([]byte, 31), 77)
	q, _ := nistec.NewP256Point().ScalarBaseMult(k)
	p := nistec.NewP256Point().Double(g)
	pg := nistec.NewP256Point().Add(p, g)
	kp, _ := nistec.NewP256Point().ScalarMult(p, k)
	kpg, _ := nistec.NewP256Point().ScalarMult(pg, k)
	x1, _ := kp.BytesX()
	x2, _ := kpg.BytesX()
	point := [pointBytes]byte(p.BytesCompressed())
	for b.Loop() {
		if _, _, err := shifted(point); err != nil {
			b.Fatal(err)
		}
		if _, err := fullPoint([fieldBytes]byte(x1), [fieldBytes]byte(x2), q); err != nil {
			b.Fatal(err)
		}
	}
}

// Points read alike bare and in an OCTET STRING, those too whose bare form is a whole OCTET
// STRING of 63 bytes.
func TestParseECPoint(t *testing.T) {
	odd := 0
	p := nistec.NewP256Point().SetGenerator()
	for range 2000 {
		bare := p.Bytes()
		if bare[1] == uncompressedBytes-2 {
			odd++
		}
		for _, b := range [][]byte{bare, append([]byte{0x04, uncompressedBytes}, bare...)} {
			if got, err := parseECPoint(b); err != nil || got.compressed != [pointBytes]byte(p.BytesCompressed()) {
				t.Fatalf("%x: %v", b, err)
			}
		}
		for _, b := range [][]byte{nil, bare[:64], append(bare, 0), p.BytesCompressed(), append([]byte{0x04, 64}, bare...)} {
			if _, err := parseECPoint(b); err == nil {
				t.Fatalf("%x: accepted", b)
			}
		}
		p.Add(p, nistec.NewP256Point().SetGenerator())
	}
	if odd == 0 {
		t.Error("no point was of the kind that misleads")
	}
}
