-- Why: the service logs in with fewer rights than whoever owns the tables. What it
-- may do is granted to the group role bkv_runtime, table by table, in the migration
-- that makes the table; operators grant the group to the login of vaultd:
--     GRANT bkv_runtime TO vaultd;
-- Nothing ever grants it DELETE, TRUNCATE or the right to create anything.

-- +goose Up
-- +goose StatementBegin
DO $$
BEGIN
	IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'bkv_runtime') THEN
		RETURN;
	END IF;
	CREATE ROLE bkv_runtime NOLOGIN;
EXCEPTION
	-- Roles are shared by a cluster's databases: another one's migration was faster.
	WHEN duplicate_object OR unique_violation THEN
		NULL;
	WHEN insufficient_privilege THEN
		RAISE EXCEPTION 'role bkv_runtime does not exist and % may not create it; have an administrator run: CREATE ROLE bkv_runtime NOLOGIN', current_user
			USING ERRCODE = 'insufficient_privilege';
END
$$;
-- +goose StatementEnd

-- vaultd checks at start that the schema is the one that it knows.
GRANT SELECT ON schema_version TO bkv_runtime;
