package vault

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"
	"time"
)

// Every field of an account, of a generation and of an attempt is under the row's MAC.
// A field that is added and forgotten there fails this test.
func TestRowMACCoversEveryField(t *testing.T) {
	t.Parallel()
	fresh := func() *Account {
		a := lawAccount(Frozen, Active, Destroyed)
		a.Head = a.Generations[2].ID
		a.Generations[2].Reason = Exhausted
		for i := range a.Generations {
			g := &a.Generations[i]
			g.ExpiresAt, g.CreatedAt, g.Strategy = epoch, epoch, "derive"
			g.Attempts = []Attempt{{Number: 1, Outcome: Open, ChargedAt: epoch, ExpiresAt: epoch}}
		}
		return a
	}
	exempt := map[string]bool{"Account.MAC": true} // the MAC itself
	base := fresh().macInput("v")
	checked := 0
	spoil := func(v reflect.Value, path string) {
		switch value := v.Interface().(type) {
		case time.Time:
			v.Set(reflect.ValueOf(value.Add(time.Microsecond)))
			return
		case time.Duration:
			v.SetInt(int64(value + time.Microsecond))
			return
		}
		switch v.Kind() {
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Uint32, reflect.Uint8:
			v.SetUint(v.Uint() + 1)
		case reflect.Int:
			v.SetInt(v.Int() + 1)
		default:
			t.Errorf("%s: a %v, which this test cannot change", path, v.Kind())
		}
	}
	// Each change is made alone, on a fresh account: the n-th leaf that walk reaches.
	for n := 0; ; n++ {
		a, seen, hit := fresh(), 0, ""
		var walk func(v reflect.Value, path string)
		walk = func(v reflect.Value, path string) {
			if hit != "" || exempt[path] {
				return
			}
			leaf := v.Kind() != reflect.Struct && v.Kind() != reflect.Slice && v.Kind() != reflect.Array
			if _, isTime := v.Interface().(time.Time); isTime || leaf {
				if seen == n {
					spoil(v, path)
					hit = path
				}
				seen++
				return
			}
			for i := range lengthOf(v) {
				if v.Kind() == reflect.Struct {
					walk(v.Field(i), path+"."+v.Type().Field(i).Name)
				} else {
					walk(v.Index(i), fmt.Sprintf("%s[%d]", path, i))
				}
			}
		}
		walk(reflect.ValueOf(a).Elem(), "Account")
		if hit == "" {
			break
		}
		checked++
		if bytes.Equal(a.macInput("v"), base) {
			t.Errorf("%s is not under the MAC", hit)
		}
	}
	if checked < 300 {
		t.Errorf("only %d values were reached", checked)
	}
	// And what is there or not.
	for name, change := range map[string]func(*Account){
		"a generation less":      func(a *Account) { a.Generations = a.Generations[1:] },
		"generations swapped":    func(a *Account) { a.Generations[0], a.Generations[1] = a.Generations[1], a.Generations[0] },
		"an attempt less":        func(a *Account) { a.Generations[1].Attempts = nil },
		"a delay less":           func(a *Account) { a.Policy.Delays = a.Policy.Delays[1:] },
		"no sealed secrets":      func(a *Account) { a.Generations[1].Sealed = nil },
		"the tombstone revived":  func(a *Account) { a.Generations[2].State = Active },
		"another tenant's row":   func(a *Account) { a.ID.Tenant = "other" },
		"tenant and user joined": func(a *Account) { a.ID = AccountID{"ap", "pu"} },
	} {
		a := fresh()
		if change(a); bytes.Equal(a.macInput("v"), base) {
			t.Errorf("%s: not under the MAC", name)
		}
	}
	if bytes.Equal(fresh().macInput("w"), base) {
		t.Error("another vault's row passes")
	}
}

func lengthOf(v reflect.Value) int {
	if v.Kind() == reflect.Struct {
		return v.NumField()
	}
	return v.Len()
}

// States survive their encoding, and nothing shorter, longer or of another kind does.
func TestStatesEncodeFixed(t *testing.T) {
	t.Parallel()
	e := enrolmentState{share: [32]byte{1}, follows: GenerationID{2}, oprfKey: 3, serverKey: 4, expires: epoch}
	r := recoveryState{claim: Claim{1}, attempt: 2, failuresSince: 3, failuresTotal: 4, expires: epoch}
	r.expect.ClientMAC[0], r.expect.SessionKey[0] = 5, 6
	var gotE enrolmentState
	var gotR recoveryState
	if err := gotE.decode(&reader{buf: e.encode()}); err != nil || gotE != e {
		t.Fatalf("%v, %v", gotE.expires, err)
	}
	if err := gotR.decode(&reader{buf: r.encode()}); err != nil || gotR != r {
		t.Fatalf("%v, %v", gotR.expires, err)
	}
	for n := range 300 {
		buf := make([]byte, n)
		if err := gotE.decode(&reader{buf: bytes.Clone(buf)}); (err == nil) != (n == len(e.encode())) {
			t.Errorf("%d bytes as an enrolment state: %v", n, err)
		}
		if err := gotR.decode(&reader{buf: buf}); (err == nil) != (n == len(r.encode())) {
			t.Errorf("%d bytes as a recovery state: %v", n, err)
		}
	}
}
