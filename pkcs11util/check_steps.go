package pkcs11util

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"sort"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"
)

func (c *checker) random(s session) CheckLine {
	const n = 64
	seen := map[string]bool{}
	for range 8 {
		b, err := s.random(n)
		if err != nil {
			return failed(brokenToken, err)
		}
		if seen[string(b)] || bytes.Count(b, b[:1]) > n/2 {
			return failed(brokenToken, fmt.Errorf("%w: C_GenerateRandom repeats itself", errFaulty))
		}
		seen[string(b)] = true
	}
	return okay("they do not repeat; no more can be seen from outside")
}

// try looks for the first candidate under which works gives no error, and adopts it.
// Otherwise it returns the error that says most: a wrong answer, or else the first.
func (c *checker) try(all []Profile, works func(s session) error) error {
	var first, wrong error
	for _, p := range all {
		s, err := c.open()
		if err != nil {
			return err
		}
		s = s.under(p)
		err = works(s)
		s.close()
		if err == nil {
			c.profile = p
			return nil
		}
		if first == nil {
			first = err
		}
		if wrong == nil && errors.Is(err, errFaulty) {
			wrong = err
		}
	}
	if wrong != nil {
		return wrong
	}
	return first
}

// gcm finds out under which number the token does AES-GCM, and who makes the IV.
func (c *checker) gcm(_ session, k *key) CheckLine {
	all := []Profile{c.profile}
	for _, number := range []Mechanism{c.profile.GCM, GCMStandard, gcmCloudHSM, gcmCloudKMS} {
		for _, iv := range []struct {
			scheme string
			bytes  int
		}{
			{IVOurs, ivBytes}, {IVWrittenBack, ivBytes}, {IVAppended, longIVBytes}, {IVAppended, ivBytes},
			{IVPrepended, ivBytes}, {IVPrepended, longIVBytes}, {IVWrittenBack, longIVBytes},
		} {
			p := c.profile
			p.GCM, p.IV, p.IVBytes = number, iv.scheme, iv.bytes
			all = append(all, p)
		}
	}
	err := c.try(all, func(s session) error {
		if err := s.proveGCM(k); err != nil {
			return err
		}
		sealed, err := s.seal(k, probeID, probeText, probeAssociated)
		if err != nil {
			return err
		}
		return s.confirm(k, knownAnswer{sealed: sealed})
	})
	if err != nil {
		return failed("use a token whose CKM_AES_GCM works with 12-byte IVs, of ours or its own, as PKCS #11 v2.40 describes it", err)
	}
	return okay("as Go computes it over the token's AES; mechanism 0x%08x, IV %s, %d bytes", uint32(c.profile.GCM), c.profile.IV, c.profile.IVBytes)
}

func (c *checker) dataLimit(_ session, k *key) CheckLine {
	seals := func(n int) error {
		s, err := c.open()
		if err != nil {
			return err
		}
		defer s.close()
		_, _, err = s.encrypt(k, make([]byte, n), probeAssociated)
		return err
	}
	limit := c.profile.MaxDataBytes
	err := seals(limit)
	if err == nil {
		return okay("%d bytes are sealed at once", limit)
	}
	if small := seals(minDataBytes); small != nil {
		return failed(fmt.Sprintf("use a token that encrypts %d bytes at once", minDataBytes), small)
	}
	over := sort.Search(limit-minDataBytes, func(i int) bool { return seals(minDataBytes+1+i) != nil })
	c.profile.MaxDataBytes = minDataBytes + over
	return okay("%d bytes are sealed at once, and no more: %v", c.profile.MaxDataBytes, err)
}

func (c *checker) ivs(s session, k *key) CheckLine {
	seen := map[string]bool{}
	for range 64 {
		iv, _, err := s.encrypt(k, probeText, probeAssociated)
		if err != nil {
			return failed(brokenToken, err)
		}
		if seen[string(iv)] {
			return failed(brokenToken, fmt.Errorf("%w: an IV came twice, which opens all that is sealed", errFaulty))
		}
		seen[string(iv)] = true
	}
	return okay("%d seals, as many IVs", len(seen))
}

