// Package interop holds tests alone: they run github.com/bytemare/opaque, an
// implementation of RFC 9807 that shares no code with ours, against the vault, and
// against records that our own client made.
//
// The vault is the real one, over HTTP, with a SoftHSM token and a Postgres
// database. The other implementation is always the client, as it would be in a
// stock app; wrapping the backup key and signing the activation, which are no part
// of OPAQUE, it leaves to our transcript and backup packages.
//
// It is a module of its own so that the other implementation is a dependency of
// these tests and never of the product.
package interop
