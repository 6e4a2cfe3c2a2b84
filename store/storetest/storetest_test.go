package storetest_test

import (
	"bufio"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// A test binary that is killed leaves no Postgres and no directory behind.
func TestClusterEndsWithTheTestBinary(t *testing.T) {
	const child = "STORETEST_CHILD"
	if os.Getenv(child) != "" {
		fmt.Printf("url %s\n", storetest.New(t).OwnerURL)
		select {} // until killed
	}
	storetest.New(t) // skips if there is no Postgres
	cmd := exec.Command(os.Args[0], "-test.run=^TestClusterEndsWithTheTestBinary$")
	cmd.Env = append(os.Environ(), child+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var database string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if n, _ := fmt.Sscanf(lines.Text(), "url %s", &database); n == 1 {
			break
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	u, err := url.Parse(database)
	if err != nil || u.Query().Get("host") == "" {
		t.Fatalf("no cluster at %q, %v", database, err)
	}
	for { // the test's own deadline is the only one
		if _, err := os.Stat(u.Query().Get("host")); os.IsNotExist(err) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := migrations.Check(t.Context(), database); err == nil {
		t.Fatal("its database still answers")
	}
}

// Databases of one cluster do not see each other's rows.
func TestDatabasesAreApart(t *testing.T) {
	t.Parallel()
	a, b := storetest.New(t), storetest.New(t)
	a.Exec(t, `INSERT INTO tenants (id, max_attempts, delays, grace) VALUES ('app', 1, '{}', '1 day')`)
	tenants, err := b.Store(t).Tenants(t.Context())
	if err != nil || len(tenants) != 0 {
		t.Fatalf("tenants: %v, %v", tenants, err)
	}
}
