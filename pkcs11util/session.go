package pkcs11util

import (
	"bytes"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// session is one PKCS#11 session, used by one call at a time. Its methods are the
// calls to the token, one operation each; whoever uses them is inside the module's
// gate. Their errors name the function and wrap its pkcs11.Error.
type session struct {
	p      *pkcs11.Ctx
	module *module.Module
	handle pkcs11.SessionHandle

	profile  Profile      // set by under
	wrapping *wrappingKey // likewise
}

// wrappingKey is an AES key of this process's, in the token for as long as one session. What
// the token wraps under it, this process can read.
type wrappingKey struct {
	handle pkcs11.ObjectHandle // 0: not made yet
	value  [secretKeyBytes]byte
}

// under is the session of a token with this profile.
func (s session) under(profile Profile) session {
	s.profile, s.wrapping = profile, &wrappingKey{}
	return s
}

func openSession(m *module.Module, slot uint, flags uint) (session, error) {
	h, err := m.Ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|flags)
	if err != nil {
		return session{}, fmt.Errorf("C_OpenSession: %w", err)
	}
	return session{p: m.Ctx, module: m, handle: h}, nil
}

// close gives the session back. It may be one that is gone already.
func (s session) close() { _ = s.p.CloseSession(s.handle) }

// login logs the user in, which serves all sessions of this process with the token.
func (s session) login(user uint, pin PIN) error {
	err := s.p.Login(s.handle, user, string(pin))
	if err != nil && err != pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		return Explain(fmt.Errorf("C_Login: %w", err))
	}
	return nil
}

// loggedIn asks for the session's state.
func (s session) loggedIn() error {
	info, err := s.p.GetSessionInfo(s.handle)
	if err != nil {
		return fmt.Errorf("C_GetSessionInfo: %w", err)
	}
	if info.State != pkcs11.CKS_RO_USER_FUNCTIONS && info.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return fmt.Errorf("C_GetSessionInfo: %w", pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN))
	}
	return nil
}

// find returns all objects of the token itself that match. The caller holds module.Objects. Session objects are
// left out: SoftHSM 2.6.1 makes what one session finds its own, so that a secret that another session derives at that moment
// is lost to it when the one that found it is closed.
func (s session) find(template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	template = append(slices.Clone(template), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	if err := s.p.FindObjectsInit(s.handle, template); err != nil {
		return nil, fmt.Errorf("C_FindObjectsInit: %w", err)
	}
	var all []pkcs11.ObjectHandle
	for {
		some, _, err := s.p.FindObjects(s.handle, 100)
		if err != nil {
			_ = s.p.FindObjectsFinal(s.handle)
			return nil, fmt.Errorf("C_FindObjects: %w", err)
		}
		if len(some) == 0 {
			break
		}
		all = append(all, some...)
	}
	if err := s.p.FindObjectsFinal(s.handle); err != nil {
		return nil, fmt.Errorf("C_FindObjectsFinal: %w", err)
	}
	return all, nil
}

// attributes reads attributes, in the order asked for. At least one type must be
// asked for: miekg/pkcs11 v1.1.2 panics on none.
func (s session) attributes(h pkcs11.ObjectHandle, types ...uint) ([][]byte, error) {
	template := make([]*pkcs11.Attribute, len(types))
	for i, t := range types {
		template[i] = pkcs11.NewAttribute(t, nil)
	}
	read, err := s.p.GetAttributeValue(s.handle, h, template)
	if err != nil {
		return nil, fmt.Errorf("C_GetAttributeValue: %w", err)
	}
	values := make([][]byte, len(read))
	for i := range read {
		values[i] = read[i].Value
	}
	return values, nil
}

// x is the x-coordinate of k·P, where P is given uncompressed: CKM_ECDH1_DERIVE
// without a key derivation function (CKD_NULL), into a session object that is read, or wrapped out and
// unwrapped here, and destroyed at once; or all of it here, where the token's profile says so. SoftHSM 2.6.1 keeps 400 to 650 bytes of each session object
// until C_Finalize all the same.
func (s session) x(k *key, uncompressed []byte) (x [fieldBytes]byte, err error) {
	if s.profile.ECDH == ECDHInMemory {
		product, err := s.product(k, uncompressed)
		if err != nil {
			return x, err
		}
		b, err := product.BytesX()
		copy(x[:], b)
		return x, err
	}
	peer := uncompressed
	if s.profile.PeerPoint == PointDER {
		if peer, err = asn1.Marshal(uncompressed); err != nil {
			return x, fmt.Errorf("encoding a point: %w", err)
		}
	}
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, s.profile.ECDH == ECDHDeriveWrap),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
	}
	if s.profile.DeriveValueLen == ValueLenGiven {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, fieldBytes))
	}
	params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, peer)
	secret, err := s.p.DeriveKey(s.handle, mechanism(pkcs11.CKM_ECDH1_DERIVE, params), k.handle, template)
	if err != nil {
		return x, fmt.Errorf("C_DeriveKey under %s: %w", k.name, err)
	}
	s.module.SessionObjects.Add(1)
	var value []byte
	if s.profile.ECDH == ECDHDeriveWrap {
		value, err = s.wrapOut(secret)
	} else {
		var values [][]byte
		if values, err = s.attributes(secret, pkcs11.CKA_VALUE); err == nil {
			value = values[0]
		}
	}
	defer clear(value)
	if destroyErr := s.p.DestroyObject(s.handle, secret); err == nil && destroyErr != nil {
		err = fmt.Errorf("C_DestroyObject: %w", destroyErr)
	}
	if err != nil {
		return x, fmt.Errorf("reading what %s derived: %w", k.name, err)
	}
	if len(value) != fieldBytes {
		return x, fmt.Errorf("%w: C_DeriveKey under %s gave %d bytes", errFaulty, k.name, len(value))
	}
	return [fieldBytes]byte(value), nil
}

