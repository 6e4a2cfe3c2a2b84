-- Why: an account is a user's row; a generation is one enrolment of the user's key.
-- One MAC, made in the token and kept in the account, covers both, so a hand that
-- edits them is noticed. Every write changes the MAC and names the one that was read:
-- that is the compare-and-swap that attempts are counted with. Rows are never
-- deleted: what is gone stays as a tombstone without its secrets.
--
-- Constraints repeat what the vault decides, so that no mistake of the service
-- gives away a guess. What is fixed when a row is made is not among the
-- columns that the service may update.

-- +goose Up
CREATE TABLE accounts (
	tenant       text COLLATE "C" NOT NULL,
	user_id      bytea       NOT NULL, -- byte-exact: no encoding, no collation
	pseudonym    bytea       NOT NULL, -- names the account in events
	max_attempts integer     NOT NULL, -- the policy when the present key was activated
	delays       interval[]  NOT NULL,
	grace        interval    NOT NULL,
	head         bytea,                -- null: no generation was ever activated
	next_number  bigint      NOT NULL,
	mac_key      bigint      NOT NULL, -- generation of the token key that made mac
	mac          bytea       NOT NULL,
	due_at       timestamptz,          -- null: nothing will fall due by time alone
	created_at   timestamptz NOT NULL DEFAULT statement_timestamp(),
	updated_at   timestamptz NOT NULL DEFAULT statement_timestamp(),

	CONSTRAINT accounts_pk PRIMARY KEY (tenant, user_id),
	CONSTRAINT accounts_tenant_fk FOREIGN KEY (tenant) REFERENCES tenants (id),
	CONSTRAINT accounts_user_id_length CHECK (octet_length(user_id) BETWEEN 1 AND 256),
	CONSTRAINT accounts_pseudonym_length CHECK (octet_length(pseudonym) = 32),
	CONSTRAINT accounts_max_attempts_bounds CHECK (max_attempts BETWEEN 1 AND 10),
	CONSTRAINT accounts_delays_bounds CHECK (cardinality(delays) <= max_attempts
		AND array_position(delays, NULL) IS NULL
		AND interval '0' <= ALL (delays) AND interval '7 days' >= ALL (delays)),
	CONSTRAINT accounts_grace_bounds CHECK (grace BETWEEN interval '1 second' AND interval '90 days'),
	CONSTRAINT accounts_head_length CHECK (octet_length(head) = 16),
	CONSTRAINT accounts_next_number_bounds CHECK (next_number BETWEEN 1 AND 4294967295),
	CONSTRAINT accounts_mac_key_bounds CHECK (mac_key BETWEEN 0 AND 4294967295),
	CONSTRAINT accounts_mac_length CHECK (octet_length(mac) = 32)
) WITH (fillfactor = 80); -- room for HOT updates: a charge changes no indexed column

-- The sweeper pages through what is due in the order of the ids.
CREATE INDEX accounts_due ON accounts (tenant, user_id) WHERE due_at IS NOT NULL;

