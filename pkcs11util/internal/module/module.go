// Package module keeps the PKCS#11 modules that this process has loaded: one
// entry per file, initialised while anybody uses it.
//
// C_Initialize and C_Finalize act on the whole process: finalising a module
// invalidates the sessions and handles of everybody who uses it, and handle
// numbers start again from the beginning. So calls enter through a gate, which
// initialising and finalising close, and name the incarnation of the module that
// their handles belong to. Everything here is safe for concurrent use.
package module

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"
	"golang.org/x/sync/semaphore"
)

// ErrReinitialised says that handles are from before the module was finalised.
var ErrReinitialised = errors.New("the PKCS#11 module has been initialised anew since")

// ErrBusy says that the module cannot be recycled at present.
var ErrBusy = errors.New("the PKCS#11 module is in use")

// ErrNoToken says that no token, and ErrManyTokens that more than one, has a label.
var (
	ErrNoToken    = errors.New("no token has this label")
	ErrManyTokens = errors.New("more than one token has this label")
)

// wholeGate is the weight of the gate: a call takes 1 of it, (re)initialising all.
const wholeGate = 1 << 30

// quiesceTimeout bounds the wait for running calls before the module is finalised.
// A call that hangs in the module cannot be ended, so that then the module cannot be
// finalised either; callers try again later.
const quiesceTimeout = 10 * time.Second

// recycleTimeout is the same for Recycle, which is in no hurry, and keeps calls waiting meanwhile.
const recycleTimeout = time.Second

// A Module is one loaded PKCS#11 module.
type Module struct {
	// Objects is held around finding, creating and destroying token objects. In
	// SoftHSM 2.6.1, C_FindObjects beside the creation of a token object made about
	// 1 % of creations fail and left half-made objects. Session objects do not need it.
	// It is taken inside the gate.
	Objects sync.Mutex

	// Ctx may be used between Enter and its release only.
	Ctx *pkcs11.Ctx

	// SessionObjects counts the session objects that were made since the module was initialised.
	SessionObjects atomic.Int64

	pins atomic.Int32 // users whose handles Recycle must not void

	decrypt unsafe.Pointer // C_Decrypt

	path string
	refs int // guarded by registryMu

	gate *semaphore.Weighted
	// Both are written with the whole gate held and read with any part of it.
	incarnation uint64 // how often the module was initialised, or the attempt failed
	initialised bool
}

var (
	registryMu sync.Mutex
	registry   = map[string]*Module{}
)

// Load loads and initialises the module at path, or adds a user to the one that is
// loaded. Each Load needs one Unload.
func Load(path string) (*Module, error) {
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("PKCS#11 module %s: %w", path, err)
	}
	if file, err = filepath.Abs(file); err != nil {
		return nil, fmt.Errorf("PKCS#11 module %s: %w", path, err)
	}

	registryMu.Lock()
	defer registryMu.Unlock()
	m := registry[file]
	if m == nil {
		if info, err := os.Stat(file); err != nil {
			return nil, fmt.Errorf("PKCS#11 module %s: %w", path, err)
		} else if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("PKCS#11 module %s is not a file", path)
		}
		p := pkcs11.New(file)
		if p == nil {
			return nil, fmt.Errorf("PKCS#11 module %s cannot be loaded: it is no PKCS#11 module for this machine, or a library that it needs is missing", path)
		}
		m = &Module{Ctx: p, path: path, decrypt: findDecrypt(file), gate: semaphore.NewWeighted(wholeGate)}
		registry[file] = m
	}
	if m.refs == 0 {
		if err := m.Reinitialise(context.Background(), m.incarnation); err != nil {
			return nil, err
		}
	}
	m.refs++
	return m, nil
}

// Unload takes a user away. After the last one's, the module is finalised. It stays
// in memory: modules that start threads or register exit handlers do not survive
// being unmapped.
func (m *Module) Unload() {
	registryMu.Lock()
	defer registryMu.Unlock()
	if m.refs--; m.refs > 0 {
		return
	}
	release, err := m.Quiesce(context.Background())
	if err != nil {
		return // a call hangs in the module, and finalising under it would crash the process
	}
	defer release()
	if m.initialised {
		_ = m.Ctx.Finalize() // nobody uses it any more, and the next Load reports what is wrong
	}
	m.initialised = false
}

// Current enters the module whatever its incarnation is, and says which it is. The
// caller calls release when it is out of the module again.
func (m *Module) Current(ctx context.Context) (incarnation uint64, release func(), err error) {
	if err := m.gate.Acquire(ctx, 1); err != nil {
		return 0, nil, fmt.Errorf("waiting for the PKCS#11 module: %w", err)
	}
	if !m.initialised {
		m.gate.Release(1)
		return 0, nil, pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	}
	return m.incarnation, m.release, nil
}

