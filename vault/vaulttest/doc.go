// Package vaulttest helps to test the domain: a token in software, a store in
// memory, and the contract that every store must keep. Only tests import it.
package vaulttest
