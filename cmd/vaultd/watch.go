package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/backup-key-vault/bkv/vault"
)

const (
	// watchEvery is how often the database is asked for what the metrics say of it.
	watchEvery = 15 * time.Second
	// watchTimeout bounds one question.
	watchTimeout = 10 * time.Second
)

// watcher keeps what the database says of keys, so that a scrape waits for nobody.
type watcher struct {
	overview func(context.Context) (*vault.KeyOverview, error)
	log      *slog.Logger

	mu   sync.Mutex // guarantees that all below are of one moment
	seen *vault.KeyOverview
	at   time.Time
	err  error // of the latest question; seen and at are from the last one that was answered
}

// run asks now and then until ctx is over.
func (w *watcher) run(ctx context.Context) {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for {
		w.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// look asks now.
func (w *watcher) look(ctx context.Context) {
	asking, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	seen, err := w.overview(asking)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		w.log.WarnContext(ctx, "reading the keys for the metrics", "error", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err = err; err == nil {
		w.seen, w.at = seen, time.Now()
	}
}

func (w *watcher) last() (*vault.KeyOverview, time.Time, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen, w.at, w.err
}