// encryptRaw is C_Encrypt with just these parameters.
func (s session) encryptRaw(k *key, iv, plaintext, associated []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(iv, associated, tagBytes*8)
	defer params.Free()
	if err := s.p.EncryptInit(s.handle, mechanism(uint(s.profile.GCM), params), k.handle); err != nil {
		return nil, err
	}
	return s.p.Encrypt(s.handle, plaintext)
}

func (c *checker) noIV(s session, k *key) CheckLine {
	if c.profile.IV != IVOurs {
		return okay("the token makes IVs itself")
	}
	got, err := s.encryptRaw(k, nil, probeText, probeAssociated)
	if err != nil {
		return okay("refused: %v", err)
	}
	encrypts := func(iv []byte) []byte {
		fresh, err := c.open()
		if err != nil {
			return nil
		}
		defer fresh.close()
		out, err := fresh.encryptRaw(k, iv, probeText, probeAssociated)
		if err != nil {
			return nil
		}
		return out
	}
	const do = "nothing, as the vault passes an IV each time; let no other program use these keys"
	switch {
	case bytes.Equal(got, encrypts(make([]byte, ivBytes))):
		return warned(do, "silently taken for one of zeros")
	case bytes.Equal(got, encrypts(nil)):
		return warned(do, "silently taken for one that is always the same")
	}
	return warned(do, "accepted, though none comes back")
}

func (c *checker) wrongTag(s session, k *key) CheckLine {
	if err := s.refusesForgeries(k); err != nil {
		return failed("do not use this token: whoever writes to the database could change what it opens", err)
	}
	return okay("refused, and so is a change in ciphertext or IV")
}

// provingLine is the line of the check that prove goes through for a purpose.
func provingLine(purpose string) string {
	switch purpose {
	case Master, State:
		return lineGCM
	case MAC:
		return lineHMAC
	case Identity, Audit:
		return lineECDSA
	}
	return lineECDH
}

// examine is what the check does with its own keys and can be done with those in use: it
// writes nothing. An error names the line.
func (s session) examine(k *key) error {
	if s.readsValue(k) {
		return fmt.Errorf("token check, line %q: %w: the key is given to who asks for it", lineValue, errFaulty)
	}
	if !seals(k.name.Purpose) {
		return nil
	}
	one, _, err := s.encrypt(k, probeText, probeAssociated)
	if err != nil {
		return fmt.Errorf("token check, line %q: %w", lineIVs, err)
	}
	other, _, err := s.encrypt(k, probeText, probeAssociated)
	if err == nil && bytes.Equal(one, other) {
		err = fmt.Errorf("%w: an IV came twice", errFaulty)
	}
	if err != nil {
		return fmt.Errorf("token check, line %q: %w", lineIVs, err)
	}
	if err := s.refusesForgeries(k); err != nil {
		return fmt.Errorf("token check, line %q: %w", lineTag, err)
	}
	return nil
}

// refusesForgeries shows that a change anywhere in a sealed value is noticed.
func (s session) refusesForgeries(k *key) error {
	iv, ciphertext, err := s.encrypt(k, probeText, probeAssociated)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		what  string
		forge func(iv, ciphertext []byte)
	}{
		{"a wrong tag", func(_, c []byte) { c[len(c)-1] ^= 1 }},
		{"another ciphertext", func(_, c []byte) { c[0] ^= 1 }},
		{"another IV", func(iv, _ []byte) { iv[0] ^= 1 }},
	} {
		otherIV, other := bytes.Clone(iv), bytes.Clone(ciphertext)
		f.forge(otherIV, other)
		_, refused, err := s.decrypt(k, otherIV, other, probeAssociated)
		if err != nil && !errors.Is(err, errFaulty) {
			return fmt.Errorf("with %s: %w", f.what, err)
		}
		if refused == nil {
			return fmt.Errorf("%w: C_Decrypt opens a value with %s", errFaulty, f.what)
		}
	}
	return nil
}

