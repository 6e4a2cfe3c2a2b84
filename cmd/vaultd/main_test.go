package main

import (
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/cmd/internal/commandline"
	"github.com/backup-key-vault/bkv/cmd/internal/readmetest"
)

var update = flag.Bool("update", false, "write the README's table of settings anew")

// The README's table of settings is made from config, as the flags and the help are.
func TestReadmeListsTheSettings(t *testing.T) {
	table, err := commandline.Table(&config{})
	if err != nil {
		t.Fatal(err)
	}
	readmetest.Has(t, "vaultd settings", table, *update)
}

// A request that begins when the stop has begun is not carried out.
func TestNothingBeginsWhileStopping(t *testing.T) {
	carriedOut := 0
	stopping, stop := context.WithCancel(t.Context())
	handler := until(stopping, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { carriedOut++ }))
	answer := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest("POST", "/", nil))
		return w
	}
	if w := answer(); w.Code != http.StatusOK || carriedOut != 1 {
		t.Fatalf("before the stop: status %d, carried out %d times", w.Code, carriedOut)
	}
	stop()
	w := answer()
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || carriedOut != 1 {
		t.Errorf("during the stop: status %d, %v, carried out %d times", w.Code, w.Header(), carriedOut)
	}
	var p api.Problem
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Status != w.Code || p.Type == "" || p.Title == "" {
		t.Errorf("not a problem: %s", w.Body)
	}
}
