// Package interop holds tests alone: they run github.com/openpcc/ohttp (with bhttp and twoway), an implementation
// of RFC 9458 and RFC 9292 that shares no code with ours, as a client of the vault's relay channel.
//
// It knows DHKEM(P-256) and refuses lists that name the hybrid KEM, so it is given the plain configuration alone.
//
// It is a module of its own so that the other implementation is a dependency of these tests and never of the product.
package interop
