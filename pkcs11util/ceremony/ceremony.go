package ceremony

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// JoinConfig says how a token takes part.
type JoinConfig struct {
	OAEPHash OAEPHash // what the token unwraps with
	Tool     string   // the program and its version
}

// Join makes a transport key in the token and returns the request that names it. A token has one open request:
// the transport key of an earlier one is destroyed first. After an error there is none, and Join can be called again.
func Join(admin *pkcs11util.Admin, cfg JoinConfig) (Request, error) {
	var r Request
	err := within(admin, func(t *token) (err error) {
		if err := t.destroyTransportKeys(); err != nil {
			return err
		}
		r, _, err = t.join(cfg, true)
		return err
	})
	return r, err
}

// join makes the transport key, for the token or for the session only.
func (t *token) join(cfg JoinConfig, keep bool) (Request, pkcs11.ObjectHandle, error) {
	r := Request{Format: requestFormat, Tool: cfg.Tool, Token: t.info, Nonce: make([]byte, nonceBytes), OAEPHash: cfg.OAEPHash}
	_, _ = rand.Read(r.Nonce) // crypto/rand never fails: it ends the process first
	private, public, err := t.makeTransportKey(r.Nonce, cfg.OAEPHash, keep)
	if err != nil {
		return Request{}, 0, err
	}
	r.TransportKey = public
	if err := r.check(); err != nil {
		if keep {
			err = errors.Join(err, t.destroy(private))
		}
		return Request{}, 0, fmt.Errorf("the request: %w", err)
	}
	return r, private, nil
}

func (t *token) destroyTransportKeys() error {
	keys, err := t.transportKeys()
	if err != nil {
		return err
	}
	for _, k := range keys {
		if err := t.destroy(k.handle); err != nil {
			return err
		}
	}
	return nil
}

// Pending says whether the token still waits for the bundle of a request; nil means yes. It changes nothing.
func Pending(admin *pkcs11util.Admin, r Request) error {
	return within(admin, func(t *token) error {
		if r.Token.Serial != t.info.Serial {
			return fmt.Errorf("the request is of the token %v, and this is %v", r.Token, t.info)
		}
		_, err := t.transportKey(r)
		return err
	})
}

// transportKey finds the transport key of a request.
func (t *token) transportKey(r Request) (pkcs11.ObjectHandle, error) {
	keys, err := t.transportKeys()
	if err != nil {
		return 0, err
	}
	label := transportPrefix + hex.EncodeToString(r.Nonce)
	keys = slices.DeleteFunc(keys, func(o object) bool { return o.label != label })
	if len(keys) != 1 {
		return 0, fmt.Errorf("the token %v does not wait for this request: its transport key was destroyed when a bundle was accepted or another request made; begin again with a new request", t.info)
	}
	public, err := t.transportPublic(keys[0].handle)
	if err != nil {
		return 0, err
	}
	if !bytes.Equal(public, r.TransportKey) {
		return 0, fmt.Errorf("the transport key in the request is not that of the token %v: it was swapped on the way; do not use this bundle", t.info)
	}
	return keys[0].handle, nil
}

// MakeConfig says what the source makes, and for whom.
type MakeConfig struct {
	// Names of the keys. None: the first generation of every purpose, into tokens that hold no keys yet. Else they
	// are further generations, and all tokens hold the identity key of the ceremony before.
	Names    []pkcs11util.KeyName
	Requests []Request // of the other tokens
	// Confirmed are the fingerprints of all requests, as the people who made them say them.
	Confirmed []Fingerprint
	OAEPHash  OAEPHash // what the source itself unwraps with
	Who       string   // holds the ceremony
	VaultID   string   // the vault that the keys are for; may be empty
	Tool      string   // the program and its version
	Time      time.Time
	// DryRun does everything with session objects alone: the token stays as it is, and the bundle
	// comes without shares, so that no token can take it.
	DryRun bool
}

