package backup

import (
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// digitCount is how many hexadecimal digits show a key.
const digitCount = 2 * KeySize

// Digits shows the key: 64 hexadecimal digits in 16 groups of four, four groups
// to a line, for its owner to write down. [ParseDigits] reads it back.
func (k Key) Digits() string {
	const group, groupsPerLine = 4, 4
	digits := hex.EncodeToString(k[:])
	var b strings.Builder
	b.Grow(digitCount + digitCount/group)
	for i := 0; i < digitCount; i += group {
		switch {
		case i == 0:
		case i%(group*groupsPerLine) == 0:
			b.WriteByte('\n')
		default:
			b.WriteByte(' ')
		}
		b.WriteString(digits[i : i+group])
	}
	return b.String()
}

// DigitsError says where digits are wrong. It never says what was typed there.
type DigitsError struct {
	// Position counts characters from 1, white space included, and Line and Column
	// likewise. All are 0 if every character is fine and their number is not.
	Position, Line, Column int
	// Found is how many digits there are: before Position, or in all.
	Found int
}

func (e *DigitsError) Error() string {
	if e.Position == 0 {
		return fmt.Sprintf("a backup key has %d digits; found %d", digitCount, e.Found)
	}
	return fmt.Sprintf("character %d (line %d, column %d, after %d digits) is not a hexadecimal digit: only 0-9, a-f and white space belong in a backup key",
		e.Position, e.Line, e.Column, e.Found)
}

// ParseDigits reads a key from its 64 hexadecimal digits, in either case, with
// any white space (as Unicode has it) before, between and after them. Every other
// character is refused, dashes and the full-width digits of some keyboards
// included, and so is every other number of digits.
//
// Errors: *DigitsError.
func ParseDigits(s string) (Key, error) {
	var digits [digitCount]byte
	found, position, line, column := 0, 0, 1, 0
	for i, width := 0, 0; i < len(s); i += width {
		var r rune
		r, width = utf8.DecodeRuneInString(s[i:])
		position++
		column++
		switch {
		case r >= '0' && r <= '9', r >= 'a' && r <= 'f', r >= 'A' && r <= 'F':
			if found < digitCount {
				digits[found] = byte(r)
			}
			found++
		case r == '\n':
			line, column = line+1, 0
		case unicode.IsSpace(r):
		default:
			return Key{}, &DigitsError{Position: position, Line: line, Column: column, Found: found}
		}
	}
	if found != digitCount {
		return Key{}, &DigitsError{Found: found}
	}
	var k Key
	if _, err := hex.Decode(k[:], digits[:]); err != nil {
		// Unreachable: each of the 64 was checked. The error would show a digit.
		return Key{}, &DigitsError{Found: found}
	}
	return k, nil
}
