package ceremony

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// transportPrefix begins the labels of transport keys; the nonce in hexadecimal follows. It is outside
// of the labels of keys, and of the temporary ones, which whoever provisions a token clears away.
const transportPrefix = "bkv/transport/"

// secretBits is the size of the AES keys of the set, of its MAC keys, and of what wraps them.
const secretBits = 256

// token is an operator's session within [pkcs11util.Admin.Do].
type token struct {
	p       *pkcs11.Ctx
	session pkcs11.SessionHandle
	info    Token
	profile pkcs11util.Profile
	made    []pkcs11.ObjectHandle // session objects, for discard
}

// within runs f inside the token. Session objects that f made are destroyed when it is done.
func within(admin *pkcs11util.Admin, f func(t *token) error) error {
	return admin.Do(func(p *pkcs11.Ctx, session pkcs11.SessionHandle, info pkcs11.TokenInfo) (err error) {
		t := &token{p: p, session: session, profile: admin.Profile(), info: Token{
			Serial: strings.TrimSpace(info.SerialNumber), Label: info.Label,
			Manufacturer: strings.TrimSpace(info.ManufacturerID), Model: strings.TrimSpace(info.Model),
		}}
		defer func() {
			for _, h := range t.made {
				if e := p.DestroyObject(session, h); e != nil && err == nil {
					err = fmt.Errorf("C_DestroyObject: %w", e)
				}
			}
		}()
		if info.Flags&pkcs11.CKF_WRITE_PROTECTED != 0 {
			return fmt.Errorf("token %v is write-protected", t.info)
		}
		return f(t)
	})
}

func attribute(kind uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(kind, value) }

func mechanism(m uint, params any) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, params)}
}

// with returns a template in which some attributes have other values, or are added.
func with(template []*pkcs11.Attribute, others ...*pkcs11.Attribute) []*pkcs11.Attribute {
	result := without(template, func(a *pkcs11.Attribute) bool {
		return slices.ContainsFunc(others, func(o *pkcs11.Attribute) bool { return o.Type == a.Type })
	})
	return append(result, others...)
}

func without(template []*pkcs11.Attribute, drop func(*pkcs11.Attribute) bool) []*pkcs11.Attribute {
	return slices.DeleteFunc(slices.Clone(template), drop)
}

// call says which function failed, and what to do where that is known.
func call(function string, err error) error {
	return pkcs11util.Explain(fmt.Errorf("%s: %w", function, err))
}

// object is an object of the token with its label.
type object struct {
	handle pkcs11.ObjectHandle
	label  string
}

// objects lists the token objects of a class.
func (t *token) objects(class uint) ([]object, error) {
	if err := t.p.FindObjectsInit(t.session, []*pkcs11.Attribute{attribute(pkcs11.CKA_CLASS, class), attribute(pkcs11.CKA_TOKEN, true)}); err != nil {
		return nil, call("C_FindObjectsInit", err)
	}
	var handles []pkcs11.ObjectHandle
	for {
		some, _, err := t.p.FindObjects(t.session, 100)
		if err != nil {
			_ = t.p.FindObjectsFinal(t.session)
			return nil, call("C_FindObjects", err)
		}
		if len(some) == 0 {
			break
		}
		handles = append(handles, some...)
	}
	if err := t.p.FindObjectsFinal(t.session); err != nil {
		return nil, call("C_FindObjectsFinal", err)
	}
	var all []object
	for _, h := range handles {
		// A creation that was cut short leaves objects that cannot be read.
		if label, err := t.read(h, pkcs11.CKA_LABEL); err == nil {
			all = append(all, object{h, string(label)})
		}
	}
	return all, nil
}

func (t *token) read(h pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	values, err := t.p.GetAttributeValue(t.session, h, []*pkcs11.Attribute{attribute(kind, nil)})
	if err != nil {
		return nil, call("C_GetAttributeValue", err)
	}
	return values[0].Value, nil
}

// transportKeys finds the transport keys in the token.
func (t *token) transportKeys() ([]object, error) {
	all, err := t.objects(pkcs11.CKO_PRIVATE_KEY)
	return slices.DeleteFunc(all, func(o object) bool { return !strings.HasPrefix(o.label, transportPrefix) }), err
}

