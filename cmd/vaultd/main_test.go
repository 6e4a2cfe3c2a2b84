package main

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
)

var update = flag.Bool("update", false, "write the README's table of settings anew")

// The README's table of settings is made from config, as the flags and the help are.
func TestReadmeListsTheSettings(t *testing.T) {
	const readme, begin, end = "../../README.md", "<!-- vaultd settings -->\n", "<!-- end of vaultd settings -->"
	table, err := settings.Table(&config{})
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
