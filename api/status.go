package api

import "time"

// The admin listener's view of an instance, for operators and load balancers.

// States of an instance.
const (
	StateOK          = "ok"          // it serves, and nobody needs to look
	StateDegraded    = "degraded"    // it serves, and an operator should look
	StateUnavailable = "unavailable" // it cannot serve
	StateStopping    = "stopping"    // it finishes what runs, and ends
)

// Health answers GET /health.
type Health struct {
	State   string   `json:"state"`
	Failing []string `json:"failing" doc:"What it cannot do without and has not."`
}

// ServiceStatus answers GET /status.
type ServiceStatus struct {
	State      string    `json:"state"`
	Problems   []string  `json:"problems" doc:"Why the state is not ok: what an operator should look at."`
	NotCovered []string  `json:"not_covered" doc:"What this deployment does not protect against, by the way it is set up."`
	Now        time.Time `json:"now"`

	VaultID     string    `json:"vault_id"`
	Fingerprint string    `json:"fingerprint"`
	Version     string    `json:"version"`
	Revision    string    `json:"revision,omitempty"`
	Go          string    `json:"go"`
	StartedAt   time.Time `json:"started_at"`

	Token        TokenStatus    `json:"token"`
	Database     DatabaseStatus `json:"database"`
	Keys         []KeyInUse     `json:"keys" doc:"Those in use, as they were read last."`
	KeysReadAt   *time.Time     `json:"keys_read_at,omitempty"`
	RewrapLeft   int64          `json:"rewrap_left" doc:"Records under older keys than those in use."`
	Uncovered    *time.Time     `json:"oldest_uncovered_destruction,omitempty" doc:"When the first record was destroyed whose copies can still be opened; absent if there is none."`
	Audit        AuditStatus    `json:"audit"`
	Certificates []Certificate  `json:"certificates"`
}

// TokenStatus is the token as this instance sees it.
type TokenStatus struct {
	Available  bool   `json:"available"`
	Error      string `json:"error,omitempty"`
	Model      string `json:"model"`
	Label      string `json:"label"`
	Serial     string `json:"serial"`
	Profile    string `json:"profile,omitempty" doc:"The file with the token's profile; empty: the default one."`
	Strategy   string `json:"strategy" doc:"How it multiplies."`
	Sessions   int    `json:"sessions"`
	Lost       uint64 `json:"lost" doc:"Times that it was lost since the start."`
	Recoveries uint64 `json:"recoveries" doc:"Times that it was recovered, or one session of it, since the start."`
}

// DatabaseStatus is the database as this instance sees it.
type DatabaseStatus struct {
	Available   bool     `json:"available"`
	Error       string   `json:"error,omitempty"`
	Server      string   `json:"server,omitempty"`
	Schema      int64    `json:"schema,omitempty" doc:"The number of the last migration."`
	Standby     bool     `json:"standby,omitempty" doc:"It takes no writes."`
	Synchronous bool     `json:"synchronous" doc:"A commit is acknowledged when replicas hold it, too."`
	Replicas    int      `json:"replicas" doc:"That are connected."`
	LagSeconds  *float64 `json:"replication_lag_seconds,omitempty" doc:"Of the replica that is furthest behind; absent if vaultd's login may not see it."`
	Connections int      `json:"connections"`
	InUse       int      `json:"connections_in_use"`
	Most        int      `json:"connections_max"`
}

// KeyInUse is the generation of a purpose that new work uses.
type KeyInUse struct {
	Purpose    string    `json:"purpose"`
	Generation uint32    `json:"generation"`
	Since      time.Time `json:"in_use_since"`
	Seals      uint64    `json:"seals"`
	Older      int       `json:"older" doc:"Older generations that still exist."`
}

// Certificate is a listener's, as it is in use.
type Certificate struct {
	Listener  string    `json:"listener"`
	Subject   string    `json:"subject"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Ends      bool      `json:"ends_soon" doc:"Its end is near, or past."`
	Problem   string    `json:"problem,omitempty" doc:"Why what the files hold now is not in use."`
	Clients   bool      `json:"client_certificates" doc:"Whether clients must show a certificate."`
}
