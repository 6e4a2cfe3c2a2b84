package main

import (
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/cmd/internal/commandline"
)

var update = flag.Bool("update", false, "write the README's table of settings anew")

// The README's table of settings is made from config, as the flags and the help are.
func TestReadmeListsTheSettings(t *testing.T) {
	const readme, begin, end = "../../README.md", "<!-- vaultd settings -->\n", "<!-- end of vaultd settings -->"
	table, err := commandline.Table(&config{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(text), begin)
	_, tail, foundEnd := strings.Cut(rest, end)
	if !found || !foundEnd {
		t.Fatalf("%s lacks the lines %s and %s", readme, strings.TrimSpace(begin), end)
	}
	want := head + begin + table + end + tail
	if want == string(text) {
		return
	}
	if !*update {
		t.Fatalf("%s has another table of settings than config; write it anew with: go test ./cmd/... -update", readme)
	}
	if err := os.WriteFile(readme, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
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
