package main

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"
)

// dialFrom connects from an address of loopback.
func dialFrom(t *testing.T, from, to string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
	c, err := d.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// served reports whether a request on a connection is answered.
func served(c net.Conn) bool {
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return false
	}
	answer := make([]byte, len("HTTP/1.1 204"))
	_, err := io.ReadFull(c, answer)
	return err == nil && string(answer) == "HTTP/1.1 204"
}

// One address cannot take more than its share, all together not more than there is, and places come back.
func TestConnectionsAreBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := bound(l, 5, 3)
	server := newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }), nil, slog.New(slog.DiscardHandler))
	go func() { _ = server.Serve(b) }()
	defer server.Close()
	at := l.Addr().String()

	var greedy []net.Conn
	for range 3 {
		c := dialFrom(t, "127.0.0.2", at)
		if !served(c) {
			t.Fatal("a connection within the limit is not served")
		}
		greedy = append(greedy, c)
	}
	for range 20 {
		if served(dialFrom(t, "127.0.0.2", at)) {
			t.Fatal("an address has more than its share")
		}
	}
	for range 2 {
		if !served(dialFrom(t, "127.0.0.1", at)) {
			t.Fatal("another address is not served")
		}
	}
	if served(dialFrom(t, "127.0.0.3", at)) {
		t.Fatal("there are more connections than there may be")
	}
	b.mu.Lock()
	if b.open != 5 || b.refused[byAddress] != 20 || b.refused[byTotal] != 1 {
		t.Errorf("%d are open, %v were refused", b.open, b.refused)
	}
	b.mu.Unlock()
	greedy[0].Close()
	for began := time.Now(); !served(dialFrom(t, "127.0.0.3", at)); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatal("the place of a closed connection does not come back")
		}
	}
}

func TestAddressOf(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.7:1234": "192.0.2.7/32", "[::ffff:192.0.2.7]:1": "192.0.2.7/32",
		"[2001:db8:1:2:3::4]:5": "2001:db8:1:2::/64", "[fe80::1%lo]:5": "fe80::/64", "@": "invalid Prefix",
	} {
		if got := addressOf(remoteConn{remote: remote}).String(); got != want {
			t.Errorf("%s counts as %s, want %s", remote, got, want)
		}
	}
}

type remoteConn struct {
	net.Conn
	remote string
}

func (c remoteConn) RemoteAddr() net.Addr { return named(c.remote) }

type named string

func (named) Network() string  { return "tcp" }
func (n named) String() string { return string(n) }
