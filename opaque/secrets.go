package opaque

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// SessionKey is the secret that both ends share after a login (RFC 9807
// section 6.4.2.2). It prints as "[redacted]".
type SessionKey [32]byte

// ExportKey is known to the client alone, and is the same at registration and
// at every login with the same password (RFC 9807 section 10.4). It prints as
// "[redacted]".
type ExportKey [32]byte

// ClientMAC is the KE3 that the server expects (expected_client_mac, RFC 9807
// section 6.4.4). Until the client has sent it, it is a secret: whoever knows
// it passes for a client that knew the password. It prints as "[redacted]".
type ClientMAC [32]byte

// redacted stands in for a secret wherever one is printed.
const redacted = "[redacted]"

var errMarshalled = errors.New("a secret is not to be marshalled")

// Each secret type hides itself from fmt under every verb (Format wins over
// String and GoString), from slog, and from a plain call of String. It refuses
// to be marshalled as text, hence as JSON: a struct that holds it cannot leak
// it through slog's JSON handler or an API, and code that does need its bytes
// says so by slicing it.

func (SessionKey) String() string               { return redacted }
func (SessionKey) Format(f fmt.State, _ rune)   { writeRedacted(f) }
func (SessionKey) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (SessionKey) MarshalText() ([]byte, error) { return nil, errMarshalled }

func (ExportKey) String() string               { return redacted }
func (ExportKey) Format(f fmt.State, _ rune)   { writeRedacted(f) }
func (ExportKey) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (ExportKey) MarshalText() ([]byte, error) { return nil, errMarshalled }

func (ClientMAC) String() string               { return redacted }
func (ClientMAC) Format(f fmt.State, _ rune)   { writeRedacted(f) }
func (ClientMAC) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (ClientMAC) MarshalText() ([]byte, error) { return nil, errMarshalled }

func (Scalar) String() string               { return redacted }
func (Scalar) Format(f fmt.State, _ rune)   { writeRedacted(f) }
func (Scalar) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (Scalar) MarshalText() ([]byte, error) { return nil, errMarshalled }

// A record is not for logs either: its masking key undoes the masking of
// every KE2 made from it.

func (RegistrationRecord) String() string               { return redacted }
func (RegistrationRecord) Format(f fmt.State, _ rune)   { writeRedacted(f) }
func (RegistrationRecord) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (RegistrationRecord) MarshalText() ([]byte, error) { return nil, errMarshalled }

// The client's states hold the password in unexported fields, which fmt would
// print without asking their types. Value receivers cover pointers too.

func (ClientRegistration) String() string             { return redacted }
func (ClientRegistration) Format(f fmt.State, _ rune) { writeRedacted(f) }
func (ClientRegistration) LogValue() slog.Value       { return slog.StringValue(redacted) }

func (ClientLogin) String() string             { return redacted }
func (ClientLogin) Format(f fmt.State, _ rune) { writeRedacted(f) }
func (ClientLogin) LogValue() slog.Value       { return slog.StringValue(redacted) }

func writeRedacted(w io.Writer) { _, _ = io.WriteString(w, redacted) }
