package tokentest

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// Shim is a token behind a PKCS#11 module of our own, which forwards to a SoftHSM and on
// the way behaves as other vendors' tokens do, and fails as tokens fail. Each Shim has a module and
// a SoftHSM of its own, so that tests may run in parallel whatever they do to theirs.
//
// Everything can be switched at any time, acts at once, and acts in every process that has
// loaded the module; a process needs nothing but the module's path for that (Config().Module).
type Shim struct {
	*Token

	control []int64 // mapped, shared with the module
}

// Setting is one way in which a Shim's token behaves. Those of one group replace each
// other; Off is SoftHSM's own way.
type Setting struct {
	group string
	value int64
}

// Off ends the behaviour of a setting's group.
func (s Setting) Off() Setting { return Setting{s.group, 0} }

// What other vendors' tokens do.
var (
	// Who makes the IV of AES-GCM: the token, and gives it back
	IVWrittenBack = Setting{"iv", 1} // over the 12 zero bytes that the caller must pass, in C_Encrypt (AWS CloudHSM)
	IVAppended    = Setting{"iv", 2} // as 16 bytes after the tag, and ignores what the caller passes; C_Decrypt wants it passed (Luna in FIPS mode)
	IVPrepended   = Setting{"iv", 3} // as 12 bytes before the ciphertext; if none is passed, C_Decrypt takes it from there

	NilIVRefused = Setting{"nil_iv", 1} // SoftHSM 2.6.1 takes no IV for one of zeros

	SensitiveRefused = Setting{"sensitive", 1} // C_DeriveKey with CKA_SENSITIVE=false: CKR_TEMPLATE_INCONSISTENT
	SensitiveForced  = Setting{"sensitive", 2} // C_DeriveKey with CKA_SENSITIVE=false: sensitive all the same

	DeriveValueLenRequired = Setting{"derive_value_len", 1}
	DeriveValueLenRefused  = Setting{"derive_value_len", 2}
	UnwrapValueLenRequired = Setting{"unwrap_value_len", 1}
	UnwrapValueLenRefused  = Setting{"unwrap_value_len", 2} // as SoftHSM 2.6.1 does

	PINLocked = Setting{"pin_locked", 1} // C_GetTokenInfo says so

	WriteProtected = Setting{"write_protected", 1} // C_GetTokenInfo says so

	VendorKDF = Setting{"vendor_kdf", 1} // CKM_ECDH1_DERIVE with CKD_NULL: CKR_MECHANISM_PARAM_INVALID

	PointRaw     = Setting{"point_out", 1} // CKA_EC_POINT reads as 65 bytes
	PointDER     = Setting{"point_out", 2} // CKA_EC_POINT reads as an OCTET STRING
	PeerPointRaw = Setting{"point_in", 1}  // CKM_ECDH1_DERIVE takes 65 bytes only
	PeerPointDER = Setting{"point_in", 2}  // CKM_ECDH1_DERIVE takes an OCTET STRING only
)

// VendorGCM has the token do AES-GCM under a vendor's number, and under none else: without an IV of the caller's, and with
// its own before the ciphertext (AWS CloudHSM's mechanism, but that it has the standard one too).
func VendorGCM(number uint32) Setting { return Setting{"gcm_number", int64(number)} }

// DataLimit is the most bytes that C_Encrypt takes; more are CKR_DATA_LEN_RANGE.
func DataLimit(n int) Setting { return Setting{"data_limit", int64(n)} }

// Faults of which no code tells.
var (
	NilIVIsZero   = Setting{"nil_iv", 2}        // no IV is one of zeros
	BadTagOpens   = Setting{"bad_tag", 1}       // C_Decrypt of AES-GCM gives a plaintext though the tag is wrong
	SameSecret    = Setting{"derived", 1}       // CKM_ECDH1_DERIVE gives one and the same x-coordinate each time
	OtherPoint    = Setting{"derived", 2}       // CKM_ECDH1_DERIVE multiplies the generator, whatever it is given
	Extraction    = Setting{"extraction", 1}    // CKA_VALUE of sensitive keys reads, and unextractable keys are wrapped; what comes is made up
	Duplicates    = Setting{"duplicates", 1}    // C_FindObjects names each object twice
	BadSignatures = Setting{"bad_signature", 1} // C_Sign is wrong in one bit
	SameRandom    = Setting{"same_random", 1}   // C_GenerateRandom gives one and the same byte
)

// LieEvery has SameSecret and OtherPoint act in each nth derive only.
func LieEvery(n int) Setting { return Setting{"derived_every", int64(n)} }

