package pkcs11util

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
)

// PIN opens a token. However it is printed, logged or marshalled, it reads "[redacted]".
type PIN string

const (
	redacted = "[redacted]"
	// maxPINBytes is far above what tokens accept (SoftHSM: 255); it keeps a wrong path from being
	// read whole.
	maxPINBytes = 1024
)

func (PIN) String() string               { return redacted }
func (PIN) GoString() string             { return redacted }
func (PIN) Format(w fmt.State, _ rune)   { _, _ = io.WriteString(w, redacted) }
func (PIN) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (PIN) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// ReadPIN reads a PIN from a file, without the newline at its end. An empty PIN is refused.
func ReadPIN(path string) (PIN, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("PIN file: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPINBytes+1))
	if err != nil {
		return "", fmt.Errorf("PIN file: %w", err)
	}
	defer clear(b)
	if len(b) > maxPINBytes {
		return "", fmt.Errorf("PIN file %s holds more than %d bytes", path, maxPINBytes)
	}
	pin := bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(pin) == 0 {
		return "", errors.New("PIN file " + path + " is empty")
	}
	return PIN(pin), nil
}
