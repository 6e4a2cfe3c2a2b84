// Package httpapi puts a vault.Vault on HTTP: routes, tenants' tokens, strict
// JSON, problems (RFC 9457), and an OpenAPI 3.1 document made from the handlers'
// own types. It translates and decides nothing about accounts.
//
// Trust boundary: everything in a request is hostile until it has passed here.
// The caller is a tenant, by the signature on its token, and the user whom the
// token names; the path must name the same user, byte for byte. Bodies are read to
// a fixed limit and decoded strictly, and byte strings are checked for their
// exact sizes and for points of the curve before the domain is called, so a
// malformed request is answered precisely and charges nothing.
//
// What leaves: a problem carries text of this package or of the domain's refusals
// only. The text of an unknown error goes to the log, once, under the request id that
// the client was given. User ids, bodies and tokens are never logged.
//
// The handlers are safe for concurrent use. The package has no global state. It
// bounds what a request may take of the vault's time; the time-outs of the
// connection (http.Server's ReadTimeout and its like) are the listener's.
package httpapi