// maxHidden is how many mechanisms Hide can hide.
const maxHidden = 4

// Always is the number of calls for Fail and Delay that has no end.
const Always = -1

//go:embed shim/layout.h
var shimLayout []byte

//go:embed shim/shim.c
var shimSource []byte

// layout is where the control file holds what; see shim/layout.h.
type layout struct {
	settings, words, functions map[string]int
	names                      []string // of the functions
}

var shimWords = sync.OnceValue(func() layout {
	l := layout{map[string]int{}, map[string]int{}, map[string]int{}, nil}
	for _, m := range regexp.MustCompile(`(?m)^(SETTING|WORD|FUNCTION|HOOKED)\((\w+)`).FindAllSubmatch(shimLayout, -1) {
		name := string(m[2])
		switch string(m[1]) {
		case "SETTING":
			l.settings[name] = len(l.settings)
		case "WORD":
			l.words[name] = len(l.words)
		default:
			l.functions[name] = len(l.functions)
			l.names = append(l.names, name)
		}
	}
	return l
})

// shimModule is the compiled shim.
var shimModule = sync.OnceValues(func() ([]byte, error) { return compile("shim.c", shimSource) })

// compile makes a PKCS#11 module from C, with these macros defined.
func compile(name string, source []byte, macros ...string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "bkvcc")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for name, source := range map[string][]byte{name: source, "layout.h": shimLayout} {
		if err := os.WriteFile(filepath.Join(dir, name), source, 0o600); err != nil {
			return nil, err
		}
	}
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	out := filepath.Join(dir, "module.so")
	args := []string{"-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden"}
	for _, m := range macros {
		args = append(args, "-D"+m)
	}
	if said, err := exec.Command(cc, append(args, "-o", out, filepath.Join(dir, name), "-ldl", "-lpthread")...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compiling %s: %w\n%s", name, err, said)
	}
	return os.ReadFile(out)
}

// SoftHSM finds its configuration through an environment variable, one for the whole
// process. So each Shim's copy of SoftHSM gets the name of another variable of the same length.
const softhsmVariable = "SOFTHSM2_CONF"

func shimVariable(n int) string { return fmt.Sprintf("BKV_SHIM_%04d", n) }

// The C library's environment may not grow while another thread reads it, as every
// C_Initialize does; replacing a value is harmless. So the first variables are there from the start.
func init() {
	for n := range 64 {
		if err := os.Setenv(shimVariable(n), ""); err != nil {
			panic(err)
		}
	}
}

var shims atomic.Int32

// NewShimmed makes a Shim, with keys generated in its token, and opens it.
func NewShimmed(t testing.TB) *Shim {
	t.Helper()
	s := EmptyShimmed(t)
	s.fill(t, nil)
	t.Cleanup(s.Clear)
	return s
}

