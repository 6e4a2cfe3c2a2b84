package client

// Normalise is normalise, for tests from outside.
func Normalise(password string) ([]byte, error) { return normalise(password) }

// MaxTries is how often a request is sent at most.
const MaxTries = maxTries
