package client_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/ohttp"
)

// relay is an app's back end that does as it likes with what it forwards, and keeps everything.
type relay struct {
	next client.Transport

	mu     sync.Mutex
	seen   []sent
	handle func(n int, r *client.Request, forward func() *client.Response) *client.Response // n counts capsules from 0; nil: forwards
	n      int
}

func (h *relay) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	forward := func() *client.Response {
		answer, err := h.next.RoundTrip(ctx, r)
		if err != nil {
			return nil
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.seen = append(h.seen, sent{step: stepOf(r), request: *r, answer: answer})
		return answer
	}
	h.mu.Lock()
	handle, n := h.handle, h.n
	capsule := r.Path == "/v1/relay"
	if capsule {
		h.n++
	}
	h.mu.Unlock()
	answer := (*client.Response)(nil)
	if handle == nil || !capsule {
		answer = forward()
	} else {
		answer = handle(n, r, forward)
	}
	if answer == nil {
		return nil, errLost
	}
	return answer, nil
}

// behave has the relay treat capsules in its own way from now on, counted anew.
func (h *relay) behave(handle func(n int, r *client.Request, forward func() *client.Response) *client.Response) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handle, h.n = handle, 0
}

func (h *relay) take() []sent {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := h.seen
	h.seen = nil
	return out
}

// behind is a device whose requests a relay forwards.
func (s *service) behind(user string) (*client.Client, *relay) {
	s.t.Helper()
	h := &relay{next: inProcess{s.handler}}
	config := s.config(user, h)
	config.Direct = false
	return newClient(s.t, config), h
}

func outsideProblem(status int, kind string, more string) *client.Response {
	return &client.Response{Status: status, Header: map[string]string{"content-type": api.ProblemMediaType},
		Body: []byte(`{"type":"` + kind + `","title":"x","status":` + string([]byte{'0' + byte(status/100), '0' + byte(status/10%10), '0' + byte(status%10)}) + more + `}`)}
}

// The relay sees the same sizes whatever is done and however it ends, and sending everything again changes nothing.
func TestRelayLearnsNothingAndReplaysInVain(t *testing.T) {
	s := newService(t)
	d, h := s.behind("alice")
	ctx := t.Context()
	enrolled, err := d.Enrol(ctx, "first")
	if err != nil {
		t.Fatal(err)
	}
	all := h.take()
	wantWrong(t, d, "wrong", 9)
	wrong := h.take()
	if got := mustRecover(t, d, "first"); got.Key != enrolled.Key {
		t.Fatal("another key")
	}
	right := h.take()
	if len(wrong) != len(right) {
		t.Errorf("a wrong password takes %d requests and a right one %d", len(wrong), len(right))
	}
	if _, err := d.ChangePassword(ctx, enrolled.Key, "second"); err != nil {
		t.Fatal(err)
	}
	if err := d.TurnOffWithoutProof(ctx); err != nil {
		t.Fatal(err)
	}
	all = append(append(append(all, wrong...), right...), h.take()...)
	var names []string
	for _, x := range all {
		if x.step == "GET /v1/vault" {
			if x.request.Header["authorization"] != "" {
				t.Error("the token was sent with what is public")
			}
			continue
		}
		if x.step != "POST /v1/relay" || len(x.request.Body) != 7+1088+65+ohttp.MinSizeClass+16 || len(x.request.Header) != 3 {
			t.Errorf("the relay sees %s of %d bytes, %v", x.step, len(x.request.Body), x.request.Header)
		}
		if x.answer.Status != 200 || len(x.answer.Body) != 32+ohttp.MinSizeClass+16 {
			t.Errorf("the relay sees an answer %d of %d bytes", x.answer.Status, len(x.answer.Body))
		}
		var header []string
		for name, value := range x.answer.Header {
			if name != "x-request-id" {
				header = append(header, name+value)
			}
		}
		names = append(names, strings.Join(header, ""))
	}
	if len(names) < 12 || len(names[0]) == 0 {
		t.Fatalf("%d capsules", len(names))
	}
	for _, n := range names {
		if len(n) != len(names[0]) {
			t.Errorf("headers of answers differ: %q", n)
		}
	}

	before, err := d.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	events, evaluated := len(s.store.Events()), s.token.Evaluated()
	for range 2 {
		for _, x := range all {
			if x.step != "POST /v1/relay" {
				continue
			}
			again, err := h.next.RoundTrip(ctx, &x.request)
			if err != nil || again.Status != 200 || bytes.Equal(again.Body, x.answer.Body) {
				t.Fatalf("a capsule again: %v, %+v", err, again)
			}
		}
	}
	after, err := d.Status(ctx)
	if err != nil || !reflect.DeepEqual(before, after) {
		t.Errorf("after everything was sent again: %v\n%+v, was\n%+v", err, after, before)
	}
	if n := len(s.store.Events()); n != events {
		t.Errorf("%d events came of it", n-events)
	}
	// A start of an enrolment sent again is evaluated under another share, and tells nothing of any record; an attempt is not.
	if n := s.token.Evaluated() - evaluated; n > 4 {
		t.Errorf("%d evaluations came of it", n)
	}
}

