package ohttp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Framing indicators (RFC 9292 section 3.3).
const (
	knownLengthRequest          = 0
	knownLengthResponse         = 1
	indeterminateLengthRequest  = 2
	indeterminateLengthResponse = 3
)

const (
	// MaxFields bounds the field lines that a decoder takes, in header and trailer together.
	MaxFields = 128
	// maxInformational bounds the informational responses before a final one.
	maxInformational = 16
)

// ErrMessage is what no Binary HTTP message may be (RFC 9292 section 4).
var ErrMessage = errors.New("not a valid Binary HTTP message")

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMessage, fmt.Sprintf(format, args...))
}

// Field is one field line. Names are in lower case.
type Field struct{ Name, Value string }

// Request is an HTTP request (RFC 9292 section 3.4).
type Request struct {
	Method, Scheme, Authority string
	// Path is what :path is in HTTP/2: the path and, after a question mark, the query.
	Path    string
	Header  []Field
	Content []byte
	Trailer []Field
}

// Response is an HTTP response (RFC 9292 section 3.5).
type Response struct {
	Informational []Informational
	Status        int // 200 to 599
	Header        []Field
	Content       []byte
	Trailer       []Field
}

// Informational is a response before the final one.
type Informational struct {
	Status int // 100 to 199
	Header []Field
}

// Encode writes the request with known length, without padding. It fails with ErrMessage for what
// DecodeRequest would refuse, but for too many fields.
func (r *Request) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	b := appendVarint(nil, knownLengthRequest)
	for _, s := range []string{r.Method, r.Scheme, r.Authority, r.Path} {
		b = appendString(b, s)
	}
	b = appendFields(b, r.Header)
	b = appendString(b, string(r.Content))
	return appendFields(b, r.Trailer), nil
}

// Encode writes the response with known length, without padding. It fails with ErrMessage for what
// DecodeResponse would refuse, but for too many fields.
func (r *Response) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	b := appendVarint(nil, knownLengthResponse)
	for _, i := range r.Informational {
		b = appendFields(appendVarint(b, uint64(i.Status)), i.Header)
	}
	b = appendFields(appendVarint(b, uint64(r.Status)), r.Header)
	b = appendString(b, string(r.Content))
	return appendFields(b, r.Trailer), nil
}

// MinSizeClass is the smallest size that Pad makes. Every ordinary message of a vault fits into it.
const MinSizeClass = 4 << 10

// Pad appends zeros (RFC 9292 section 3.8) up to the message's size class, so that whoever sees the sealed message learns
// its class alone: MinSizeClass or the next power of two.
func Pad(message []byte) []byte {
	class := MinSizeClass
	for class < len(message) {
		class *= 2
	}
	return append(message, make([]byte, class-len(message))...)
}

// DecodeRequest reads a whole request of known or indeterminate length. What it returns does not share
// memory with b. Its error is ErrMessage, and says what is wrong without repeating it.
func DecodeRequest(b []byte) (*Request, error) {
	d := decoder{rest: b}
	switch d.varint() {
	case knownLengthRequest:
	case indeterminateLengthRequest:
		d.indeterminate = true
	default:
		return nil, invalid("it is no request")
	}
	r := &Request{}
	for _, s := range []*string{&r.Method, &r.Scheme, &r.Authority, &r.Path} {
		*s = string(d.bytes())
	}
	r.Header, r.Content, r.Trailer = d.message()
	if err := d.end(); err != nil {
		return nil, err
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	return r, nil
}

// DecodeResponse reads a whole response of known or indeterminate length, as DecodeRequest does.
func DecodeResponse(b []byte) (*Response, error) {
	d := decoder{rest: b}
	switch d.varint() {
	case knownLengthResponse:
	case indeterminateLengthResponse:
		d.indeterminate = true
	default:
		return nil, invalid("it is no response")
	}
	r := &Response{}
	for {
		status := d.varint()
		if d.err != nil {
			return nil, d.err
		}
		if status < 100 || status > 599 {
			return nil, invalid("a status out of 100 to 599")
		}
		if r.Status = int(status); status >= 200 {
			break
		}
		if len(r.Informational) == maxInformational {
			return nil, invalid("more than %d informational responses", maxInformational)
		}
		r.Informational = append(r.Informational, Informational{Status: r.Status, Header: d.fields()})
	}
	r.Header, r.Content, r.Trailer = d.message()
	if err := d.end(); err != nil {
		return nil, err
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	return r, nil
}

// check holds of every request that is encoded or decoded: control data as HTTP/2 has it (RFC 9113
// section 8.3.1), and fields.
func (r *Request) check() error {
	if !isToken(r.Method) {
		return invalid("the method is no token")
	}
	if !isScheme(r.Scheme) {
		return invalid("the scheme is none")
	}
	for _, s := range []string{r.Authority, r.Path} {
		if strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
			return invalid("a space or a control character in authority or path")
		}
	}
	if r.Path == "" && r.Method != "CONNECT" {
		return invalid("the path is empty")
	}
	return checkFields(r.Header, r.Trailer)
}

func (r *Response) check() error {
	if r.Status < 200 || r.Status > 599 {
		return invalid("a final status out of 200 to 599")
	}
	for _, i := range r.Informational {
		if i.Status < 100 || i.Status > 199 {
			return invalid("an informational status out of 100 to 199")
		}
		if err := checkFields(i.Header); err != nil {
			return err
		}
	}
	return checkFields(r.Header, r.Trailer)
}

// checkFields refuses names and values that would make an HTTP/2 message malformed (RFC 9113 section 8.2.1,
// as RFC 9292 section 3.6 demands) and pseudo-fields, of which we know none.
func checkFields(sections ...[]Field) error {
	for _, fields := range sections {
		for _, f := range fields {
			if !isToken(f.Name) || strings.ToLower(f.Name) != f.Name {
				return invalid("a field name that is no token in lower case")
			}
			if strings.ContainsAny(f.Value, "\x00\r\n") || strings.Trim(f.Value, " \t") != f.Value {
				return invalid("a field value with a line break, a zero, or white space around it")
			}
		}
	}
	return nil
}

// isToken reports whether s is a token (RFC 9110 section 5.6.2).
func isToken(s string) bool {
	for _, c := range []byte(s) {
		if !isLetter(c) && !isDigit(c) && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return s != ""
}

// isScheme reports whether s is a scheme (RFC 3986 section 3.1).
func isScheme(s string) bool {
	for i, c := range []byte(s) {
		if !isLetter(c) && (i == 0 || !isDigit(c) && c != '+' && c != '-' && c != '.') {
			return false
		}
	}
	return s != ""
}

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
func isDigit(c byte) bool  { return c >= '0' && c <= '9' }

// appendVarint writes an integer in its shortest form (RFC 9000 section 16).
func appendVarint(b []byte, n uint64) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n))
	case n < 1<<14:
		return binary.BigEndian.AppendUint16(b, uint16(n)|1<<14)
	case n < 1<<30:
		return binary.BigEndian.AppendUint32(b, uint32(n)|2<<30)
	default: // lengths in memory stay below 2^62
		return binary.BigEndian.AppendUint64(b, n|3<<62)
	}
}

