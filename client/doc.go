// Package client is the SDK of a backup key vault: a device puts its backup key
// there under a password, and gets it back, on another device too, by that password.
//
//	transport, err := httpclient.New(httpclient.Config{BaseURL: "https://vault.example"})
//	vault, err := client.New(client.Config{Transport: transport, Fingerprint: pinned,
//		Tenant: "chat", User: "alice", Token: token})
//	enrolled, err := vault.Enrol(ctx, password)     // a new key, now kept by the vault
//	recovered, err := vault.Recover(ctx, password)  // the same key, on any device
//
// # What it guarantees
//
//   - The password never leaves the device, and the key only wrapped under a
//     secret that the password and the vault's token make together (OPAQUE, RFC 9807).
//   - Nothing is sent on behalf of a user before the vault has shown the pinned
//     identity and a list of its keys that this identity signed. A registration
//     for, or a login with, a server key that is not listed stops.
//   - One call of Recover makes one attempt at most. A reply that gets lost is asked
//     for again with the same bytes, which the vault answers again without a charge.
//   - One call of Enrol, or of a password change, makes one generation at most.
//   - An operation that could not be finished can be taken up where it was left:
//     see [PendingRecovery] and [PendingEnrolment]. That never costs an attempt and
//     never enrols twice; calling Recover or Enrol anew might.
//   - A recovery that has begun is finished, with random bytes for a proof where the
//     password was wrong, so that whoever forwards the requests sees no difference and
//     the vault knows at once how the attempt ended.
//   - Requests travel in capsules (Oblivious HTTP, RFC 9458) that are sealed to a key which the pinned identity
//     vouches for, against later quantum computers too, and answers come back sealed to the one request. Whoever
//     forwards them, such as the app's own back end, sees the user's token, the time, and a size class that is
//     the same for all operations; and cannot answer, alter or exchange anything. Only the vault's identity, which is
//     public and signed, travels in the open.
//   - The vault cannot ask for key stretching below a floor, which would make guessing
//     cheap, nor above a ceiling, which would exhaust the device.
//
// # What it does not
//
// On the direct route (Config.Direct) nothing of that holds for enrolments and password changes: whoever can answer in the
// vault's place can bring a device to make a record that he can guess passwords from. The vault
// refuses them there, unless the tenant is declared to trust its back end with passwords.
//
// Whoever forwards requests can hold them back, or send them again, which the vault takes for the same
// request; and he can make the attempts that the vault allows to anybody who speaks for the user.
//
// Secrets are not wiped from memory: Go's runtime may have copied them. None of
// them, and no token, appears in an error or when a value of this package is printed.
//
// # What counts as an attempt
//
// Recover, RecoverGeneration and ChangePasswordWithOld charge one attempt, unless they
// fail before the vault has counted it; success forgives it and all before it.
// No other operation touches the counter of a generation.
//
// # Concurrency
//
// A [Client] is for one user of one vault and is safe for concurrent use, as are
// the pending operations. Two devices, or two calls, that recover at the same time can get
// into each other's way: one of them then gets [ErrConflict]. It was not charged, or
// the other's success forgave it.
//
// The package does not import net/http; package httpclient makes a [Transport] of it.
package client