// A relay that recorded how a key was brought back cannot end a later freezing with it.
func TestRelayReplaysAReinstatementInVain(t *testing.T) {
	s := newService(t)
	d, h := s.behind("alice")
	ctx := t.Context()
	enrolled, err := d.Enrol(ctx, "right")
	if err != nil {
		t.Fatal(err)
	}
	freeze := func() *api.Generation {
		t.Helper()
		if err := d.TurnOffWithoutProof(ctx); err != nil {
			t.Fatal(err)
		}
		status, err := d.Status(ctx)
		if err != nil || len(status.Generations) != 1 || status.Generations[0].State != "frozen" {
			t.Fatalf("%v, %+v", err, status)
		}
		return &status.Generations[0]
	}
	first := freeze()
	h.take()
	if err := d.Reinstate(ctx, enrolled.Key); err != nil {
		t.Fatal(err)
	}
	recorded := h.take()
	second := freeze()
	if second.ExpiresAt.Equal(*first.ExpiresAt) {
		t.Fatal("two freezings have one end")
	}
	events := len(s.store.Events())
	replay := func() {
		t.Helper()
		for _, x := range recorded {
			if again, err := h.next.RoundTrip(ctx, &x.request); err != nil || again.Status != 200 {
				t.Fatalf("a capsule again: %v, %+v", err, again)
			}
		}
	}
	replay()
	after, err := d.Status(ctx)
	if err != nil || len(after.Generations) != 1 || !reflect.DeepEqual(&after.Generations[0], second) || len(s.store.Events()) != events {
		t.Fatalf("the recorded reinstatement did something: %v, %+v", err, after)
	}
	// The owner's next one works, and after it the recorded one is as idle.
	if err := d.Reinstate(ctx, enrolled.Key); err != nil {
		t.Fatal(err)
	}
	replay()
	if got := mustRecover(t, d, "right"); got.Key != enrolled.Key {
		t.Error("another key")
	}
}

