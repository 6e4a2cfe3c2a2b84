-- Why: keys rotate. Which generation of a purpose new work uses is a fact that all
-- instances share, and not the highest that a token happens to hold: of several tokens one holds
-- a generation before the others do. A generation goes
--     making → made → current → retired → closing → destroyed
-- and never back. Its number is claimed (making) before the key is made, by one
-- instance, and never used again, whatever becomes of the claim: so no two keys get
-- one name. closing means that nothing new may depend on the key: writes that would
-- are refused, and what still depends on it can then be counted for good.

-- +goose Up
CREATE TABLE key_generations (
	purpose       text COLLATE "C" NOT NULL,
	generation    bigint      NOT NULL,
	state         text COLLATE "C" NOT NULL,
	proof         bytea,                -- tells the key from any other; null: not made
	created_at    timestamptz NOT NULL DEFAULT statement_timestamp(),
	current_since timestamptz,          -- null: never in use
	retired_at    timestamptz,          -- null: not superseded
	destroyed_at  timestamptz,          -- null: some token holds it, or may
	seals         bigint      NOT NULL DEFAULT 0, -- GCM seals that instances have reported
	rewrapped_at  timestamptz,          -- null: records of older generations may be left
	-- The instance that makes the key, or moves records to it, and until when it is taken to live.
	holder        text COLLATE "C",     -- null: nobody
	held_until    timestamptz,

	CONSTRAINT key_generations_pk PRIMARY KEY (purpose, generation),
	CONSTRAINT key_generations_purpose_known CHECK (purpose IN ('master', 'state', 'oprf', 'server', 'relay', 'mac', 'identity', 'audit')),
	CONSTRAINT key_generations_generation_bounds CHECK (generation BETWEEN 1 AND 4294967295),
	CONSTRAINT key_generations_state_known CHECK (state IN ('making', 'made', 'current', 'retired', 'closing', 'destroyed')),
	CONSTRAINT key_generations_proof_length CHECK (octet_length(proof) BETWEEN 16 AND 256),
	CONSTRAINT key_generations_proof_if_made CHECK (state IN ('making', 'destroyed') OR proof IS NOT NULL),
	CONSTRAINT key_generations_current_since_if_used CHECK (state NOT IN ('current', 'retired') OR current_since IS NOT NULL),
	CONSTRAINT key_generations_retired_at_if_retired CHECK ((state = 'retired') <= (retired_at IS NOT NULL)),
	CONSTRAINT key_generations_destroyed_at_if_destroyed CHECK ((state = 'destroyed') = (destroyed_at IS NOT NULL)),
	CONSTRAINT key_generations_seals_bounds CHECK (seals >= 0),
	CONSTRAINT key_generations_holder_length CHECK (octet_length(holder) BETWEEN 1 AND 64),
	CONSTRAINT key_generations_held_until_if_held CHECK ((holder IS NULL) = (held_until IS NULL)),
	-- What the oldest records and every pseudonym depend on, and what clients pin.
	CONSTRAINT key_generations_never_destroyed CHECK (state <> 'destroyed' OR (purpose <> 'identity' AND (purpose, generation) <> ('mac', 1)))
);
CREATE UNIQUE INDEX key_generations_one_current ON key_generations (purpose) WHERE state = 'current';

-- Which token has shown that it holds which key.
CREATE TABLE token_proofs (
	token_serial text COLLATE "C" NOT NULL,
	purpose      text COLLATE "C" NOT NULL,
	generation   bigint      NOT NULL,
	proved_at    timestamptz NOT NULL DEFAULT statement_timestamp(),
	gone_at      timestamptz, -- null: not destroyed there
	left_at      timestamptz, -- null: the token is in service

	CONSTRAINT token_proofs_pk PRIMARY KEY (token_serial, purpose, generation),
	CONSTRAINT token_proofs_key_fk FOREIGN KEY (purpose, generation) REFERENCES key_generations (purpose, generation),
	CONSTRAINT token_proofs_serial_length CHECK (octet_length(token_serial) BETWEEN 1 AND 64)
);