func (c *checker) wrongAssociated(s session, k *key) CheckLine {
	iv, ciphertext, err := s.encrypt(k, probeText, probeAssociated)
	if err != nil {
		return failed(brokenToken, err)
	}
	_, refused, err := s.decrypt(k, iv, ciphertext, probeOther)
	if err != nil {
		return failed(brokenToken, err)
	}
	if refused == nil {
		return failed("do not use this token: records could be put in each other's place", fmt.Errorf("%w: C_Decrypt does not look at it", errFaulty))
	}
	return okay("refused")
}

// ecdh finds out how an x-coordinate comes out, and if it does not, whether the vault can do without.
func (c *checker) ecdh(s session) CheckLine {
	had, pair := c.profile, c.keys[OPRF]
	err := errors.New("there is no key pair to try it on")
	if pair != nil {
		err = c.try(derivations(had), func(s session) error { return s.proveDerive(pair.key) })
	}
	switch {
	case err == nil && had.ECDH == ECDHInMemory:
		better := c.profile.ECDH
		c.profile = had // keys have been made under it, or will be
		if err := c.scalars(s); err != nil {
			return failed(brokenToken, err)
		}
		return warned("for a new vault, use the profile that the check proposes without --token-profile; keys that were made under this one stay under it",
			"%s, as the profile says, though the token can do better: %s", c.profile.ECDH, better)
	case err == nil:
		return okay("as Go computes it; strategy %s", c.profile.ECDH)
	case errors.Is(err, errFaulty):
		return failed(brokenToken, err)
	case c.lower:
		if err := c.scalars(s); err != nil {
			return failed("use another token: this one cannot even give a scalar by "+lineHMAC, err)
		}
		return warned("use a token that derives, if you can", "%s, as is declared, because nothing better works: %v", c.profile.ECDH, err)
	case pair == nil:
		return warned("", "not tried: there is no %s key to try it on", OPRF)
	}
	return failed("use a token, or settings of it, with CKM_ECDH1_DERIVE on P-256 without a key derivation function (CKD_NULL), "+
		"into a secret that can be read, or wrapped out by CKM_AES_KEY_WRAP; or declare by --accept-lower-assurance that this process may multiply in its memory", err)
}

// derivations are the profiles under which the token derives, this one first if it is one.
func derivations(first Profile) (all []Profile) {
	for _, strategy := range []string{first.ECDH, ECDHDerive, ECDHDeriveWrap} {
		if strategy == ECDHInMemory {
			continue
		}
		for _, length := range []string{first.DeriveValueLen, ValueLenGiven, ValueLenLeftOut} {
			for _, point := range []string{first.PeerPoint, PointRaw, PointDER} {
				p := first
				p.ECDH, p.DeriveValueLen, p.PeerPoint = strategy, length, point
				all = append(all, p)
			}
		}
	}
	return all
}

// scalars tries ECDHInMemory on a key of its kind and adopts it; the key takes the place of the pair in what follows.
func (c *checker) scalars(s session) (err error) {
	pair := c.keys[OPRF]
	defer func() {
		if err != nil {
			c.keys[OPRF] = pair
		}
	}()
	p := c.profile
	p.ECDH = ECDHInMemory
	s = s.under(p)
	if line := c.generate(s, OPRF); line.Result == CheckFail {
		return errors.New(line.Why)
	}
	k := c.keys[OPRF].key
	if err := s.withScalar(k, func([]byte) error { return nil }); err != nil {
		return err
	}
	if err := s.proveDerive(k); err != nil {
		return err
	}
	c.profile = p
	return nil
}