// Whatever a relay does to one capsule or its answer, the operation goes on, and makes one attempt.
func TestManglingRelay(t *testing.T) {
	s := newService(t)
	d, h := s.behind("alice")
	other, otherRelay := s.behind("berta")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Status(t.Context()); !errors.Is(err, client.ErrNotEnrolled) {
		t.Fatal(err)
	}
	foreign, earlier := otherRelay.take(), h.take()
	foreignAnswer, earlierAnswer := foreign[len(foreign)-1].answer, earlier[len(earlier)-1].answer
	with := func(answer *client.Response, body []byte) *client.Response {
		return &client.Response{Status: answer.Status, Header: answer.Header, Body: body}
	}
	attempts := uint32(1)
	for name, mangle := range map[string]func(r *client.Request, forward func() *client.Response) *client.Response{
		"drops the request": func(*client.Request, func() *client.Response) *client.Response { return nil },
		"drops the answer":  func(_ *client.Request, forward func() *client.Response) *client.Response { forward(); return nil },
		"repeats":           func(_ *client.Request, forward func() *client.Response) *client.Response { forward(); return forward() },
		"gives the first of two": func(_ *client.Request, forward func() *client.Response) *client.Response {
			first := forward()
			forward()
			return first
		},
		"cuts the request": func(r *client.Request, forward func() *client.Response) *client.Response {
			r.Body = r.Body[:len(r.Body)/2]
			return forward()
		},
		"cuts the answer": func(_ *client.Request, forward func() *client.Response) *client.Response {
			a := forward()
			return with(a, a.Body[:len(a.Body)-1])
		},
		"changes the answer": func(_ *client.Request, forward func() *client.Response) *client.Response {
			a := forward()
			b := bytes.Clone(a.Body)
			b[len(b)/2] ^= 1
			return with(a, b)
		},
		"gives another user's answer": func(_ *client.Request, forward func() *client.Response) *client.Response {
			forward()
			return foreignAnswer
		},
		"gives an earlier answer": func(_ *client.Request, forward func() *client.Response) *client.Response {
			forward()
			return earlierAnswer
		},
		"answers itself": func(*client.Request, func() *client.Response) *client.Response {
			return &client.Response{Status: 200, Body: []byte(`{"ke2":"","attempts_left":10}`)}
		},
		"is busy": func(*client.Request, func() *client.Response) *client.Response {
			return outsideProblem(503, "about:blank", "")
		},
		"says the key is retired": func(*client.Request, func() *client.Response) *client.Response {
			return outsideProblem(400, api.OHTTPKey, "")
		},
		"says the token is bad": func(*client.Request, func() *client.Response) *client.Response {
			return outsideProblem(401, api.Unauthenticated, "")
		},
	} {
		for _, at := range []int{1, 2} { // the start of a recovery, and its finish
			h.behave(func(n int, r *client.Request, forward func() *client.Response) *client.Response {
				if n == at {
					return mangle(r, forward)
				}
				return forward()
			})
			if _, err := d.Recover(t.Context(), "right"); err != nil {
				t.Errorf("it %s at %d: %v", name, at, err)
				continue
			}
			h.behave(nil)
			status, err := d.Status(t.Context())
			attempts++
			if err != nil || status.AttemptsLeft != 10 || status.Generations[0].NextAttempt != attempts {
				t.Fatalf("it %s at %d: %v, %+v", name, at, err, status)
			}
		}
	}
}

