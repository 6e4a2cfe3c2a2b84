package e2e_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// wiretap keeps what a device sends and receives.
type wiretap struct {
	client.Transport

	mu     sync.Mutex
	tokens []string
	bodies [][]byte
}

func (w *wiretap) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	answer, err := w.Transport.RoundTrip(ctx, r)
	w.mu.Lock()
	defer w.mu.Unlock()
	if token := r.Header["authorization"]; token != "" { // what is public needs none
		w.tokens = append(w.tokens, strings.TrimPrefix(token, "Bearer "))
		w.bodies = append(w.bodies, r.Body)
		if err == nil {
			w.bodies = append(w.bodies, answer.Body)
		}
	}
	return answer, err
}

// A user's life with the SDK and the built vaultd. Afterwards the log, at its most
// talkative, holds nothing of it: no user, token, PIN, password, key or member of a body.
func TestStoryLeavesNothingInTheLog(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t, "BKV_LOG_LEVEL=debug")
	ctx := t.Context()
	const (
		user   = "zoë/capybara@example.org"
		first  = "password-Narwhal-31"
		second = "password-Pangolin-62"
	)
	tap := &wiretap{Transport: at(v)}
	phone := func() *client.Client { return d.direct(t, user, tap) } // what it sends can be read
	var wrong *client.WrongPasswordError

	if _, err := phone().Recover(ctx, first); !errors.Is(err, client.ErrNotEnrolled) {
		t.Fatalf("before the enrolment: %v", err)
	}
	enrolled, err := phone().Enrol(ctx, first)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := phone().Enrol(ctx, first); !errors.Is(err, client.ErrAlreadyEnrolled) {
		t.Fatalf("a second enrolment: %v", err)
	}
	if _, err := phone().Recover(ctx, "password-Tapir-4"); !errors.As(err, &wrong) || wrong.AttemptsLeft != 9 {
		t.Fatalf("a wrong password: %v", err)
	}
	recovered, err := phone().Recover(ctx, first)
	if err != nil || recovered.Key != enrolled.Key || recovered.FailuresSince != 1 {
		t.Fatalf("recovering: %v, %d failures", err, recovered.FailuresSince)
	}
	if _, err := phone().ChangePassword(ctx, recovered.Key, second); err != nil {
		t.Fatal(err)
	}
	if _, err := phone().Recover(ctx, first); !errors.As(err, &wrong) || wrong.AttemptsLeft != 9 {
		t.Fatalf("the old password: %v", err)
	}
	if again, err := phone().Recover(ctx, second); err != nil || again.Key != enrolled.Key {
		t.Fatalf("the new password: %v", err)
	}
	if again, err := d.device(t, user, at(v)).Recover(ctx, second); err != nil || again.Key != enrolled.Key {
		t.Fatalf("over the relay channel: %v", err)
	}
	if err := phone().TurnOff(ctx, enrolled.Key); err != nil {
		t.Fatal(err)
	}
	if _, err := phone().Recover(ctx, second); !errors.Is(err, client.ErrNotEnrolled) {
		t.Fatalf("after it was turned off: %v", err)
	}
	// Somebody else's token, no token, and nonsense, which is logged in other words.
	mallory := d.phone(at(v), "mallory-Ocelot")
	if r, err := mallory.send(ctx, "POST", "/recovery", map[string]string{"ke1": "body-Wombat-83", "member-Lemur-17": ""}); err != nil || r.status != 400 {
		t.Fatalf("nonsense: %v, %v", r, err)
	}
	if r := get(t, v.url+"/v1/users/"+url.PathEscape(user)+"/backup-key?query-Gecko-9=1"); r.status != 401 {
		t.Fatalf("without a token: %v", r)
	}
	v.stop(t)

	log := v.log.String()
	if n := strings.Count(log, `"msg":"request"`); n < 20 {
		t.Fatalf("%d requests in the log, so that the search would say nothing", n)
	}
	secrets := map[string]string{
		"a body": "Wombat", "a body's member": "Lemur", "a query": "Gecko",
		"the key": base64.RawURLEncoding.EncodeToString(enrolled.Key[:]), "the key's digits": enrolled.Key.Digits()[:9],
		"the first password": "Narwhal", "the second password": "Pangolin", "a wrong password": "Tapir",
		"the user": "capybara", "the other user": "Ocelot", "PIN": pin, "SO PIN": soPIN, "database password": dbPassword,
	}
	for _, token := range tap.tokens {
		_, signature, _ := strings.Cut(token[strings.IndexByte(token, '.')+1:], ".")
		secrets["a token"], secrets["a token's signature"] = token, signature
		for what, secret := range secrets {
			if strings.Contains(log, secret) {
				t.Fatalf("%s is in the log:\n%s", what, log)
			}
		}
	}
	members := 0
	for _, body := range tap.bodies {
		if len(body) == 0 {
			continue
		}
		var object any
		if err := json.Unmarshal(body, &object); err != nil {
			t.Fatal(err)
		}
		eachText(object, func(text string) {
			members++
			if strings.Contains(log, text) {
				t.Errorf("a body's %q is in the log", text)
			}
		})
	}
	if members < 50 {
		t.Errorf("%d members of bodies were searched for, which is too few to say anything", members)
	}
}

// eachText calls f with every text in a JSON value that is long enough to be more than
// a word: bytes, ids, states. What the log may name is not among them.
func eachText(value any, f func(string)) {
	switch value := value.(type) {
	case map[string]any:
		for member, v := range value {
			// Request ids are made for the log; types and texts of problems are the program's own.
			if member != "instance" && member != "type" && member != "detail" && member != "title" {
				eachText(v, f)
			}
		}
	case []any:
		for _, v := range value {
			eachText(v, f)
		}
	case string:
		if len(value) >= 20 {
			f(value)
		}
	}
}
