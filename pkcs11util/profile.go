package pkcs11util

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/miekg/pkcs11"
)

// Who makes the IV of AES-GCM, and where a token that makes it gives it back.
const (
	IVOurs        = "ours"         // this process, at random; the token uses what it is given
	IVWrittenBack = "written-back" // the token, over the zeros that it is given (AWS CloudHSM 5)
	IVAppended    = "appended"     // the token, after the tag (Luna 7 in FIPS mode)
	IVPrepended   = "prepended"    // the token, before the ciphertext; it is given none (AWS CloudHSM's own mechanism)
)

// Numbers under which tokens do AES-GCM.
const (
	// GCMStandard is CKM_AES_GCM.
	GCMStandard Mechanism = pkcs11.CKM_AES_GCM
	// gcmCloudHSM is CKM_CLOUDHSM_AES_GCM, CKM_VENDOR_DEFINED | CKM_AES_GCM in AWS CloudHSM's
	// header cloudhsm_pkcs11_vendor_defs.h. It takes no IV (pIv must be NULL) and prepends its own.
	gcmCloudHSM Mechanism = vendorDefined | pkcs11.CKM_AES_GCM
	// gcmCloudKMS is CKM_CLOUDKMS_AES_GCM, CKM_VENDOR_DEFINED | 0x1E100 | 1 in Google Cloud KMS's
	// header kmsp11.h. It takes 12 zeros and writes its own IV over them.
	gcmCloudKMS Mechanism = vendorDefined | 0x1e101

	vendorDefined = 0x80000000 // CKM_VENDOR_DEFINED, PKCS #11 v2.40 section 3.3
)

// Mechanism is the number of a PKCS #11 mechanism, in files in hexadecimal as headers have it.
type Mechanism uint32

// MarshalText writes 0x and eight digits.
func (m Mechanism) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "0x%08x", uint32(m)), nil }

// UnmarshalText reads what MarshalText writes, with any number of digits and in either case.
func (m *Mechanism) UnmarshalText(b []byte) error {
	digits, ok := strings.CutPrefix(string(b), "0x")
	n, err := strconv.ParseUint(digits, 16, 32)
	if err != nil || !ok {
		return fmt.Errorf("want a number like 0x%08x, got %q", uint32(GCMStandard), b)
	}
	*m = Mechanism(n)
	return nil
}

// How x-coordinates come out of CKM_ECDH1_DERIVE. Records keep the strategy that they were
// made under. The key is the same in the first two, so that either serves the other's records. In the third
// it is of another kind (see Profile.Weakness).
const (
	ECDHDerive     = "derive"      // into a readable secret
	ECDHDeriveWrap = "derive-wrap" // into a sensitive secret, wrapped out under a key of this process
	ECDHInMemory   = "in-memory"   // not at all: this process multiplies, by a scalar that a secret of the token's gives
)

// Whether C_DeriveKey is told CKA_VALUE_LEN, and how it is given the peer's point.
const (
	ValueLenGiven   = "given"
	ValueLenLeftOut = "left-out"

	PointRaw = "raw" // 65 bytes, as PKCS #11 v2.40 (mechanisms, section 2.3.10) prefers
	PointDER = "der" // the same in a DER OCTET STRING, which it also allows
)

// minDataBytes is more than the largest value that the vault seals.
const minDataBytes = 512

// Profile says in what a token differs from others of the same standard. How CKA_EC_POINT
// reads is not part of it: its two forms are told apart by their lengths. A profile is
// found by [Admin.Check], and kept as a small JSON file, all members present.
type Profile struct {
	// GCM is the number under which the token does AES-GCM: GCMStandard, or one of its vendor's.
	GCM Mechanism `json:"gcm_mechanism"`
	// IV is IVOurs, IVWrittenBack, IVAppended or IVPrepended. Values that were sealed under another
	// open as long as the token can decrypt with a given IV.
	IV string `json:"iv"`
	// IVBytes is the IV's length: 12 or 16, and 12 if the IV is ours.
	IVBytes int `json:"iv_bytes"`
	// ECDH is ECDHDerive, ECDHDeriveWrap or ECDHInMemory.
	ECDH string `json:"ecdh"`
	// DeriveValueLen is ValueLenGiven or ValueLenLeftOut.
	DeriveValueLen string `json:"derive_value_len"`
	// PeerPoint is PointRaw or PointDER.
	PeerPoint string `json:"peer_point"`
	// MaxDataBytes is the most that one C_Encrypt takes: 512 to 8,192.
	MaxDataBytes int `json:"max_data_bytes"`
}

