package pkcs11util

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// scheduleRecycling says when the module is next to be recycled. The caller holds mu, or is the only one.
func (k *Keyset) scheduleRecycling() {
	after := int64(k.config.RecycleAfter)
	if after == 0 && strings.HasPrefix(k.model, "SoftHSM ") {
		after = recycleSoftHSMAfter
	}
	k.recycleAt.Store(max(after, 0))
}

// renew replaces the connection because the module has to be recycled, or has been
// initialised anew by somebody else: the token is not at fault, so that calls wait for
// the new connection. It is made once, however many ask for it. The caller is counted in k.calls.
func (k *Keyset) renew(c *connection) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.isCurrent(c) {
		return
	}
	c = k.connection
	k.connection, k.renewed = nil, make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	k.stop = cancel
	k.calls.Add(1)
	go func() {
		defer k.calls.Done()
		defer cancel()
		k.recycle(ctx, c)
	}()
}

// recycle finalises and initialises the module, unless somebody has done so since c was
// made, and connects again. A module that is too busy keeps c for some time more. If there is no new connection,
// the token is lost after all, and recovered.
func (k *Keyset) recycle(ctx context.Context, c *connection) {
	objects := k.module.SessionObjects.Load()
	err := k.module.Recycle(ctx, c.incarnation)
	if errors.Is(err, module.ErrBusy) && k.keep(c) {
		k.log.Info("PKCS#11 module not recycled", "error", err)
		return
	}
	close(c.gone)
	var next *connection
	if err != nil {
		k.discard(c)
	} else {
		next, err = k.connect(ctx)
	}
	if err == nil {
		k.log.Info("PKCS#11 module recycled", "session_objects", objects)
	} else if ctx.Err() == nil {
		err = fmt.Errorf("initialising the PKCS#11 module anew: %w", err)
		k.log.Error("token lost", "error", err)
	}
	if !k.settle(next, err) {
		k.recover(ctx, nil)
	}
}

// keep puts c back to use, unless it has lost a session meanwhile, until a tenth as many
// objects more have been made.
func (k *Keyset) keep(c *connection) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || c.spoiled.Load() {
		return false
	}
	k.connection = c
	k.recycleAt.Store(k.module.SessionObjects.Load() + k.recycleAt.Load()/10 + 1)
	k.release()
	return true
}
