package client

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

const nonceSize = 12 // AES-GCM's (NIST SP 800-38D §5.2.1.1)

// wrap encrypts the backup key under the export key: nonce, ciphertext, tag.
func wrap(random io.Reader, export opaque.ExportKey, key backup.Key, associated []byte) ([]byte, error) {
	gcm, err := aead(export[:], transcript.WrapKeyInfo)
	if err != nil {
		return nil, err
	}
	out := make([]byte, nonceSize, transcript.WrappedKeySize)
	if _, err := io.ReadFull(random, out); err != nil {
		return nil, fmt.Errorf("drawing the wrap's nonce: %w", err)
	}
	return gcm.Seal(out, out, key[:], associated), nil
}

// unwrap undoes the vault's delivery under the session key and then the device's own
// wrap under the export key. It fails unless both are authentic and for this account.
func unwrap(session opaque.SessionKey, export opaque.ExportKey, sealed, delivery, associated []byte) (backup.Key, error) {
	wrapped, err := open(session[:], transcript.DeliveryKeyInfo, sealed, delivery)
	if err != nil {
		return backup.Key{}, fmt.Errorf("opening the delivery: %w", err)
	}
	key, err := open(export[:], transcript.WrapKeyInfo, wrapped, associated)
	if err != nil {
		return backup.Key{}, fmt.Errorf("opening the wrapped key: %w", err)
	}
	if len(key) != backup.KeySize {
		return backup.Key{}, errors.New("opening the wrapped key: it has not the size of one")
	}
	return backup.Key(key), nil
}

func open(secret []byte, info string, sealed, associated []byte) ([]byte, error) {
	gcm, err := aead(secret, info)
	if err != nil {
		return nil, err
	}
	if len(sealed) < nonceSize {
		return nil, errors.New("too short")
	}
	return gcm.Open(nil, sealed[:nonceSize], sealed[nonceSize:], associated)
}

// aead is AES-256-GCM under HKDF-SHA-256 of a secret.
func aead(secret []byte, info string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, info, 32)
	if err != nil {
		return nil, fmt.Errorf("deriving a key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