// wrapOut is the value of a sensitive object: wrapped in the token, unwrapped here.
func (s session) wrapOut(secret pkcs11.ObjectHandle) ([]byte, error) {
	w := s.wrapping
	if w.handle == 0 {
		_, _ = rand.Read(w.value[:]) // crypto/rand never fails: it ends the process first
		handle, err := s.p.CreateObject(s.handle, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, w.value[:]),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		})
		if err != nil {
			return nil, fmt.Errorf("C_CreateObject of the wrapping key: %w", err)
		}
		w.handle = handle
	}
	wrapped, err := s.p.WrapKey(s.handle, mechanism(pkcs11.CKM_AES_KEY_WRAP, nil), w.handle, secret)
	if err != nil {
		return nil, fmt.Errorf("C_WrapKey: %w", err)
	}
	return unwrap(w.value, wrapped)
}

// encrypt is AES-GCM with a 128-bit tag, under an IV that comes back. associated must hold at
// least one byte, and so does the IV, unless the token prepends its own: SoftHSM 2.6.1 takes a missing IV for one of zeros,
// and some builds abort on empty associated data.
func (s session) encrypt(k *key, plaintext, associated []byte) (iv, ciphertext []byte, err error) {
	given := make([]byte, s.profile.IVBytes)
	switch s.profile.IV {
	case IVOurs:
		_, _ = rand.Read(given) // crypto/rand never fails: it ends the process first
	case IVPrepended:
		given = nil
	}
	params := pkcs11.NewGCMParams(given, associated, tagBytes*8)
	defer params.Free()
	if err := s.p.EncryptInit(s.handle, mechanism(uint(s.profile.GCM), params), k.handle); err != nil {
		return nil, nil, fmt.Errorf("C_EncryptInit under %s: %w", k.name, err)
	}
	out, err := s.p.Encrypt(s.handle, plaintext)
	if err != nil {
		return nil, nil, fmt.Errorf("C_Encrypt under %s: %w", k.name, err)
	}
	left := params.IV()
	want := len(plaintext) + tagBytes
	if s.profile.IV == IVAppended || s.profile.IV == IVPrepended {
		want += s.profile.IVBytes
	}
	if len(out) != want {
		return nil, nil, fmt.Errorf("%w: C_Encrypt under %s gave %d bytes for %d", errFaulty, k.name, len(out), len(plaintext))
	}
	switch s.profile.IV {
	case IVOurs:
		iv, ciphertext = given, out
		if !bytes.Equal(left, given) {
			return nil, nil, fmt.Errorf("%w: C_Encrypt under %s used an IV of its own", errFaulty, k.name)
		}
	case IVWrittenBack:
		iv, ciphertext = left, out
	case IVAppended:
		ciphertext, iv = out[:len(out)-s.profile.IVBytes], out[len(out)-s.profile.IVBytes:]
	case IVPrepended:
		iv, ciphertext = out[:s.profile.IVBytes], out[s.profile.IVBytes:]
	}
	if bytes.Equal(iv, make([]byte, s.profile.IVBytes)) {
		return nil, nil, fmt.Errorf("%w: C_Encrypt under %s made no IV", errFaulty, k.name)
	}
	return iv, ciphertext, nil
}

