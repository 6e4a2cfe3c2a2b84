// Package storetest gives tests a real Postgres, and ways to take it away again.
//
// The first test of a binary that calls New starts a private cluster in a new
// directory under /tmp; every test gets a migrated database of its own there. The
// cluster runs until the test binary ends, in whatever way: a child process waits on
// a pipe that the binary never writes to, and stops the cluster and removes
// its directory once the pipe closes, after a panic or kill -9 too. (Stopping
// with the last test that uses it would start it again for the next one.)
//
// Where Postgres is missing, tests are skipped; with CI=true in the environment
// they fail instead. For tests alone. Everything is safe for parallel tests.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/store"
)

// Roles of a cluster. They need no password: the socket's directory is closed to
// everybody but the user that runs the cluster.
const (
	superuser   = "postgres"
	ownerRole   = "bkv_owner"   // owns the databases, runs migrations
	runtimeRole = "bkv_service" // a login with migrations.RuntimeRole
)

// template is the migrated database that others are copied from.
const template = "bkv_template"

// Database is a migrated database of a test's own. It is dropped when the test ends.
type Database struct {
	OwnerURL   string // logs in as the owner of the tables
	RuntimeURL string // logs in as vaultd does
	Cluster    *Cluster
}

// shared is the cluster that New uses.
var shared = sync.OnceValues(func() (*Cluster, error) { return start() })

// New returns a migrated database in the test binary's shared cluster.
func New(t testing.TB) *Database {
	t.Helper()
	c, err := shared()
	require(t, err)
	return c.Database(t)
}

// Store opens a store as vaultd does, and closes it when the test ends.
func (d *Database) Store(t testing.TB) *store.Store { return open(t, d.RuntimeURL) }

// OwnerStore opens a store as vaultctl does, and closes it when the test ends.
func (d *Database) OwnerStore(t testing.TB) *store.Store { return open(t, d.OwnerURL) }

func open(t testing.TB, url string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Copy returns a database with what this one holds now. Nobody may be connected to this one but Stores, which lose
// their connections and make new ones.
func (d *Database) Copy(t testing.TB) *Database {
	t.Helper()
	name := strings.TrimPrefix(mustParse(t, d.OwnerURL).Path, "/")
	if err := d.Cluster.exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '"+name+"'"); err != nil {
		t.Fatal(err)
	}
	return d.Cluster.database(t, name)
}

func mustParse(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Exec runs one statement as the owner, past the service: a hand in the database.
// It returns the number of rows affected.
func (d *Database) Exec(t testing.TB, sql string, args ...any) int64 {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	conn, err := pgx.Connect(ctx, d.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	tag, err := conn.Exec(ctx, sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	return tag.RowsAffected()
}

// Cluster is a running Postgres that only this machine's tests can reach.
type Cluster struct {
	dir     string // holds the data, the log and the socket
	bin     string // of Postgres
	account *syscall.Credential
	keeper  io.Closer // the pipe that the keeper waits on

	mu        sync.Mutex // one CREATE DATABASE at a time; guards databases
	databases int
}

// NewCluster starts a cluster of the test's own, to be stopped and started as it likes.
// It is gone when the test ends.
func NewCluster(t testing.TB) *Cluster {
	t.Helper()
	c, err := start()
	require(t, err)
	t.Cleanup(func() { c.keeper.Close() })
	return c
}

// Stop takes Postgres away at once, as a crash does: open connections break, what is
// committed stays.
func (c *Cluster) Stop(t testing.TB) {
	t.Helper()
	if err := c.run("pg_ctl", "-D", c.data(), "-w", "-m", "immediate", "stop"); err != nil {
		t.Fatal(err)
	}
}

// Start brings Postgres back after Stop, recovered and ready.
func (c *Cluster) Start(t testing.TB) {
	t.Helper()
	if err := c.up(); err != nil {
		t.Fatal(err)
	}
}

// Database returns a new migrated database. It is dropped when the test ends, if the
// cluster runs then.
func (c *Cluster) Database(t testing.TB) *Database { return c.database(t, template) }

// Empty returns a database without a schema.
func (c *Cluster) Empty(t testing.TB) *Database { return c.database(t, "template0") }

// Empty returns a database without a schema in the test binary's shared cluster.
func Empty(t testing.TB) *Database {
	t.Helper()
	c, err := shared()
	require(t, err)
	return c.Empty(t)
}

func (c *Cluster) database(t testing.TB, from string) *Database {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.databases++
	name := fmt.Sprintf("test_%d", c.databases)
	if err := c.exec(t.Context(), "CREATE DATABASE "+name+" OWNER "+ownerRole+" TEMPLATE "+from); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Best effort: the cluster may be stopped, and goes away in any case.
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c.exec(ctx, "DROP DATABASE "+name+" WITH (FORCE)")
	})
	return &Database{OwnerURL: c.url(ownerRole, name), RuntimeURL: c.url(runtimeRole, name), Cluster: c}
}

// SuperuserURL logs in to a database of the cluster with every right.
func (d *Database) SuperuserURL() string {
	return strings.Replace(d.OwnerURL, ownerRole+"@", superuser+"@", 1)
}

func (c *Cluster) url(role, database string) string {
	u := url.URL{Scheme: "postgres", User: url.User(role), Path: "/" + database, RawQuery: url.Values{"host": {c.dir}}.Encode()}
	return u.String()
}

func (c *Cluster) data() string { return filepath.Join(c.dir, "data") }

// errMissing: this machine has no Postgres.
var errMissing = errors.New("no Postgres server (initdb, pg_ctl) in PATH or /usr/lib/postgresql; ./scripts/test installs what is missing")

func require(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, errMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// binaries finds Postgres: in PATH, or the newest that Debian's packages installed.
func binaries() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path), nil
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		return "", errMissing
	}
	version := func(path string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path))))
		return n
	}
	newest := slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })
	return filepath.Dir(newest), nil
}

