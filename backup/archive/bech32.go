package archive

import "strings"

// identityText is an MLKEM768-X25519 identity as age's key files have it: its 32 bytes
// in Bech32 (BIP 173) under this human-readable part, in upper case.
func identityText(seed []byte) string {
	return strings.ToUpper(bech32("age-secret-key-pq-", seed))
}

// bech32 encodes bytes (BIP 173), of any length, as age does. hrp is in lower case.
func bech32(hrp string, data []byte) string {
	const charset = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
	// Groups of five bits, the last one filled up with zeros.
	var groups []byte
	accumulator, bits := uint32(0), 0
	for _, b := range data {
		accumulator = accumulator<<8 | uint32(b)
		for bits += 8; bits >= 5; {
			bits -= 5
			groups = append(groups, byte(accumulator>>bits)&31)
		}
	}
	if bits > 0 {
		groups = append(groups, byte(accumulator<<(5-bits))&31)
	}
	// The checksum is over the human-readable part's high bits, a zero, its low bits,
	// the groups, and six zeros.
	checked := make([]byte, 0, 2*len(hrp)+1+len(groups)+6)
	for _, c := range []byte(hrp) {
		checked = append(checked, c>>5)
	}
	checked = append(checked, 0)
	for _, c := range []byte(hrp) {
		checked = append(checked, c&31)
	}
	checked = append(append(checked, groups...), 0, 0, 0, 0, 0, 0)
	sum := bech32Polymod(checked) ^ 1
	for i := range 6 {
		groups = append(groups, byte(sum>>(5*(5-i)))&31)
	}
	var out strings.Builder
	out.WriteString(hrp)
	out.WriteByte('1')
	for _, g := range groups {
		out.WriteByte(charset[g])
	}
	return out.String()
}

// bech32Polymod is the BCH code's remainder, with the generator of BIP 173.
func bech32Polymod(values []byte) uint32 {
	generator := [5]uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3}
	sum := uint32(1)
	for _, v := range values {
		top := sum >> 25
		sum = sum&0x1ffffff<<5 ^ uint32(v)
		for i, g := range generator {
			if top>>i&1 == 1 {
				sum ^= g
			}
		}
	}
	return sum
}
