package migrations

// For tests that stop at an earlier version.
var (
	Embedded     = embedded
	VersionTable = versionTable
)
