//go:build js && wasm

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall/js"
	"time"

	"github.com/backup-key-vault/bkv/client"
)

// fetchTimeout is for one request, to its answer's last byte.
const fetchTimeout = 30 * time.Second

// fetch is a [client.Transport] by the browser's fetch. Cookies go to the page's own origin.
type fetch struct{ base string }

func (t fetch) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	controller := js.Global().Get("AbortController").New()
	stop := context.AfterFunc(ctx, func() { controller.Call("abort") })
	defer stop()

	header := map[string]any{}
	for name, value := range r.Header {
		header[name] = value
	}
	options := map[string]any{
		"method": r.Method, "headers": header, "signal": controller.Get("signal"),
		"credentials": "same-origin", "redirect": "error", "cache": "no-store", "referrerPolicy": "no-referrer",
	}
	if len(r.Body) > 0 {
		body := js.Global().Get("Uint8Array").New(len(r.Body))
		js.CopyBytesToJS(body, r.Body)
		options["body"] = body
	}
	response, err := await(js.Global().Call("fetch", strings.TrimRight(t.base, "/")+r.Path, options))
	if err != nil {
		return nil, causeOf(ctx, err)
	}
	out := &client.Response{Status: response.Get("status").Int(), Header: map[string]string{}}
	headers := js.Global().Get("Array").Call("from", response.Get("headers"))
	for i := range headers.Length() {
		out.Header[headers.Index(i).Index(0).String()] = headers.Index(i).Index(1).String()
	}
	if response.Get("body").IsNull() {
		return out, nil
	}
	reader := response.Get("body").Call("getReader")
	for {
		chunk, err := await(reader.Call("read"))
		if err != nil {
			return nil, causeOf(ctx, err)
		}
		if chunk.Get("done").Bool() {
			return out, nil
		}
		value := chunk.Get("value")
		if len(out.Body)+value.Length() > client.MaxResponseBytes {
			controller.Call("abort")
			return nil, fmt.Errorf("reading the answer: over %d bytes", client.MaxResponseBytes)
		}
		part := make([]byte, value.Length())
		js.CopyBytesToGo(part, value)
		out.Body = append(out.Body, part...)
	}
}

// causeOf prefers the context's error over the AbortError that it brought about.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// await waits for a promise. It must not be called from the event loop.
func await(promise js.Value) (js.Value, error) {
	type outcome struct {
		value js.Value
		err   error
	}
	settled := make(chan outcome, 1)
	resolve := js.FuncOf(func(_ js.Value, args []js.Value) any {
		settled <- outcome{value: args[0]}
		return nil
	})
	defer resolve.Release()
	reject := js.FuncOf(func(_ js.Value, args []js.Value) any {
		// Names and texts of browsers' errors; none holds a URL's user or a body.
		settled <- outcome{err: errors.New(js.Global().Call("String", args[0]).String())}
		return nil
	})
	defer reject.Release()
	promise.Call("then", resolve, reject)
	o := <-settled
	return o.value, o.err
}
