-- Why: a hand in the database could edit, remove or add events unseen. A sequencer, in vaultd, seals
-- them: it gives each a sequence number and a hash over it and the hash before, and has the token sign the
-- newest hash from time to time. Events themselves are never updated: seals are rows of their own.
--
-- An event waits in unsealed_events from the statement that wrote it until the one that seals it. So none is
-- passed over, in whatever order transactions commit, and whatever becomes of transaction ids
-- and clocks when a dump is restored.
--
-- Operators' actions are events too, with who asked; and every event says which database role wrote it.

-- +goose Up
ALTER TABLE events
	ADD COLUMN operator text COLLATE "C", -- null: no operator asked, or nobody knows who
	ADD COLUMN detail   text COLLATE "C", -- null: kind and columns say it all
	ADD COLUMN login    text COLLATE "C"; -- null: of before this was kept
ALTER TABLE events
	ALTER COLUMN login SET DEFAULT session_user,
	DROP CONSTRAINT events_kind_known,
	DROP CONSTRAINT events_about,
	ADD CONSTRAINT events_kind_known CHECK (kind IN (
		'staged', 'activated', 'frozen', 'reinstated', 'turned-off', 'attempt', 'success', 'failure', 'destroyed',
		'key-made', 'key-current', 'rewrap-done', 'key-closing', 'key-erased', 'key-destroyed',
		'tenant-added', 'tenant-policy', 'tenant-key-added', 'tenant-key-revoked', 'token-forgotten', 'migrated')),
	ADD CONSTRAINT events_about CHECK (CASE
		WHEN kind IN ('key-made', 'key-current', 'rewrap-done', 'key-closing', 'key-erased', 'key-destroyed')
		THEN num_nonnulls(purpose, key_generation) = 2 AND num_nulls(tenant, pseudonym, generation_id) = 3
		WHEN kind IN ('tenant-added', 'tenant-policy', 'tenant-key-added', 'tenant-key-revoked')
		THEN tenant IS NOT NULL AND num_nulls(purpose, key_generation, pseudonym, generation_id) = 4
		WHEN kind IN ('token-forgotten', 'migrated')
		THEN detail IS NOT NULL AND num_nulls(purpose, key_generation, tenant, pseudonym, generation_id) = 5
		ELSE num_nulls(purpose, key_generation, operator, detail) = 4 AND num_nonnulls(tenant, pseudonym, generation_id) = 3 END),
	ADD CONSTRAINT events_operator_length CHECK (octet_length(operator) BETWEEN 1 AND 256),
	ADD CONSTRAINT events_detail_length CHECK (octet_length(detail) BETWEEN 1 AND 1024);

-- The service does not choose an event's number, time and login.
REVOKE INSERT ON events FROM bkv_runtime;
GRANT INSERT (kind, tenant, pseudonym, generation_id, attempt, reason, request_id, purpose, key_generation, operator, detail)
	ON events TO bkv_runtime;

CREATE TABLE unsealed_events (
	id bigint NOT NULL, -- no reference: the trigger adds it with its event

	CONSTRAINT unsealed_events_pk PRIMARY KEY (id)
);
INSERT INTO unsealed_events SELECT id FROM events;

-- +goose StatementBegin
CREATE FUNCTION queue_event() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
	INSERT INTO public.unsealed_events (id) VALUES (NEW.id);
	RETURN NULL;
END
$$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION queue_event() FROM PUBLIC;
CREATE TRIGGER events_wait_to_be_sealed AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION queue_event();

CREATE TABLE event_seals (
	sequence bigint NOT NULL,
	event_id bigint NOT NULL,
	hash     bytea  NOT NULL,

	CONSTRAINT event_seals_pk PRIMARY KEY (sequence),
	CONSTRAINT event_seals_event_key UNIQUE (event_id),
	CONSTRAINT event_seals_event_fk FOREIGN KEY (event_id) REFERENCES events (id),
	CONSTRAINT event_seals_sequence_bounds CHECK (sequence >= 1),
	CONSTRAINT event_seals_hash_length CHECK (octet_length(hash) = 32)
);

