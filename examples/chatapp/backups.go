package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// A backup is a blob that nobody here can open, and what a new device has to know before it
// can: whether the key is in the vault under a password, written down, or wrapped
// under passkeys.
type backup struct {
	Version  int64     `json:"version,omitempty"`
	Mode     string    `json:"mode"`
	Passkeys []passkey `json:"passkeys"`
	Blob     []byte    `json:"blob,omitempty"`
	Size     int64     `json:"size,omitempty"`
	SavedAt  time.Time `json:"saved_at,omitzero"`
}

type passkey struct {
	ID      []byte `json:"id"`      // the credential's
	Wrapped []byte `json:"wrapped"` // the backup key, under what the passkey's PRF answers
}

const (
	maxBackupBody = 24 << 20 // a blob of 16 MiB, as base64
	maxPasskeys   = 8
)

func (s *server) getBackup(w http.ResponseWriter, r *http.Request, a account) error {
	var b backup
	err := s.db.QueryRow(r.Context(), `SELECT version, mode, passkeys, length(blob), saved_at FROM backups WHERE account = $1`, a.id).
		Scan(&b.Version, &b.Mode, &b.Passkeys, &b.Size, &b.SavedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		answer(w, http.StatusOK, map[string]any{"backup": nil})
		return nil
	}
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, map[string]any{"backup": b})
	return nil
}

func (s *server) getBlob(w http.ResponseWriter, r *http.Request, a account) error {
	var blob []byte
	err := s.db.QueryRow(r.Context(), `SELECT blob FROM backups WHERE account = $1`, a.id).Scan(&blob)
	if errors.Is(err, pgx.ErrNoRows) {
		return refuse(http.StatusNotFound, "There is no backup.")
	}
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write(blob) // the page is gone, or not
	return nil
}

var errChanged = refuse(http.StatusConflict, "The backup was changed by another tab or phone meanwhile.")

// putBackup replaces the backup that If-Match names by its version; 0 is none at all. So of
// two devices at once one is told. Versions begin at the time, so that none returns after a
// backup was deleted.
func (s *server) putBackup(w http.ResponseWriter, r *http.Request, a account) error {
	known, err := strconv.ParseInt(r.Header.Get("If-Match"), 10, 64)
	if err != nil {
		return refuse(http.StatusPreconditionRequired, "If-Match: want the version that is to be replaced, or 0.")
	}
	var b backup
	if err := read(w, r, maxBackupBody, &b); err != nil {
		return err
	}
	switch {
	case b.Mode != "password" && b.Mode != "digits" && b.Mode != "passkey", len(b.Blob) == 0, len(b.Passkeys) > maxPasskeys:
		return refuse(http.StatusBadRequest, "The backup is malformed.")
	case b.Mode == "passkey" && len(b.Passkeys) == 0:
		return refuse(http.StatusBadRequest, "A backup without a passkey cannot be opened by one.")
	}
	if b.Passkeys == nil {
		b.Passkeys = []passkey{}
	}
	passkeys, err := json.Marshal(b.Passkeys)
	if err != nil {
		return err
	}
	err = s.db.QueryRow(r.Context(), `INSERT INTO backups AS b (account, version, mode, passkeys, blob)
		SELECT $1, (extract(epoch FROM now()) * 1000)::bigint, $3, $4, $5 WHERE $2::bigint = 0 OR EXISTS (SELECT FROM backups WHERE account = $1)
		ON CONFLICT (account) DO UPDATE SET version = b.version + 1, mode = excluded.mode, passkeys = excluded.passkeys,
			blob = excluded.blob, saved_at = now() WHERE b.version = $2
		RETURNING version, saved_at`, a.id, known, b.Mode, passkeys, b.Blob).Scan(&b.Version, &b.SavedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return errChanged
	}
	if err != nil {
		return err
	}
	b.Size, b.Blob = int64(len(b.Blob)), nil
	answer(w, http.StatusOK, map[string]any{"backup": b})
	return nil
}

// deleteBackup is harmless when there is none.
func (s *server) deleteBackup(w http.ResponseWriter, r *http.Request, a account) error {
	if _, err := s.db.Exec(r.Context(), `DELETE FROM backups WHERE account = $1`, a.id); err != nil {
		return err
	}
	answer(w, http.StatusOK, struct{}{})
	return nil
}