// makeTransportKey makes a key pair, of which the token keeps the private half (if keep is set: else the
// session does), and proves it with the hash that the request will name.
func (t *token) makeTransportKey(nonce []byte, oaep OAEPHash, keep bool) (pkcs11.ObjectHandle, []byte, error) {
	public, private, err := t.p.GenerateKeyPair(t.session, mechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil),
		[]*pkcs11.Attribute{
			attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_PRIVATE, false),
			attribute(pkcs11.CKA_MODULUS_BITS, minTransportBits), attribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
			attribute(pkcs11.CKA_WRAP, true), attribute(pkcs11.CKA_ENCRYPT, false), attribute(pkcs11.CKA_VERIFY, false),
		},
		[]*pkcs11.Attribute{
			attribute(pkcs11.CKA_TOKEN, keep), attribute(pkcs11.CKA_PRIVATE, true),
			attribute(pkcs11.CKA_SENSITIVE, true), attribute(pkcs11.CKA_EXTRACTABLE, false),
			attribute(pkcs11.CKA_UNWRAP, true), attribute(pkcs11.CKA_DECRYPT, false), attribute(pkcs11.CKA_SIGN, false),
			attribute(pkcs11.CKA_SIGN_RECOVER, false), attribute(pkcs11.CKA_DERIVE, false),
			attribute(pkcs11.CKA_LABEL, transportPrefix+hex.EncodeToString(nonce)),
		})
	if err != nil {
		return 0, nil, call("C_GenerateKeyPair of the transport key", err)
	}
	t.made = append(t.made, public)
	if !keep {
		t.made = append(t.made, private)
	}
	spki, err := t.transportPublic(private)
	if err == nil {
		err = t.proveTransport(spki, private, oaep)
	}
	if err != nil {
		if keep {
			err = errors.Join(err, t.destroy(private))
		}
		return 0, nil, err
	}
	return private, spki, nil
}

// transportPublic is the public half of a transport key, from the private one.
func (t *token) transportPublic(private pkcs11.ObjectHandle) ([]byte, error) {
	n, err := t.read(private, pkcs11.CKA_MODULUS)
	if err != nil {
		return nil, err
	}
	e, err := t.read(private, pkcs11.CKA_PUBLIC_EXPONENT)
	if err != nil {
		return nil, err
	}
	exponent := new(big.Int).SetBytes(e)
	if !exponent.IsInt64() || exponent.Int64() != 65537 {
		return nil, errors.New("the transport key's public exponent is not 65537")
	}
	return x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537})
}

// proveTransport wraps a throw-away key to the transport key as the source will, and has the token unwrap it.
func (t *token) proveTransport(spki []byte, private pkcs11.ObjectHandle, oaep OAEPHash) error {
	trial, err := t.p.GenerateKey(t.session, mechanism(pkcs11.CKM_AES_KEY_GEN, nil), wrappingKeyTemplate())
	if err != nil {
		return call("C_GenerateKey", err)
	}
	t.made = append(t.made, trial)
	wrapped, err := t.wrapTo(Request{TransportKey: spki, OAEPHash: oaep}, trial)
	if err != nil {
		return err
	}
	_, err = t.unwrapFrom(private, oaep, wrapped)
	return err
}

func (t *token) destroy(h pkcs11.ObjectHandle) error {
	if err := t.p.DestroyObject(t.session, h); err != nil {
		return call("C_DestroyObject", err)
	}
	return nil
}

func oaepParams(h OAEPHash) *pkcs11.OAEPParams {
	if h == SHA1 {
		return pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil)
	}
	return pkcs11.NewOAEPParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, pkcs11.CKZ_DATA_SPECIFIED, nil)
}

// oaepError names the way out where a token, the one that wraps or the one that unwraps, does not
// know the hash: SoftHSM 2.6.1 answers CKR_ARGUMENTS_BAD to everything but SHA-1.
func oaepError(function string, h OAEPHash, err error) error {
	if h == SHA256 {
		return fmt.Errorf("%s with RSA-OAEP and SHA-256: %w; where a token knows SHA-1 only, as SoftHSM 2.6.1, join and make with --oaep-hash=%s", function, err, SHA1)
	}
	return fmt.Errorf("%s with RSA-OAEP and SHA-1: %w; where a token has given SHA-1 up, join and make with --oaep-hash=%s", function, err, SHA256)
}

