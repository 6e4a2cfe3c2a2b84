-- What the chat app keeps. Applied at every start; all of it is IF NOT EXISTS.
-- Texts are nowhere in it: messages are sealed to devices, backups under a key
-- that only devices have.

CREATE TABLE IF NOT EXISTS accounts (
	id            text PRIMARY KEY,          -- random; the vault knows the user by it, so it never changes
	name          text NOT NULL UNIQUE,      -- lower case
	password_hash bytea NOT NULL,            -- Argon2id of the account's password, which is no backup password
	password_salt bytea NOT NULL,
	device_key    bytea,                     -- public key of the device that messages are sealed to
	created_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS sessions (
	token_hash bytea PRIMARY KEY,            -- SHA-256 of the cookie
	account    text NOT NULL REFERENCES accounts ON DELETE CASCADE,
	expires_at timestamptz NOT NULL
);

CREATE TABLE IF NOT EXISTS messages (
	id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	sender        text NOT NULL REFERENCES accounts ON DELETE CASCADE,
	recipient     text NOT NULL REFERENCES accounts ON DELETE CASCADE,
	client_id     text NOT NULL,             -- of the sender's making, so that sending again is harmless
	sender_key    bytea NOT NULL,
	recipient_key bytea NOT NULL,
	sealed        bytea NOT NULL,
	sent_at       timestamptz NOT NULL DEFAULT now(),
	CONSTRAINT messages_once UNIQUE (sender, client_id)
);
CREATE INDEX IF NOT EXISTS messages_to ON messages (recipient, id);

CREATE TABLE IF NOT EXISTS backups (
	account  text PRIMARY KEY REFERENCES accounts ON DELETE CASCADE,
	version  bigint NOT NULL,                -- grows with every change; what If-Match names
	mode     text NOT NULL CHECK (mode IN ('password', 'digits', 'passkey')),
	passkeys jsonb NOT NULL,                 -- credential ids, and the key wrapped under what each passkey answers
	blob     bytea NOT NULL,
	saved_at timestamptz NOT NULL DEFAULT now()
);
