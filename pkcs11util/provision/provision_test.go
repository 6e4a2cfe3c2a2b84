package provision_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/provision"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// Tests here use the module by turns, as operators' commands do, and so are not parallel.

func newConfig(t *testing.T) (provision.Config, tokentest.Directory) {
	t.Helper()
	dir := tokentest.NewDirectory(t)
	conf := strings.SplitN(dir.Env(), "=", 2)
	t.Setenv(conf[0], conf[1])
	return provision.Config{Module: dir.Module, Label: "vault", SOPIN: tokentest.SOPIN, PIN: tokentest.PIN}, dir
}

// open opens the token as the service does, which checks and proves every key.
func open(t *testing.T, cfg provision.Config) {
	t.Helper()
	keys, err := pkcs11util.Open(context.Background(), login(cfg))
	if err != nil {
		t.Fatal(err)
	}
	if got := len(keys.Keys()); got != 8 {
		t.Errorf("%d keys", got)
	}
	if err := keys.Check(context.Background()); err != nil {
		t.Error(err)
	}
	if err := keys.Close(); err != nil {
		t.Error(err)
	}
}

func login(cfg provision.Config) pkcs11util.Config {
	return pkcs11util.Config{Module: cfg.Module, Label: cfg.Label, PIN: cfg.PIN}
}

// raw runs f in a session of its own, apart from all packages under test.
func raw(t *testing.T, cfg provision.Config, f func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := pkcs11.New(cfg.Module)
	check(p.Initialize())
	defer func() { check(p.Finalize()) }()
	slots, err := p.GetSlotList(true)
	check(err)
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		check(err)
		if info.Label != cfg.Label {
			continue
		}
		s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		check(err)
		check(p.Login(s, pkcs11.CKU_USER, string(cfg.PIN)))
		check(f(p, s))
		return
	}
	t.Fatal("no such token")
}

// labels counts all objects in the token by label.
func labels(t *testing.T, cfg provision.Config) map[string]int {
	t.Helper()
	all := map[string]int{}
	raw(t, cfg, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(s, nil); err != nil {
			return err
		}
		found, _, err := p.FindObjects(s, 1000)
		if err != nil {
			return err
		}
		for _, h := range found {
			values, err := p.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return fmt.Errorf("object %d: %w", h, err)
			}
			all[string(values[0].Value)]++
		}
		return p.FindObjectsFinal(s)
	})
	return all
}

func destroy(t *testing.T, cfg provision.Config, class uint, label string) {
	t.Helper()
	raw(t, cfg, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}); err != nil {
			return err
		}
		found, _, err := p.FindObjects(s, 10)
		if err != nil {
			return err
		}
		if err := p.FindObjectsFinal(s); err != nil {
			return err
		}
		if len(found) != 1 {
			return fmt.Errorf("%d objects are labelled %s", len(found), label)
		}
		return p.DestroyObject(s, found[0])
	})
}

// assertOnlyKeys: eight keys, five of them pairs, and nothing else.
func assertOnlyKeys(t *testing.T, cfg provision.Config) {
	t.Helper()
	got := labels(t, cfg)
	for _, purpose := range pkcs11util.Purposes() {
		want := 2
		switch purpose {
		case pkcs11util.Master, pkcs11util.State, pkcs11util.MAC:
			want = 1
		}
		label := "bkv/" + purpose + "/1"
		if got[label] != want {
			t.Errorf("%d objects are labelled %s", got[label], label)
		}
		delete(got, label)
	}
	if len(got) > 0 {
		t.Errorf("also there: %v", got)
	}
}

