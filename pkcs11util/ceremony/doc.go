// Package ceremony puts one set of keys into several tokens, one for each site, so
// that what is sealed and enrolled through one opens and recovers through the others.
//
//	site B                        carried by people                  site A, the source
//	Join: makes a transport key
//	                        ──  request (public key, nonce)  ─▶
//	                        ··  its fingerprint, by voice  ··▶
//	                                                      Make: generates the set, wraps it
//	                                                      for B and for itself, signs a record
//	                        ◀─────────  bundle  ───────────
//	                        ◀·  its fingerprint, by voice  ··
//	Accept: unwraps, proves, names                        Accept: the same
//
// # Where the keys are
//
// A plain key is in no file and never in this process's memory. The set exists once as
// session objects of the source's token, sensitive but extractable, for as long as
// Make runs. Every stored copy, the source's own too, was unwrapped from the bundle,
// sensitive and not extractable, with the attributes that package pkcs11util demands. As such copies were
// outside, wrapped, CKA_LOCAL, CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE are false
// on them. Afterwards nobody can wrap the set again: all sites take part in the ceremony that makes it.
//
// # Wrapping
//
// For each token, a fresh AES-256 key is wrapped by RSAES-OAEP (RFC 8017 section 7.1) to the
// token's transport key, and each key of the set by AES Key Wrap (RFC 3394) under it: secret keys as their
// 32 bytes, private keys as PKCS #8 PrivateKeyInfo, with zero bytes behind up to a multiple of 8 where its
// length needs them. CKM_AES_KEY_WRAP is used for both: CKM_AES_KEY_WRAP_PAD means zero padding to SoftHSM 2.6.1,
// RFC 5649 to others and something else again to NSS. The hash in OAEP is each destination's choice, as tokens differ
// (SoftHSM 2.6.1 has SHA-1 alone); OAEP does not rest on collision resistance.
//
// # Trust
//
// The tokens and the operators who read fingerprints to each other are trusted; files and
// who carries them are not. A transport key swapped on the way would open the
// set to whoever swapped it, so that Make wants each request's fingerprint as its
// maker says it; and whoever saw a request could make up a bundle for it, with keys that he
// knows, so that Accept wants the record's. The record lists tokens, requests and
// fingerprints of keys, covers every wrapped byte by a hash, and is signed by the set's identity key (for
// further generations, by the one that all sites hold already).
//
// # Repeating
//
// Each step may be killed at any point and run again. Keys lie under temporary labels until all
// of them agree with the record; then each is proved and named. A transport key is destroyed when its bundle is
// in the token, so that the bundle is of no use any more.
//
// Nothing here is safe for concurrent use, as [pkcs11util.Admin] is not.
package ceremony