func appendString(b []byte, s string) []byte { return append(appendVarint(b, uint64(len(s))), s...) }

func appendFields(b []byte, fields []Field) []byte {
	var section []byte
	for _, f := range fields {
		section = appendString(appendString(section, f.Name), f.Value)
	}
	return appendString(b, string(section))
}

// decoder reads a message. After its first failure everything that it returns is empty.
type decoder struct {
	rest          []byte
	indeterminate bool
	count         int // field lines read so far
	err           error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err, d.rest = invalid(format, args...), nil
	}
}

// varint reads an integer of any form: the shortest is not demanded (RFC 9292 section 3).
func (d *decoder) varint() uint64 {
	if len(d.rest) == 0 {
		d.fail("it ends where a number should be")
		return 0
	}
	size := 1 << (d.rest[0] >> 6)
	if len(d.rest) < size {
		d.fail("it ends within a number")
		return 0
	}
	n := uint64(d.rest[0] & 0x3f)
	for _, c := range d.rest[1:size] {
		n = n<<8 | uint64(c)
	}
	d.rest = d.rest[size:]
	return n
}

// bytes reads a length and as many bytes. They lie in the input.
func (d *decoder) bytes() []byte {
	return d.take(d.varint())
}

func (d *decoder) take(n uint64) []byte {
	if n > uint64(len(d.rest)) {
		d.fail("a length goes beyond its end")
		return nil
	}
	out := d.rest[:n]
	d.rest = d.rest[n:]
	return out
}

// message reads what follows the control data. Where the input ends before a section, that and the following
// are empty (RFC 9292 section 3.8); but the header of a response or request cannot be cut off unless all
// after it is.
func (d *decoder) message() (header []Field, content []byte, trailer []Field) {
	if len(d.rest) > 0 {
		header = d.fields()
	}
	if len(d.rest) > 0 {
		content = d.content()
	}
	if len(d.rest) > 0 {
		trailer = d.fields()
	}
	return header, content, trailer
}

func (d *decoder) fields() (fields []Field) {
	if d.indeterminate {
		for {
			n := d.varint()
			if n == 0 || d.err != nil {
				return fields
			}
			fields = d.field(fields, n)
		}
	}
	section := decoder{rest: d.bytes(), count: d.count, err: d.err}
	for len(section.rest) > 0 {
		n := section.varint()
		if n == 0 {
			section.fail("a field without a name")
		}
		fields = section.field(fields, n)
	}
	d.count = section.count
	if section.err != nil && d.err == nil {
		d.err, d.rest = section.err, nil
	}
	return fields
}

func (d *decoder) field(fields []Field, nameLength uint64) []Field {
	if d.count++; d.count > MaxFields {
		d.fail("more than %d fields", MaxFields)
	}
	name := string(d.take(nameLength))
	value := string(d.bytes())
	if d.err != nil {
		return nil
	}
	return append(fields, Field{name, value})
}

func (d *decoder) content() (content []byte) {
	if !d.indeterminate {
		return append(content, d.bytes()...)
	}
	for {
		n := d.varint()
		if n == 0 || d.err != nil {
			return content
		}
		content = append(content, d.take(n)...)
	}
}

// end checks that nothing is left but padding (RFC 9292 section 3.8).
func (d *decoder) end() error {
	for _, c := range d.rest {
		if c != 0 {
			d.fail("padding that is not zero")
			break
		}
	}
	return d.err
}