// Enter enters the module if its incarnation is still the given one, and else answers
// ErrReinitialised. The caller calls release when it is out of the module again, and
// does not enter a second time before that.
func (m *Module) Enter(ctx context.Context, incarnation uint64) (release func(), err error) {
	if err := m.gate.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("waiting for the PKCS#11 module: %w", err)
	}
	if m.incarnation != incarnation || !m.initialised {
		m.gate.Release(1)
		return nil, ErrReinitialised
	}
	return m.release, nil
}

func (m *Module) release() { m.gate.Release(1) }

// Incarnation is what Reinitialise wants to be told.
func (m *Module) Incarnation(ctx context.Context) (uint64, error) {
	if err := m.gate.Acquire(ctx, 1); err != nil {
		return 0, fmt.Errorf("waiting for the PKCS#11 module: %w", err)
	}
	defer m.gate.Release(1)
	return m.incarnation, nil
}

// Quiesce keeps new calls out and waits, not for ever, until none is inside.
func (m *Module) Quiesce(ctx context.Context) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, quiesceTimeout)
	defer cancel()
	if err := m.gate.Acquire(ctx, wholeGate); err != nil {
		return nil, fmt.Errorf("waiting for calls to leave the PKCS#11 module: %w", err)
	}
	return func() { m.gate.Release(wholeGate) }, nil
}

// Reinitialise waits for the calls inside to end, keeps others out, finalises the
// module and initialises it again, unless somebody has done so since the given
// incarnation. All sessions and handles of all users of the module are void then.
func (m *Module) Reinitialise(ctx context.Context, incarnation uint64) error {
	release, err := m.Quiesce(ctx)
	if err != nil {
		return err
	}
	defer release()
	return m.reinitialise(incarnation)
}

// reinitialise does it; the caller has the whole gate.
func (m *Module) reinitialise(incarnation uint64) error {
	if m.incarnation != incarnation {
		return nil
	}
	if m.initialised {
		// It fails if somebody else in the process finalised the module before; what
		// counts is whether it can be initialised now.
		_ = m.Ctx.Finalize()
		trim()
	}
	// Without options, miekg/pkcs11 passes CKF_OS_LOCKING_OK: the module locks by itself.
	err := m.Ctx.Initialize()
	m.incarnation++
	m.initialised = err == nil
	m.SessionObjects.Store(0)
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return fmt.Errorf("C_Initialize of %s: something else in this process uses the module: %w", m.path, err)
	}
	if err != nil {
		return fmt.Errorf("C_Initialize of %s: %w", m.path, err)
	}
	return nil
}

// Recycle is Reinitialise for its own sake: it has the module give back what it does not
// free before. It answers ErrBusy, and nothing has happened, while somebody has
// pinned the module, or if a call does not end soon. If the module was initialised since
// the given incarnation, there is nothing to do.
func (m *Module) Recycle(ctx context.Context, incarnation uint64) error {
	if now, err := m.Incarnation(ctx); err != nil || now != incarnation {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, recycleTimeout)
	defer cancel()
	if err := m.gate.Acquire(ctx, wholeGate); err != nil {
		return fmt.Errorf("%w: waiting for calls to leave it: %w", ErrBusy, err)
	}
	defer m.gate.Release(wholeGate)
	if m.pins.Load() > 0 && m.incarnation == incarnation {
		return fmt.Errorf("%w: by an operator's login", ErrBusy)
	}
	return m.reinitialise(incarnation)
}

// Pin keeps Recycle away until unpin is called once. The caller is inside the module.
func (m *Module) Pin() (unpin func()) {
	m.pins.Add(1)
	return func() { m.pins.Add(-1) }
}

// FindToken returns the slot of the one initialised token with this label, or
// ErrNoToken (naming the labels that are there) or ErrManyTokens. The caller is
// inside the module.
func (m *Module) FindToken(label string) (slot uint, info pkcs11.TokenInfo, err error) {
	slots, err := m.Ctx.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, fmt.Errorf("C_GetSlotList: %w", err)
	}
	var there []string
	matches := 0
	for _, s := range slots {
		t, err := m.Ctx.GetTokenInfo(s)
		if err != nil || t.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // an empty slot's token, or one that cannot be ours as it does not answer
		}
		there = append(there, fmt.Sprintf("%q", t.Label))
		if t.Label == label {
			matches++
			slot, info = s, t
		}
	}
	switch matches {
	case 1:
		return slot, info, nil
	case 0:
		slices.Sort(there)
		return 0, info, fmt.Errorf("token %q: %w; there are: [%s]", label, ErrNoToken, strings.Join(there, ", "))
	default:
		return 0, info, fmt.Errorf("token %q: %w", label, ErrManyTokens)
	}
}

// FreeSlot returns a slot with a token that is not initialised yet. The caller is
// inside the module.
func (m *Module) FreeSlot() (uint, error) {
	slots, err := m.Ctx.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("C_GetSlotList: %w", err)
	}
	for _, s := range slots {
		t, err := m.Ctx.GetTokenInfo(s)
		if err == nil && t.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			return s, nil
		}
	}
	return 0, errors.New("no slot has a token that is not initialised yet")
}
