// Command chatapp is a small chat app whose users turn on end-to-end encrypted backup: what
// an app's developers look at before they adopt the vault.
//
// This program is the back end. It logs users in, keeps their messages, which are sealed to
// devices, and their backups, which are sealed under keys that it never has; and it is
// a tenant of the vault: it signs a token for the user who is logged in and forwards what the
// page's SDK sends, so that the page talks to its own origin alone. That is all a back end
// does, so this one imports nothing of the vault's code.
//
// The page, plain modules without a build tool, is under page. Its address must be https, or
// localhost: browsers offer neither cryptography nor passkeys elsewhere.
//
// Trust boundary: whoever controls this program can deny its users everything, and can
// serve them another page; what that would mean, and what an installed app does better,
// is in the guide (docs/integration.md).
package main
