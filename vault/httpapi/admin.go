package httpapi

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
)

// Check tells whether something that the service needs is there.
type Check struct {
	Name string // as /readyz says it
	Run  func(ctx context.Context) error
}

// checkTimeout bounds each check of one question to /readyz.
const checkTimeout = 3 * time.Second

// NewAdmin makes the handler of the admin listener, which is never public.
//
//	GET /healthz  200: the process lives
//	GET /readyz   200 if every check passes, else 503; either way which ones fail
//
// The text of a check's error goes to the log alone.
func NewAdmin(log *slog.Logger, checks ...Check) (http.Handler, error) {
	if log == nil {
		return nil, errors.New("the admin interface needs a log")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeAdmin(w, http.StatusOK, struct {
			Alive bool `json:"alive"`
		}{true})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		status, answer := http.StatusOK, readiness{Ready: true, Failing: []string{}}
		for i, err := range RunChecks(r.Context(), checks) {
			if err != nil {
				log.WarnContext(r.Context(), "not ready", "check", checks[i].Name, "error", err)
				status, answer.Ready = http.StatusServiceUnavailable, false
				answer.Failing = append(answer.Failing, checks[i].Name)
			}
		}
		writeAdmin(w, status, answer)
	})
	return mux, nil
}

// readiness is the answer of /readyz.
type readiness struct {
	Ready   bool     `json:"ready"`
	Failing []string `json:"failing"`
}

// RunChecks runs all checks at once and returns their errors, in their order. One
// that does not come back in time has failed, whether it honours its context or not.
func RunChecks(ctx context.Context, checks []Check) []error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	running := make([]chan error, len(checks))
	for i, c := range checks {
		running[i] = make(chan error, 1)
		go func() { running[i] <- c.Run(ctx) }()
	}
	failures := make([]error, len(checks))
	for i := range running {
		select {
		case failures[i] = <-running[i]:
		case <-ctx.Done():
			failures[i] = ctx.Err()
		}
	}
	return failures
}

func writeAdmin(w http.ResponseWriter, status int, answer any) {
	body, err := json.Marshal(answer)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(body)
}
