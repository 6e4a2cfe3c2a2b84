package storetest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Proxy stands between a program and Postgres, counts statements, and loses the
// connection where a test says so: before a statement arrives, or after it
// was committed and before the program knows.
type Proxy struct {
	url    string // for programs
	server string // Postgres's socket

	mu         sync.Mutex // guards what follows
	statements int
	cut        int  // at this statement; 0: none
	after      bool // cut after it, not before
	open       map[net.Conn]bool
	closed     bool
}

// NewProxy returns a proxy to the database of url, one of a Database's. It is gone
// when the test ends.
func NewProxy(t testing.TB, to string) *Proxy {
	t.Helper()
	u, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "bkv-px-")
	if err != nil {
		t.Fatal(err)
	}
	const socket = ".s.PGSQL.5432" // where clients look in the directory that they are given as the host
	listener, err := net.Listen("unix", filepath.Join(dir, socket))
	if err != nil {
		os.RemoveAll(dir)
		t.Fatal(err)
	}
	p := &Proxy{server: filepath.Join(u.Query().Get("host"), socket), open: map[net.Conn]bool{}}
	u.RawQuery = url.Values{"host": {dir}}.Encode()
	p.url = u.String()
	var running sync.WaitGroup
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { p.serve(client) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		p.mu.Lock()
		p.closed = true
		for conn := range p.open {
			conn.Close()
		}
		p.mu.Unlock()
		running.Wait()
		os.RemoveAll(dir)
	})
	return p
}

// URL is the database through the proxy.
func (p *Proxy) URL() string { return p.url }

// CutBefore loses the connection instead of the nth statement from now, 1 being the
// next: it does not arrive.
func (p *Proxy) CutBefore(n int) { p.arm(n, false) }

// CutAfter loses the connection in place of the answer to the nth statement from now:
// it is committed.
func (p *Proxy) CutAfter(n int) { p.arm(n, true) }

func (p *Proxy) arm(n int, after bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut, p.after = p.statements+n, after
}

// Statements counts what was executed, or cut off, so far. Preparing a statement is none.
func (p *Proxy) Statements() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.statements
}

// next counts a statement and says whether to cut before or after it.
func (p *Proxy) next() (before, after bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.statements++
	hit := p.statements == p.cut
	return hit && !p.after, hit && p.after
}

// keep remembers a connection until it is forgotten, to be closed at the end.
func (p *Proxy) keep(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.open[conn] = true
	return true
}

func (p *Proxy) forget(conn net.Conn) {
	conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, conn)
}

func (p *Proxy) serve(client net.Conn) {
	defer p.forget(client)
	if !p.keep(client) {
		return
	}
	server, err := net.Dial("unix", p.server)
	if err != nil {
		return // Postgres is gone: so is the connection
	}
	defer p.forget(server)
	if !p.keep(server) {
		return
	}
	lose := make(chan struct{}) // closed: answers are lost from now on
	var answers sync.WaitGroup
	answers.Go(func() {
		defer client.Close()
		forwardAnswers(client, server, lose)
	})
	p.forwardStatements(server, client, lose)
	select {
	case <-lose: // the server is still at the last statement
	default:
		server.Close()
	}
	answers.Wait()
}

// errCut: the connection is to be lost here.
var errCut = errors.New("cut")

// Messages of Postgres's protocol 3 (PostgreSQL documentation, 55.7): a type byte but for
// the first, a length that counts itself, and a body.
const (
	messageExecute       = 'E' // of the client
	messageReadyForQuery = 'Z' // of the server: the statement is over, committed or not
)

func (p *Proxy) forwardStatements(server io.Writer, client io.Reader, lose chan struct{}) error {
	from, to := bufio.NewReader(client), bufio.NewWriter(server)
	if err := copyBody(to, from); err != nil { // the first has no type
		return err
	}
	for {
		if from.Buffered() == 0 {
			if err := to.Flush(); err != nil {
				return err
			}
		}
		kind, err := from.ReadByte()
		if err != nil {
			return err
		}
		if kind == messageExecute {
			before, after := p.next()
			if before {
				return errCut // what is not flushed never arrives
			}
			if after {
				close(lose)
			}
		}
		if err := errors.Join(to.WriteByte(kind), copyBody(to, from)); err != nil {
			return err
		}
	}
}

func forwardAnswers(client io.Writer, server io.Reader, lose <-chan struct{}) error {
	from, to := bufio.NewReader(server), bufio.NewWriter(client)
	for {
		if from.Buffered() == 0 {
			if err := to.Flush(); err != nil {
				return err
			}
		}
		kind, err := from.ReadByte()
		if err != nil {
			return err
		}
		select {
		case <-lose:
			if err := copyBody(io.Discard, from); err != nil {
				return err
			}
			if kind == messageReadyForQuery {
				return errCut
			}
		default:
			if err := errors.Join(to.WriteByte(kind), copyBody(to, from)); err != nil {
				return err
			}
		}
	}
}

// copyBody copies a message from its length on.
func copyBody(to io.Writer, from io.Reader) error {
	var length [4]byte
	if _, err := io.ReadFull(from, length[:]); err != nil {
		return err
	}
	size := int64(binary.BigEndian.Uint32(length[:])) - int64(len(length))
	if size < 0 {
		return errors.New("malformed message")
	}
	if _, err := to.Write(length[:]); err != nil {
		return err
	}
	_, err := io.CopyN(to, from, size)
	return err
}