func TestRun(t *testing.T) {
	cfg, _ := newConfig(t)
	report, err := provision.Run(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !report.TokenCreated || report.Destroyed != 0 || len(report.Kept) != 0 || len(report.Made) != 8 {
		t.Errorf("first run: %+v", report)
	}
	open(t, cfg)
	assertOnlyKeys(t, cfg)

	report, err = provision.Run(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if report.TokenCreated || report.Destroyed != 0 || len(report.Kept) != 8 || len(report.Made) != 0 {
		t.Errorf("second run: %+v", report)
	}
	assertOnlyKeys(t, cfg)
}

// What crypto11 made has no attribute that the templates do not name the value of.
func TestRunSetsEveryUsage(t *testing.T) {
	cfg, _ := newConfig(t)
	if _, err := provision.Run(cfg); err != nil {
		t.Fatal(err)
	}
	raw(t, cfg, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		for label, want := range map[string]map[uint]byte{
			"bkv/oprf/1":     {pkcs11.CKA_SIGN: 0, pkcs11.CKA_DERIVE: 1, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_LOCAL: 1, pkcs11.CKA_NEVER_EXTRACTABLE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 1},
			"bkv/identity/1": {pkcs11.CKA_SIGN: 1, pkcs11.CKA_DERIVE: 0, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_PRIVATE: 1},
			"bkv/master/1":   {pkcs11.CKA_ENCRYPT: 1, pkcs11.CKA_DECRYPT: 1, pkcs11.CKA_WRAP: 0, pkcs11.CKA_UNWRAP: 0, pkcs11.CKA_DERIVE: 0, pkcs11.CKA_SIGN: 0, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0},
			"bkv/mac/1":      {pkcs11.CKA_SIGN: 1, pkcs11.CKA_VERIFY: 1, pkcs11.CKA_ENCRYPT: 0, pkcs11.CKA_DERIVE: 0, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_PRIVATE: 1},
		} {
			if err := p.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true)}); err != nil {
				return err
			}
			found, _, err := p.FindObjects(s, 2)
			if err != nil {
				return err
			}
			if err := p.FindObjectsFinal(s); err != nil {
				return err
			}
			if len(found) != 1 {
				return fmt.Errorf("%d sensitive objects are labelled %s", len(found), label)
			}
			for a, value := range want {
				got, err := p.GetAttributeValue(s, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
				if err != nil {
					return err
				}
				if len(got[0].Value) != 1 || got[0].Value[0] != value {
					t.Errorf("%s: attribute %#x is %x, want %d", label, a, got[0].Value, value)
				}
			}
		}
		return nil
	})
}

// A run repairs what an earlier one left: temporary keys, a public half without its private one,
// missing keys. Finished keys stay as they are.
func TestRunResumes(t *testing.T) {
	cfg, _ := newConfig(t)
	if _, err := provision.Run(cfg); err != nil {
		t.Fatal(err)
	}
	before := publicKey(t, cfg, pkcs11util.Server)
	destroy(t, cfg, pkcs11.CKO_PRIVATE_KEY, "bkv/oprf/1")
	destroy(t, cfg, pkcs11.CKO_SECRET_KEY, "bkv/master/1")
	raw(t, cfg, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		for _, purpose := range []string{pkcs11util.Master, pkcs11util.Audit} {
			label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, pkcs11util.TemporaryLabel(pkcs11util.KeyName{Purpose: purpose, Generation: 1}))
			secret, private, public, err := pkcs11util.DefaultProfile().Templates(purpose)
			if err != nil {
				return err
			}
			if secret != nil {
				_, err = p.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, append(secret, label))
			} else {
				_, _, err = p.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)}, append(public, label), append(private, label))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})

	report, err := provision.Run(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if report.TokenCreated || report.Destroyed != 4 || len(report.Kept) != 6 ||
		fmt.Sprint(report.Made) != "[bkv/master/1 bkv/oprf/1]" {
		t.Errorf("got %+v", report)
	}
	open(t, cfg)
	assertOnlyKeys(t, cfg)
	if publicKey(t, cfg, pkcs11util.Server) != before {
		t.Error("a finished key was made anew")
	}
}

