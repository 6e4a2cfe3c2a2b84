package opaque_test

import (
	"bytes"
	"encoding"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/opaque"
)

// A secret of 0x5a bytes shows in any output as one of these.
var traces = []string{"5a5a", "5A5A", "ZZZ", "90 90", "90, 90", "0x5a", "132", "1011010", "Wlpa"}

func TestSecretsDoNotPrint(t *testing.T) {
	password := bytes.Repeat([]byte{0x5a}, 40)
	blindBytes := bytes.Repeat([]byte{0x5a}, 96)
	_, registration, err := opaque.StartRegistration(bytes.NewReader(blindBytes), password)
	if err != nil {
		t.Fatal(err)
	}
	_, login, err := opaque.StartLogin(bytes.NewReader(blindBytes), password)
	if err != nil {
		t.Fatal(err)
	}
	var (
		sessionKey opaque.SessionKey
		exportKey  opaque.ExportKey
		clientMAC  opaque.ClientMAC
		scalar     opaque.Scalar
		record     opaque.RegistrationRecord
	)
	for _, b := range [][]byte{sessionKey[:], exportKey[:], clientMAC[:], scalar[:], record[:]} {
		for i := range b {
			b[i] = 0x5a
		}
	}
	// The traces do show where nothing hides them.
	if s := fmt.Sprintf("%x", [32]byte(sessionKey)); !strings.Contains(s, traces[0]) {
		t.Fatalf("an open value prints as %s", s)
	}
	if s := fmt.Sprintf("%x", sessionKey[:]); s != hex.EncodeToString(sessionKey[:]) {
		t.Fatal("the bytes themselves are not for hiding")
	}

	for _, v := range []slog.LogValuer{sessionKey, exportKey, clientMAC, scalar, record, registration, login} {
		if got := logged(slog.NewJSONHandler, v); !strings.Contains(got, `"k":"[redacted]"`) {
			t.Errorf("slog of %T: %s", v, got)
		}
	}
	for _, v := range []encoding.TextMarshaler{sessionKey, exportKey, clientMAC, scalar, record} {
		if got, err := json.Marshal(v); err == nil {
			t.Errorf("%T marshals as %s", v, got)
		}
	}
	for _, v := range []any{
		sessionKey, exportKey, clientMAC, scalar, record,
		&sessionKey, &exportKey, &clientMAC, &scalar, &record,
		registration, *registration, login, *login,
		opaque.ExpectedFinish{ClientMAC: clientMAC, SessionKey: sessionKey},
		opaque.Registration{Record: record, ExportKey: exportKey},
		opaque.Login{SessionKey: sessionKey, ExportKey: exportKey},
		[]opaque.Scalar{scalar}, map[string]opaque.ExportKey{"k": exportKey},
	} {
		t.Run(fmt.Sprintf("%T", v), func(t *testing.T) {
			var out []string
			for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%#x", "%d", "%b", "%o", "%c", "%U"} {
				out = append(out, fmt.Sprintf(format, v))
			}
			out = append(out, logged(slog.NewTextHandler, v))
			if s, ok := v.(fmt.Stringer); ok {
				out = append(out, s.String())
			}
			for _, s := range out {
				if !strings.Contains(s, "redacted") {
					t.Errorf("not redacted: %s", s)
				}
				for _, trace := range traces {
					if strings.Contains(s, trace) {
						t.Errorf("%q shows in %s", trace, s)
					}
				}
			}
			// A struct with secrets in it is refused, not printed.
			logged := logged(slog.NewJSONHandler, v)
			if !strings.Contains(logged, "redacted") && !strings.Contains(logged, "not to be marshalled") {
				t.Errorf("slog in JSON: %s", logged)
			}
		})
	}
}

// logged is the line that slog writes for v, without the time, whose digits
// could be anything.
func logged[H slog.Handler](handler func(io.Writer, *slog.HandlerOptions) H, v any) string {
	var b bytes.Buffer
	slog.New(handler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})).Info("m", "k", v)
	return b.String()
}
