-- Why: an event records a change in the statement that makes the change, so that
-- neither is there without the other. It names the account by its pseudonym, a MAC
-- made in the token: whoever reads events sees activity, not users. The service may
-- only add events, and cannot even read them back.

-- +goose Up
CREATE TABLE events (
	id            bigint      NOT NULL GENERATED ALWAYS AS IDENTITY,
	at            timestamptz NOT NULL DEFAULT statement_timestamp(),
	kind          text COLLATE "C" NOT NULL,
	tenant        text COLLATE "C" NOT NULL,
	pseudonym     bytea       NOT NULL,
	generation_id bytea       NOT NULL,
	attempt       bigint,               -- null: not about an attempt
	reason        text COLLATE "C",     -- null: nothing was destroyed
	request_id    text COLLATE "C",     -- null: the vault acted by itself

	CONSTRAINT events_pk PRIMARY KEY (id),
	CONSTRAINT events_kind_known CHECK (kind IN ('staged', 'activated', 'frozen', 'reinstated',
		'attempt', 'success', 'failure', 'destroyed')),
	CONSTRAINT events_tenant_length CHECK (octet_length(tenant) BETWEEN 1 AND 64),
	CONSTRAINT events_pseudonym_length CHECK (octet_length(pseudonym) = 32),
	CONSTRAINT events_generation_id_length CHECK (octet_length(generation_id) = 16),
	CONSTRAINT events_attempt_if_one CHECK ((kind IN ('attempt', 'success', 'failure')) = (attempt IS NOT NULL)),
	CONSTRAINT events_attempt_bounds CHECK (attempt BETWEEN 1 AND 4294967295),
	CONSTRAINT events_reason_if_destroyed CHECK ((kind = 'destroyed') = (reason IS NOT NULL)),
	CONSTRAINT events_reason_known CHECK (reason IN ('exhausted', 'failures', 'replaced', 'overruled',
		'turned-off', 'grace-over', 'not-in-time', 'superseded')),
	CONSTRAINT events_request_id_length CHECK (octet_length(request_id) BETWEEN 1 AND 128)
);

GRANT INSERT ON events TO bkv_runtime;