// wrappingKeyTemplate is of the AES key that wraps one share.
func wrappingKeyTemplate() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_PRIVATE, true),
		attribute(pkcs11.CKA_SENSITIVE, true), attribute(pkcs11.CKA_EXTRACTABLE, true),
		attribute(pkcs11.CKA_VALUE_LEN, secretBits/8), attribute(pkcs11.CKA_WRAP, true),
		attribute(pkcs11.CKA_ENCRYPT, false), attribute(pkcs11.CKA_DECRYPT, false), attribute(pkcs11.CKA_UNWRAP, false),
	}
}

// wrapTo wraps a wrapping key to the transport key of a request.
func (t *token) wrapTo(r Request, key pkcs11.ObjectHandle) ([]byte, error) {
	transport, err := r.publicKey()
	if err != nil {
		return nil, err
	}
	public, err := t.p.CreateObject(t.session, []*pkcs11.Attribute{
		attribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_PRIVATE, false), attribute(pkcs11.CKA_WRAP, true),
		attribute(pkcs11.CKA_MODULUS, transport.N.Bytes()),
		attribute(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(transport.E)).Bytes()),
	})
	if err != nil {
		return nil, call("C_CreateObject of a transport key", err)
	}
	t.made = append(t.made, public)
	wrapped, err := t.p.WrapKey(t.session, mechanism(pkcs11.CKM_RSA_PKCS_OAEP, oaepParams(r.OAEPHash)), public, key)
	if err != nil {
		return nil, oaepError("C_WrapKey", r.OAEPHash, err)
	}
	if len(wrapped) != transport.Size() {
		return nil, fmt.Errorf("C_WrapKey to the transport key gave %d bytes", len(wrapped))
	}
	return wrapped, nil
}

// unwrapFrom undoes wrapTo. What it gives can unwrap, and no more.
func (t *token) unwrapFrom(transport pkcs11.ObjectHandle, h OAEPHash, wrapped []byte) (pkcs11.ObjectHandle, error) {
	key, err := t.unwrap(mechanism(pkcs11.CKM_RSA_PKCS_OAEP, oaepParams(h)), transport, wrapped, []*pkcs11.Attribute{
		attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_PRIVATE, true),
		attribute(pkcs11.CKA_SENSITIVE, true), attribute(pkcs11.CKA_EXTRACTABLE, false),
		attribute(pkcs11.CKA_UNWRAP, true), attribute(pkcs11.CKA_WRAP, false),
		attribute(pkcs11.CKA_ENCRYPT, false), attribute(pkcs11.CKA_DECRYPT, false),
	})
	if err != nil {
		return 0, oaepError("C_UnwrapKey", h, err)
	}
	t.made = append(t.made, key)
	return key, nil
}

// unwrap is C_UnwrapKey. The length of a secret key is in what was wrapped, and SoftHSM
// 2.6.1 refuses CKA_VALUE_LEN beside it; Luna wants it before firmware 7.9.3.
func (t *token) unwrap(m []*pkcs11.Mechanism, by pkcs11.ObjectHandle, wrapped []byte, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	key, err := t.p.UnwrapKey(t.session, m, by, wrapped, template)
	secret := slices.ContainsFunc(template, func(a *pkcs11.Attribute) bool {
		return a.Type == pkcs11.CKA_CLASS && bytes.Equal(a.Value, attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY).Value)
	})
	if secret && errors.Is(err, pkcs11.Error(pkcs11.CKR_TEMPLATE_INCOMPLETE)) {
		return t.p.UnwrapKey(t.session, m, by, wrapped, with(template, attribute(pkcs11.CKA_VALUE_LEN, secretBits/8)))
	}
	return key, err
}

// generated is a key of the set, as session objects of the source.
type generated struct {
	Key
	handle pkcs11.ObjectHandle // the secret key or the private half
}