// Make generates the set in the source's token, wraps it for all tokens, and signs the record. Of all
// this the token keeps only a transport key: the bundle must be on disk before it is given to
// [Accept], at the source as elsewhere. If it is lost before that, nothing is lost: call Make again.
func Make(admin *pkcs11util.Admin, cfg MakeConfig) (Bundle, error) {
	if len(cfg.Requests) == 0 {
		return Bundle{}, errors.New("a ceremony is for two tokens or more, and there is no request; for one token there is: vaultctl token init")
	}
	if err := checkRequests(cfg.Requests); err != nil {
		return Bundle{}, err
	}
	if err := checkWho(cfg.Who, cfg.Tool, cfg.VaultID); err != nil {
		return Bundle{}, err
	}
	for _, r := range cfg.Requests {
		if !slices.Contains(cfg.Confirmed, r.Fingerprint()) {
			return Bundle{}, fmt.Errorf("the request of %v is not confirmed: none of the fingerprints that were said is its own; if the one of its maker was among them, the request was swapped or damaged on the way", r.Token)
		}
	}
	if len(cfg.Confirmed) != len(cfg.Requests) {
		return Bundle{}, errors.New("there must be as many confirmed fingerprints as requests")
	}
	names := slices.Clone(cfg.Names)
	for _, purpose := range pkcs11util.Purposes() {
		if len(cfg.Names) == 0 {
			names = append(names, pkcs11util.KeyName{Purpose: purpose, Generation: 1})
		}
	}
	slices.SortFunc(names, order)

	there, _, err := admin.Keys()
	if err != nil {
		return Bundle{}, err
	}
	if err := mayMake(names, there, len(cfg.Names) == 0); err != nil {
		return Bundle{}, err
	}
	var b Bundle
	err = within(admin, func(t *token) (err error) {
		b, err = t.make(cfg, names, there)
		return err
	})
	return b, err
}

// mayMake refuses keys that do not fit to those in the source.
func mayMake(names, there []pkcs11util.KeyName, first bool) error {
	if first && len(there) > 0 {
		return fmt.Errorf("the token holds keys already (%s): name the purposes and the generation of keys to add", list(there))
	}
	if !first && !slices.ContainsFunc(there, isIdentity) {
		return errors.New("the token holds no identity key, to sign for further generations: make the whole set first, without a purpose or generation")
	}
	for i, name := range names {
		if _, _, _, err := pkcs11util.DefaultProfile().Templates(name.Purpose); err != nil || name.Generation == 0 {
			return fmt.Errorf("%s is no name for a key", name)
		}
		if i > 0 && names[i-1] == name {
			return fmt.Errorf("%s is named twice", name)
		}
		for _, old := range there {
			if old.Purpose == name.Purpose && old.Generation >= name.Generation {
				return fmt.Errorf("the token holds %s already: a new generation has a higher number", old)
			}
		}
	}
	return nil
}

func isIdentity(n pkcs11util.KeyName) bool { return n.Purpose == pkcs11util.Identity }

func list(names []pkcs11util.KeyName) string {
	var all []string
	for _, n := range names {
		all = append(all, n.String())
	}
	return strings.Join(all, ", ")
}