// EmptyShimmed makes a Shim whose token has no keys, not opened (its Keyset is nil).
func EmptyShimmed(t testing.TB) *Shim {
	t.Helper()
	softhsm, err := os.ReadFile(Module(t))
	if err != nil {
		t.Fatal(err)
	}
	shim, err := shimModule()
	if err != nil {
		t.Fatal(err)
	}
	dir := NewDirectory(t)
	variable := shimVariable(int(shims.Add(1)) - 1)
	if bytes.Count(softhsm, []byte(softhsmVariable+"\x00")) != 1 {
		t.Fatalf("%s does not name %s exactly once", dir.Module, softhsmVariable)
	}
	softhsm = bytes.Replace(softhsm, []byte(softhsmVariable), []byte(variable), 1)

	s := &Shim{}
	l := shimWords()
	size := 8 * (len(l.settings) + len(l.functions)*len(l.words))
	dir.Module = filepath.Join(dir.Path, "shim.so")
	for name, content := range map[string][]byte{
		"shim.so":    shim,
		"softhsm.so": softhsm,
		"control":    append(make([]byte, size), (variable + string(make([]byte, 32-len(variable))))...),
	} {
		if err := os.WriteFile(filepath.Join(dir.Path, name), content, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.mapControl(t, filepath.Join(dir.Path, "control"), size)
	s.Token = emptyIn(t, dir)
	t.Cleanup(s.Clear)
	return s
}

// NewToken makes a further token in the Shim, with keys, and opens it. What befalls the Shim befalls it too.
func (s *Shim) NewToken(t testing.TB) *Token {
	t.Helper()
	tok := emptyIn(t, s.Directory)
	tok.fill(t, nil)
	t.Cleanup(s.Clear)
	return tok
}

// OpenKeyset opens the token a further time, until the test's end, when everything is
// switched off first, so that nothing hangs then.
func (s *Shim) OpenKeyset(t testing.TB, cfg pkcs11util.Config) *pkcs11util.Keyset {
	t.Helper()
	keys := s.Token.OpenKeyset(t, cfg)
	t.Cleanup(s.Clear)
	return keys
}

func (s *Shim) mapControl(t testing.TB, path string, size int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapped, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	s.control = unsafe.Slice((*int64)(unsafe.Pointer(&mapped[0])), size/8)
	t.Cleanup(func() {
		if err := syscall.Munmap(mapped); err != nil {
			t.Error(err)
		}
	})
}

func (s *Shim) setting(name string) *int64 {
	i, ok := shimWords().settings[name]
	if !ok {
		panic("the shim has no setting " + name)
	}
	return &s.control[i]
}

func (s *Shim) word(function, name string) *int64 {
	l := shimWords()
	f, ok := l.functions[function]
	if !ok {
		panic("PKCS#11 has no function " + function)
	}
	return &s.control[len(l.settings)+f*len(l.words)+l.words[name]]
}

// Set switches settings on, or off.
func (s *Shim) Set(settings ...Setting) {
	for _, b := range settings {
		atomic.StoreInt64(s.setting(b.group), b.value)
	}
}

// Hide makes the token have none of these mechanisms, at most four; of those that were hidden, the others
// come back.
func (s *Shim) Hide(mechanisms ...uint) {
	if len(mechanisms) > maxHidden {
		panic("too many mechanisms to hide")
	}
	for i := range maxHidden {
		var m int64
		if i < len(mechanisms) {
			m = int64(mechanisms[i])
		}
		atomic.StoreInt64(s.setting(fmt.Sprintf("hidden_%d", i+1)), m)
	}
}

// Fail has the next n calls of a function ("C_Sign"), or all with Always, answer a CKR code and do nothing. n = 0
// ends it.
func (s *Shim) Fail(function string, code uint, n int) {
	atomic.StoreInt64(s.word(function, "fails"), 0)
	atomic.StoreInt64(s.word(function, "code"), int64(code))
	atomic.StoreInt64(s.word(function, "fails"), int64(n))
}

// Delay has the next n calls of a function, or all with Always, wait before they do
// anything, for this long or until Release.
func (s *Shim) Delay(function string, d time.Duration, n int) {
	atomic.StoreInt64(s.word(function, "delays"), 0)
	atomic.StoreInt64(s.word(function, "delay"), d.Milliseconds())
	atomic.StoreInt64(s.word(function, "delays"), int64(n))
}

// Hang is Delay without an end of its own.
func (s *Shim) Hang(function string, n int) { s.Delay(function, 1<<62, n) }

// Release ends a function's Delay, also for the calls that wait.
func (s *Shim) Release(function string) {
	atomic.StoreInt64(s.word(function, "delays"), 0)
	atomic.StoreInt64(s.word(function, "delay"), 0)
}

// Held is how many calls of a function wait at this moment.
func (s *Shim) Held(function string) int { return int(atomic.LoadInt64(s.word(function, "held"))) }

// Calls is how often a function was called, from the start, those that were made to fail included.
func (s *Shim) Calls(function string) int { return int(atomic.LoadInt64(s.word(function, "calls"))) }

// Vanish makes the token go away: slots are empty and every session's call is
// CKR_DEVICE_REMOVED, until Return. What does not come back with it is, at level
//
//	1  the sessions: others can be opened, and the login stands
//	2  the login, with all sessions and handles
//	3  the module's initialisation: until C_Finalize and C_Initialize, everything is CKR_DEVICE_ERROR
func (s *Shim) Vanish(level int) {
	atomic.StoreInt64(s.setting("gone_level"), int64(level))
	atomic.StoreInt64(s.setting("gone"), 1)
	atomic.AddInt64(s.setting("gone_times"), 1)
}

// Return ends Vanish.
func (s *Shim) Return() { atomic.StoreInt64(s.setting("gone"), 0) }

// Clear switches everything off, so that the token is a plain SoftHSM.
func (s *Shim) Clear() {
	l := shimWords()
	for name := range l.settings {
		if name != "gone_times" && name != "gone_level" {
			atomic.StoreInt64(s.setting(name), 0)
		}
	}
	for _, f := range l.names {
		s.Fail(f, 0, 0)
		s.Release(f)
	}
}
