// Package pkcs11util is the vault's way to its PKCS#11 token: sealing, x-only
// Diffie-Hellman and the full point made from it, MACs and signatures under
// long-lived keys that never leave the token.
//
// A [Keyset] is what a service uses. It logs in, finds the keys by their labels
// bkv/<purpose>/<generation>, refuses those whose attributes are not exactly what
// their purpose needs, proves that each works, and keeps a pool of sessions. An
// [Admin] is what an operator's command uses to make a token ready; packages
// provision, for one token, and ceremony, for several with the same keys, drive it.
//
// # Trust
//
// Whoever holds the PIN and reaches the token can use its keys; this package keeps
// the PIN in memory to log in again after a fault. The token is trusted to keep its
// keys, and not to compute right: points are checked against the public key,
// signatures are verified, sealed values are authenticated. Callers are not trusted
// with points or sealed bytes: both are checked before they mean anything.
//
// # Faults
//
// A session that reported an error is dropped and another opened. If that does not
// mend it, the connection is given up: calls fail at once with [ErrUnavailable],
// while in the background first a new login and then a new initialisation of the
// whole module are tried, with growing pauses, until the same keys are there
// and proven again. A PIN that was refused is never sent a second time; that, and
// nothing else, needs a new Keyset. A sealed value that does not open is no fault.
//
// # Recycling
//
// SoftHSM 2.6.1 keeps 400 to 650 bytes of each session object, so of each derived secret, until the module is
// finalised. So after every so many the module is finalised and initialised, and the keys are
// found and proven again. Calls that come meanwhile wait, as long as their contexts allow, and are then
// made. The same goes for the other Keysets of the module in this process, and if one's recovery initialised it
// anew. Only a token that then is not there, or does not prove itself, is lost.
//
// # Concurrency
//
// A Keyset is safe for concurrent use. A call waits for a session as long as its
// context allows; once inside the module it cannot be interrupted, and its session
// goes to nobody else before it has come out. All tokens of one module in a process share its
// initialisation.
package pkcs11util
