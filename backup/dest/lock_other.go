//go:build !unix

package dest

import "os"

// flock does nothing here: two programs that write to one folder are not kept apart.
func flock(*os.File) error { return nil }