// DefaultProfile is SoftHSM's, and of most tokens.
func DefaultProfile() Profile {
	return Profile{
		GCM: GCMStandard, IV: IVOurs, IVBytes: ivBytes, ECDH: ECDHDerive,
		DeriveValueLen: ValueLenGiven, PeerPoint: PointRaw, MaxDataBytes: maxPlaintextBytes,
	}
}

// orDefault is p, or the default profile in the place of none.
func (p Profile) orDefault() Profile {
	if p == (Profile{}) {
		return DefaultProfile()
	}
	return p
}

// Weakness says what is lost under this profile that others keep, for the operator to read; nothing, of most.
func (p Profile) Weakness() string {
	if p.ECDH != ECDHInMemory {
		return ""
	}
	return "lower assurance (ecdh in-memory): the OPRF, server and relay keys pass through vaultd's memory each time that they are used; " +
		"whoever controls it or reads that memory once can carry them away with all records, and then guess passwords offline, without the token and its counter"
}

// check names everything that is wrong, by the members of the file, in one line.
func (p Profile) check() error {
	var problems []string
	report := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	oneOf := func(member, got string, want ...string) {
		for _, w := range want {
			if got == w {
				return
			}
		}
		report("%s: want one of %q, got %q", member, want, got)
	}
	if p.GCM != GCMStandard && p.GCM < vendorDefined {
		report("gcm_mechanism: want 0x%08x (CKM_AES_GCM), or a vendor's from 0x%08x on, got 0x%08x", uint32(GCMStandard), uint32(vendorDefined), uint32(p.GCM))
	}
	oneOf("iv", p.IV, IVOurs, IVWrittenBack, IVAppended, IVPrepended)
	if p.IVBytes != ivBytes && (p.IVBytes != longIVBytes || p.IV == IVOurs) {
		report("iv_bytes: want 12, or 16 if the token makes the IV, got %d", p.IVBytes)
	}
	oneOf("ecdh", p.ECDH, ECDHDerive, ECDHDeriveWrap, ECDHInMemory)
	oneOf("derive_value_len", p.DeriveValueLen, ValueLenGiven, ValueLenLeftOut)
	oneOf("peer_point", p.PeerPoint, PointRaw, PointDER)
	if p.MaxDataBytes < minDataBytes || p.MaxDataBytes > maxPlaintextBytes {
		report("max_data_bytes: want %d to %d, got %d", minDataBytes, maxPlaintextBytes, p.MaxDataBytes)
	}
	if len(problems) > 0 {
		return errors.New(strings.Join(problems, "; "))
	}
	return nil
}

// maxProfileBytes keeps a wrong path from being read whole.
const maxProfileBytes = 4096

// ReadProfile reads a profile from a JSON file. Members that are missing, unknown or there twice, and
// values that are out of range, are errors.
func ReadProfile(path string) (Profile, error) {
	f, err := os.Open(path)
	if err != nil {
		return Profile{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxProfileBytes+1))
	if err != nil {
		return Profile{}, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(b) > maxProfileBytes {
		return Profile{}, fmt.Errorf("%s holds more than %d bytes, and is no token profile", path, maxProfileBytes)
	}
	p, err := parseProfile(b)
	if err != nil {
		return Profile{}, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func parseProfile(b []byte) (Profile, error) {
	var p Profile
	if err := json.Unmarshal(b, &p, json.RejectUnknownMembers(true)); err != nil {
		return Profile{}, err
	}
	if err := p.check(); err != nil { // a member that is missing is one with a wrong value
		return Profile{}, err
	}
	return p, nil
}

// File is the profile as ReadProfile takes it.
func (p Profile) File() ([]byte, error) {
	b, err := json.Marshal(p, jsontext.Multiline(true), jsontext.WithIndent("  "))
	if err != nil {
		return nil, fmt.Errorf("encoding a token profile: %w", err)
	}
	return append(b, '\n'), nil
}
