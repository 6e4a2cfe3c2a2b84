package api

import "time"

// The admin listener's view of the token's keys. It is for operators; the API for
// tenants has none of it.

// KeyStatus answers GET /keys/.
type KeyStatus struct {
	Now             time.Time  `json:"now" doc:"The database's clock."`
	Token           string     `json:"token" doc:"Serial number of this instance's token."`
	Tokens          []string   `json:"tokens" doc:"Serial numbers of all tokens in service."`
	Keys            []TokenKey `json:"keys"`
	RewrapLeft      int64      `json:"rewrap_left" doc:"Records under older keys than those in use."`
	Rewrapping      bool       `json:"rewrapping" doc:"Whether an instance moves them at present."`
	OldestUncovered *time.Time `json:"oldest_uncovered_destruction,omitempty" doc:"When the first record was destroyed whose copies can still be opened; absent if there is none."`
	Warnings        []string   `json:"warnings"`
}

// TokenKey is one generation of a key.
type TokenKey struct {
	Purpose      string     `json:"purpose"`
	Generation   uint32     `json:"generation"`
	State        string     `json:"state"`
	CreatedAt    time.Time  `json:"created_at"`
	CurrentSince *time.Time `json:"current_since,omitempty"`
	RetiredAt    *time.Time `json:"retired_at,omitempty"`
	DestroyedAt  *time.Time `json:"destroyed_at,omitempty"`
	RewrappedAt  *time.Time `json:"rewrapped_at,omitempty"`
	Seals        uint64     `json:"seals" doc:"Values sealed under it, as far as instances have reported."`
	Records      int64      `json:"records" doc:"Records that need it; of mac, accounts."`
	Tokens       []string   `json:"tokens" doc:"Serial numbers of the tokens that hold it."`
}

// RotatedKey answers POST /keys/{purpose}/rotate and POST /keys/{purpose}/{generation}/destroy.
type RotatedKey struct {
	Purpose    string `json:"purpose"`
	Generation uint32 `json:"generation"`
}

// ForgottenToken answers POST /keys/tokens/{serial}/forget.
type ForgottenToken struct {
	Token string `json:"token"`
}

// OperatorHeader names who asks on the admin listener, for the audit log. It is believed only where no certificate says who it is.
const OperatorHeader = "BKV-Operator"

// AuditStatus is how far the audit log is sealed, as one vaultd knows it. Sealed and Signed are the sequence numbers of the last
// event that was sealed and of the newest checkpoint. LagSeconds is how long the oldest of the waiting events has waited. Fault
// is empty unless the log is not as the vault wrote it; only the instance that seals looks.
type AuditStatus struct {
	At         *time.Time `json:"at"`
	Sealing    bool       `json:"sealing"`
	Sealed     uint64     `json:"sealed"`
	Signed     uint64     `json:"signed"`
	SignedAt   *time.Time `json:"signed_at"`
	Waiting    int        `json:"waiting"`
	LagSeconds float64    `json:"lag_seconds"`
	Fault      string     `json:"fault"`
}
