package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

const (
	root      = "../../"
	guideFile = root + "docs/integration.md"
)

func file(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// squeeze makes white space of any kind one space.
func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

// Each snippet of the guide is part of the file that it names, which a test runs.
func TestGuideSnippets(t *testing.T) {
	t.Parallel()
	guide := file(t, guideFile)
	snippet := regexp.MustCompile("(?s)<!-- from (\\S+) -->\n```\\w+\n(.*?)\n```")
	found := snippet.FindAllStringSubmatch(guide, -1)
	if all := strings.Count(guide, "\n```") / 2; len(found) != all || all < 8 {
		t.Errorf("%d snippets of %d say where they are from", len(found), all)
	}
	for _, m := range found {
		source := squeeze(file(t, root+m[1]))
		if strings.HasPrefix(m[1], "scripts/") { // line by line: between them stands what the demo needs besides
			for line := range strings.Lines(m[2]) {
				if !strings.Contains(source, squeeze(line)) {
					t.Errorf("%s has no line %q", m[1], line)
				}
			}
			continue
		}
		if !strings.Contains(source, squeeze(m[2])) {
			t.Errorf("this is not in %s:\n%s", m[1], m[2])
		}
	}
}

// The guide's table has a row for each code, in the words that the page uses.
func TestGuideErrors(t *testing.T) {
	t.Parallel()
	guide, types := file(t, guideFile), file(t, root+"client/js/bkv.d.ts")
	words := squeeze(file(t, "page/js/words.js") + file(t, "page/js/screens.js"))
	_, union, _ := strings.Cut(types, "export type Code =")
	union, _, _ = strings.Cut(union, "\n\n")
	codes := regexp.MustCompile(`\| "([a-z-]+)"`).FindAllStringSubmatch(union, -1)
	if len(codes) < 20 {
		t.Fatalf("only %d codes are declared", len(codes))
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| (`[^|]+) \\| ([^|]+) \\| [^|]+ \\|$").FindAllStringSubmatch(guide, -1) {
		for _, code := range regexp.MustCompile("`([a-z-]+)`").FindAllStringSubmatch(m[1], -1) {
			rows[code[1]] = m[2]
		}
	}
	for _, m := range codes {
		sentence, ok := rows[m[1]]
		if !ok {
			t.Errorf("the guide's table lacks %s", m[1])
			continue
		}
		delete(rows, m[1])
		if strings.HasPrefix(sentence, "a screen: ") {
			continue
		}
		for part := range strings.SplitSeq(sentence, "…") {
			if part = strings.TrimSpace(part); len(part) > 1 && !strings.Contains(words, part) {
				t.Errorf("%s: the page does not say %q", m[1], part)
			}
		}
	}
	if len(rows) > 0 {
		t.Errorf("the guide has rows for codes that there are not: %v", rows)
	}
}
