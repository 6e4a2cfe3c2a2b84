package pkcs11util

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// renew replaces the connection because the module has been initialised anew by somebody else: the
// token is not at fault, so that calls wait for the new connection. It is made once, however
// many ask for it. The caller is counted in k.calls.
func (k *Keyset) renew(c *connection) { k.replaceConnection(c, func() {}) }

// recycleSoon is renew for the module's own sake. It does nothing, and is to be called again, while
// keys are made or looked for.
func (k *Keyset) recycleSoon(c *connection) {
	if k.changes.TryLock() {
		k.replaceConnection(c, k.changes.Unlock)
	}
}

// replaceConnection does it, and calls after when no call is made on c any more.
func (k *Keyset) replaceConnection(c *connection, after func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.isCurrent(c) {
		after()
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
		if lost := k.recycle(ctx, c, after); lost {
			k.recover(ctx, nil)
		}
	}()
}

// recycle finalises and initialises the module, unless somebody has done so since c was
// made, and connects again. If the module is too busy, c stays for some time more. If there is no
// new connection, the token is lost after all.
func (k *Keyset) recycle(ctx context.Context, c *connection, after func()) (lost bool) {
	objects := k.module.SessionObjects.Load()
	err := k.module.Recycle(ctx, c.incarnation)
	after()
	if errors.Is(err, module.ErrBusy) && k.keep(c) {
		k.log.Info("PKCS#11 module not recycled", "error", err)
		return false
	}
	close(c.gone)
	var next *connection
	if err != nil {
		k.discard(c)
	} else {
		next, err = k.connect(ctx)
	}
	if err == nil {
		k.counts.recycled.Add(1)
		k.log.Info("PKCS#11 module recycled", "session_objects", objects)
	} else if ctx.Err() == nil {
		err = fmt.Errorf("initialising the PKCS#11 module anew: %w", err)
		k.counts.lost.Add(1)
		k.log.Error("token lost", "error", err)
	}
	return !k.settle(next, err)
}

// keep puts c back to use, unless it has lost a session meanwhile, until a tenth as many
// objects more have been made.
func (k *Keyset) keep(c *connection) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || c.spoiled.Load() {
		return false
	}
	next := *c
	next.keys, next.known = maps.Clone(c.keys), maps.Clone(c.known)
	k.choose(&next)
	k.connection = &next
	k.recycleAt.Store(k.module.SessionObjects.Load() + k.recycleAt.Load()/10 + 1)
	k.release()
	return true
}
