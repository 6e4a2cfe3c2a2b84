package pkcs11util

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// CheckResult is how a line of a token check came out.
type CheckResult string

// A token with a CheckFail is not usable. A CheckWarn is for a person to judge.
const (
	CheckOK   CheckResult = "ok"
	CheckWarn CheckResult = "warn"
	CheckFail CheckResult = "fail"
)

// CheckLine is one thing that a token check looked at.
type CheckLine struct {
	What   string      `json:"what"`
	Result CheckResult `json:"result"`
	Why    string      `json:"why"`
	Do     string      `json:"do,omitzero"`
}

// Lines of a token check, in its order. Those that a [Keyset] goes through when it opens, too, are named in its errors.
const (
	lineToken      = "token"
	lineLeftovers  = "leftovers"
	lineRandom     = "random numbers"
	lineKey        = "key for " // and a purpose
	lineLookup     = "look-up by label"
	lineGCM        = "AES-GCM"
	lineIVs        = "fresh IVs"
	lineNoIV       = "missing IV"
	lineTag        = "wrong tag"
	lineAssociated = "wrong associated data"
	lineDataLimit  = "data limit"
	lineECDH       = "ECDH"
	linePoints     = "whole points"
	lineBadPoint   = "invalid point"
	lineHMAC       = "HMAC-SHA-256"
	lineECDSA      = "ECDSA"
	lineValue      = "reading CKA_VALUE"
	lineWrap       = "wrapping keys out"
	lineCopy       = "extractable copies"
	lineSet        = "lifting protection"
	lineRates      = "rates"
	lineUsage      = "other uses of keys"
	lineRename     = "renaming"
	lineDestroy    = "destroying"
	lineEmpty      = "empty associated data"
	lineProfile    = "profile"
)

// CheckRate is how fast a token was in one session.
type CheckRate struct {
	Operation string  `json:"operation"`
	PerSecond float64 `json:"per_second"`
}

// CheckReport is what a token check found.
type CheckReport struct {
	Token   string      `json:"token"` // what it is, by its own account
	Usable  bool        `json:"usable"`
	Verdict string      `json:"verdict"`
	Lines   []CheckLine `json:"lines"`
	Profile Profile     `json:"profile"` // the one that fits, as far as one does
	Rates   []CheckRate `json:"rates"`
}

// Failed names the lines that failed.
func (r CheckReport) Failed() (lines []string) {
	for _, l := range r.Lines {
		if l.Result == CheckFail {
			lines = append(lines, l.What)
		}
	}
	return lines
}

// scratchPrefix begins the labels of a check's keys, which are bkv/tmp/check/<purpose>/<random>.
const scratchPrefix = temporaryPrefix + "check/"

// scratchPurposes are those of the check's keys: one of each kind.
var scratchPurposes = []string{Master, OPRF, MAC, Identity}

// CheckConfig says how a token is checked.
type CheckConfig struct {
	// LowerAssurance declares that a profile with a Weakness will do. It is proposed only where
	// no better one works.
	LowerAssurance bool
	// Progress hears what is being done. Default: nobody.
	Progress func(what string)
}

// checker is one run of a check. Its steps are in check_steps.go.
type checker struct {
	module   *module.Module
	slot     uint
	profile  Profile // the one that fits, as far as is known
	lower    bool    // one with a weakness will do
	progress func(what string)
	report   *CheckReport
	keys     map[string]*scratch
}

// scratch is a key of the check's, and what to do without it.
type scratch struct {
	key    *key
	label  string
	public pkcs11.ObjectHandle // of EC keys
}

// Check runs every operation that the vault needs on keys of its own, compares with Go's
// cryptography, tries to extract what must not be extractable, and looks for faults that
// no code tells of. It finds the profile that fits; if Admin was opened with one, another is a failed
// line. One with a weakness is looked for only if it is declared, there or in cfg.
//
// The check's keys are destroyed at the end, and those of a run that was cut short at the next
// run's beginning; no other object is touched. It writes to the token, so that it is not for beside a
// running service. The error says why there is no report; what the token does wrong is in the report.
func (a *Admin) Check(ctx context.Context, cfg CheckConfig) (CheckReport, error) {
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	release, err := a.enter()
	if err != nil {
		return CheckReport{}, err
	}
	defer release()
	a.module.Objects.Lock()
	defer a.module.Objects.Unlock()

	slot, err := a.session.slot()
	if err != nil {
		return CheckReport{}, err
	}
	report := CheckReport{}
	c := &checker{
		module: a.module, slot: slot, profile: a.session.profile, progress: cfg.Progress,
		lower:  cfg.LowerAssurance || a.session.profile.Weakness() != "",
		report: &report, keys: map[string]*scratch{},
	}
	c.step(lineToken, c.token)
	c.step(lineLeftovers, c.leftovers)
	for _, step := range c.steps() {
		if err := ctx.Err(); err != nil {
			c.step(lineDestroy, c.destroy)
			return CheckReport{}, fmt.Errorf("checking the token: %w", err)
		}
		c.step(step.what, step.run)
	}
	c.judge(a.profileGiven, a.session.profile)
	return report, nil
}

