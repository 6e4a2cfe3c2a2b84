package storetest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// diskFull is SQLSTATE 53100 (Postgres documentation, appendix A).
const diskFull = "53100"

// SmallDisk puts the table events on a disk of its own with room for two megabytes. fill takes the room that is left, and free gives it
// back. The disk is real, a tmpfs, where the test may mount one; else a trigger answers what Postgres answers on
// a full disk. The cluster must be the test's own.
func (d *Database) SmallDisk(t testing.TB) (fill, free func()) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	conn, err := pgx.Connect(ctx, d.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(ctx) })
	do := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	full := func(err error) bool {
		var pgErr *pgconn.PgError
		return errors.As(err, &pgErr) && pgErr.Code == diskFull
	}
	dir := filepath.Join(d.Cluster.dir, "small")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	switch err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, "size=2m,mode=0700"); {
	case errors.Is(err, syscall.EPERM):
		do(`CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$`)
		do(`REVOKE ALL ON FUNCTION full_disk() FROM PUBLIC`)
		return func() {
				do(`CREATE TRIGGER full_disk BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION full_disk()`)
			},
			func() { do(`DROP TRIGGER full_disk ON events`) }
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Postgres has files open there, and stops later.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if a := d.Cluster.account; a != nil {
		if err := os.Chown(dir, int(a.Uid), int(a.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	do(`CREATE TABLESPACE small LOCATION '` + dir + `'`)
	do(`ALTER TABLE events SET TABLESPACE small`)
	do(`ALTER INDEX events_pk SET TABLESPACE small`)
	return func() {
			t.Helper()
			do(`CREATE TABLE filler (x text) TABLESPACE small`)
			for _, sql := range []string{
				`INSERT INTO filler SELECT repeat('x', 1000) FROM generate_series(1, 7)`,
				// What is left in pages that are there already.
				`INSERT INTO events (kind, tenant, pseudonym, generation_id) VALUES ('staged', 'filler', sha256('p'), decode(repeat('ab', 16), 'hex'))`,
			} {
				for err = error(nil); err == nil; {
					_, err = conn.Exec(ctx, sql)
				}
				if !full(err) {
					t.Fatal(err)
				}
			}
		}, func() {
			t.Helper()
			do(`DROP TABLE filler`)
		}
}
