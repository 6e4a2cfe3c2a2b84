package pkcs11util

// SpoilKnownAnswer changes the known value of a key, so that the token cannot open it: what a
// token looks like that refuses good values.
func (k *Keyset) SpoilKnownAnswer(name KeyName) {
	k.mu.Lock()
	defer k.mu.Unlock()
	known := k.known[name]
	known.sealed = append([]byte(nil), known.sealed...)
	known.sealed[len(known.sealed)-1] ^= 1
	k.known[name] = known // the connection's, too: they share the map
}

// Recycling says whether calls wait for a new connection.
func (k *Keyset) Recycling() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.renewed != nil
}
