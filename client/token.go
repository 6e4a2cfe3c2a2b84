package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// tokenCache keeps the user's token until the vault refuses it.
type tokenCache struct {
	source func(context.Context) (string, error)
	mu     sync.Mutex // never held while source runs
	token  string
}

// get returns a token other than the one that was refused ("": none was).
func (t *tokenCache) get(ctx context.Context, refused string) (string, error) {
	t.mu.Lock()
	token := t.token
	t.mu.Unlock()
	if token != "" && token != refused {
		return token, nil
	}
	token, err := t.source(ctx)
	if err != nil {
		return "", fmt.Errorf("getting a token: %w", err)
	}
	if token == "" {
		return "", errors.New("getting a token: it is empty")
	}
	t.mu.Lock()
	t.token = token
	t.mu.Unlock()
	return token, nil
}
