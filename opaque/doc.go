// Package opaque is OPAQUE-3DH with P256-SHA256, HKDF-SHA-256, HMAC-SHA-256
// and SHA-256 (RFC 9807), both ends. With it a client registers a password,
// and later proves that it knows it and recovers a key that depends on it,
// while the server never sees anything from which the password could be
// guessed without the server's private keys.
//
// # Messages
//
// Registration (RFC 9807 section 5):
//
//	client                                              server
//	StartRegistration(password)
//	            RegistrationRequest (33 bytes) ───────▶
//	                                                    CreateRegistrationResponse
//	            ◀─────── RegistrationResponse (66)
//	ClientRegistration.Finish
//	            RegistrationRecord (129) ─────────────▶ kept for this client
//
// Login (section 6):
//
//	client                                              server
//	StartLogin(password)
//	            KE1 (98 bytes) ───────────────────────▶
//	                                                    GenerateKE2
//	            ◀────────────────────────── KE2 (259)
//	ClientLogin.Finish
//	            KE3 (32) ─────────────────────────────▶
//	                                                    ExpectedFinish.Verify
//	both hold the SessionKey; the client alone holds the ExportKey
//
// # What is trusted with what
//
// The server side holds no private key. It reaches the OPRF key through an
// [Evaluator] and its static key through a [StaticKey], so that both can live
// in a hardware token (section 10.12 names that case), and the OPRF key can be
// one of the client's own, drawn at random (section 10.9) instead of derived
// from a common oprf_seed. What an Evaluator returns is the one value that
// lets a holder of a RegistrationRecord test a password: whoever limits
// guesses must count one before calling [GenerateKE2]. Nothing in this package
// counts.
//
// Every message from the other side is hostile until its Parse function has
// accepted it: exact length, and each point in it a compressed, canonical
// point of the curve (section 10.7). The identity cannot be written in 33
// bytes and is refused with all the rest. The functions check again what they
// depend on, so a message array filled by other means is refused and not
// misused. No input makes this package panic.
//
// A client that fails learns which of three things happened: a malformed
// message ([ErrInvalidMessage]); a wrong password, or a server that does not
// hold the keys of the registration ([ErrWrongPasswordOrServer]: nobody can
// tell these two apart); or a server that knew the record and failed in the
// key exchange ([ErrServerAuthentication]).
//
// # Secrets and timing
//
// The server's arithmetic on secrets is constant time: points by
// filippo.io/nistec, scalars by filippo.io/bigmod. The client's blinding is
// circl's oprf package, whose documentation says that its P-256 operations are
// not constant time in a server's private key, and which must therefore never
// see a secret of the server. Types that hold secrets print as "[redacted]"
// through fmt and slog. They are not wiped from memory: Go's runtime may have
// copied them.
//
// # Randomness and concurrency
//
// All randomness comes from the io.Reader that the caller passes, which is
// crypto/rand.Reader outside of tests. The order in which each function reads
// is part of its documentation, so that specification vectors can be replayed.
//
// There is no shared mutable state: all functions, and all methods of one
// value, may be called concurrently as far as the given reader, Evaluator and
// StaticKey allow it.
package opaque
