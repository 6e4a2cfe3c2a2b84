package main

import (
	"errors"
	"net"
	"net/netip"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// bounded is a listener that keeps at most so many connections open, and of one address at most so many. What
// comes beyond is closed at once: whoever opens thousands finds the door shut, and everybody else finds it
// open. Time-outs of the server take care of those that are open and silent.
type bounded struct {
	net.Listener
	most, perAddress int

	mu        sync.Mutex // guarantees that open is the sum of addresses
	open      int
	addresses map[netip.Prefix]int
	refused   map[string]uint64 // by which limit it was
}

// Limits by which a connection is refused.
const (
	byTotal   = "total"
	byAddress = "address"
)

func bound(l net.Listener, most, perAddress int) *bounded {
	return &bounded{Listener: l, most: most, perAddress: perAddress, addresses: map[netip.Prefix]int{}, refused: map[string]uint64{}}
}

// Accept returns the next connection that is within the limits.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := addressOf(c)
		if b.admit(from) {
			return &boundedConn{Conn: c, release: sync.OnceFunc(func() { b.leave(from) })}, nil
		}
		_ = c.Close() // there is nobody to tell
	}
}

func (b *bounded) admit(from netip.Prefix) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.addresses[from] >= b.perAddress:
		b.refused[byAddress]++
		return false
	case b.open >= b.most:
		b.refused[byTotal]++
		return false
	}
	b.open++
	b.addresses[from]++
	return true
}

func (b *bounded) leave(from netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open--
	if b.addresses[from]--; b.addresses[from] == 0 {
		delete(b.addresses, from)
	}
}

// addressOf is whose connection it is: an IPv4 address, or the /64 that somebody who has one IPv6 address usually has all of.
func addressOf(c net.Conn) netip.Prefix {
	at, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return netip.Prefix{} // no TCP: all are one
	}
	address, bits := at.Addr().Unmap().WithZone(""), 32
	if address.Is6() {
		bits = 64
	}
	prefix, err := address.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}

type boundedConn struct {
	net.Conn
	release func()
}

// Close gives the place back.
func (c *boundedConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// CloseWrite lets the server end its side first.
func (c *boundedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// watchConnections adds how many connections listeners have, by name.
func (m *metrics) watchConnections(listeners map[string]*bounded) {
	open := newGauge("bkv_connections", "Connections that are open.", "listener")
	most := newGauge("bkv_connections_max", "Most connections that may be open.", "listener")
	refused := newCount("bkv_connections_refused_total", "Connections that were closed at once because too many were open, in all (total) or from one address (address).", "listener", "limit")
	m.registry.MustRegister(collected{[]gauge{open, most, refused}, func(out chan<- prometheus.Metric) {
		for name, b := range listeners {
			b.mu.Lock()
			n, total, address := b.open, b.refused[byTotal], b.refused[byAddress]
			b.mu.Unlock()
			open.is(out, float64(n), name)
			most.is(out, float64(b.most), name)
			refused.is(out, float64(total), name, byTotal)
			refused.is(out, float64(address), name, byAddress)
		}
	}})
}
