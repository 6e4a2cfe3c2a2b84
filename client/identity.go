package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"fmt"
	"math/big"
	"slices"
	"time"

	"filippo.io/nistec"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// clockLeeway is how far the device's clock may be off. Key lists hold for days.
const clockLeeway = time.Hour

// purposeServer marks OPAQUE's static server keys in the key list.
const purposeServer = "server"

// vaultIdentity is a vault after the check against the pin. It does not change.
type vaultIdentity struct {
	id         string
	context    []byte // OPAQUE's context; not signed, but a false one only makes a login fail
	serverKeys []opaque.PublicKey
	relay      *ohttp.KeyConfig // nil on the direct route
	serial     uint64
	expires    time.Time
}

// identity returns the vault that the user pinned, from memory while its key list holds.
// Nothing that matters to the user is sent before it has succeeded.
//
// Errors: ErrWrongVault, ErrStaleKeys, ErrNoRelayKey, and those of send.
func (c *Client) identity(ctx context.Context) (*vaultIdentity, error) {
	c.mu.Lock()
	v := c.vault
	c.mu.Unlock()
	if v != nil && c.now().Before(v.expires) {
		return v, nil
	}
	return c.fetchIdentity(ctx)
}

func (c *Client) fetchIdentity(ctx context.Context) (*vaultIdentity, error) {
	var answer api.Vault
	request := &Request{Method: "GET", Path: "/v1/vault", Header: map[string]string{}}
	if err := c.send(ctx, request, "", nil, &answer); err != nil {
		return nil, fmt.Errorf("asking for the vault's identity: %w", err)
	}
	v, err := verifyIdentity(&answer, c.fingerprint, c.now())
	if err != nil {
		return nil, err
	}
	if !c.direct {
		if v.relay, err = relayKey(answer.Keys.Keys); err != nil {
			return nil, err
		}
		if v.relay == nil {
			return nil, ErrNoRelayKey
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if v.serial < c.serial {
		return nil, fmt.Errorf("%w: its serial is %d, after %d was seen", ErrStaleKeys, v.serial, c.serial)
	}
	c.serial, c.vault = v.serial, v
	return v, nil
}

// Serial is that of the newest key list seen, for Config.LastSerial when the app
// starts again.
func (c *Client) Serial() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.serial
}

// verifyIdentity checks what a vault says of itself: the pin covers id and identity key,
// the identity key signs the list, and the list holds now.
func verifyIdentity(v *api.Vault, pin transcript.Fingerprint, now time.Time) (*vaultIdentity, error) {
	if got := transcript.FingerprintOf(v.ID, v.IdentityKey); got != pin {
		return nil, fmt.Errorf("%w: its fingerprint is %v, and %v is pinned", ErrWrongVault, got, pin)
	}
	if v.Suite != api.Suite {
		return nil, fmt.Errorf("%w: it speaks another OPAQUE suite than %s", ErrWrongVault, api.Suite)
	}
	list := transcript.KeyList{
		Vault: v.ID, Serial: v.Keys.Serial,
		NotBefore: v.Keys.NotBefore.Unix(), Expires: v.Keys.Expires.Unix(),
	}
	for _, k := range v.Keys.Keys {
		list.Keys = append(list.Keys, transcript.ListedKey{Purpose: k.Purpose, Generation: k.Generation, Key: k.PublicKey})
	}
	if !signedBy(v.IdentityKey, list.Digest(), v.Keys.Signature) {
		return nil, fmt.Errorf("%w: its key list is not signed by the identity key", ErrWrongVault)
	}
	notBefore, expires := time.Unix(list.NotBefore, 0), time.Unix(list.Expires, 0)
	if now.Before(notBefore.Add(-clockLeeway)) || !now.Before(expires.Add(clockLeeway)) {
		return nil, fmt.Errorf("%w: it holds from %s to %s, and the device's clock says %s", ErrStaleKeys,
			notBefore.UTC().Format(time.RFC3339), expires.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	out := &vaultIdentity{id: v.ID, context: v.Context, serial: list.Serial, expires: expires}
	for _, k := range list.Keys {
		if k.Purpose != purposeServer {
			continue
		}
		key, err := opaque.ParsePublicKey(k.Key)
		if err != nil {
			return nil, fmt.Errorf("%w: a listed server key: %w", ErrWrongVault, err)
		}
		out.serverKeys = append(out.serverKeys, key)
	}
	return out, nil
}

// signedBy verifies ECDSA over P-256 (FIPS 186-5), with r and s of 32 bytes each,
// by a compressed public key.
func signedBy(key []byte, digest [32]byte, signature []byte) bool {
	const size = 32
	if len(key) != opaque.ElementSize || len(signature) != 2*size {
		return false
	}
	point, err := nistec.NewP256Point().SetBytes(key)
	if err != nil {
		return false
	}
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point.Bytes())
	if err != nil {
		return false
	}
	r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
	return ecdsa.Verify(public, digest[:], r, s)
}

// vouches returns nil if the vault lists this server key, and ErrWrongVault if not. The
// list in memory may be older than the vault's newest key, so it asks once more.
func (c *Client) vouches(ctx context.Context, v *vaultIdentity, key opaque.PublicKey) error {
	if slices.Contains(v.serverKeys, key) {
		return nil
	}
	v, err := c.fetchIdentity(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(v.serverKeys, key) {
		return fmt.Errorf("%w: its signed list has no such server key", ErrWrongVault)
	}
	return nil
}

// opaqueConfig is what both ends of OPAQUE must agree on.
func (c *Client) opaqueConfig(v *vaultIdentity, ksf opaque.Argon2id) opaque.ClientConfig {
	return opaque.ClientConfig{
		Context: v.context, ServerIdentity: []byte(v.id),
		ClientIdentity: transcript.ClientIdentity(c.tenant, c.user), KSF: ksf,
	}
}
