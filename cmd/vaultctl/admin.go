package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

// adminListener is a running vaultd, as operators reach it.
type adminListener struct {
	AdminURL  string `name:"admin-url" default:"http://127.0.0.1:8421" env:"BKV_ADMIN_URL" placeholder:"URL" help:"vaultd's admin listener; https if it has TLS."`
	AdminCA   string `name:"admin-ca" env:"BKV_ADMIN_CA" placeholder:"FILE" help:"PEM file with the authorities that sign the admin listener's certificate. None: those of the system."`
	AdminCert string `name:"admin-cert" env:"BKV_ADMIN_CERT" placeholder:"FILE" help:"PEM file with the client certificate to show, if vaultd has --admin-tls-client-ca. vaultd writes down its subject as who did it."`
	AdminKey  string `name:"admin-key" env:"BKV_ADMIN_KEY" placeholder:"FILE" help:"PEM file with its private key."`
}

// adminTimeout bounds one request: counting what depends on a key reads an index, and a token may take a while to make a key.
const adminTimeout = time.Minute

// client is the way to vaultd.
func (a *adminListener) client() (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS13} // as vaultd demands
	if a.AdminCA != "" {
		pem, err := os.ReadFile(a.AdminCA)
		if err != nil {
			return nil, fmt.Errorf("--admin-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--admin-ca: %s has no certificate", a.AdminCA)
		}
	}
	if (a.AdminCert == "") != (a.AdminKey == "") {
		return nil, errors.New("--admin-cert and --admin-key: want both or neither")
	}
	if a.AdminCert != "" {
		pair, err := tls.LoadX509KeyPair(a.AdminCert, a.AdminKey)
		if err != nil {
			return nil, fmt.Errorf("--admin-cert: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: config, DisableKeepAlives: true},
		// What vaultd answers is final: a redirection would send the operator's wish elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// ask sends a request about keys and reads its answer into out. What vaultd refuses is the error.
func (a *adminListener) ask(ctx context.Context, method string, out any, path ...string) error {
	return a.request(ctx, method, out, append([]string{"keys/"}, path...)...)
}

// request sends a request and reads its answer into out.
func (a *adminListener) request(ctx context.Context, method string, out any, path ...string) error {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	response, body, err := a.exchange(ctx, method, path...)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		var refusal struct {
			Error string `json:"error"`
		}
		if json.Unmarshal(body, &refusal) == nil && refusal.Error != "" {
			return errors.New(refusal.Error)
		}
		return unexpected(response)
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("reading vaultd's answer: %w", err)
	}
	return nil
}

// unexpected is the error for an answer that no vaultd gives.
func unexpected(response *http.Response) error {
	target := response.Request.URL
	if target.Scheme == "http" && response.StatusCode == http.StatusBadRequest {
		return fmt.Errorf("%s answers %s: has vaultd's admin listener TLS? then say https in --admin-url", target, response.Status)
	}
	return fmt.Errorf("%s answers %s: is that vaultd's admin listener?", target, response.Status)
}

// exchange sends a request and reads the whole answer, whatever its status.
func (a *adminListener) exchange(ctx context.Context, method string, path ...string) (*http.Response, []byte, error) {
	for i := range path[1:] {
		path[i+1] = url.PathEscape(path[i+1])
	}
	target, err := url.JoinPath(a.AdminURL, path...)
	if err != nil {
		return nil, nil, fmt.Errorf("--admin-url: %w", err)
	}
	client, err := a.client()
	if err != nil {
		return nil, nil, err
	}
	request, err := http.NewRequestWithContext(ctx, method, target, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("--admin-url: %w", err)
	}
	if who := vault.OperatorOf(ctx); who != "" {
		request.Header.Set(api.OperatorHeader, who)
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, nil, fmt.Errorf("asking vaultd, which must be running (see --admin-url): %w", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return nil, nil, fmt.Errorf("reading vaultd's answer: %w", err)
	}
	return response, body, nil
}