func publicKey(t *testing.T, cfg provision.Config, purpose string) [33]byte {
	t.Helper()
	keys, err := pkcs11util.Open(context.Background(), login(cfg))
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	public, err := keys.PublicKey(purpose, 1)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

// A finished key that does not hold what it must is not touched.
func TestRunLeavesOddKeysAlone(t *testing.T) {
	cfg, _ := newConfig(t)
	if _, err := provision.Run(cfg); err != nil {
		t.Fatal(err)
	}
	raw(t, cfg, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		_, err := p.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "bkv/master/2"), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		})
		return err
	})
	if _, err := provision.Run(cfg); err == nil || !strings.Contains(err.Error(), "bkv/master/2") || !strings.Contains(err.Error(), "CKA_EXTRACTABLE") {
		t.Errorf("got %v", err)
	}
	if labels(t, cfg)["bkv/master/2"] != 1 {
		t.Error("it is gone")
	}
}

func TestRunRefuses(t *testing.T) {
	cfg, _ := newConfig(t)
	if _, err := provision.Run(provision.Config{Module: cfg.Module, Label: cfg.Label, PIN: cfg.PIN}); err == nil || !strings.Contains(err.Error(), "security officer") {
		t.Errorf("without the security officer's PIN: %v", err)
	}
	if _, err := provision.Run(provision.Config{Module: cfg.Module, Label: cfg.Label, SOPIN: cfg.SOPIN}); err == nil || !strings.Contains(err.Error(), "PIN is missing") {
		t.Errorf("without the user's PIN: %v", err)
	}
	if _, err := provision.Run(cfg); err != nil {
		t.Fatal(err)
	}
	wrong := cfg
	wrong.PIN = "1234-wrong"
	var code pkcs11.Error
	if _, err := provision.Run(wrong); !errors.Is(err, pkcs11util.ErrPINRefused) || !errors.As(err, &code) || code != pkcs11.CKR_PIN_INCORRECT {
		t.Errorf("with a wrong PIN: %v", err)
	}

	destroy(t, cfg, pkcs11.CKO_SECRET_KEY, "bkv/mac/1")
	admin, err := pkcs11util.OpenAdmin(login(cfg))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	if _, err := provision.Run(cfg); err == nil || !strings.Contains(err.Error(), "in use in this process") {
		t.Errorf("while the module is in use: %v", err)
	}
}

// Runs that are killed anywhere leave what a further run repairs. BKV_KILLED_RUNS sets how many
// there are.
func TestKilledRuns(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	rounds, _ := strconv.Atoi(os.Getenv("BKV_KILLED_RUNS"))
	for round := range max(rounds, 6) {
		cfg, dir := newConfig(t) // and the child's environment
		child := exec.Command(os.Args[0], "-test.run=^TestChild$")
		child.Env = append(os.Environ(), "BKV_PROVISION_CHILD="+cfg.Label)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() && lines.Text() != childStarts {
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		_ = child.Process.Kill() // it may have ended
		for lines.Scan() {
			if strings.Contains(lines.Text(), "FAIL") {
				t.Errorf("round %d: the child failed before it was killed", round)
			}
		}
		_ = child.Wait() // says that it was killed

		report, err := provision.Run(cfg)
		if errors.Is(err, pkcs11util.ErrHalfMade) {
			t.Logf("round %d: %v", round, err)
			dir.Vanish(t) // deletes it, as the error says
			report, err = provision.Run(cfg)
		}
		if err != nil {
			t.Fatalf("round %d: after a run that was killed: %v", round, err)
		}
		t.Logf("round %d: the second run destroyed %d, kept %d, made %d", round, report.Destroyed, len(report.Kept), len(report.Made))
		open(t, cfg)
	}
}

const childStarts = "the run starts"

// TestChild is what TestKilledRuns starts and kills.
func TestChild(t *testing.T) {
	label := os.Getenv("BKV_PROVISION_CHILD")
	if label == "" {
		t.Skip("only as a child")
	}
	fmt.Println(childStarts)
	if _, err := provision.Run(provision.Config{Module: tokentest.Module(t), Label: label, SOPIN: tokentest.SOPIN, PIN: tokentest.PIN}); err != nil {
		t.Fatal(err)
	}
}
