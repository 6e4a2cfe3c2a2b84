package httpapi

import (
	"net/http"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// NewAuditAdmin makes the handler of the admin listener for the audit log: GET /audit/ says how far it is sealed and
// signed, and what is wrong with it, as the instance that answers knows it. It never asks store or token.
func NewAuditAdmin(sequencer *vault.Sequencer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /audit/{$}", func(w http.ResponseWriter, _ *http.Request) {
		writeAdmin(w, http.StatusOK, WireAuditStatus(sequencer.Status()))
	})
	return mux
}

// WireAuditStatus is the status as the admin listener says it.
func WireAuditStatus(s vault.AuditStatus) *api.AuditStatus {
	return &api.AuditStatus{
		At: timeOrNil(s.At), Sealing: s.Sealing, Sealed: s.Sequence, Signed: s.Signed, SignedAt: timeOrNil(s.SignedAt),
		Waiting: s.Waiting, LagSeconds: s.Lag.Seconds(), Fault: s.Fault,
	}
}
