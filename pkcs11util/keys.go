package pkcs11util

import (
	"bytes"
	"cmp"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// Purposes of keys. Each key serves one purpose, and its attributes allow no more.
const (
	Master   = "master"   // AES-256, seals the secret part of every record
	State    = "state"    // AES-256, seals what clients carry between two requests
	OPRF     = "oprf"     // P-256, multiplies: the token's share of every user's OPRF key
	Server   = "server"   // P-256, multiplies: OPAQUE's static server key
	Relay    = "relay"    // P-256, derives: HPKE key of the relay channel
	MAC      = "mac"      // 32 bytes, HMAC-SHA-256
	Identity = "identity" // P-256, signs what clients pin
	Audit    = "audit"    // P-256, signs checkpoints of the audit log
)

// Purposes returns all purposes, in a fixed order.
func Purposes() []string {
	return []string{Master, State, OPRF, Server, Relay, MAC, Identity, Audit}
}

// Labels of keys are bkv/<purpose>/<generation>. Keys that are not proven yet are
// bkv/tmp/<purpose>/<generation>/<random>.
const (
	labelPrefix     = "bkv/"
	temporaryPrefix = labelPrefix + "tmp/"
)

// secretKeyBytes is the size of AES-256 keys and of the MAC keys.
const secretKeyBytes = 32

// p256Params is CKA_EC_PARAMS of P-256: the OID 1.2.840.10045.3.1.7 in DER (RFC 5480 section 2.1.1.1).
var p256Params = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}

// kind is how a purpose's keys look in the token.
type kind struct {
	class, keyType uint
	usage          []uint // of the flags in usageFlags, those that are set
}

var kinds = map[string]kind{
	Master:   {pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}},
	State:    {pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}},
	OPRF:     {pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, []uint{pkcs11.CKA_DERIVE}},
	Server:   {pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, []uint{pkcs11.CKA_DERIVE}},
	Relay:    {pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, []uint{pkcs11.CKA_DERIVE}},
	MAC:      {pkcs11.CKO_SECRET_KEY, pkcs11.CKK_GENERIC_SECRET, []uint{pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY}},
	Identity: {pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, []uint{pkcs11.CKA_SIGN}},
	Audit:    {pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, []uint{pkcs11.CKA_SIGN}},
}

// usageFlags are the attributes that allow a key of each class to do something
// (PKCS #11 v2.40, sections 4.9 and 4.10).
var usageFlags = map[uint][]uint{
	pkcs11.CKO_SECRET_KEY: {
		pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY,
		pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE,
	},
	pkcs11.CKO_PRIVATE_KEY: {
		pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_SIGN_RECOVER, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE,
	},
}

var attributeNames = map[uint]string{
	pkcs11.CKA_TOKEN: "CKA_TOKEN", pkcs11.CKA_PRIVATE: "CKA_PRIVATE",
	pkcs11.CKA_SENSITIVE: "CKA_SENSITIVE", pkcs11.CKA_EXTRACTABLE: "CKA_EXTRACTABLE",
	pkcs11.CKA_ENCRYPT: "CKA_ENCRYPT", pkcs11.CKA_DECRYPT: "CKA_DECRYPT",
	pkcs11.CKA_SIGN: "CKA_SIGN", pkcs11.CKA_VERIFY: "CKA_VERIFY", pkcs11.CKA_SIGN_RECOVER: "CKA_SIGN_RECOVER",
	pkcs11.CKA_WRAP: "CKA_WRAP", pkcs11.CKA_UNWRAP: "CKA_UNWRAP", pkcs11.CKA_DERIVE: "CKA_DERIVE",
	pkcs11.CKA_KEY_TYPE: "CKA_KEY_TYPE", pkcs11.CKA_VALUE_LEN: "CKA_VALUE_LEN", pkcs11.CKA_EC_PARAMS: "CKA_EC_PARAMS",
}

// protection is what every key's attributes say, whatever its purpose.
func protection() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
	}
}

// scalarSecret is how keys that multiply look where scalars are computed from secrets (see inmemory.go).
var scalarSecret = kind{pkcs11.CKO_SECRET_KEY, pkcs11.CKK_GENERIC_SECRET, []uint{pkcs11.CKA_SIGN}}

// kind is how keys of a purpose look under the profile.
func (p Profile) kind(purpose string) (k kind, ok bool) {
	if p.inMemory(purpose) {
		return scalarSecret, true
	}
	k, ok = kinds[purpose]
	return k, ok
}

