-- Why: the relay channel. An app's back end carries requests that are sealed to the vault. Enrolment and password
-- change need that, because whoever answers them in the vault's place gets a record that he can guess passwords from; unless the
-- tenant is declared to trust its back end with passwords.

-- +goose Up

-- The ML-KEM-768 half of each generation of the relay key, sealed under the master key; the other half is in the token. The row
-- stays when the seed is erased, so that it does not come back.
CREATE TABLE relay_seeds (
	generation bigint      NOT NULL,
	sealed     bytea,                 -- null: erased with its relay key
	made_at    timestamptz NOT NULL DEFAULT statement_timestamp(),

	CONSTRAINT relay_seeds_pk PRIMARY KEY (generation),
	CONSTRAINT relay_seeds_generation_bounds CHECK (generation BETWEEN 1 AND 4294967295),
	CONSTRAINT relay_seeds_sealed_length CHECK (octet_length(sealed) BETWEEN 64 AND 256)
);
GRANT SELECT, INSERT ON relay_seeds TO bkv_runtime;
GRANT UPDATE (sealed) ON relay_seeds TO bkv_runtime;

-- Whether the tenant's users may enrol and change passwords past the relay channel. The row has no MAC: whoever can
-- write to the database can set this, and gains by it only together with a hostile back end.
ALTER TABLE tenants ADD COLUMN direct_enrolment boolean NOT NULL DEFAULT false;
