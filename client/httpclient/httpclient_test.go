package httpclient_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
)

func TestAddresses(t *testing.T) {
	for _, good := range []string{
		"https://vault.example", "https://vault.example:8443/", "https://app.example/a/b/", "HTTPS://vault.example",
		"http://localhost:8080", "http://127.0.0.1", "http://127.9.9.9:1", "http://[::1]:8080/x",
	} {
		if _, err := httpclient.New(httpclient.Config{BaseURL: good}); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", "vault.example", "//vault.example", "ftp://vault.example", "https://", "https:vault.example", "https:///path",
		"http://vault.example", "http://localhost.example", "http://10.0.0.1", "http://127.0.0.1.example",
		"https://user:secret@vault.example", "https://vault.example?x=1", "https://vault.example?", "https://vault.example#f", "https://vault.example:port", "\x00",
	} {
		_, err := httpclient.New(httpclient.Config{BaseURL: bad})
		if err == nil {
			t.Errorf("%q: accepted", bad)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := httpclient.New(httpclient.Config{BaseURL: "http://vault.example", AllowPlainHTTP: true}); err != nil {
		t.Errorf("plain http, allowed: %v", err)
	}
}

func serve(t *testing.T, h http.HandlerFunc) (*httptest.Server, *httpclient.Transport) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	transport, err := httpclient.New(httpclient.Config{BaseURL: server.URL + "/prefix/"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(transport.CloseIdleConnections)
	return server, transport
}

func TestRequestGoesOutAsItIs(t *testing.T) {
	var path, method, body, kind, connection string
	var connections = map[string]bool{}
	_, transport := serve(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		path, method, body, kind = r.RequestURI, r.Method, string(b), r.Header.Get("Content-Type")
		connection = r.RemoteAddr
		connections[connection] = true
		w.Header().Add("X-Twice", "first")
		w.Header().Add("X-Twice", "second")
		w.WriteHeader(418)
		_, _ = io.WriteString(w, "tea")
	})
	for range 3 {
		answer, err := transport.RoundTrip(t.Context(), &client.Request{
			Method: "DELETE", Path: "/v1/users/a%2Fb%252F%2E%2E/backup-key?generation=00&x=1",
			Header: map[string]string{"content-type": "application/json"}, Body: []byte("{}"),
		})
		if err != nil {
			t.Fatal(err)
		}
		if path != "/prefix/v1/users/a%2Fb%252F%2E%2E/backup-key?generation=00&x=1" || method != "DELETE" || body != "{}" || kind != "application/json" {
			t.Errorf("arrived as %s %s %q %q", method, path, body, kind)
		}
		if answer.Status != 418 || string(answer.Body) != "tea" || answer.Header["x-twice"] != "first" {
			t.Errorf("answered %+v", answer)
		}
	}
	if len(connections) != 1 {
		t.Errorf("%d connections for three requests", len(connections))
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	requests := 0
	_, transport := serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests++
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	})
	answer, err := transport.RoundTrip(t.Context(), &client.Request{Method: "POST", Path: "/v1/x", Body: []byte("secret")})
	if err != nil || answer.Status != http.StatusTemporaryRedirect || requests != 1 {
		t.Errorf("%d requests, %+v, %v", requests, answer, err)
	}
}

func TestAnswerIsBounded(t *testing.T) {
	size, compressed := 0, false
	_, transport := serve(t, func(w http.ResponseWriter, r *http.Request) {
		compressed = r.Header.Get("Accept-Encoding") != ""
		_, _ = w.Write(make([]byte, size))
	})
	for _, test := range []struct {
		size int
		good bool
	}{{client.MaxResponseBytes, true}, {client.MaxResponseBytes + 1, false}, {10 << 20, false}} {
		size = test.size
		answer, err := transport.RoundTrip(t.Context(), &client.Request{Method: "GET", Path: "/v1/vault"})
		if (err == nil) != test.good || test.good && len(answer.Body) != size {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if compressed {
		t.Error("asked for a compressed answer")
	}
}

func TestBrokenAnswers(t *testing.T) {
	for name, text := range map[string]string{
		"cut off in the body":   "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
		"cut off in the header": "HTTP/1.1 200 OK\r\nContent-",
		"not HTTP":              "SSH-2.0-OpenSSH_9.2\r\n",
		"endless header":        "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
		"nothing":               "",
	} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Read(make([]byte, 4096))
				_, _ = io.WriteString(conn, text)
				_ = conn.Close()
			}
		}()
		transport, err := httpclient.New(httpclient.Config{BaseURL: "http://" + listener.Addr().String()})
		if err != nil {
			t.Fatal(err)
		}
		_, err = transport.RoundTrip(t.Context(), &client.Request{Method: "GET", Path: "/v1/users/alice%40example/backup-key"})
		if err == nil {
			t.Errorf("%s: no error", name)
		} else if strings.Contains(err.Error(), "alice") {
			t.Errorf("%s: the error names the user: %v", name, err)
		}
		transport.CloseIdleConnections()
		_ = listener.Close()
	}
}

func TestCertificateIsChecked(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer server.Close()
	server.Config.ErrorLog = nil
	request := &client.Request{Method: "GET", Path: "/v1/vault"}
	stranger, err := httpclient.New(httpclient.Config{BaseURL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	var unknown *tls.CertificateVerificationError
	if _, err := stranger.RoundTrip(t.Context(), request); !errors.As(err, &unknown) {
		t.Errorf("a certificate by nobody: %v", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	friend, err := httpclient.New(httpclient.Config{BaseURL: server.URL, TLS: &tls.Config{RootCAs: roots}})
	if err != nil {
		t.Fatal(err)
	}
	defer friend.CloseIdleConnections()
	if answer, err := friend.RoundTrip(t.Context(), request); err != nil || answer.Status != 200 {
		t.Errorf("with its root: %v", err)
	}
}

func TestContextEndsTheRequest(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	hang := make(chan struct{})
	_, transport := serve(t, func(http.ResponseWriter, *http.Request) {
		cancel()
		<-hang
	})
	defer close(hang)
	if _, err := transport.RoundTrip(ctx, &client.Request{Method: "GET", Path: "/v1/vault"}); !errors.Is(err, context.Canceled) {
		t.Errorf("got: %v", err)
	}
	if _, err := transport.RoundTrip(t.Context(), &client.Request{Method: "bad method", Path: "/"}); err == nil {
		t.Error("a request that cannot be made was sent")
	}
}