// flags are the protection of a key of this kind and its usage flags, set and unset.
func (k kind) flags() []*pkcs11.Attribute {
	flags := protection()
	for _, f := range usageFlags[k.class] {
		flags = append(flags, pkcs11.NewAttribute(f, slices.Contains(k.usage, f)))
	}
	return flags
}

// shape are the attributes that say what sort of key it is, as they read back.
func (k kind) shape() []*pkcs11.Attribute {
	shape := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, k.keyType)}
	if k.class == pkcs11.CKO_SECRET_KEY {
		return append(shape, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, secretKeyBytes))
	}
	return append(shape, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, p256Params))
}

// SecretKeyGen is the mechanism that generates secret keys of a purpose: CKM_AES_KEY_GEN, or
// CKM_GENERIC_SECRET_KEY_GEN for those that make HMACs.
func (p Profile) SecretKeyGen(purpose string) uint {
	if k, _ := p.kind(purpose); k.keyType == pkcs11.CKK_GENERIC_SECRET {
		return pkcs11.CKM_GENERIC_SECRET_KEY_GEN
	}
	return pkcs11.CKM_AES_KEY_GEN
}

// Templates returns the attributes to generate a key of this purpose with: for a
// secret key only secret is set, for a key pair private and public. Label,
// CKA_ID and (for the private half) the curve are the caller's.
func (p Profile) Templates(purpose string) (secret, private, public []*pkcs11.Attribute, err error) {
	k, ok := p.kind(purpose)
	if !ok {
		return nil, nil, nil, fmt.Errorf("%q is no purpose of a key", purpose)
	}
	if k.class == pkcs11.CKO_SECRET_KEY {
		return append(k.flags(), k.shape()...), nil, nil, nil
	}
	return nil, k.flags(), []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, k.keyType),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, p256Params),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, slices.Contains(k.usage, pkcs11.CKA_SIGN)),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY_RECOVER, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
	}, nil
}

// A KeyName is a purpose and a generation. Generations count from 1.
type KeyName struct {
	Purpose    string
	Generation uint32
}

// String is the key's label in the token.
func (n KeyName) String() string {
	return labelPrefix + n.Purpose + "/" + strconv.FormatUint(uint64(n.Generation), 10)
}

// sortNames sorts by purpose, in the order of Purposes, and generation.
func sortNames(names []KeyName) {
	slices.SortFunc(names, func(a, b KeyName) int {
		return cmp.Or(
			cmp.Compare(slices.Index(Purposes(), a.Purpose), slices.Index(Purposes(), b.Purpose)),
			cmp.Compare(a.Generation, b.Generation),
		)
	})
}

// parseLabel reads a label. ours is false for labels that are none of this package's:
// temporary ones, unknown purposes and whatever else is in the token. A label of a known purpose
// that is not exactly what String makes is an error.
func parseLabel(label string) (name KeyName, ours bool, err error) {
	rest, ok := strings.CutPrefix(label, labelPrefix)
	if !ok {
		return KeyName{}, false, nil
	}
	purpose, number, _ := strings.Cut(rest, "/")
	if _, ok := kinds[purpose]; !ok {
		return KeyName{}, false, nil
	}
	generation, err := strconv.ParseUint(number, 10, 32)
	name = KeyName{purpose, uint32(generation)}
	if err != nil || generation == 0 || name.String() != label {
		return KeyName{}, false, fmt.Errorf("key %q: its generation is no number from 1 on in plain decimal", label)
	}
	return name, true, nil
}

// key is a key of the token, valid for as long as the connection that found it.
type key struct {
	name   KeyName
	handle pkcs11.ObjectHandle
	public publicKey // of EC keys, and of those that scalars are computed from
}

// publicKey is an EC key's public half, decoded once.
type publicKey struct {
	compressed [pointBytes]byte
	point      *nistec.P256Point
}

// object is what is known of an object before it is trusted.
type object struct {
	handle pkcs11.ObjectHandle
	label  string
}

// objects lists the objects of a class with their labels, those without a readable
// label left out: a creation that was cut short leaves such. The caller holds
// module.Objects.
func (s session) objects(class uint) ([]object, error) {
	handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, class))
	if err != nil {
		return nil, err
	}
	var all []object
	for _, h := range handles {
		values, err := s.attributes(h, pkcs11.CKA_LABEL)
		if errors.Is(err, pkcs11.Error(pkcs11.CKR_OBJECT_HANDLE_INVALID)) || errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, object{h, string(values[0])})
	}
	return all, nil
}

