package main

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/backup-key-vault/bkv/client"
)

// httpDate is IMF-fixdate, the one form in which servers write dates (RFC 9110 §5.6.7).
const httpDate = "Mon, 02 Jan 2006 15:04:05 GMT"

// clocked is a transport that notes how far the server's clock is from the device's. Waits
// are shown by it: the vault names them in its own time, and the device's may be days off.
// It decides nothing else.
type clocked struct {
	next   client.Transport
	offset atomic.Int64 // the server's clock less the device's, in nanoseconds
}

func (c *clocked) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	response, err := c.next.RoundTrip(ctx, r)
	if err != nil {
		return nil, err
	}
	if date, err := time.Parse(httpDate, response.Header["date"]); err == nil {
		c.offset.Store(int64(time.Until(date)))
	}
	return response, nil
}

func (c *clocked) now() time.Time { return time.Now().Add(time.Duration(c.offset.Load())) }
