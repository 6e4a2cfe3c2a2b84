// Package version says which build of the project this is.
package version

import "runtime/debug"

// version is set where the build knows it better than Go does, as in an image that is built without
// the repository: go build -ldflags "-X github.com/backup-key-vault/bkv/cmd/internal/version.version=v1.2.3".
var version string

// Build is what a program knows of its own making.
type Build struct {
	Version  string // of the module; "(devel)" if nobody said
	Revision string // of the repository, with + added if files were changed since; empty if it was not known
	Go       string // the compiler
}

// Of this program.
func Of() Build {
	b := Build{Version: "(devel)"}
	if info, ok := debug.ReadBuildInfo(); ok {
		b.Go = info.GoVersion
		if info.Main.Version != "" {
			b.Version = info.Main.Version
		}
		changed := ""
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				b.Revision = s.Value
			case "vcs.modified":
				if s.Value == "true" {
					changed = "+"
				}
			}
		}
		if b.Revision != "" {
			b.Revision += changed
		}
	}
	if version != "" {
		b.Version = version
	}
	return b
}