func (t *token) make(cfg MakeConfig, names, there []pkcs11util.KeyName) (b Bundle, err error) {
	identities, err := t.stored(slices.DeleteFunc(slices.Clone(there), func(n pkcs11util.KeyName) bool { return !isIdentity(n) }))
	if err != nil {
		return Bundle{}, err
	}
	for _, r := range cfg.Requests {
		if r.Token.Serial == t.info.Serial {
			return Bundle{}, fmt.Errorf("the source, %v, is also among the requests: each token takes part once", t.info)
		}
	}
	if !cfg.DryRun {
		if err := t.destroyTransportKeys(); err != nil {
			return Bundle{}, err
		}
	}
	own, transport, err := t.join(JoinConfig{OAEPHash: cfg.OAEPHash, Tool: cfg.Tool}, !cfg.DryRun)
	if err != nil {
		return Bundle{}, err
	}
	defer func() {
		if err != nil && !cfg.DryRun {
			err = errors.Join(err, t.destroy(transport))
		}
	}()
	requests := append([]Request{own}, cfg.Requests...)
	b = Bundle{Format: bundleFormat, Record: Record{
		Format: recordFormat, Time: cfg.Time.UTC().Format(time.RFC3339), Who: cfg.Who, Tool: cfg.Tool, VaultID: cfg.VaultID,
		Requests: requests,
	}}
	var set []generated
	var signer pkcs11.ObjectHandle
	for _, name := range names {
		key, err := t.generate(name)
		if err != nil {
			return Bundle{}, err
		}
		set = append(set, key)
		b.Record.Keys = append(b.Record.Keys, key.Key)
		if isIdentity(name) {
			b.Record.Identity, signer = key.Key, key.handle
		}
	}
	if n := len(identities); n > 0 { // sorted by generation
		b.Record.Identity, signer = identities[n-1].Key, identities[n-1].handle
	}
	for _, r := range requests {
		share, err := t.wrap(r, set)
		if err != nil {
			return Bundle{}, fmt.Errorf("wrapping for %v: %w", r.Token, err)
		}
		b.Shares = append(b.Shares, share)
	}
	b.Record.Shares = hashShares(b.Shares)
	if b.Record.Signature, err = t.sign(signer, b.Record.Identity.PublicKey, b.Record.digest()); err != nil {
		return Bundle{}, err
	}
	if err := b.check(); err != nil {
		return Bundle{}, fmt.Errorf("the bundle: %w", err)
	}
	if cfg.DryRun {
		by, err := t.unwrapFrom(transport, own.OAEPHash, b.Shares[0].WrappingKey)
		if err != nil {
			return Bundle{}, err
		}
		for i, key := range b.Record.Keys {
			if err := t.unwrapKey(by, key, b.Shares[0].Keys[i], "", false); err != nil {
				return Bundle{}, err
			}
		}
		b.Shares = nil
	}
	return b, nil
}

// Accepted says what Accept did.
type Accepted struct {
	Stored []pkcs11util.KeyName // keys that are new in the token
	Kept   []pkcs11util.KeyName // keys of the set that were there
}

// Accept unwraps the token's share of a bundle, proves the keys, names them and destroys the
// transport key. confirmed is the record's fingerprint, as the source's operator says it. All is
// checked before a key gets its name; Accept can be repeated after an error or a crash,
// and when it has succeeded, it changes nothing more.
func Accept(admin *pkcs11util.Admin, b Bundle, confirmed Fingerprint) (Accepted, error) {
	if err := b.check(); err != nil {
		return Accepted{}, fmt.Errorf("it is no bundle of a ceremony, or it was changed: %w", err)
	}
	if confirmed != b.Record.Fingerprint() {
		return Accepted{}, errors.New("the bundle has another fingerprint than was said: if that was its maker's, the bundle was swapped on the way; do not use it")
	}
	there, _, err := admin.Keys()
	if err != nil {
		return Accepted{}, err
	}
	var accepted Accepted
	var missing []Key
	var own int
	err = within(admin, func(t *token) error {
		keys, err := t.stored(there)
		if err != nil {
			return err
		}
		own = slices.IndexFunc(b.Record.Requests, func(r Request) bool { return r.Token.Serial == t.info.Serial })
		if own < 0 {
			return fmt.Errorf("the bundle is not for the token %v", t.info)
		}
		if accepted.Kept, missing, err = b.Record.compare(keys); err != nil {
			return err
		}
		if len(missing) == 0 {
			return t.destroyTransportKeyOf(b.Record.Requests[own])
		}
		if err := b.Record.mayAdd(keys); err != nil {
			return err
		}
		_, err = t.transportKey(b.Record.Requests[own])
		return err
	})
	if err != nil || len(missing) == 0 {
		return accepted, err
	}

	if _, err := admin.Clean(); err != nil { // what a run left that was cut short
		return accepted, err
	}
	labels := map[pkcs11util.KeyName]string{}
	err = within(admin, func(t *token) error {
		transport, err := t.transportKey(b.Record.Requests[own])
		if err != nil {
			return err
		}
		by, err := t.unwrapFrom(transport, b.Record.Requests[own].OAEPHash, b.Shares[own].WrappingKey)
		if err != nil {
			return err
		}
		for i, key := range b.Record.Keys {
			if !slices.ContainsFunc(missing, func(k Key) bool { return k.Name() == key.Name() }) {
				continue
			}
			labels[key.Name()] = pkcs11util.TemporaryLabel(key.Name())
			if err := t.unwrapKey(by, key, b.Shares[own].Keys[i], labels[key.Name()], true); err != nil {
				return err
			}
		}
		return nil
	})
	for _, key := range missing {
		if err == nil {
			err = admin.Prove(labels[key.Name()], key.Name())
		}
	}
	for _, key := range missing {
		if err == nil {
			err = admin.Adopt(labels[key.Name()], key.Name())
		}
		if err == nil {
			accepted.Stored = append(accepted.Stored, key.Name())
		}
	}
	if err != nil {
		_, cleanErr := admin.Clean()
		return accepted, errors.Join(err, cleanErr)
	}
	return accepted, within(admin, func(t *token) error { return t.destroyTransportKeyOf(b.Record.Requests[own]) })
}

