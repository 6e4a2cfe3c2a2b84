//go:build js && wasm

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"syscall/js"

	"github.com/backup-key-vault/bkv/client"
)

// worker is the program's side of the messages.
type worker struct {
	sdk *sdk

	mu        sync.Mutex // the maps hold what is under way, and nothing that has ended
	cancels   map[int]context.CancelFunc
	tokens    map[int]chan js.Value // answers that the page still owes
	lastToken int
}

func main() {
	w := &worker{cancels: map[int]context.CancelFunc{}, tokens: map[int]chan js.Value{}}
	w.sdk = newSDK(func(base string) client.Transport { return fetch{base} }, w.token)
	js.Global().Set("onmessage", js.FuncOf(func(_ js.Value, args []js.Value) any {
		w.receive(args[0].Get("data"))
		return nil
	}))
	post(map[string]any{"ready": true})
	select {} // the page ends it, with the worker
}

func post(message any) { js.Global().Call("postMessage", message) }

// receive never blocks: it is called from the event loop that operations wait for.
func (w *worker) receive(m js.Value) {
	switch {
	case !m.Get("cancel").IsUndefined():
		w.mu.Lock()
		cancel := w.cancels[m.Get("cancel").Int()]
		w.mu.Unlock()
		if cancel != nil {
			cancel()
		}
	case !m.Get("token").IsUndefined():
		w.mu.Lock()
		n := m.Get("token").Int()
		answer := w.tokens[n]
		delete(w.tokens, n)
		w.mu.Unlock()
		if answer != nil {
			answer <- m // it has room for one
		}
	default:
		id := m.Get("id").Int()
		ctx, cancel := context.WithCancel(context.Background())
		w.mu.Lock()
		w.cancels[id] = cancel
		w.mu.Unlock()
		go w.perform(ctx, id, m)
	}
}

func (w *worker) perform(ctx context.Context, id int, m js.Value) {
	var data []byte
	if d := m.Get("data"); d.Truthy() {
		data = make([]byte, d.Get("length").Int())
		js.CopyBytesToGo(data, d)
	}
	result, out, failure := w.sdk.do(ctx, m.Get("op").String(), []byte(m.Get("params").String()), data)
	w.mu.Lock()
	w.cancels[id]()
	delete(w.cancels, id)
	w.mu.Unlock()
	answer := map[string]any{"id": id}
	if failure != nil {
		answer["error"] = marshal(failure)
	} else {
		answer["result"] = marshal(result)
		if out != nil {
			bytes := js.Global().Get("Uint8Array").New(len(out))
			js.CopyBytesToJS(bytes, out)
			answer["data"] = bytes
		}
	}
	post(answer)
}

// marshal is for our own types, none of which can fail.
func marshal(v any) string {
	out, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("marshalling %T: %v", v, err))
	}
	return string(out)
}

// token asks the page, and waits.
func (w *worker) token(ctx context.Context, vault int) (string, error) {
	answer := make(chan js.Value, 1)
	w.mu.Lock()
	w.lastToken++
	n := w.lastToken
	w.tokens[n] = answer
	w.mu.Unlock()
	post(map[string]any{"needToken": n, "vault": vault})
	select {
	case m := <-answer:
		if e := m.Get("error"); !e.IsUndefined() {
			return "", fmt.Errorf("%w: %s", errToken, e.String())
		}
		return m.Get("value").String(), nil
	case <-ctx.Done():
		w.mu.Lock()
		delete(w.tokens, n)
		w.mu.Unlock()
		return "", ctx.Err()
	}
}