CREATE TABLE generations (
	tenant         text COLLATE "C" NOT NULL,
	user_id        bytea       NOT NULL,
	number         bigint      NOT NULL,
	generation_id  bytea       NOT NULL,
	follows        bytea,                -- null: it was the account's first
	state          text COLLATE "C" NOT NULL,
	reason         text COLLATE "C",     -- null: not destroyed
	created_at     timestamptz NOT NULL,
	expires_at     timestamptz,          -- null: neither staged nor frozen
	digest         bytea       NOT NULL,
	owner_key      bytea       NOT NULL,
	ksf_time       bigint      NOT NULL,
	ksf_memory_kib bigint      NOT NULL,
	ksf_threads    bigint      NOT NULL,
	sealed         bytea,                -- null: destroyed
	oprf_key       bigint      NOT NULL,
	server_key     bigint      NOT NULL,
	strategy       text COLLATE "C" NOT NULL,
	started        bigint      NOT NULL,
	last_success   bigint      NOT NULL,
	successes      bigint      NOT NULL,
	attempts       jsonb       NOT NULL, -- the last success and all after it

	CONSTRAINT generations_pk PRIMARY KEY (tenant, user_id, number),
	CONSTRAINT generations_account_fk FOREIGN KEY (tenant, user_id) REFERENCES accounts (tenant, user_id),
	CONSTRAINT generations_id_key UNIQUE (tenant, user_id, generation_id),
	-- At most one is staged, one active, one frozen. Deferrable, so that it is looked at
	-- when the whole statement is done: one becomes active while another freezes.
	CONSTRAINT generations_one_of_each_state EXCLUDE USING btree (tenant WITH =, user_id WITH =, state WITH =)
		WHERE (state <> 'destroyed') DEFERRABLE INITIALLY IMMEDIATE,

	CONSTRAINT generations_number_bounds CHECK (number BETWEEN 1 AND 4294967295),
	CONSTRAINT generations_id_length CHECK (octet_length(generation_id) = 16),
	CONSTRAINT generations_follows_length CHECK (octet_length(follows) = 16),
	CONSTRAINT generations_state_known CHECK (state IN ('staged', 'active', 'frozen', 'destroyed')),
	CONSTRAINT generations_reason_known CHECK (reason IN ('exhausted', 'failures', 'replaced', 'overruled',
		'turned-off', 'grace-over', 'not-in-time', 'superseded')),
	CONSTRAINT generations_reason_if_destroyed CHECK ((state = 'destroyed') = (reason IS NOT NULL)),
	CONSTRAINT generations_expires_if_staged_or_frozen CHECK ((state IN ('staged', 'frozen')) = (expires_at IS NOT NULL)),
	CONSTRAINT generations_sealed_unless_destroyed CHECK ((state = 'destroyed') = (sealed IS NULL)),
	CONSTRAINT generations_sealed_length CHECK (octet_length(sealed) BETWEEN 1 AND 4096),
	CONSTRAINT generations_digest_length CHECK (octet_length(digest) = 32),
	CONSTRAINT generations_owner_key_length CHECK (octet_length(owner_key) = 32),
	CONSTRAINT generations_ksf_bounds CHECK (ksf_time BETWEEN 0 AND 4294967295
		AND ksf_memory_kib BETWEEN 0 AND 4294967295 AND ksf_threads BETWEEN 0 AND 4294967295),
	CONSTRAINT generations_token_key_bounds CHECK (oprf_key BETWEEN 0 AND 4294967295
		AND server_key BETWEEN 0 AND 4294967295),
	CONSTRAINT generations_strategy_length CHECK (octet_length(strategy) BETWEEN 1 AND 64),
	-- The guess law, as far as one row shows it.
	CONSTRAINT generations_started_bounds CHECK (started BETWEEN 0 AND 4294967295),
	CONSTRAINT generations_last_success_started CHECK (last_success BETWEEN 0 AND started),
	CONSTRAINT generations_successes_last_success CHECK (successes BETWEEN 0 AND last_success
		AND (successes = 0) = (last_success = 0)),
	CONSTRAINT generations_used_cap CHECK (started - last_success <= 10),
	CONSTRAINT generations_failures_cap CHECK (started - successes <= 100),
	CONSTRAINT generations_attempts_length CHECK (
		CASE jsonb_typeof(attempts) WHEN 'array' THEN jsonb_array_length(attempts) <= 11 ELSE false END)
) WITH (fillfactor = 70);

GRANT SELECT, INSERT ON accounts, generations TO bkv_runtime;
GRANT UPDATE (max_attempts, delays, grace, head, next_number, mac_key, mac, due_at, updated_at)
	ON accounts TO bkv_runtime;
GRANT UPDATE (state, reason, expires_at, sealed, started, last_success, successes, attempts)
	ON generations TO bkv_runtime;
