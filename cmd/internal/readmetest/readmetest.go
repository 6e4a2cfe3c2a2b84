// Package readmetest holds the README to what the programs themselves say. Only tests import it.
package readmetest

import (
	"os"
	"strings"
	"testing"
)

const readme = "../../README.md" // from the folder of a command

// Has fails unless the README has this text between the lines "<!-- name -->" and "<!-- end of name -->";
// with update it puts the text there.
func Has(t testing.TB, name, text string, update bool) {
	t.Helper()
	begin, end := "<!-- "+name+" -->\n", "<!-- end of "+name+" -->"
	before, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(before), begin)
	_, tail, foundEnd := strings.Cut(rest, end)
	if !found || !foundEnd {
		t.Fatalf("%s lacks the lines %s and %s", readme, strings.TrimSpace(begin), end)
	}
	want := head + begin + text + end + tail
	if want == string(before) {
		return
	}
	if !update {
		t.Fatalf("%s has other %s than the program; write them anew with: go test ./cmd/... -update", readme, name)
	}
	if err := os.WriteFile(readme, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}