// destroyTransportKeyOf does nothing if it is destroyed already.
func (t *token) destroyTransportKeyOf(r Request) error {
	keys, err := t.transportKeys()
	if err != nil {
		return err
	}
	for _, k := range keys {
		if k.label == transportPrefix+hex.EncodeToString(r.Nonce) {
			return t.destroy(k.handle)
		}
	}
	return nil
}

// compare sorts the record's keys into those that a token has and those that it has not. A key of one name that is
// another is an error.
func (r Record) compare(keys []stored) (same []pkcs11util.KeyName, missing []Key, err error) {
	var others []pkcs11util.KeyName
	for _, want := range r.Keys {
		i := slices.IndexFunc(keys, func(k stored) bool { return k.Name() == want.Name() })
		switch {
		case i < 0:
			missing = append(missing, want)
		case bytes.Equal(keys[i].Fingerprint, want.Fingerprint):
			same = append(same, want.Name())
		default:
			others = append(others, want.Name())
		}
	}
	if len(others) > 0 {
		return nil, nil, fmt.Errorf("the token holds other keys than this ceremony's as %s", list(others))
	}
	return same, missing, nil
}

// mayAdd refuses tokens whose keys are not from the ceremonies before this one.
func (r Record) mayAdd(keys []stored) error {
	for _, k := range keys {
		if _, ok := r.find(k.Name()); r.first() && !ok {
			return fmt.Errorf("the token holds %s, which is not of this ceremony: a first set goes into a token without keys", k.Name())
		}
	}
	if r.first() {
		return nil
	}
	i := slices.IndexFunc(keys, func(k stored) bool { return k.Name() == r.Identity.Name() })
	if i < 0 {
		return fmt.Errorf("the token does not hold %s, which signed the bundle: accept the bundle with that key first", r.Identity.Name())
	}
	if !bytes.Equal(keys[i].PublicKey, r.Identity.PublicKey) {
		return fmt.Errorf("the bundle is signed by another %s than the token's: it comes from another vault, or from somebody who made it up", r.Identity.Name())
	}
	return nil
}

// Compare says which keys of a record are in the token, and which are not (any more). A key of one name that
// is another is an error.
func Compare(admin *pkcs11util.Admin, r Record) (same, missing []pkcs11util.KeyName, err error) {
	there, _, err := admin.Keys()
	if err != nil {
		return nil, nil, err
	}
	err = within(admin, func(t *token) error {
		keys, err := t.stored(there)
		if err != nil {
			return err
		}
		var gone []Key
		if same, gone, err = r.compare(keys); err != nil {
			return err
		}
		for _, k := range gone {
			missing = append(missing, k.Name())
		}
		return nil
	})
	return same, missing, err
}