// A relay that lies for good is not believed, and what was begun can be gone on with.
func TestLyingRelay(t *testing.T) {
	s := newService(t)
	d, h := s.behind("alice")
	enrolled, err := d.Enrol(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	for name, lie := range map[string]*client.Response{
		"the password is wrong":      outsideProblem(403, api.WrongPassword, `,"attempts_left":3`),
		"the key is destroyed":       outsideProblem(410, api.KeyDestroyed, ""),
		"the account changed":        outsideProblem(409, api.Conflict, ""),
		"take the direct route":      outsideProblem(403, api.RelayRequired, ""),
		"there is no such path":      outsideProblem(404, api.NotFound, ""),
		"the relay key is not known": outsideProblem(400, api.OHTTPKey, ""),
		"the vault is away":          outsideProblem(503, api.StoreUnavailable, ""),
	} {
		h.take()
		h.behave(func(n int, _ *client.Request, forward func() *client.Response) *client.Response {
			if n < 2 {
				return forward()
			}
			return lie
		})
		_, err := d.Recover(t.Context(), "right")
		var pending *client.PendingRecovery
		if !errors.As(err, &pending) || !errors.Is(err, client.ErrRelay) && !errors.Is(err, client.ErrUnavailable) {
			t.Fatalf("%s: %v", name, err)
		}
		fetched := 0
		for _, x := range h.take() {
			if x.step == "GET /v1/vault" {
				fetched++
			}
		}
		if fetched > 1 {
			t.Errorf("%s: the keys were fetched %d times", name, fetched)
		}
		h.behave(nil)
		if got, err := pending.Resume(t.Context()); err != nil || got.Key != enrolled.Key {
			t.Fatalf("%s, and then not: %v", name, err)
		}
	}
}

// A relay that sends one user's capsule under another's token does neither of them harm.
func TestRelaySwapsUsers(t *testing.T) {
	s := newService(t)
	d, h := s.behind("alice")
	h.behave(func(_ int, r *client.Request, forward func() *client.Response) *client.Response {
		r.Header["authorization"] = "Bearer " + s.jwt("berta", 300e9)
		return forward()
	})
	if _, err := d.Status(t.Context()); !errors.Is(err, client.ErrForbidden) {
		t.Errorf("alice's capsule under berta's token: %v", err)
	}
	if len(s.store.Events()) != 0 {
		t.Error("something was done")
	}
}

// Keys that the relay serves are not those that the pinned identity signed.
func TestRelayServesOtherKeys(t *testing.T) {
	s := newService(t)
	forged := newService(t) // another vault, whose keys the relay has
	var theirs api.Vault
	answer, err := inProcess{forged.handler}.RoundTrip(t.Context(), &client.Request{Method: "GET", Path: "/v1/vault"})
	if err == nil {
		err = json.Unmarshal(answer.Body, &theirs)
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(v *api.Vault){
		"its own relay keys":     func(v *api.Vault) { v.Keys.Keys = append(v.Keys.Keys[:1:1], theirs.Keys.Keys[1:]...) },
		"no hybrid":              func(v *api.Vault) { v.Keys.Keys = append(v.Keys.Keys[:1:1], v.Keys.Keys[2:]...) },
		"no relay key":           func(v *api.Vault) { v.Keys.Keys = v.Keys.Keys[:1] },
		"the plain key first":    func(v *api.Vault) { k := v.Keys.Keys; k[1], k[2] = k[2], k[1] },
		"its own signature":      func(v *api.Vault) { v.Keys.Signature = theirs.Keys.Signature },
		"another vault entirely": func(v *api.Vault) { *v = theirs },
	} {
		w := &wire{next: inProcess{s.handler}}
		w.tamper = func(step string, r *client.Response) {
			if step != "GET /v1/vault" {
				return
			}
			var v api.Vault
			if err := json.Unmarshal(r.Body, &v); err != nil {
				t.Error(err)
			}
			change(&v)
			r.Body, _ = json.Marshal(v)
		}
		config := s.config("alice", w)
		config.Direct = false
		if _, err := newClient(t, config).Enrol(t.Context(), "password"); !errors.Is(err, client.ErrWrongVault) {
			t.Errorf("%s: %v", name, err)
		}
		if all := steps(w.take()); len(all) != 1 {
			t.Errorf("%s: %v was sent", name, all)
		}
	}

	// An older list that the vault did sign.
	old, err := inProcess{s.handler}.RoundTrip(t.Context(), &client.Request{Method: "GET", Path: "/v1/vault"})
	if err != nil {
		t.Fatal(err)
	}
	s.token.RotateRelay()
	d, h := s.relayed("alice")
	if _, err := d.Status(t.Context()); !errors.Is(err, client.ErrNotEnrolled) {
		t.Fatal(err)
	}
	s.token.DestroyRelays()
	s.token.RotateRelay()
	s.token.DestroyRelays() // the device's key is gone, and it has to ask
	h.set(func(w *wire) {
		w.tamper = func(step string, r *client.Response) {
			if step == "GET /v1/vault" {
				*r = *old
			}
		}
	})
	if _, err := d.Status(t.Context()); !errors.Is(err, client.ErrStaleKeys) {
		t.Errorf("an older list: %v", err)
	}
	h.set(func(w *wire) { w.tamper = nil })
	h.take()
	if _, err := d.Status(t.Context()); !errors.Is(err, client.ErrNotEnrolled) {
		t.Errorf("the list of now: %v", err)
	}
	if all := steps(h.take()); !reflect.DeepEqual(all, []string{"POST /v1/relay", "GET /v1/vault", "POST /v1/relay"}) {
		t.Errorf("a retired key took %v", all)
	}
}

// On the direct route the vault refuses an enrolment of a tenant that does not trust its back end, and says why.
func TestDirectEnrolmentIsRefused(t *testing.T) {
	s := newService(t)
	s.strict = true
	d, _ := s.device("alice")
	if _, err := d.Enrol(t.Context(), "password"); !errors.Is(err, client.ErrRelayRequired) {
		t.Errorf("an enrolment on the direct route: %v", err)
	}
	d, _ = s.relayed("alice")
	if _, err := d.Enrol(t.Context(), "password"); err != nil {
		t.Error(err)
	}
}