CREATE TABLE audit_checkpoints (
	sequence       bigint      NOT NULL,
	hash           bytea       NOT NULL,
	at             timestamptz NOT NULL, -- signed, therefore given
	key_generation bigint      NOT NULL,
	signature      bytea       NOT NULL,

	CONSTRAINT audit_checkpoints_pk PRIMARY KEY (sequence),
	CONSTRAINT audit_checkpoints_seal_fk FOREIGN KEY (sequence) REFERENCES event_seals (sequence),
	CONSTRAINT audit_checkpoints_hash_length CHECK (octet_length(hash) = 32),
	CONSTRAINT audit_checkpoints_key_generation_bounds CHECK (key_generation BETWEEN 1 AND 4294967295),
	CONSTRAINT audit_checkpoints_signature_length CHECK (octet_length(signature) = 64)
);

-- Generations of the audit key, certified by the identity key: they verify checkpoints when the keys are gone.
CREATE TABLE audit_keys (
	generation bigint NOT NULL,
	public_key bytea  NOT NULL,
	signature  bytea  NOT NULL,

	CONSTRAINT audit_keys_pk PRIMARY KEY (generation),
	CONSTRAINT audit_keys_generation_bounds CHECK (generation BETWEEN 1 AND 4294967295),
	CONSTRAINT audit_keys_public_key_length CHECK (octet_length(public_key) = 33),
	CONSTRAINT audit_keys_signature_length CHECK (octet_length(signature) = 64)
);

-- One row: whose log it is, and which instance seals it.
CREATE TABLE audit_log (
	one          boolean NOT NULL DEFAULT true,
	vault_id     text COLLATE "C" NOT NULL,
	identity_key bytea   NOT NULL,
	holder       text COLLATE "C", -- null: nobody
	held_until   timestamptz,

	CONSTRAINT audit_log_pk PRIMARY KEY (one),
	CONSTRAINT audit_log_one CHECK (one),
	CONSTRAINT audit_log_vault_id_length CHECK (octet_length(vault_id) BETWEEN 1 AND 255),
	CONSTRAINT audit_log_identity_key_length CHECK (octet_length(identity_key) = 33),
	CONSTRAINT audit_log_holder_length CHECK (octet_length(holder) BETWEEN 1 AND 64),
	CONSTRAINT audit_log_held_until_if_held CHECK ((holder IS NULL) = (held_until IS NULL))
);

-- Seals waiting events after the head of the chain, all or none, and says whether it did: not if the head is
-- another than the caller knows. The service can take events off the queue in this way alone.
-- +goose StatementBegin
CREATE FUNCTION seal_events(after bigint, previous bytea, ids bigint[], hashes bytea[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	head   record;
	waited bigint;
BEGIN
	PERFORM pg_advisory_xact_lock(x'626b766175646974'::bigint); -- "bkvaudit" in ASCII
	SELECT sequence, hash INTO head FROM public.event_seals ORDER BY sequence DESC LIMIT 1;
	IF coalesce(head.sequence, 0) <> after OR head.hash IS DISTINCT FROM previous THEN
		RETURN false;
	END IF;
	DELETE FROM public.unsealed_events WHERE id = ANY (ids);
	GET DIAGNOSTICS waited = ROW_COUNT;
	IF waited <> cardinality(ids) OR waited <> cardinality(hashes) THEN
		RAISE EXCEPTION 'only events that wait are sealed, each once' USING ERRCODE = 'data_exception';
	END IF;
	INSERT INTO public.event_seals (sequence, event_id, hash)
	SELECT after + s.n, s.id, s.hash FROM unnest(ids, hashes) WITH ORDINALITY AS s (id, hash, n);
	RETURN true;
END
$$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION seal_events(bigint, bytea, bigint[], bytea[]) FROM PUBLIC;

GRANT SELECT ON events, unsealed_events, event_seals, audit_checkpoints, audit_keys, audit_log TO bkv_runtime;
GRANT INSERT ON audit_checkpoints, audit_keys TO bkv_runtime;
GRANT INSERT (vault_id, identity_key) ON audit_log TO bkv_runtime;
GRANT UPDATE (holder, held_until) ON audit_log TO bkv_runtime;
GRANT EXECUTE ON FUNCTION seal_events(bigint, bytea, bigint[], bytea[]) TO bkv_runtime;

-- Migrations are operators' actions: from this one on each is an event, in its own transaction.
-- +goose StatementBegin
CREATE FUNCTION record_migration() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
	INSERT INTO public.events (kind, detail) VALUES ('migrated', 'schema version ' || NEW.version_id);
	RETURN NULL;
END
$$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION record_migration() FROM PUBLIC;
CREATE TRIGGER schema_version_is_recorded AFTER INSERT ON schema_version FOR EACH ROW EXECUTE FUNCTION record_migration();
