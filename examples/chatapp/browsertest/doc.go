// Package browsertest holds tests alone: they use the chat app as its users do, in Debian's
// Chromium without a window, against the built chatapp and vaultd with a real token and a
// real database.
//
// Between browser and chatapp, and between chatapp and vaultd, stands a proxy of the test's,
// which loses, delays and records. Screenshots of each screen, at the width of a phone
// and of a desk, light and dark, go to a directory that the tests print; set
// CHATAPP_SCREENSHOTS to choose it.
//
// It is a module of its own so that the browser's driver is a dependency of these tests
// and never of the product.
package browsertest
