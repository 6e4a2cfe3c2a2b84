package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// meter shows how far something is, how fast, and how long it will still take: one line at a
// terminal, written over again and again; nothing elsewhere.
type meter struct {
	what  string
	total int64 // 0: not known
	done  atomic.Int64
	begun time.Time

	out     *terminal // nil: nothing is shown
	stop    chan struct{}
	stopped sync.WaitGroup
}

const meterEvery = 250 * time.Millisecond

// meter starts one. Its end must be called.
func (e *environment) meter(what string, total int64) *meter {
	m := &meter{what: what, total: total, begun: time.Now(), stop: make(chan struct{})}
	if e.quiet || !e.term.shows() {
		return m
	}
	m.out = e.term
	m.stopped.Go(func() {
		ticker := time.NewTicker(meterEvery)
		defer ticker.Stop()
		for {
			m.out.printf("\r%s\x1b[K", m.line(time.Since(m.begun)))
			select {
			case <-ticker.C:
			case <-m.stop:
				m.out.printf("\r\x1b[K")
				return
			}
		}
	})
	return m
}

// add counts bytes.
func (m *meter) add(n int) { m.done.Add(int64(n)) }

// end takes the line away. It may be called more than once.
func (m *meter) end() {
	select {
	case <-m.stop:
	default:
		close(m.stop)
	}
	m.stopped.Wait()
}

// note writes a line of its own above the meter's.
func (e *environment) note(m *meter, format string, args ...any) {
	clear := ""
	if m != nil && m.out != nil {
		clear = "\r\x1b[K"
	}
	e.term.printf(clear+format+"\n", args...)
}

func (m *meter) line(elapsed time.Duration) string {
	done := m.done.Load()
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", m.what, size(done))
	if m.total > 0 {
		fmt.Fprintf(&b, " of %s (%d %%)", size(m.total), min(100, done*100/m.total))
	}
	if elapsed < time.Second || done == 0 {
		return b.String()
	}
	speed := float64(done) / elapsed.Seconds()
	fmt.Fprintf(&b, ", %s/s", size(int64(speed)))
	if left := m.total - done; left > 0 {
		fmt.Fprintf(&b, ", %v left", time.Duration(float64(left)/speed*float64(time.Second)).Round(time.Second))
	}
	return b.String()
}

// size is a number of bytes for people.
func size(n int64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n)
	unit := -1
	for f >= 1024 && unit < len(units)-1 {
		f /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %s", f, units[unit])
}

// measured is a reader that a meter counts.
type measured struct {
	io.Reader
	meter *meter
}

func (r measured) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.meter.add(n)
	return n, err
}
