package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// terminal asks the person. Answers come from standard input if that is a terminal; questions go
// to standard error or, if that goes elsewhere, to the same terminal. So standard output holds only
// what was asked for.
type terminal struct {
	in, out *os.File
}

// interactive reports whether there is somebody to ask.
func (t *terminal) interactive() bool { return term.IsTerminal(int(t.in.Fd())) }

// show writes what belongs to a question, and must be seen by whoever answers.
func (t *terminal) show(format string, args ...any) error {
	to := t.out
	if !t.shows() {
		to = t.in // a terminal is open for both, as a rule
	}
	_, err := fmt.Fprintf(to, format, args...)
	return err
}

// shows reports whether somebody sees what is written.
func (t *terminal) shows() bool { return term.IsTerminal(int(t.out.Fd())) }

func (t *terminal) printf(format string, args ...any) {
	_, _ = fmt.Fprintf(t.out, format, args...) // there is nobody to tell
}

var (
	// errNobody: there is no terminal, and no flag says it either.
	errNobody = errors.New("there is no terminal to ask at")
	// errNoAnswer: the input ended at a question, as by Ctrl-D.
	errNoAnswer = errors.New("no answer came: run it again to be asked again")
)

// maxLineBytes bounds an answer; a password has at most 1,024.
const maxLineBytes = 8 << 10

// ask asks for a line. Hidden is for what nobody else should see.
//
// Errors: errNobody, errNoAnswer, and the context's.
func (t *terminal) ask(ctx context.Context, question string, hidden bool) (string, error) {
	if !t.interactive() {
		return "", errNobody
	}
	if err := t.show("%s", question); err != nil {
		return "", err
	}
	fd := int(t.in.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	type answer struct {
		line string
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		read := readLine
		if hidden {
			read = readHidden
		}
		line, err := read(t.in)
		if errors.Is(err, io.EOF) {
			err = errNoAnswer
		}
		answered <- answer{line, err}
	}()
	select {
	case a := <-answered:
		if hidden || errors.Is(a.err, errNoAnswer) {
			err = t.show("\n")
		}
		return a.line, errors.Join(a.err, err)
	case <-ctx.Done():
		// The reading itself cannot be stopped, but the process ends.
		return "", errors.Join(ctx.Err(), t.show("\n"), term.Restore(fd, before))
	}
}

// readLine reads up to a line break and not a byte further: what follows may be a password.
func readLine(f *os.File) (string, error) {
	var line []byte
	for one := make([]byte, 1); len(line) < maxLineBytes; {
		n, err := f.Read(one)
		if n == 1 && one[0] == '\n' {
			return strings.TrimSuffix(string(line), "\r"), nil
		}
		line = append(line, one[:n]...)
		if err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("the answer is longer than %d bytes", maxLineBytes)
}

// confirm asks for one word, and returns an error unless that is the answer.
func (t *terminal) confirm(ctx context.Context, question, word string) error {
	got, err := t.ask(ctx, fmt.Sprintf("%s Type %q to go on: ", question, word), false)
	if err != nil {
		return err
	}
	if !strings.EqualFold(strings.TrimSpace(got), word) {
		return errors.New("nothing was done")
	}
	return nil
}
