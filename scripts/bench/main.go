// Command bench is what scripts/bench-bkv runs, with bkv, age and age-keygen in the path.
package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
)

type flags struct {
	Dir       string `required:"" help:"Where everything goes."`
	Mebibytes int    `default:"1024" help:"How much data."`
	Runs      int    `default:"5" help:"How many runs of each."`
	Fill      bool   `help:"Only make the data. A process of its own does that: what this one once had would count as the memory of those that it starts."`
}

func main() {
	var f flags
	kong.Parse(&f)
	if err := run(f); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(f flags) error {
	if err := os.Chdir(f.Dir); err != nil { // an absolute path
		return err
	}
	if f.Fill {
		return errors.Join(fill("data", int64(f.Mebibytes)<<20), fill("eighth", int64(f.Mebibytes)<<17))
	}
	if out, err := exec.Command(os.Args[0], append(os.Args[1:], "--fill")...).CombinedOutput(); err != nil {
		return fmt.Errorf("making the data: %w: %s", err, out)
	}
	const prepare = `bkv key --age-identity >identity && age-keygen -y identity >recipient && bkv backup --no-verify eighth small`
	if _, _, err := measure(prepare); err != nil {
		return err
	}
	for _, step := range []struct{ what, bkv, pipe, clean string }{
		{
			"backup", `bkv backup --no-verify data there`,
			`tar -c data | zstd -q | age -R recipient >piped && sync piped .`,
			`rm -rf there piped`,
		},
		{
			"restore", `bkv restore there by-bkv`,
			`mkdir by-pipe && age -d -i identity piped | zstd -dq | tar -x -C by-pipe && sync -f by-pipe`,
			`rm -rf by-bkv by-pipe`,
		},
	} {
		var ours, theirs []time.Duration
		var memory int64
		for i := range f.Runs {
			if i > 0 {
				if _, _, err := measure(step.clean); err != nil {
					return err
				}
			}
			commands := []func() error{
				func() error {
					took, most, err := measure(step.bkv)
					ours, memory = append(ours, took), max(memory, most)
					return err
				},
				func() error {
					took, _, err := measure(step.pipe)
					theirs = append(theirs, took)
					return err
				},
			}
			if i%2 == 1 {
				slices.Reverse(commands)
			}
			for _, c := range commands {
				if err := c(); err != nil {
					return err
				}
			}
		}
		_, small, err := measure(strings.NewReplacer("data there", "eighth small2", "there by-bkv", "small by-small").Replace(step.bkv))
		if err != nil {
			return err
		}
		a, b := median(ours), median(theirs)
		mib := func(d time.Duration) float64 { return float64(f.Mebibytes) / d.Seconds() }
		fmt.Printf("%s of %d MiB: bkv %.0f MiB/s, tar|zstd|age %.0f MiB/s, ratio %.2f; memory %d MiB, and %d MiB for an eighth of it\n",
			step.what, f.Mebibytes, mib(a), mib(b), b.Seconds()/a.Seconds(), memory>>20, small>>20)
	}
	return nil
}

// measure runs a command of the shell, and returns how long it took and the most memory, in
// bytes, that it or one of its children had.
func measure(command string) (time.Duration, int64, error) {
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", command)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	begun := time.Now()
	err := cmd.Run()
	took := time.Since(begun)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w: %s", command, err, complaint.Bytes())
	}
	return took, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10, nil
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// fill makes a folder of this many bytes: files of 8 MiB, by turns random and of the standard
// library's source.
func fill(dir string, total int64) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	text, err := source()
	if err != nil {
		return err
	}
	const fileBytes = 8 << 20
	at := 0
	for n := int64(0); n*fileBytes < total; n++ {
		content := make([]byte, min(fileBytes, total-n*fileBytes))
		if n%2 == 0 {
			_, _ = rand.Read(content)
		} else {
			for i := 0; i < len(content); {
				copied := copy(content[i:], text[at:])
				i += copied
				at = (at + copied) % len(text)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// source is the Go standard library's source in one piece.
func source() ([]byte, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("asking for the standard library's source, of %s: %w", runtime.Version(), err)
	}
	var text bytes.Buffer
	root := filepath.Join(strings.TrimSpace(string(out)), "src")
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.HasSuffix(p, ".go") {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		_, err = io.Copy(&text, f)
		return err
	})
	if err == nil && text.Len() == 0 {
		err = fmt.Errorf("no source in %s", root)
	}
	return text.Bytes(), err
}
