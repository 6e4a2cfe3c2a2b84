// Command js is the SDK in a browser: packages client and backup for WebAssembly, behind
// the JavaScript face of bkv.js, which bkv.d.ts declares and documents.
//
//	page: bkv.js ── messages ──▶ worker.js: this program ── fetch ──▶ the app's back end ──▶ the vault
//
// It runs in a Web Worker, so that stretching a password, which keeps a processor busy for
// a second or more, never blocks the page. Passwords and keys pass between page and
// worker and go nowhere else; both are of one origin and trust each other. What comes
// from the network is package client's to check.
//
// Messages to the program are {id, op, params, data}: params is JSON, data bytes or null.
// It answers {id, ok, result, data} or {id, error}. {cancel: id} cancels. {needToken: n,
// vault} asks the page for a user's token, which it answers by {token: n, value} or
// {token: n, error}. Operations run side by side.
//
// scripts/build-sdk builds everything that a page has to load. net/http is in none of it.
package main