// points multiplies points whose products are known from the public half. Both y-coordinates come up, at
// random: that only one did has a chance of 2^-63.
func (c *checker) points(s session, k *key) CheckLine {
	const rounds = 64
	odd := 0
	for range rounds {
		peer, err := ecdh.P256().GenerateKey(rand.Reader)
		if err != nil {
			return failed("see what is wrong with this machine", err)
		}
		p, err := nistec.NewP256Point().SetBytes(peer.PublicKey().Bytes())
		if err != nil {
			return failed("see what is wrong with this machine", err)
		}
		want, err := nistec.NewP256Point().ScalarMult(k.public.point, peer.Bytes())
		if err != nil {
			return failed("see what is wrong with this machine", err)
		}
		_, pPlusG, err := shifted([pointBytes]byte(p.BytesCompressed()))
		if err != nil {
			return failed("see what is wrong with this machine", err)
		}
		x1, err := s.x(k, p.Bytes())
		if err != nil {
			return failed(brokenToken, err)
		}
		x2, err := s.x(k, pPlusG)
		if err != nil {
			return failed(brokenToken, err)
		}
		got, err := fullPoint(x1, x2, k.public.point)
		if err == nil && !bytes.Equal(got[:], want.BytesCompressed()) {
			err = fmt.Errorf("%w: another point than Go's", errFaulty)
		}
		if err != nil {
			return failed(brokenToken, err)
		}
		odd += int(got[0] & 1)
	}
	return okay("%d products as Go computes them, %d of them with an odd y", rounds, odd)
}

func (c *checker) badPoint(s session, k *key) CheckLine {
	p := k.public.point.Bytes()
	p[len(p)-1] ^= 1 // one of ±P and no other point has this x
	if _, err := s.x(k, p); err != nil {
		return okay("one that is not on the curve is refused")
	}
	return warned("nothing, as the vault shows it none; let no other program use these keys", "one that is not on the curve is multiplied")
}

// imported makes a session object of a known secret. It is gone with the session.
func (s session) imported(keyType uint, value []byte, usage ...uint) (pkcs11.ObjectHandle, error) {
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, value),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
	}
	for _, u := range usage {
		template = append(template, pkcs11.NewAttribute(u, true))
	}
	return s.p.CreateObject(s.handle, template)
}

func (c *checker) hmac(s session, k *key) CheckLine {
	if _, err := s.prove(k); err != nil {
		return failed(brokenToken, err)
	}
	secret := make([]byte, secretKeyBytes)
	_, _ = rand.Read(secret) // crypto/rand never fails: it ends the process first
	handle, err := s.imported(pkcs11.CKK_GENERIC_SECRET, secret, pkcs11.CKA_SIGN)
	if err != nil {
		return warned("nothing, if the token is certified to compute it", "not compared with Go's, as the token takes no known key: %v", err)
	}
	for _, n := range []int{1, 63, 64, 65, 1000} {
		message := make([]byte, n)
		_, _ = rand.Read(message)
		mac := hmac.New(sha256.New, secret)
		mac.Write(message)
		got, err := s.mac(&key{name: k.name, handle: handle}, message)
		if err == nil && !bytes.Equal(got[:], mac.Sum(nil)) {
			err = fmt.Errorf("%w: another MAC than Go's over %d bytes", errFaulty, n)
		}
		if err != nil {
			return failed(brokenToken, err)
		}
	}
	return okay("as Go computes it")
}

func (c *checker) ecdsa(s session, k *key) CheckLine {
	const rounds = 32
	seen := map[string]bool{}
	for i := range rounds {
		signature, err := s.signVerified(k, sha256.Sum256([]byte{byte(i)}))
		if err != nil {
			return failed(brokenToken, err)
		}
		r := string(signature[:fieldBytes])
		if seen[r] {
			return failed(brokenToken, fmt.Errorf("%w: two signatures under one nonce, which gives the key away", errFaulty))
		}
		seen[r] = true
	}
	return okay("%d signatures verify, under as many nonces", rounds)
}

