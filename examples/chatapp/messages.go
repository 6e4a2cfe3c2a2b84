package main

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// envelope is a message: sealed by the sender's device to the recipient's.
type envelope struct {
	ID           int64     `json:"id,omitempty"`
	ClientID     string    `json:"client_id"`
	From         string    `json:"from,omitempty"`
	To           string    `json:"to,omitempty"`
	SenderKey    []byte    `json:"sender_key"`
	RecipientKey []byte    `json:"recipient_key"`
	Sealed       []byte    `json:"sealed"`
	SentAt       time.Time `json:"sent_at,omitzero"`
}

const (
	maxMessageBody = 64 << 10
	pageSize       = 200
)

func (s *server) postMessage(w http.ResponseWriter, r *http.Request, a account) error {
	var e envelope
	if err := read(w, r, maxMessageBody, &e); err != nil {
		return err
	}
	if len(e.ClientID) < 16 || len(e.ClientID) > 64 || len(e.SenderKey) != 65 || len(e.RecipientKey) != 65 || len(e.Sealed) < 28 {
		return refuse(http.StatusBadRequest, "The message is malformed.")
	}
	to, _, err := s.lookUp(r.Context(), e.To)
	if err != nil {
		return err
	}
	// Sent again, it is the same message.
	_, err = s.db.Exec(r.Context(), `INSERT INTO messages (sender, recipient, client_id, sender_key, recipient_key, sealed)
		VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT ON CONSTRAINT messages_once DO NOTHING`,
		a.id, to, e.ClientID, e.SenderKey, e.RecipientKey, e.Sealed)
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, struct{}{})
	return nil
}

func (s *server) getMessages(w http.ResponseWriter, r *http.Request, a account) error {
	after, err := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
	if err != nil {
		return refuse(http.StatusBadRequest, "after: want a number.")
	}
	rows, err := s.db.Query(r.Context(), `SELECT m.id, m.client_id, f.name, m.sender_key, m.recipient_key, m.sealed, m.sent_at
		FROM messages m JOIN accounts f ON f.id = m.sender WHERE m.recipient = $1 AND m.id > $2 ORDER BY m.id LIMIT $3`,
		a.id, after, pageSize)
	if err != nil {
		return err
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e envelope, err error) {
		err = row.Scan(&e.ID, &e.ClientID, &e.From, &e.SenderKey, &e.RecipientKey, &e.Sealed, &e.SentAt)
		return e, err
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	if out == nil {
		out = []envelope{}
	}
	answer(w, http.StatusOK, out)
	return nil
}
