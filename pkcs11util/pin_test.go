package pkcs11util_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

func TestPINNeverShows(t *testing.T) {
	const secret = "987654"
	pin := pkcs11util.PIN(secret)
	cfg := pkcs11util.Config{PIN: pin}
	marshalled, err := json.Marshal(cfg.PIN)
	if err != nil {
		t.Fatal(err)
	}
	var logged strings.Builder
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "pin", pin, "config", fmt.Sprint(cfg))
	shown := []string{pin.String(), string(marshalled), logged.String()}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T %v"} {
		shown = append(shown, fmt.Sprintf(verb, pin), fmt.Sprintf(verb, cfg), fmt.Sprintf(verb, &cfg))
	}
	for _, s := range shown {
		if strings.Contains(s, secret) || strings.Contains(s, fmt.Sprintf("%x", secret)) {
			t.Errorf("shows the PIN: %s", s)
		}
	}
}

func TestReadPIN(t *testing.T) {
	for _, c := range []struct {
		name, content string
		want          pkcs11util.PIN
		ok            bool
	}{
		{"plain", "1234", "1234", true},
		{"newline", "1234\n", "1234", true},
		{"crlf", "1234\r\n", "1234", true},
		{"one newline only", "1234\n\n", "1234\n", true},
		{"spaces belong to it", " 12 34 ", " 12 34 ", true},
		{"empty", "", "", false},
		{"only a newline", "\n", "", false},
		{"huge", strings.Repeat("1", 5000), "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pin")
			if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := pkcs11util.ReadPIN(path)
			if (err == nil) != c.ok || got != c.want {
				t.Errorf("got %d bytes and error %v, want %d bytes, ok %v", len(got), err, len(c.want), c.ok)
			}
		})
	}
	if _, err := pkcs11util.ReadPIN(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("read a PIN from a file that is not there")
	}
}