// generate makes a key as it will be used, but extractable and for the session only.
func (t *token) generate(name pkcs11util.KeyName) (generated, error) {
	secret, private, public, err := t.profile.Templates(name.Purpose)
	if err != nil {
		return generated{}, err
	}
	passing := []*pkcs11.Attribute{attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_EXTRACTABLE, true)}
	g := generated{Key: Key{Purpose: name.Purpose, Generation: name.Generation}}
	if secret != nil {
		m := mechanism(t.profile.SecretKeyGen(name.Purpose), nil)
		if g.handle, err = t.p.GenerateKey(t.session, m, with(secret, passing...)); err != nil {
			return generated{}, call("C_GenerateKey for "+name.String(), err)
		}
		t.made = append(t.made, g.handle)
		g.Fingerprint, err = t.fingerprintSecret(name, g.handle)
		return g, err
	}
	half, handle, err := t.p.GenerateKeyPair(t.session, mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil),
		with(public, attribute(pkcs11.CKA_TOKEN, false)), with(private, passing...))
	if err != nil {
		return generated{}, call("C_GenerateKeyPair for "+name.String(), err)
	}
	t.made = append(t.made, half, handle)
	g.handle = handle
	if g.PublicKey, err = t.publicKey(half); err != nil {
		return generated{}, fmt.Errorf("public half of %s: %w", name, err)
	}
	g.Fingerprint = fingerprintOf(name, g.PublicKey)
	return g, nil
}

// publicKey reads CKA_EC_POINT, bare or in a DER OCTET STRING, and compresses it.
func (t *token) publicKey(h pkcs11.ObjectHandle) ([]byte, error) {
	raw, err := t.read(h, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, err
	}
	var inner []byte
	if rest, err := asn1.Unmarshal(raw, &inner); err == nil && len(rest) == 0 {
		raw = inner
	}
	point, err := nistec.NewP256Point().SetBytes(raw)
	if err != nil || len(raw) != 65 {
		return nil, errors.New("CKA_EC_POINT is no uncompressed point of P-256")
	}
	return point.BytesCompressed(), nil
}

// fingerprintSecret has a secret key answer a constant that nothing else asks it, and hashes the answer, which
// as it is nobody sees. For AES that is two blocks in ECB mode, which do not
// depend on who makes a token's GCM IVs; each is a counter block of GCM with probability 2^-96 or less.
func (t *token) fingerprintSecret(name pkcs11util.KeyName, h pkcs11.ObjectHandle) ([]byte, error) {
	question := hash(keyCheckLabel, []byte(name.String()))
	var answer []byte
	var err error
	if t.profile.SecretKeyGen(name.Purpose) == pkcs11.CKM_GENERIC_SECRET_KEY_GEN {
		message := append([]byte(keyCheckLabel+"\x00"), question[:]...)
		if err = t.p.SignInit(t.session, mechanism(pkcs11.CKM_SHA256_HMAC, nil), h); err == nil {
			answer, err = t.p.Sign(t.session, message)
		}
	} else if err = t.p.EncryptInit(t.session, mechanism(pkcs11.CKM_AES_ECB, nil), h); err == nil {
		answer, err = t.p.Encrypt(t.session, question[:])
	}
	if err != nil {
		return nil, call("the key check of "+name.String(), err)
	}
	if len(answer) != 32 {
		return nil, fmt.Errorf("the key check of %s has %d bytes", name, len(answer))
	}
	return fingerprintOf(name, answer), nil
}

// sign is ECDSA; a signature that does not verify, which may give the key away, stays here.
func (t *token) sign(key pkcs11.ObjectHandle, compressed []byte, digest [32]byte) ([]byte, error) {
	if err := t.p.SignInit(t.session, mechanism(pkcs11.CKM_ECDSA, nil), key); err != nil {
		return nil, call("C_SignInit by the identity key", err)
	}
	signature, err := t.p.Sign(t.session, digest[:])
	if err != nil {
		return nil, call("C_Sign by the identity key", err)
	}
	if err := verify(compressed, digest, signature); err != nil {
		return nil, fmt.Errorf("the token signed wrong: %w", err)
	}
	return signature, nil
}

// wrap makes the share of one token.
func (t *token) wrap(r Request, set []generated) (Share, error) {
	by, err := t.p.GenerateKey(t.session, mechanism(pkcs11.CKM_AES_KEY_GEN, nil), wrappingKeyTemplate())
	if err != nil {
		return Share{}, call("C_GenerateKey of a wrapping key", err)
	}
	t.made = append(t.made, by)
	share := Share{}
	if share.WrappingKey, err = t.wrapTo(r, by); err != nil {
		return Share{}, err
	}
	for _, key := range set {
		wrapped, err := t.p.WrapKey(t.session, mechanism(pkcs11.CKM_AES_KEY_WRAP, nil), by, key.handle)
		if err == nil {
			err = checkWrapped(key.Key, wrapped)
		}
		if err != nil {
			return Share{}, call("C_WrapKey (CKM_AES_KEY_WRAP) of "+key.Name().String(), err)
		}
		share.Keys = append(share.Keys, wrapped)
	}
	return share, nil
}

