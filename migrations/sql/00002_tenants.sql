-- Why: a tenant is an app. The vault knows it by the public keys that its back end
-- signs tokens with, and takes from it the policy of every key that its users
-- enrol from then on. Operators write these tables; the service only reads them.

-- +goose Up
CREATE TABLE tenants (
	id           text COLLATE "C" NOT NULL,
	max_attempts integer     NOT NULL,
	delays       interval[]  NOT NULL,
	grace        interval    NOT NULL,
	created_at   timestamptz NOT NULL DEFAULT statement_timestamp(),

	CONSTRAINT tenants_pk PRIMARY KEY (id),
	CONSTRAINT tenants_id_shape CHECK (id ~ '^[a-z0-9][a-z0-9._-]{0,63}$'),
	CONSTRAINT tenants_max_attempts_bounds CHECK (max_attempts BETWEEN 1 AND 10),
	CONSTRAINT tenants_delays_bounds CHECK (cardinality(delays) <= max_attempts
		AND array_position(delays, NULL) IS NULL
		AND interval '0' <= ALL (delays) AND interval '7 days' >= ALL (delays)),
	CONSTRAINT tenants_grace_bounds CHECK (grace BETWEEN interval '1 second' AND interval '90 days')
);

-- A revoked key stays: its kid is never given to another key.
CREATE TABLE tenant_keys (
	tenant     text COLLATE "C" NOT NULL,
	kid        text COLLATE "C" NOT NULL,
	public_key bytea       NOT NULL, -- DER, PKIX (RFC 5280)
	created_at timestamptz NOT NULL DEFAULT statement_timestamp(),
	revoked_at timestamptz,          -- null: in use

	CONSTRAINT tenant_keys_pk PRIMARY KEY (tenant, kid),
	CONSTRAINT tenant_keys_tenant_fk FOREIGN KEY (tenant) REFERENCES tenants (id),
	CONSTRAINT tenant_keys_kid_shape CHECK (kid ~ '^[!-~]{1,128}$'),
	CONSTRAINT tenant_keys_public_key_length CHECK (octet_length(public_key) BETWEEN 32 AND 2200)
);

GRANT SELECT ON tenants, tenant_keys TO bkv_runtime;