func (c *checker) readValue(s session, sc *scratch) string {
	if s.readsValue(sc.key) {
		return "read"
	}
	return ""
}

// readsValue says whether the token gives a key's value to who asks for it.
func (s session) readsValue(k *key) bool {
	values, err := s.attributes(k.handle, pkcs11.CKA_VALUE)
	if err != nil {
		return false
	}
	defer clear(values[0])
	return len(values[0]) > 0
}

// CKM_AES_KEY_WRAP_PAD and CKM_AES_KEY_WRAP_KWP of PKCS #11 v3.0; miekg/pkcs11 v1.1.2 lacks the second.
const (
	ckmAESKeyWrapPad = 0x210a
	ckmAESKeyWrapKWP = 0x210b
)

// wrapping are the ways to wrap a key out under an AES key.
var wrapping = []struct {
	name      string
	mechanism uint
	parameter any
}{
	{"CKM_AES_KEY_WRAP", pkcs11.CKM_AES_KEY_WRAP, nil},
	{"CKM_AES_KEY_WRAP_PAD", ckmAESKeyWrapPad, nil},
	{"CKM_AES_KEY_WRAP_KWP", ckmAESKeyWrapKWP, nil},
	{"CKM_AES_CBC_PAD", pkcs11.CKM_AES_CBC_PAD, make([]byte, aes.BlockSize)},
	{"CKM_AES_ECB", pkcs11.CKM_AES_ECB, nil},
}

// wraps says whether the token wraps an object under a key that this process knows, or, if it takes no known
// keys, under one of its own.
func (c *checker) wraps(m []*pkcs11.Mechanism, object func(s session) (pkcs11.ObjectHandle, error)) bool {
	s, err := c.open()
	if err != nil {
		return false
	}
	defer s.close()
	by, err := s.imported(pkcs11.CKK_AES, make([]byte, secretKeyBytes), pkcs11.CKA_WRAP)
	if err != nil {
		by, err = s.p.GenerateKey(s.handle, mechanism(pkcs11.CKM_AES_KEY_GEN, nil), []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, secretKeyBytes), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		})
	}
	if err != nil {
		return false
	}
	handle, err := object(s)
	if err != nil {
		return false
	}
	wrapped, err := s.p.WrapKey(s.handle, m, by, handle)
	return err == nil && len(wrapped) > 0
}

func (c *checker) wrapKey(_ session, sc *scratch) string {
	for _, w := range wrapping {
		if c.wraps(mechanism(w.mechanism, w.parameter), func(session) (pkcs11.ObjectHandle, error) { return sc.key.handle, nil }) {
			return w.name
		}
	}
	return ""
}

// wrapOut tries to wrap keys out, and an extractable one for comparison.
func (c *checker) wrapOut(s session) CheckLine {
	line := c.each(c.wrapKey)(s)
	if line.Result != CheckOK {
		return line
	}
	works := 0
	for _, w := range wrapping {
		if c.wraps(mechanism(w.mechanism, w.parameter), func(s session) (pkcs11.ObjectHandle, error) {
			return s.p.GenerateKey(s.handle, mechanism(pkcs11.CKM_AES_KEY_GEN, nil), []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
				pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, secretKeyBytes), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			})
		}) {
			works++
		}
	}
	if works == 0 {
		return okay("none of the %d mechanisms that were tried wraps any key here", len(wrapping))
	}
	return okay("refused for every kind of key, by %d mechanisms that wrap an extractable key", works)
}

// lifted are the attributes that would make a key extractable, each by itself.
var lifted = []struct {
	name      string
	attribute *pkcs11.Attribute
}{
	{"CKA_EXTRACTABLE=true", pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)},
	{"CKA_SENSITIVE=false", pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false)},
}