// account is who runs Postgres, which refuses to run as root; nil: we ourselves.
func account() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, errUID := strconv.ParseUint(u.Uid, 10, 32)
		gid, errGID := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(errUID, errGID); err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.New("postgres refuses to run as root, and there is neither a user postgres nor nobody")
}

// keep is the keeper's whole program; $1 is pg_ctl, $2 the cluster's directory.
const keep = `cat >/dev/null; "$1" -D "$2/data" -w -m immediate stop; rm -rf "$2"`

func start() (_ *Cluster, err error) {
	c := &Cluster{}
	if c.bin, err = binaries(); err != nil {
		return nil, err
	}
	if c.account, err = account(); err != nil {
		return nil, err
	}
	// Not TMPDIR: the path of a Unix socket ends at 107 bytes.
	if c.dir, err = os.MkdirTemp("/tmp", "bkv-pg-"); err != nil {
		return nil, err
	}
	if c.account != nil {
		if err := os.Chown(c.dir, int(c.account.Uid), int(c.account.Gid)); err != nil {
			return nil, errors.Join(err, os.RemoveAll(c.dir))
		}
	}
	// From here on the keeper cleans up.
	keeper := c.command("/bin/sh", "-c", keep, "keeper", filepath.Join(c.bin, "pg_ctl"), c.dir)
	if c.keeper, err = keeper.StdinPipe(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(c.dir))
	}
	if err := keeper.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(c.dir))
	}
	go keeper.Wait()
	defer func() {
		if err != nil {
			c.keeper.Close()
		}
	}()
	if err := c.run("initdb", "-D", c.data(), "-U", superuser, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"); err != nil {
		return nil, err
	}
	if err := c.up(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, sql := range []string{
		"CREATE ROLE " + ownerRole + " LOGIN CREATEROLE",
		"CREATE ROLE " + runtimeRole + " LOGIN",
		"CREATE DATABASE " + template + " OWNER " + ownerRole,
	} {
		if err := c.exec(ctx, sql); err != nil {
			return nil, err
		}
	}
	if err := migrations.Up(ctx, c.url(ownerRole, template), slog.New(slog.DiscardHandler)); err != nil {
		return nil, err
	}
	// A sequence is written ahead 32 numbers at a time. Postgres 15 copies how many of these are left to a new
	// database, but not that they are written: after a crash they would be given out again.
	if err := c.execOn(ctx, template, "SELECT setval(pg_get_serial_sequence('events', 'id'), max(id)) FROM events"); err != nil {
		return nil, err
	}
	return c, c.exec(ctx, "GRANT "+migrations.RuntimeRole+" TO "+runtimeRole)
}

// up starts the server and waits until it answers.
func (c *Cluster) up() error {
	// Nothing here needs to survive the machine, so nothing is synced to the disk.
	options := "-c listen_addresses= -c unix_socket_permissions=0700 -c unix_socket_directories=" + c.dir +
		" -c fsync=off -c full_page_writes=off -c max_connections=200 -c shared_buffers=64MB -c timezone=UTC"
	log := filepath.Join(c.dir, "log")
	if err := c.run("pg_ctl", "-D", c.data(), "-w", "-l", log, "-o", options, "start"); err != nil {
		text, _ := os.ReadFile(log)
		return fmt.Errorf("%w\n%s", err, text)
	}
	return nil
}

// run runs one of Postgres's programs to its end.
func (c *Cluster) run(program string, args ...string) error {
	out, err := c.command(filepath.Join(c.bin, program), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", program, err, out)
	}
	return nil
}

// command runs as the cluster's user, and in a session of its own: a Ctrl-C at
// the tests' terminal is not for it.
func (c *Cluster) command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: c.account}
	return cmd
}

// exec runs a statement as the superuser, outside any test's database.
func (c *Cluster) exec(ctx context.Context, sql string) error { return c.execOn(ctx, "postgres", sql) }

func (c *Cluster) execOn(ctx context.Context, database, sql string) error {
	conn, err := pgx.Connect(ctx, c.url(superuser, database))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		return fmt.Errorf("%s: %w", sql, err)
	}
	return nil
}