// decrypt undoes encrypt. refused is an error that a wrong tag or IV may have caused,
// or that the token may have made up; err is any other.
func (s session) decrypt(k *key, iv, ciphertext, associated []byte) (plaintext []byte, refused, err error) {
	given, data := iv, ciphertext
	if s.profile.IV == IVPrepended && len(iv) == s.profile.IVBytes {
		given, data = nil, append(bytes.Clone(iv), ciphertext...) // the token takes it from there
	}
	params := pkcs11.NewGCMParams(given, associated, tagBytes*8)
	defer params.Free()
	if err := s.p.DecryptInit(s.handle, mechanism(uint(s.profile.GCM), params), k.handle); err != nil {
		wrapped := fmt.Errorf("C_DecryptInit under %s: %w", k.name, err)
		if errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_PARAM_INVALID)) {
			return nil, wrapped, nil // an IV of a length that this token does not take, which a forgery may have, too
		}
		return nil, nil, wrapped
	}
	plaintext, err = s.module.Decrypt(s.handle, data)
	if err != nil {
		wrapped := fmt.Errorf("C_Decrypt under %s: %w", k.name, err)
		if mayBeWrongTag(err) {
			return nil, wrapped, nil
		}
		return nil, nil, wrapped
	}
	if len(plaintext) != len(ciphertext)-tagBytes {
		return nil, nil, fmt.Errorf("%w: C_Decrypt under %s gave %d bytes for %d", errFaulty, k.name, len(plaintext), len(ciphertext))
	}
	return plaintext, nil, nil
}

// mac is HMAC-SHA-256.
func (s session) mac(k *key, message []byte) (mac [macBytes]byte, err error) {
	if err := s.p.SignInit(s.handle, mechanism(pkcs11.CKM_SHA256_HMAC, nil), k.handle); err != nil {
		return mac, fmt.Errorf("C_SignInit under %s: %w", k.name, err)
	}
	out, err := s.p.Sign(s.handle, message)
	if err != nil {
		return mac, fmt.Errorf("C_Sign under %s: %w", k.name, err)
	}
	if len(out) != macBytes {
		return mac, fmt.Errorf("%w: C_Sign under %s gave %d bytes", errFaulty, k.name, len(out))
	}
	return [macBytes]byte(out), nil
}

// sign is ECDSA over a SHA-256 digest: r and s, 32 bytes each.
func (s session) sign(k *key, digest [32]byte) (signature [signatureBytes]byte, err error) {
	if err := s.p.SignInit(s.handle, mechanism(pkcs11.CKM_ECDSA, nil), k.handle); err != nil {
		return signature, fmt.Errorf("C_SignInit under %s: %w", k.name, err)
	}
	out, err := s.p.Sign(s.handle, digest[:])
	if err != nil {
		return signature, fmt.Errorf("C_Sign under %s: %w", k.name, err)
	}
	if len(out) != signatureBytes {
		return signature, fmt.Errorf("%w: C_Sign under %s gave %d bytes", errFaulty, k.name, len(out))
	}
	return [signatureBytes]byte(out), nil
}

// random reads the token's generator; n is at least 1.
func (s session) random(n int) ([]byte, error) {
	b, err := s.p.GenerateRandom(s.handle, n)
	if err != nil {
		return nil, fmt.Errorf("C_GenerateRandom: %w", err)
	}
	if len(b) != n {
		return nil, fmt.Errorf("%w: C_GenerateRandom gave %d bytes for %d", errFaulty, len(b), n)
	}
	return b, nil
}

func mechanism(m uint, params any) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, params)}
}