func (c *checker) copyKey(s session, sc *scratch) string {
	for _, l := range lifted {
		for _, more := range [][]*pkcs11.Attribute{nil, {pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)}} {
			handle, err := s.p.CopyObject(s.handle, sc.key.handle, append([]*pkcs11.Attribute{l.attribute}, more...))
			if err != nil {
				continue
			}
			is := s.require(handle, []*pkcs11.Attribute{l.attribute})
			_ = s.p.DestroyObject(s.handle, handle) // the last step looks for it by its label
			if is == nil {
				return "a copy with " + l.name
			}
		}
	}
	return ""
}

func (c *checker) liftProtection(s session, sc *scratch) string {
	for _, l := range lifted {
		if s.p.SetAttributeValue(s.handle, sc.key.handle, []*pkcs11.Attribute{l.attribute}) != nil {
			continue
		}
		if s.require(sc.key.handle, []*pkcs11.Attribute{l.attribute}) == nil {
			return l.name
		}
	}
	return ""
}

func (c *checker) usage(s session) CheckLine {
	var allowed []string
	if sc := c.keys[Identity]; sc != nil {
		if _, err := s.x(sc.key, sc.key.public.point.Bytes()); err == nil {
			allowed = append(allowed, "a signing key derives")
		}
	}
	if sc := c.keys[OPRF]; sc != nil {
		if _, err := s.sign(sc.key, [32]byte{1}); err == nil {
			allowed = append(allowed, "a deriving key signs")
		}
	}
	if sc := c.keys[Master]; sc != nil {
		other, err := s.imported(pkcs11.CKK_AES, make([]byte, secretKeyBytes), pkcs11.CKA_ENCRYPT, pkcs11.CKA_EXTRACTABLE)
		if err == nil {
			if _, err := s.p.WrapKey(s.handle, mechanism(pkcs11.CKM_AES_KEY_WRAP, nil), sc.key.handle, other); err == nil {
				allowed = append(allowed, "an encrypting key wraps")
			}
		}
	}
	if len(allowed) > 0 {
		return warned("let no other program use these keys", "the token does not hold keys to their uses: %v", allowed)
	}
	return okay("refused")
}

func (c *checker) rename(s session) CheckLine {
	const do = "use a token whose labels can be changed: a key gets its name when it is proven"
	for _, purpose := range scratchPurposes {
		sc := c.keys[purpose]
		if sc == nil {
			continue
		}
		label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, sc.label+"/named")
		for _, h := range []pkcs11.ObjectHandle{sc.key.handle, sc.public} {
			if h == 0 {
				continue
			}
			err := s.p.SetAttributeValue(s.handle, h, []*pkcs11.Attribute{label})
			if err == nil {
				err = s.require(h, []*pkcs11.Attribute{label})
			}
			if err != nil {
				return failed(do, fmt.Errorf("C_SetAttributeValue of %s: %w", purpose, err))
			}
		}
	}
	return okay("keys can be given names")
}

// emptyAssociated comes last of all: some modules abort the process here.
func (c *checker) emptyAssociated(s session, k *key) CheckLine {
	iv := make([]byte, c.profile.IVBytes)
	if c.profile.IV == IVOurs {
		_, _ = rand.Read(iv)
	}
	got, err := s.encryptRaw(k, iv, probeText, nil)
	if err != nil {
		return okay("refused, and not needed")
	}
	if c.profile.IV != IVOurs {
		return okay("accepted, and not needed")
	}
	fresh, err := c.open()
	if err != nil {
		return failed(brokenToken, err)
	}
	defer fresh.close()
	block := &tokenBlock{s: fresh, k: k}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return failed(brokenToken, err)
	}
	if want := gcm.Seal(nil, iv, probeText, nil); block.err != nil || !bytes.Equal(got, want) {
		return warned("nothing, as the vault never leaves it empty; let no other program use these keys", "accepted, and not AES-GCM as Go computes it")
	}
	return okay("as Go computes it, and not needed")
}