type step struct {
	what string
	run  func(s session) CheckLine
}

// steps are those between the leftovers and the verdict. Finding the profile comes before
// what depends on it; what may spoil keys, or the process, comes late.
func (c *checker) steps() []step {
	steps := []step{{lineRandom, c.random}}
	for _, purpose := range scratchPurposes {
		steps = append(steps, step{lineKey + purpose, func(s session) CheckLine { return c.makeKey(s, purpose) }})
	}
	return append(steps,
		step{lineLookup, c.lookup},
		step{lineGCM, c.with(Master, c.gcm)},
		step{lineDataLimit, c.after(lineGCM, c.with(Master, c.dataLimit))},
		step{lineIVs, c.after(lineGCM, c.with(Master, c.ivs))},
		step{lineNoIV, c.after(lineGCM, c.with(Master, c.noIV))},
		step{lineTag, c.after(lineGCM, c.with(Master, c.wrongTag))},
		step{lineAssociated, c.after(lineGCM, c.with(Master, c.wrongAssociated))},
		step{lineECDH, c.ecdh},
		step{linePoints, c.after(lineECDH, c.with(OPRF, c.points))},
		step{lineBadPoint, c.after(lineECDH, c.with(OPRF, c.badPoint))},
		step{lineHMAC, c.with(MAC, c.hmac)},
		step{lineECDSA, c.with(Identity, c.ecdsa)},
		step{lineRates, c.rates},
		step{lineUsage, c.usage},
		step{lineRename, c.rename},
		step{lineValue, c.each(c.readValue)},
		step{lineWrap, c.wrapOut},
		step{lineCopy, c.each(c.copyKey)},
		step{lineSet, c.each(c.liftProtection)},
		step{lineEmpty, c.after(lineGCM, c.with(Master, c.emptyAssociated))},
		step{lineDestroy, c.destroy},
	)
}

// step runs one step with a session of its own: one that failed inside an operation may be of no more use.
func (c *checker) step(what string, run func(s session) CheckLine) {
	c.progress(what)
	s, err := c.open()
	if err != nil {
		c.add(what, failed("see whether the token is still there, and run the check again", err))
		return
	}
	defer s.close()
	if line := run(s); line.Result != "" {
		c.add(what, line)
	}
}

func (c *checker) open() (session, error) {
	s, err := openSession(c.module, c.slot, pkcs11.CKF_RW_SESSION)
	return s.under(c.profile), err
}

func (c *checker) add(what string, l CheckLine) {
	l.What = what
	c.report.Lines = append(c.report.Lines, l)
}

// with is a step that needs a key.
func (c *checker) with(purpose string, run func(s session, k *key) CheckLine) func(s session) CheckLine {
	return func(s session) CheckLine {
		if c.keys[purpose] == nil {
			return CheckLine{Result: CheckWarn, Why: "not tried: there is no " + purpose + " key to try it on"}
		}
		return run(s, c.keys[purpose].key)
	}
}

// after is a step that means nothing if an earlier one failed.
func (c *checker) after(earlier string, run func(s session) CheckLine) func(s session) CheckLine {
	return func(s session) CheckLine {
		if slices.Contains(c.report.Failed(), earlier) {
			return CheckLine{Result: CheckWarn, Why: "not tried: " + earlier + " failed"}
		}
		return run(s)
	}
}

