package pkcs11util

import (
	"context"
	"errors"
	"log/slog"
	"testing"
)

// busy is a Keyset whose only session is in use, and which never touches a module.
func busy() *Keyset {
	return &Keyset{
		log:        slog.New(slog.DiscardHandler),
		connection: &connection{idle: make(chan session, 1), gone: make(chan struct{})},
	}
}

func TestWaitingForASessionHonoursTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error)
	k := busy()
	go func() { result <- k.Check(ctx) }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := k.MAC(ctx, 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over before: got %v", err)
	}
}

func TestWaitingForASessionEndsWithTheConnection(t *testing.T) {
	k := busy()
	result := make(chan error)
	go func() { result <- k.Check(context.Background()) }()
	k.mu.Lock()
	c := k.connection
	k.connection, k.down = nil, errors.Join(ErrUnavailable, errors.New("the cause"))
	close(c.gone)
	k.mu.Unlock()
	if err := <-result; !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

func TestParseLabel(t *testing.T) {
	for label, want := range map[string]KeyName{
		"bkv/master/1":                     {Master, 1},
		"bkv/oprf/4294967295":              {OPRF, 4294967295},
		"bkv/identity/12":                  {Identity, 12},
		"":                                 {},
		"bkv":                              {},
		"bkv/":                             {},
		"bkv/other/1":                      {},
		"bkv/tmp/master/1/ab":              {},
		"somebody else's":                  {},
		"xbkv/master/1":                    {},
		"bkv/MASTER/1":                     {},
		TemporaryLabel(KeyName{Master, 1}): {},
	} {
		got, ours, err := parseLabel(label)
		if err != nil || ours != (want != KeyName{}) || got != want {
			t.Errorf("%q: got %v, %v, %v", label, got, ours, err)
		}
		if ours && got.String() != label {
			t.Errorf("%q encodes back to %q", label, got)
		}
	}
	for _, label := range []string{
		"bkv/master", "bkv/master/", "bkv/master/0", "bkv/master/01", "bkv/master/+1", "bkv/master/-1",
		"bkv/master/1/", "bkv/master/1 ", "bkv/master/4294967296", "bkv/master/x", "bkv/master/1\x00",
	} {
		if _, _, err := parseLabel(label); err == nil {
			t.Errorf("%q: accepted", label)
		}
	}
}
