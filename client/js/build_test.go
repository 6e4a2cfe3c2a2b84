package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A page on a telephone has to load it.
const (
	maxWasmBytes       = 8 << 20
	maxCompressedBytes = 5 << 19 // 2.5 MiB
)

func TestBuild(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if out, err := exec.Command("../../scripts/build-sdk", dir).CombinedOutput(); err != nil {
		t.Fatalf("scripts/build-sdk: %v\n%s", err, out)
	}
	for name, limit := range map[string]int64{
		"bkv.wasm": maxWasmBytes, "bkv.wasm.gz": maxCompressedBytes,
		"bkv.js": 64 << 10, "bkv.d.ts": 64 << 10, "worker.js": 64 << 10, "wasm_exec.js": 64 << 10,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes, of at most %d", name, info.Size(), limit)
		if info.Size() == 0 || info.Size() > limit {
			t.Errorf("%s has %d bytes, and should have at most %d", name, info.Size(), limit)
		}
	}
	wasm, err := os.ReadFile(filepath.Join(dir, "bkv.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	if wd, err := os.Getwd(); err != nil || bytes.Contains(wasm, []byte(wd)) {
		t.Errorf("the file names this machine's directories (%v)", err)
	}
}

// Nothing that is built for the browser imports net/http, which doubles the size.
func TestNoNetHTTP(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("go", "list", "-deps", ".")
	cmd.Env = append(os.Environ(), "GOOS=js", "GOARCH=wasm", "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, "syscall/js") || !slices.Contains(deps, "github.com/backup-key-vault/bkv/client") {
		t.Fatalf("these are not the program's packages: %v", deps)
	}
	for _, forbidden := range []string{"net/http", "crypto/tls", "net"} {
		if slices.Contains(deps, forbidden) {
			t.Errorf("%s is part of it", forbidden)
		}
	}
}

// The codes that the program gives, those that bkv.js gives, and those that bkv.d.ts
// declares are the same, and each method is declared.
func TestDeclarations(t *testing.T) {
	t.Parallel()
	read := func(name string) string {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	types, script, source := read("bkv.d.ts"), read("bkv.js"), read("failure.go")

	var declared []string
	_, union, _ := strings.Cut(types, "export type Code =")
	union, _, _ = strings.Cut(union, "\n\n")
	for _, m := range regexp.MustCompile(`\| "([a-z-]+)"`).FindAllStringSubmatch(union, -1) {
		declared = append(declared, m[1])
	}
	var given []string
	for _, m := range regexp.MustCompile(`, "([a-z-]+)"\}`).FindAllStringSubmatch(source, -1) {
		given = append(given, m[1])
	}
	for _, m := range regexp.MustCompile(`(?:f\.Code.*?= |Code: )"([a-z-]+)"`).FindAllStringSubmatch(source, -1) {
		given = append(given, m[1])
	}
	for _, m := range regexp.MustCompile(`code: "([a-z-]+)"`).FindAllStringSubmatch(script, -1) {
		given = append(given, m[1])
	}
	slices.Sort(declared)
	slices.Sort(given)
	if given = slices.Compact(given); !slices.Equal(declared, given) {
		t.Errorf("declared: %q\n   given: %q", declared, given)
	}

	methods := regexp.MustCompile(`(?m)^  (?:static |async )*(\w+)\(`)
	class := regexp.MustCompile(`(?ms)^export class (\w+).*?^}`)
	bodies := map[string]string{}
	for _, m := range class.FindAllStringSubmatch(types, -1) {
		bodies[m[1]] = m[0]
	}
	for _, m := range class.FindAllStringSubmatch(script, -1) {
		for _, method := range methods.FindAllStringSubmatch(m[0], -1) {
			switch name := method[1]; {
			case slices.Contains([]string{"call", "constructor", "toString", "toJSON"}, name): // of no interest to apps
			case !strings.Contains(bodies[m[1]], "  "+name+"(") && !strings.Contains(bodies[m[1]], "static "+name+"("):
				t.Errorf("%s.%s is not declared", m[1], name)
			}
		}
	}
}