// each is a step that tries something on every key that must fail. attack returns how it succeeded, or "".
func (c *checker) each(attack func(s session, sc *scratch) string) func(s session) CheckLine {
	return func(s session) CheckLine {
		var taken []string
		tried := 0
		for _, purpose := range scratchPurposes {
			if sc := c.keys[purpose]; sc != nil {
				tried++
				if how := attack(s, sc); how != "" {
					taken = append(taken, purpose+" ("+how+")")
				}
			}
		}
		switch {
		case tried == 0:
			return CheckLine{Result: CheckWarn, Why: "not tried: there are no keys to try it on"}
		case len(taken) > 0:
			return CheckLine{
				Result: CheckFail, Why: "keys that are sensitive and not extractable could be had: " + strings.Join(taken, ", "),
				Do: "do not use this token: whoever has its PIN can carry the vault's keys away",
			}
		}
		return CheckLine{Result: CheckOK, Why: "refused for every kind of key"}
	}
}

func okay(format string, args ...any) CheckLine {
	return CheckLine{Result: CheckOK, Why: fmt.Sprintf(format, args...)}
}

func warned(do, format string, args ...any) CheckLine {
	return CheckLine{Result: CheckWarn, Why: fmt.Sprintf(format, args...), Do: do}
}

func failed(do string, err error) CheckLine {
	return CheckLine{Result: CheckFail, Why: err.Error(), Do: do}
}

const brokenToken = "do not use this token; report it to its vendor, with this line"

// judge compares profiles and gives the verdict.
func (c *checker) judge(given bool, had Profile) {
	r := c.report
	r.Profile = c.profile
	differs := c.profile != had
	found := !slices.ContainsFunc(r.Lines, func(l CheckLine) bool {
		weak := l.What == lineECDH && l.Result == CheckWarn && c.profile.ECDH == ECDHInMemory
		return l.Result != CheckOK && !weak && (l.What == lineGCM || l.What == lineECDH || l.What == lineDataLimit)
	})
	switch {
	case !found:
		c.add(lineProfile, CheckLine{Result: CheckFail, Why: "no profile fits this token", Do: "see the lines " + strings.Join(r.Failed(), ", ")})
	case !differs:
		c.add(lineProfile, okay("%s", describe(c.profile)))
	case given:
		c.add(lineProfile, CheckLine{
			Result: CheckFail, Why: "the profile that was given is not this token's: " + difference(had, c.profile),
			Do: "use the profile that --propose writes",
		})
	default:
		c.add(lineProfile, CheckLine{
			Result: CheckWarn, Why: "the token needs a profile: " + difference(had, c.profile),
			Do: "write it with --propose FILE, and name FILE by --token-profile to vaultctl and vaultd",
		})
	}
	failures := r.Failed()
	warnings := 0
	for _, l := range r.Lines {
		if l.Result == CheckWarn {
			warnings++
		}
	}
	r.Usable = len(failures) == 0
	switch {
	case !r.Usable:
		r.Verdict = fmt.Sprintf("not usable: failed %s", strings.Join(failures, ", "))
	case differs:
		r.Verdict = "usable with the proposed profile, and only with it"
	default:
		r.Verdict = "usable"
	}
	if r.Usable && warnings > 0 {
		r.Verdict += fmt.Sprintf("; read the %d warnings first", warnings)
		if warnings == 1 {
			r.Verdict = strings.Replace(r.Verdict, "the 1 warnings", "the warning", 1)
		}
	}
	if weakness := c.profile.Weakness(); r.Usable && weakness != "" {
		r.Verdict += "; " + weakness
	}
}

func describe(p Profile) string {
	who := "IVs are made here"
	if p.IV != IVOurs {
		who = fmt.Sprintf("the token makes IVs of %d bytes, %s", p.IVBytes, p.IV)
	}
	return fmt.Sprintf("AES-GCM is mechanism 0x%08x; %s; %s, CKA_VALUE_LEN %s, points %s; at most %d bytes at a time",
		uint32(p.GCM), who, p.ECDH, p.DeriveValueLen, p.PeerPoint, p.MaxDataBytes)
}

func difference(had, fits Profile) string {
	var d []string
	add := func(member string, a, b any) {
		if a != b {
			d = append(d, fmt.Sprintf("%s is %v where %v is needed", member, a, b))
		}
	}
	add("gcm_mechanism", fmt.Sprintf("0x%08x", uint32(had.GCM)), fmt.Sprintf("0x%08x", uint32(fits.GCM)))
	add("iv", had.IV, fits.IV)
	add("iv_bytes", had.IVBytes, fits.IVBytes)
	add("ecdh", had.ECDH, fits.ECDH)
	add("derive_value_len", had.DeriveValueLen, fits.DeriveValueLen)
	add("peer_point", had.PeerPoint, fits.PeerPoint)
	add("max_data_bytes", had.MaxDataBytes, fits.MaxDataBytes)
	return strings.Join(d, ", ")
}