// findKeys finds every bkv/<purpose>/<generation> key in the token and checks its
// attributes. Two keys of one name, a pair without its public half, and attributes
// that allow more or less than the purpose needs are errors.
func (s session) findKeys(m *module.Module) (map[KeyName]*key, error) {
	m.Objects.Lock()
	defer m.Objects.Unlock()

	publics := map[string][]pkcs11.ObjectHandle{}
	found, err := s.objects(pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return nil, err
	}
	for _, o := range found {
		publics[o.label] = append(publics[o.label], o.handle)
	}

	keys := map[KeyName]*key{}
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
		found, err := s.objects(class)
		if err != nil {
			return nil, err
		}
		for _, o := range found {
			name, ours, err := parseLabel(o.label)
			if err != nil {
				return nil, err
			}
			if !ours {
				continue
			}
			if keys[name] != nil {
				return nil, fmt.Errorf("key %s: %w", name, errDuplicate)
			}
			k, err := s.inspect(name, class, o.handle, publics[o.label])
			if err != nil {
				return nil, fmt.Errorf("key %s: %w", name, err)
			}
			keys[name] = k
		}
	}
	return keys, nil
}

var errDuplicate = errors.New("the token holds it twice")

// inspect reads a key's attributes back and refuses it unless they are exactly its purpose's.
func (s session) inspect(name KeyName, class uint, h pkcs11.ObjectHandle, publics []pkcs11.ObjectHandle) (*key, error) {
	kind, _ := s.profile.kind(name.Purpose)
	if class != kind.class {
		if multiplies(name.Purpose) {
			return nil, fmt.Errorf("it is of the wrong class for a token profile with ecdh %q, and was made under another", s.profile.ECDH)
		}
		return nil, errors.New("it is of the wrong class")
	}
	if err := s.require(h, append(kind.flags(), kind.shape()...)); err != nil {
		return nil, err
	}
	k := &key{name: name, handle: h}
	if s.profile.inMemory(name.Purpose) {
		return k, s.withScalar(k, func([]byte) error { return nil }) // for its public half
	}
	if class != pkcs11.CKO_PRIVATE_KEY {
		return k, nil
	}
	switch len(publics) {
	case 0:
		return nil, errors.New("its public half is missing")
	case 1:
	default:
		return nil, fmt.Errorf("public half: %w", errDuplicate)
	}
	if err := s.require(publics[0], kind.shape()); err != nil {
		return nil, fmt.Errorf("public half: %w", err)
	}
	values, err := s.attributes(publics[0], pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, fmt.Errorf("public half: %w", err)
	}
	k.public, err = parseECPoint(values[0])
	if err != nil {
		return nil, fmt.Errorf("public half: %w", err)
	}
	return k, nil
}

// require reads attributes and compares.
func (s session) require(h pkcs11.ObjectHandle, want []*pkcs11.Attribute) error {
	types := make([]uint, len(want))
	for i, a := range want {
		types[i] = a.Type
	}
	got, err := s.attributes(h, types...)
	if err != nil {
		return err
	}
	for i, a := range want {
		// SoftHSM 2.6.1 says 0 of a secret key that was unwrapped, whatever its length is; who unwraps sees to it.
		if a.Type == pkcs11.CKA_VALUE_LEN && len(bytes.Trim(got[i], "\x00")) == 0 {
			continue
		}
		if !bytes.Equal(got[i], a.Value) {
			return fmt.Errorf("%s is %x, and must be %x", attributeNames[a.Type], got[i], a.Value)
		}
	}
	return nil
}

// parseECPoint reads CKA_EC_POINT: an uncompressed point, in a DER OCTET STRING as
// PKCS #11 v2.40 section 2.3.3 (mechanisms) says, or bare as some tokens have it. The length tells
// which: a bare point begins with 0x04 as an OCTET STRING does, and one in 256 reads as one.
func parseECPoint(b []byte) (publicKey, error) {
	if len(b) != uncompressedBytes {
		var inner []byte
		if rest, err := asn1.Unmarshal(b, &inner); err == nil && len(rest) == 0 {
			b = inner
		}
	}
	if len(b) != uncompressedBytes {
		return publicKey{}, fmt.Errorf("CKA_EC_POINT is no uncompressed point of P-256 (%d bytes)", len(b))
	}
	p, err := nistec.NewP256Point().SetBytes(b)
	if err != nil {
		return publicKey{}, errors.New("CKA_EC_POINT is no point of P-256")
	}
	return publicKey{[pointBytes]byte(p.BytesCompressed()), p}, nil
}
