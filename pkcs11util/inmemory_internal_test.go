package pkcs11util

import (
	"crypto/elliptic"
	"math/big"
	"testing"
)

func TestIsScalar(t *testing.T) {
	n := elliptic.P256().Params().N
	for _, c := range []struct {
		number *big.Int
		is     bool
	}{
		{big.NewInt(0), false}, {big.NewInt(1), true}, {big.NewInt(2), true},
		{new(big.Int).Sub(n, big.NewInt(1)), true}, {n, false}, {new(big.Int).Add(n, big.NewInt(1)), false},
		{new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 256), big.NewInt(1)), false},
	} {
		if got := isScalar(c.number.FillBytes(make([]byte, fieldBytes))); got != c.is {
			t.Errorf("%x: %v", c.number, got)
		}
	}
}