// token looks at what the token says of itself.
func (c *checker) token(session) CheckLine {
	t, err := c.module.Ctx.GetTokenInfo(c.slot)
	if err != nil {
		return failed("see whether the token is still there", fmt.Errorf("C_GetTokenInfo: %w", err))
	}
	c.report.Token = fmt.Sprintf("%s %s, firmware %d.%d, serial number %s",
		t.ManufacturerID, t.Model, t.FirmwareVersion.Major, t.FirmwareVersion.Minor, t.SerialNumber)
	switch {
	case t.Flags&pkcs11.CKF_WRITE_PROTECTED != 0:
		return CheckLine{Result: CheckFail, Why: "the token is write-protected", Do: "lift the protection: keys are made, rotated and destroyed in it"}
	case t.Flags&(pkcs11.CKF_USER_PIN_FINAL_TRY|pkcs11.CKF_USER_PIN_COUNT_LOW) != 0:
		return warned("find out who tried wrong PINs before you go on", "wrong PINs have been tried; few tries or one are left")
	case strings.HasPrefix(c.report.Token, "SoftHSM"):
		return warned("use a hardware HSM in production",
			"%s: a folder of files; whoever copies it and the PIN file has the keys", c.report.Token)
	}
	return okay("%s", c.report.Token)
}

// leftovers destroys the keys of checks that were cut short.
func (c *checker) leftovers(s session) CheckLine {
	found, err := s.scratchObjects()
	for _, o := range found {
		if err == nil {
			err = s.p.DestroyObject(s.handle, o.handle)
		}
	}
	switch {
	case err != nil:
		return failed("destroy the objects labelled "+scratchPrefix+"… with the token's own tools", err)
	case len(found) > 0:
		return okay("destroyed %d objects of a check that was cut short", len(found))
	}
	return okay("none of an earlier check")
}

// scratchObjects lists the objects of this check and of earlier ones.
func (s session) scratchObjects() (all []object, err error) {
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		found, err := s.objects(class)
		if err != nil {
			return nil, err
		}
		for _, o := range found {
			named := func(p object) bool { return p.handle == o.handle }
			if strings.HasPrefix(o.label, scratchPrefix) && !slices.ContainsFunc(all, named) {
				all = append(all, o)
			}
		}
	}
	return all, nil
}

// destroy destroys the check's keys, and looks that they are gone.
func (c *checker) destroy(s session) CheckLine {
	do := "destroy the objects labelled " + scratchPrefix + "… with the token's own tools; the vault destroys keys when they are rotated"
	found, err := s.scratchObjects()
	if err != nil {
		return failed(do, err)
	}
	for _, o := range found {
		if err := s.p.DestroyObject(s.handle, o.handle); err != nil {
			return failed(do, fmt.Errorf("C_DestroyObject of %s: %w", o.label, err))
		}
	}
	left, err := s.scratchObjects()
	if err != nil {
		return failed(do, err)
	}
	if len(left) > 0 {
		return failed(do, fmt.Errorf("%w: %s is there though it was destroyed", errFaulty, left[0].label))
	}
	return okay("%d objects of this check destroyed", len(found))
}

// makeKey generates a key as the vault's are generated, and looks whether it became what was asked for.
// Those that multiply are pairs here whatever the profile says, to see whether the token can do better than it.
func (c *checker) makeKey(s session, purpose string) CheckLine {
	profile := c.profile
	profile.ECDH = ECDHDerive
	line := c.generate(s.under(profile), purpose)
	if line.Result == CheckFail && multiplies(purpose) && c.lower {
		return warned("see the line "+lineECDH, "%s", line.Why)
	}
	return line
}

