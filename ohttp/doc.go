// Package ohttp is Oblivious HTTP (RFC 9458) with Binary HTTP (RFC 9292) inside, both
// ends: a client seals a request to the gateway's key, a relay carries what it
// cannot read, and the gateway seals its answer to that one request.
//
//	client                          relay                        gateway
//	  │ header ‖ enc ‖ ct ────────────▶ │ ───────────────────────▶ │
//	  │                                 │                          │ the request, as bytes
//	  │ ◀──────────────────────────────── nonce ‖ ct ───────────── │ the answer, as bytes
//
//	header = key id (1) ‖ KEM id (2) ‖ KDF id (2) ‖ AEAD id (2)
//
// HPKE (RFC 9180) is crypto/hpke's. The package knows nothing of what a request
// means, who may send it, or which keys to trust: a [KeyConfig] is only as good as the
// way it came. It also does not stop replays: the same capsule opens as often as it is
// sent, and what it asks for must bear that.
//
// Everything that is decoded here is hostile until its decoder has returned: lengths
// are checked before they are used, and a failure tells nothing but that it failed.
//
// The functions are safe for concurrent use; a [Sealed] and an [Opened] are for one
// request each. Nothing here imports net/http, so that a client for the browser stays small.
package ohttp

// Media types (RFC 9458 sections 4.3, 4.4 and 3.2).
const (
	RequestMediaType  = "message/ohttp-req"
	ResponseMediaType = "message/ohttp-res"
	KeysMediaType     = "application/ohttp-keys"
)

// KeyProblem is the type of the problem that a gateway answers where a capsule was sealed to a key
// that it does not have, or not any more (RFC 9458 section 5.3).
const KeyProblem = "https://iana.org/assignments/http-problem-types#ohttp-key"