// unwrapKey puts one key of a share into the token (or, unless keep is set, the session), sensitive and not
// extractable, with its public half, and compares secret keys with the record. Private halves are
// compared with the public ones when they are proved.
func (t *token) unwrapKey(by pkcs11.ObjectHandle, key Key, wrapped []byte, label string, keep bool) error {
	secret, private, public, err := t.profile.Templates(key.Purpose)
	if err != nil {
		return err
	}
	if key.isPair() != (secret == nil) {
		return fmt.Errorf("%s was made for tokens of another profile than this one's, which has ecdh %q: all tokens of a ceremony must have the same", key.Name(), t.profile.ECDH)
	}
	id := make([]byte, 16) // CKA_ID, for tools that pair halves by it
	_, _ = rand.Read(id)   // crypto/rand never fails: it ends the process first
	place := []*pkcs11.Attribute{
		attribute(pkcs11.CKA_TOKEN, keep), attribute(pkcs11.CKA_LABEL, label), attribute(pkcs11.CKA_ID, id),
	}
	kind := []*pkcs11.Attribute{attribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC)}
	template := private
	if secret != nil {
		kind = []*pkcs11.Attribute{attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}
		template = without(secret, func(a *pkcs11.Attribute) bool { return a.Type == pkcs11.CKA_VALUE_LEN })
	}
	h, err := t.unwrap(mechanism(pkcs11.CKM_AES_KEY_WRAP, nil), by, wrapped, with(with(template, place...), kind...))
	if err != nil {
		return call("C_UnwrapKey (CKM_AES_KEY_WRAP) of "+key.Name().String(), err)
	}
	if !keep {
		t.made = append(t.made, h)
	}
	if secret != nil {
		fingerprint, err := t.fingerprintSecret(key.Name(), h)
		if err != nil {
			return err
		}
		if !bytes.Equal(fingerprint, key.Fingerprint) {
			return fmt.Errorf("%s came out as another key than the record says", key.Name())
		}
		return nil
	}
	point, err := uncompressed(key.PublicKey)
	if err != nil {
		return err
	}
	der, err := asn1.Marshal(point)
	if err != nil {
		return err
	}
	half, err := t.p.CreateObject(t.session, with(with(public, place...),
		attribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attribute(pkcs11.CKA_EC_POINT, der)))
	if err != nil {
		return call("C_CreateObject of the public half of "+key.Name().String(), err)
	}
	if !keep {
		t.made = append(t.made, half)
	}
	return nil
}

// stored is a named key of the token.
type stored struct {
	Key
	handle pkcs11.ObjectHandle
}

// stored reads the named keys. They were proved before.
func (t *token) stored(names []pkcs11util.KeyName) ([]stored, error) {
	byLabel := map[uint]map[string]pkcs11.ObjectHandle{}
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		all, err := t.objects(class)
		if err != nil {
			return nil, err
		}
		byLabel[class] = map[string]pkcs11.ObjectHandle{}
		for _, o := range all {
			byLabel[class][o.label] = o.handle
		}
	}
	var keys []stored
	for _, name := range names {
		k := stored{Key: Key{Purpose: name.Purpose, Generation: name.Generation}}
		var err error
		if _, private, _, templateErr := t.profile.Templates(name.Purpose); templateErr == nil && private != nil {
			k.handle = byLabel[pkcs11.CKO_PRIVATE_KEY][name.String()]
			if k.PublicKey, err = t.publicKey(byLabel[pkcs11.CKO_PUBLIC_KEY][name.String()]); err == nil {
				k.Fingerprint = fingerprintOf(name, k.PublicKey)
			}
		} else {
			k.handle = byLabel[pkcs11.CKO_SECRET_KEY][name.String()]
			k.Fingerprint, err = t.fingerprintSecret(name, k.handle)
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}