// generate makes the check's key of a purpose, in the place of an earlier one.
func (c *checker) generate(s session, purpose string) CheckLine {
	const do = "see what the token's settings or its licence lack for this kind of key"
	var random [8]byte
	_, _ = rand.Read(random[:]) // crypto/rand never fails: it ends the process first
	sc := &scratch{label: scratchPrefix + purpose + "/" + hex.EncodeToString(random[:])}
	labelled := func(template []*pkcs11.Attribute) []*pkcs11.Attribute {
		return append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, sc.label))
	}
	sc.key = &key{name: KeyName{Purpose: purpose}} // generation 0: no key that is in use
	kind, _ := s.profile.kind(purpose)
	secret, private, public, err := s.profile.Templates(purpose)
	if err != nil {
		return failed(do, err)
	}
	if kind.class == pkcs11.CKO_SECRET_KEY {
		m := mechanism(s.profile.SecretKeyGen(purpose), nil)
		if sc.key.handle, err = s.p.GenerateKey(s.handle, m, labelled(secret)); err != nil {
			return failed(do, fmt.Errorf("C_GenerateKey: %w", err))
		}
	} else {
		sc.public, sc.key.handle, err = s.p.GenerateKeyPair(s.handle, mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil), labelled(public), labelled(private))
		if err != nil {
			return failed(do, fmt.Errorf("C_GenerateKeyPair: %w", err))
		}
		values, err := s.attributes(sc.public, pkcs11.CKA_EC_POINT)
		if err == nil {
			sc.key.public, err = parseECPoint(values[0])
		}
		if err != nil {
			return failed(do, fmt.Errorf("public half: %w", err))
		}
	}
	c.keys[purpose] = sc
	if err := s.require(sc.key.handle, append(kind.flags(), kind.shape()...)); err != nil {
		return failed("do not use this token: its keys do not become what is asked for", err)
	}
	return okay("made in the token, with the attributes that were asked for")
}

// lookup looks whether a label finds its one key.
func (c *checker) lookup(s session) CheckLine {
	for _, purpose := range scratchPurposes {
		sc := c.keys[purpose]
		if sc == nil {
			continue
		}
		found, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, kinds[purpose].class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, sc.label))
		if err != nil {
			return failed(brokenToken, err)
		}
		if len(found) != 1 || found[0] != sc.key.handle {
			return failed(brokenToken, fmt.Errorf("%w: looking for %s, of which there is one, found %d", errFaulty, sc.label, len(found)))
		}
	}
	return okay("each label finds its one key")
}

// slot is the session's.
func (s session) slot() (uint, error) {
	info, err := s.p.GetSessionInfo(s.handle)
	if err != nil {
		return 0, fmt.Errorf("C_GetSessionInfo: %w", err)
	}
	return info.SlotID, nil
}

// The measuring of a rate ends with the first of these.
const (
	rateTime       = 500 * time.Millisecond
	rateOperations = 500
)

// rates measures, in one session.
func (c *checker) rates(s session) CheckLine {
	master, oprf, mac, identity := c.keys[Master], c.keys[OPRF], c.keys[MAC], c.keys[Identity]
	if master == nil || oprf == nil || mac == nil || identity == nil {
		return CheckLine{Result: CheckWarn, Why: "not measured: a key is missing"}
	}
	var sealed []byte
	var left []string
	point := oprf.key.public.point.Bytes()
	plaintext := make([]byte, minDataBytes/2)
	for _, m := range []struct {
		operation string
		run       func() error
	}{
		{"seal", func() (err error) { sealed, err = s.seal(master.key, probeID, plaintext, probeAssociated); return err }},
		{"open", func() error {
			h, iv, ciphertext, ok := parseSealed(sealed)
			if !ok {
				return errors.New("nothing was sealed")
			}
			_, refused, err := s.decrypt(master.key, iv, ciphertext, h.associated(Master, probeAssociated))
			return errors.Join(refused, err)
		}},
		{"derive", func() error { _, err := s.x(oprf.key, point); return err }},
		{"MAC", func() error { _, err := s.mac(mac.key, plaintext); return err }},
		{"sign", func() error { _, err := s.sign(identity.key, [32]byte{1}); return err }},
	} {
		begun, n := time.Now(), 0
		var err error
		for ; err == nil && n < rateOperations && time.Since(begun) < rateTime; n++ {
			err = m.run()
		}
		if err != nil {
			left = append(left, m.operation)
			continue
		}
		c.report.Rates = append(c.report.Rates, CheckRate{m.operation, float64(n) / time.Since(begun).Seconds()})
	}
	if len(left) > 0 {
		return CheckLine{Result: CheckWarn, Why: "not measured, as it does not work: " + strings.Join(left, ", ")}
	}
	return CheckLine{} // the report has a place of its own for them
}
