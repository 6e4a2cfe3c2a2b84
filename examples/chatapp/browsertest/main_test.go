package browsertest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

var update = flag.Bool("update", false, "write the accessibility trees that are expected anew")

// What all tests share.
var (
	bin         string          // the programs
	sdk         string          // what scripts/build-sdk wrote
	screenshots string          // where they go
	browser     context.Context // the one browser; nil if there is none
)

const root = "../../.." // of the repository

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	flag.Parse()
	dir, err := os.MkdirTemp("/tmp", "bkv-browser-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	if screenshots = os.Getenv("CHATAPP_SCREENSHOTS"); screenshots == "" {
		screenshots, err = os.MkdirTemp("/tmp", "bkv-screenshots-")
	} else {
		err = os.MkdirAll(screenshots, 0o755)
	}
	if err != nil {
		return fail(err)
	}
	fmt.Println("screenshots:", screenshots)
	bin, sdk = filepath.Join(dir, "bin"), filepath.Join(dir, "sdk")
	for _, args := range [][]string{
		{"go", "build", "-C", root, "-o", bin + "/", "./cmd/vaultd", "./cmd/vaultctl", "./examples/chatapp"},
		{root + "/scripts/build-sdk", sdk},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fail(fmt.Errorf("%v: %w\n%s", args, err, out))
		}
	}
	if path, err := exec.LookPath("chromium"); err == nil {
		allocator, stop := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
			chromedp.ExecPath(path), chromedp.UserDataDir(filepath.Join(dir, "profile")),
			chromedp.NoSandbox, // CI runs as root; the pages are ours
			chromedp.Flag("hide-scrollbars", true),
		)...)
		defer stop()
		var cancel context.CancelFunc
		browser, cancel = chromedp.NewContext(allocator)
		defer cancel()
		if err := chromedp.Do(browser); err != nil {
			return fail(fmt.Errorf("starting Chromium: %w", err))
		}
	}
	return m.Run()
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// patience bounds every wait for something that must happen. A run that is well
// never gets near it.
const patience = 3 * time.Minute

// needBrowser skips where there is none, and fails in CI.
func needBrowser(t *testing.T) {
	t.Helper()
	switch {
	case browser != nil:
	case os.Getenv("CI") == "true":
		t.Fatal("Chromium is missing: scripts/need installs it")
	default:
		t.Skip("Chromium is missing: run scripts/test, which installs it")
	}
}
