// Package e2e tests vaultd, vaultctl and bkv as built: processes with arguments,
// environment, signals and logs, on a real SoftHSM token and a real Postgres, with
// devices that speak to them over HTTP. It holds tests only.
//
// The programs are built once for each run of the tests, with the race detector if
// the tests themselves have it. Scripts of vaultctl are in testdata/script, those of bkv in testdata/bkv; run the tests with
// -update to write the outputs that they expect anew. No test asserts on time: what
// takes its time is waited for, within a bound that only a failure reaches.
package e2e