-- Which master key sealed a record: it stands in clear in the sealed value, after one byte of version, in four
-- bytes, and is part of what the account's MAC covers. A column of its own could disagree with it.
CREATE FUNCTION sealed_under(sealed bytea) RETURNS bigint
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE WHEN octet_length(sealed) >= 5 THEN
	(get_byte(sealed, 1)::bigint << 24) + (get_byte(sealed, 2) << 16) + (get_byte(sealed, 3) << 8) + get_byte(sealed, 4)
END;

-- When a record's secrets were erased: copies of them are worth nothing once
-- every master key that was in use before is destroyed. Of earlier tombstones it is not known; now is never too early.
ALTER TABLE generations ADD COLUMN destroyed_at timestamptz;
UPDATE generations SET destroyed_at = statement_timestamp() WHERE state = 'destroyed';
ALTER TABLE generations ADD CONSTRAINT generations_destroyed_at_if_destroyed CHECK ((state = 'destroyed') = (destroyed_at IS NOT NULL));

-- What depends on a generation of a key is found by these. None of the columns changes when an attempt is counted.
CREATE INDEX generations_master_key ON generations (sealed_under(sealed), tenant, user_id) WHERE state <> 'destroyed';
CREATE INDEX generations_oprf_key ON generations (oprf_key) WHERE state <> 'destroyed';
CREATE INDEX generations_server_key ON generations (server_key) WHERE state <> 'destroyed';
CREATE INDEX generations_destroyed_at ON generations (destroyed_at) WHERE state = 'destroyed';
CREATE INDEX accounts_mac_key ON accounts (mac_key, tenant, user_id);

-- Events of keys are about no account.
ALTER TABLE events
	ADD COLUMN purpose text COLLATE "C",    -- null: about an account
	ADD COLUMN key_generation bigint,
	ALTER COLUMN tenant DROP NOT NULL,
	ALTER COLUMN pseudonym DROP NOT NULL,
	ALTER COLUMN generation_id DROP NOT NULL,
	DROP CONSTRAINT events_kind_known,
	ADD CONSTRAINT events_kind_known CHECK (kind IN ('staged', 'activated', 'frozen', 'reinstated',
		'attempt', 'success', 'failure', 'destroyed', 'key-made', 'key-current', 'rewrap-done', 'key-destroyed')),
	ADD CONSTRAINT events_purpose_length CHECK (octet_length(purpose) BETWEEN 1 AND 64),
	ADD CONSTRAINT events_key_generation_bounds CHECK (key_generation BETWEEN 1 AND 4294967295),
	ADD CONSTRAINT events_about CHECK (CASE WHEN kind IN ('key-made', 'key-current', 'rewrap-done', 'key-destroyed')
		THEN num_nonnulls(purpose, key_generation) = 2 AND num_nulls(tenant, pseudonym, generation_id) = 3
		ELSE num_nulls(purpose, key_generation) = 2 AND num_nonnulls(tenant, pseudonym, generation_id) = 3 END);

-- Waits for the writes of accounts that run now, and for no later ones. A statement takes its lock before
-- its snapshot (READ COMMITTED), so writes that begin after this see all that was committed before it. The
-- service may not lock tables by itself.
-- +goose StatementBegin
CREATE FUNCTION await_account_writes() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
	LOCK TABLE public.accounts IN SHARE MODE;
END
$$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION await_account_writes() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION await_account_writes() TO bkv_runtime;

GRANT SELECT, INSERT ON key_generations, token_proofs TO bkv_runtime;
GRANT UPDATE (state, proof, current_since, retired_at, destroyed_at, seals, rewrapped_at, holder, held_until) ON key_generations TO bkv_runtime;
GRANT UPDATE (gone_at, left_at) ON token_proofs TO bkv_runtime;
GRANT UPDATE (destroyed_at) ON generations TO bkv_runtime;
