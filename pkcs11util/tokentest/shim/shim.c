/*
 * A PKCS #11 module for tests. It forwards every call to a SoftHSM of its own and
 * imposes what other vendors' tokens do, what faulty ones do, and faults: see layout.h.
 *
 * Beside it, in its directory, lie SoftHSM's module (softhsm.so), its configuration
 * (softhsm2.conf) and the control file (control), which the test maps and writes at any time.
 * The copy of SoftHSM takes the place of its configuration from an environment
 * variable of another name, which the control file holds and which is set here.
 *
 * Types are those of PKCS #11 v2.40 on 64-bit Linux, where nothing is packed. Lengths that
 * the caller gives are trusted: this is a test's instrument.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong;

struct attribute { ulong type; void *value; ulong length; };
struct mechanism { ulong type; void *parameter; ulong length; };
struct gcm { unsigned char *iv; ulong ivLen, ivBits; unsigned char *aad; ulong aadLen, tagBits; };
struct ctr { ulong counterBits; unsigned char block[16]; };
struct token { unsigned char names[96]; ulong flags; }; /* and more */
struct ecdh { ulong kdf, sharedLen; void *shared; ulong publicLen; unsigned char *public; };

struct functions {
	unsigned char version[2];
#define SETTING(name)
#define WORD(name)
#define FUNCTION(name, kind, parameters, arguments) ulong (*name) parameters;
#include "layout.h"
};

enum {
	CKR_OK = 0, CKR_GENERAL_ERROR = 5, CKR_ATTRIBUTE_SENSITIVE = 0x11, CKR_DATA_LEN_RANGE = 0x21,
	CKR_DEVICE_ERROR = 0x30, CKR_DEVICE_REMOVED = 0x32, CKR_ENCRYPTED_DATA_LEN_RANGE = 0x41,
	CKR_KEY_UNEXTRACTABLE = 0x6a, CKR_MECHANISM_INVALID = 0x70, CKR_MECHANISM_PARAM_INVALID = 0x71,
	CKR_TEMPLATE_INCOMPLETE = 0xd0, CKR_TEMPLATE_INCONSISTENT = 0xd1, CKR_TOKEN_NOT_PRESENT = 0xe0,
	CKR_BUFFER_TOO_SMALL = 0x150,
	CKA_CLASS = 0, CKA_VALUE = 0x11, CKA_KEY_TYPE = 0x100, CKA_SENSITIVE = 0x103, CKA_VALUE_LEN = 0x161, CKA_EC_POINT = 0x181,
	CKM_ECDH1_DERIVE = 0x1050, CKM_AES_CTR = 0x1086, CKM_AES_GCM = 0x1087,
	CKD_NULL = 1, CKF_SERIAL_SESSION = 4, CKF_USER_PIN_LOCKED = 0x40000, CKF_WRITE_PROTECTED = 2,
};

enum {
	FIELD = 32, RAW_POINT = 65, DER_POINT = 67, IV = 12, LONG_IV = 16, TAG = 16,
};

/* The control file. */

enum setting {
#define SETTING(name) S_##name,
#define WORD(name)
#define FUNCTION(name, kind, parameters, arguments)
#include "layout.h"
	SETTINGS
};

enum kind { GENERAL, SLOT, SESSION };

enum function {
#define SETTING(name)
#define WORD(name)
#define FUNCTION(name, kind, parameters, arguments) F_##name,
#include "layout.h"
	FUNCTIONS
};

struct words {
#define SETTING(name)
#define WORD(name) int64_t name;
#define FUNCTION(name, kind, parameters, arguments)
#include "layout.h"
};

static struct control {
	int64_t settings[SETTINGS];
	struct words functions[FUNCTIONS];
	char variable[32];
} *control;

#define LOAD(word) __atomic_load_n(&(word), __ATOMIC_SEQ_CST)
#define ADD(word, n) __atomic_add_fetch(&(word), (n), __ATOMIC_SEQ_CST)
#define SET(name) LOAD(control->settings[S_##name])

static struct functions *real;

__attribute__((constructor)) static void load(void)
{
	Dl_info self;
	char dir[PATH_MAX], path[PATH_MAX + 16];
	if (!dladdr((void *)load, &self) || !realpath(self.dli_fname, dir)) {
		fprintf(stderr, "shim: cannot find itself\n");
		return;
	}
	*strrchr(dir, '/') = 0;
	snprintf(path, sizeof path, "%s/control", dir);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *mapped = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (fd >= 0)
		close(fd);
	if (mapped == MAP_FAILED) {
		fprintf(stderr, "shim: cannot map %s\n", path);
		return;
	}
	control = mapped;
	snprintf(path, sizeof path, "%s/softhsm2.conf", dir);
	setenv(control->variable, path, 1);
	snprintf(path, sizeof path, "%s/softhsm.so", dir);
	void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	ulong (*list)(struct functions **) = module ? (ulong (*)(struct functions **))dlsym(module, "C_GetFunctionList") : NULL;
	if (!list || list(&real) != CKR_OK)
		fprintf(stderr, "shim: cannot load %s: %s\n", path, dlerror());
}

/*
 * Calls that are forwarded hold it for reading, so that sessions are closed
 * under nobody: SoftHSM does not survive that.
 */
static pthread_rwlock_t inside = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

/* Sessions that are open, and what each is doing. */

enum { ENCRYPTS = 1, DECRYPTS };

static struct session {
	ulong handle, slot;
	int doing;             /* AES-GCM, or nothing that is of interest here */
	int scheme;            /* the setting iv when it began */
	unsigned char iv[LONG_IV];
	ulong ivLen;
	unsigned char *callersIV;
	ulong key;
	unsigned char aad[1 << 16];
	ulong aadLen, tagBits;
	int begun;             /* the real C_DecryptInit was made */
} *sessions[1 << 12];
static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER; /* of the pointers; a session is its one user's */

static struct session *find(ulong handle)
{
	struct session *found = NULL;
	pthread_mutex_lock(&table);
	for (size_t i = 0; i < sizeof sessions / sizeof *sessions && !found; i++)
		if (sessions[i] && sessions[i]->handle == handle)
			found = sessions[i];
	pthread_mutex_unlock(&table);
	return found;
}

static void put(ulong handle, ulong slot)
{
	struct session *s = calloc(1, sizeof *s);
	s->handle = handle;
	s->slot = slot;
	pthread_mutex_lock(&table);
	for (size_t i = 0; i < sizeof sessions / sizeof *sessions && s; i++)
		if (!sessions[i]) {
			sessions[i] = s;
			s = NULL;
		}
	pthread_mutex_unlock(&table);
	free(s);
}

/* drop forgets a session, those of a slot, or all. */
static void drop(const ulong *handle, const ulong *slot)
{
	pthread_mutex_lock(&table);
	for (size_t i = 0; i < sizeof sessions / sizeof *sessions; i++) {
		struct session *s = sessions[i];
		if (s && (!handle || s->handle == *handle) && (!slot || s->slot == *slot)) {
			free(s);
			sessions[i] = NULL;
		}
	}
	pthread_mutex_unlock(&table);
}

/* The token that goes away. */

static int64_t seenTimes; /* how often this process saw it go; changed with inside held for writing */
static int broken;        /* nothing works until the module is initialised anew */

static void notice(void)
{
	if (LOAD(seenTimes) == SET(gone_times))
		return;
	pthread_rwlock_wrlock(&inside);
	int64_t times = SET(gone_times), level = SET(gone_level);
	if (seenTimes != times) {
		for (size_t i = 0; i < sizeof sessions / sizeof *sessions; i++) {
			if (!sessions[i])
				continue;
			ulong handle = sessions[i]->handle, slot = sessions[i]->slot, keeper;
			if (level == 1) {
				/* Another session keeps the login. */
				real->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &keeper);
				real->C_CloseSession(handle);
				drop(&handle, NULL);
			} else {
				real->C_CloseAllSessions(slot);
				drop(NULL, &slot);
			}
		}
		broken = level == 3;
		__atomic_store_n(&seenTimes, times, __ATOMIC_SEQ_CST);
	}
	pthread_rwlock_unlock(&inside);
}

static void hold(struct words *f)
{
	struct timespec tick = {0, 1000000};
	int64_t left = LOAD(f->delays), waited = 0;
	do {
		if (left == 0)
			return;
	} while (left > 0 && !__atomic_compare_exchange_n(&f->delays, &left, left - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
	ADD(f->held, 1);
	for (; waited < LOAD(f->delay); waited++)
		nanosleep(&tick, NULL);
	ADD(f->held, -1);
}

static ulong injected(struct words *f)
{
	int64_t left = LOAD(f->fails);
	do {
		if (left == 0)
			return CKR_OK;
	} while (left > 0 && !__atomic_compare_exchange_n(&f->fails, &left, left - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
	return LOAD(f->code);
}

/* enter is what happens before any call. Unless it gives CKR_OK, its answer is the call's. */
static ulong enter(enum function f, enum kind kind)
{
	ADD(control->functions[f].calls, 1);
	hold(&control->functions[f]);
	ulong code = injected(&control->functions[f]);
	if (code != CKR_OK)
		return code;
	notice();
	if (kind == GENERAL)
		return CKR_OK;
	if (SET(gone))
		return kind == SLOT ? CKR_TOKEN_NOT_PRESENT : CKR_DEVICE_REMOVED;
	return LOAD(broken) ? CKR_DEVICE_ERROR : CKR_OK;
}

/* Templates. */

static struct attribute *look(struct attribute *t, ulong n, ulong type)
{
	for (ulong i = 0; i < n; i++)
		if (t[i].type == type)
			return &t[i];
	return NULL;
}

static ulong with(struct attribute *out, struct attribute *t, ulong n, struct attribute a)
{
	ulong m = 0;
	for (ulong i = 0; i < n; i++)
		if (t[i].type != a.type)
			out[m++] = t[i];
	if (a.value)
		out[m++] = a;
	return m;
}

static ulong valueLen(int64_t rule, struct attribute *t, ulong n)
{
	if (rule == 1 && !look(t, n, CKA_VALUE_LEN))
		return CKR_TEMPLATE_INCOMPLETE;
	if (rule == 2 && look(t, n, CKA_VALUE_LEN))
		return CKR_TEMPLATE_INCONSISTENT;
	return CKR_OK;
}

/* Mechanisms that are not there. */

static int hidden(ulong type)
{
	return type && ((type == CKM_AES_GCM && SET(gcm_number)) || type == (ulong)SET(hidden_1) || type == (ulong)SET(hidden_2) || type == (ulong)SET(hidden_3) || type == (ulong)SET(hidden_4));
}

#define REFUSE_HIDDEN(m) if ((m) && hidden((m)->type)) return CKR_MECHANISM_INVALID

static ulong do_C_GetMechanismList(ulong slot, ulong *list, ulong *count)
{
	ulong all[1024], n = sizeof all / sizeof *all, m = 0;
	ulong rv = real->C_GetMechanismList(slot, all, &n);
	if (rv != CKR_OK)
		return rv;
	for (ulong i = 0; i < n; i++)
		if (!hidden(all[i]))
			all[m++] = all[i];
	if (list && *count < m)
		rv = CKR_BUFFER_TOO_SMALL;
	else if (list)
		memcpy(list, all, m * sizeof *all);
	*count = m;
	return rv;
}

static ulong do_C_GetMechanismInfo(ulong slot, ulong type, void *info)
{
	return hidden(type) ? CKR_MECHANISM_INVALID : real->C_GetMechanismInfo(slot, type, info);
}

static ulong do_C_SignInit(ulong s, struct mechanism *m, ulong key)
{
	REFUSE_HIDDEN(m);
	return real->C_SignInit(s, m, key);
}

static ulong do_C_GenerateKey(ulong s, struct mechanism *m, struct attribute *t, ulong n, ulong *key)
{
	REFUSE_HIDDEN(m);
	return real->C_GenerateKey(s, m, t, n, key);
}

static ulong do_C_GenerateKeyPair(ulong s, struct mechanism *m, struct attribute *pub, ulong pubLen, struct attribute *priv, ulong privLen, ulong *pubKey, ulong *privKey)
{
	REFUSE_HIDDEN(m);
	return real->C_GenerateKeyPair(s, m, pub, pubLen, priv, privLen, pubKey, privKey);
}

/* Slots, sessions, initialisation. */

static ulong do_C_Initialize(void *args)
{
	ulong rv = real->C_Initialize(args);
	if (rv == CKR_OK && !SET(gone))
		__atomic_store_n(&broken, 0, __ATOMIC_SEQ_CST);
	return rv;
}

static ulong do_C_Finalize(void *reserved)
{
	ulong rv = real->C_Finalize(reserved);
	if (rv == CKR_OK)
		drop(NULL, NULL);
	return rv;
}

static ulong do_C_GetSlotList(unsigned char present, ulong *slots, ulong *count)
{
	if (SET(gone)) {
		*count = 0;
		return CKR_OK;
	}
	return LOAD(broken) ? CKR_DEVICE_ERROR : real->C_GetSlotList(present, slots, count);
}

static ulong do_C_GetTokenInfo(ulong slot, struct token *info)
{
	ulong rv = real->C_GetTokenInfo(slot, info);
	if (rv == CKR_OK && SET(pin_locked))
		info->flags |= CKF_USER_PIN_LOCKED;
	if (rv == CKR_OK && SET(write_protected))
		info->flags |= CKF_WRITE_PROTECTED;
	return rv;
}

static ulong do_C_OpenSession(ulong slot, ulong flags, void *app, void *notify, ulong *s)
{
	ulong rv = real->C_OpenSession(slot, flags, app, notify, s);
	if (rv == CKR_OK)
		put(*s, slot);
	return rv;
}

static ulong do_C_CloseSession(ulong s)
{
	ulong rv = real->C_CloseSession(s);
	if (rv == CKR_OK)
		drop(&s, NULL);
	return rv;
}

static ulong do_C_CloseAllSessions(ulong slot)
{
	ulong rv = real->C_CloseAllSessions(slot);
	if (rv == CKR_OK)
		drop(NULL, &slot);
	return rv;
}

/* Objects. */

static ulong do_C_FindObjects(ulong s, ulong *objects, ulong max, ulong *count)
{
	if (SET(duplicates) != 1 || max < 2)
		return real->C_FindObjects(s, objects, max, count);
	ulong rv = real->C_FindObjects(s, objects, max / 2, count);
	if (rv != CKR_OK)
		return rv;
	memcpy(objects + *count, objects, *count * sizeof *objects);
	*count *= 2;
	return rv;
}

/* give answers one attribute, as C_GetAttributeValue does. */
static ulong give(struct attribute *a, const unsigned char *value, ulong length)
{
	if (a->value && a->length < length) {
		a->length = (ulong)-1;
		return CKR_BUFFER_TOO_SMALL;
	}
	if (a->value)
		memcpy(a->value, value, length);
	a->length = length;
	return CKR_OK;
}

static ulong givePoint(ulong s, ulong o, struct attribute *a, int64_t form)
{
	unsigned char b[DER_POINT + RAW_POINT];
	struct attribute own = {CKA_EC_POINT, b, sizeof b};
	ulong rv = real->C_GetAttributeValue(s, o, &own, 1);
	if (rv != CKR_OK) {
		a->length = own.length;
		return rv;
	}
	int der = own.length == DER_POINT;
	if (form == 1 && der)
		return give(a, b + 2, RAW_POINT);
	if (form == 2 && !der && own.length == RAW_POINT) {
		memmove(b + 2, b, RAW_POINT);
		b[0] = 4;
		b[1] = RAW_POINT;
		own.length = DER_POINT;
	}
	return give(a, b, own.length);
}

static ulong do_C_GetAttributeValue(ulong s, ulong o, struct attribute *t, ulong n)
{
	int64_t point = SET(point_out), extraction = SET(extraction);
	if (!point && !extraction)
		return real->C_GetAttributeValue(s, o, t, n);
	ulong result = CKR_OK;
	for (ulong i = 0; i < n; i++) {
		ulong rv;
		if (t[i].type == CKA_EC_POINT && point) {
			rv = givePoint(s, o, &t[i], point);
		} else {
			struct attribute before = t[i];
			rv = real->C_GetAttributeValue(s, o, &t[i], 1);
			if (extraction && t[i].type == CKA_VALUE && rv == CKR_ATTRIBUTE_SENSITIVE) {
				unsigned char made[FIELD];
				memset(made, 0x5a, sizeof made);
				t[i] = before;
				rv = give(&t[i], made, sizeof made);
			}
		}
		if (rv != CKR_OK)
			result = rv;
	}
	return result;
}

static ulong do_C_WrapKey(ulong s, struct mechanism *m, ulong by, ulong key, unsigned char *out, ulong *outLen)
{
	REFUSE_HIDDEN(m);
	ulong length = *outLen;
	ulong rv = real->C_WrapKey(s, m, by, key, out, outLen);
	if (rv != CKR_KEY_UNEXTRACTABLE || !SET(extraction))
		return rv;
	*outLen = FIELD + 8;
	if (!out)
		return CKR_OK;
	if (length < *outLen)
		return CKR_BUFFER_TOO_SMALL;
	memset(out, 0x5a, *outLen);
	return CKR_OK;
}

static ulong do_C_UnwrapKey(ulong s, struct mechanism *m, ulong by, void *in, ulong inLen, struct attribute *t, ulong n, ulong *key)
{
	REFUSE_HIDDEN(m);
	int64_t rule = SET(unwrap_value_len);
	ulong rv = valueLen(rule, t, n);
	if (rv != CKR_OK)
		return rv;
	struct attribute own[64];
	if (rule == 1 && n < 64) { /* SoftHSM refuses it */
		n = with(own, t, n, (struct attribute){CKA_VALUE_LEN, NULL, 0});
		t = own;
	}
	return real->C_UnwrapKey(s, m, by, in, inLen, t, n, key);
}

/* CKM_ECDH1_DERIVE. */

static const unsigned char generator[RAW_POINT] = { /* of P-256, SEC 2 version 2.0 section 2.4.2 */
	0x04,
	0x6b, 0x17, 0xd1, 0xf2, 0xe1, 0x2c, 0x42, 0x47, 0xf8, 0xbc, 0xe6, 0xe5, 0x63, 0xa4, 0x40, 0xf2,
	0x77, 0x03, 0x7d, 0x81, 0x2d, 0xeb, 0x33, 0xa0, 0xf4, 0xa1, 0x39, 0x45, 0xd8, 0x98, 0xc2, 0x96,
	0x4f, 0xe3, 0x42, 0xe2, 0xfe, 0x1a, 0x7f, 0x9b, 0x8e, 0xe7, 0xeb, 0x4a, 0x7c, 0x0f, 0x9e, 0x16,
	0x2b, 0xce, 0x33, 0x57, 0x6b, 0x31, 0x5e, 0xce, 0xcb, 0xb6, 0x40, 0x68, 0x37, 0xbf, 0x51, 0xf5,
};

static int64_t derives;

static ulong do_C_DeriveKey(ulong s, struct mechanism *m, ulong base, struct attribute *t, ulong n, ulong *key)
{
	REFUSE_HIDDEN(m);
	if (m->type != CKM_ECDH1_DERIVE || m->length != sizeof(struct ecdh) || n > 60)
		return real->C_DeriveKey(s, m, base, t, n, key);
	struct ecdh p = *(struct ecdh *)m->parameter;
	if (p.kdf == CKD_NULL && SET(vendor_kdf))
		return CKR_MECHANISM_PARAM_INVALID;
	int der = p.publicLen == DER_POINT && p.public[0] == 4 && p.public[1] == RAW_POINT && p.public[2] == 4;
	if ((SET(point_in) == 1 && p.publicLen != RAW_POINT) || (SET(point_in) == 2 && !der))
		return CKR_MECHANISM_PARAM_INVALID;
	ulong rv = valueLen(SET(derive_value_len), t, n);
	if (rv != CKR_OK)
		return rv;

	struct attribute own[64], *sensitive = look(t, n, CKA_SENSITIVE);
	unsigned char yes = 1;
	ulong length = FIELD;
	int open = sensitive && !*(unsigned char *)sensitive->value;
	if (SET(sensitive) == 1 && open)
		return CKR_TEMPLATE_INCONSISTENT;
	memcpy(own, t, n * sizeof *t);
	if (SET(sensitive) == 2)
		n = with(own, t, n, (struct attribute){CKA_SENSITIVE, &yes, 1});
	if (!look(own, n, CKA_VALUE_LEN))
		own[n++] = (struct attribute){CKA_VALUE_LEN, &length, sizeof length};

	int64_t every = SET(derived_every), lie = SET(derived);
	if (lie && every && ADD(derives, 1) % every)
		lie = 0;
	if (lie == 1) {
		unsigned char value[FIELD];
		memcpy(value, generator + 1, sizeof value);
		struct attribute made[64];
		n = with(made, own, n, (struct attribute){CKA_VALUE_LEN, NULL, 0});
		made[n++] = (struct attribute){CKA_VALUE, value, sizeof value};
		return real->C_CreateObject(s, made, n, key);
	}
	if (lie == 2) {
		p.public = (unsigned char *)generator;
		p.publicLen = sizeof generator;
	}
	struct mechanism with = {m->type, &p, sizeof p};
	return real->C_DeriveKey(s, &with, base, own, n, key);
}

/* AES-GCM. */

static int isGCM(const struct mechanism *m)
{
	ulong number = SET(gcm_number) ? SET(gcm_number) : CKM_AES_GCM;
	return m && m->type == number && m->length == sizeof(struct gcm);
}

static ulong beginGCM(int doing, ulong s, const struct mechanism *m, ulong key)
{
	const struct gcm *p = m->parameter;
	static const unsigned char zeros[LONG_IV];
	struct session *own = find(s);
	if (!own || p->aadLen > sizeof own->aad || p->ivLen > sizeof own->iv)
		return doing == ENCRYPTS ? real->C_EncryptInit(s, (struct mechanism *)m, key) : real->C_DecryptInit(s, (struct mechanism *)m, key);
	own->doing = 0;
	own->scheme = SET(gcm_number) ? 3 : SET(iv);
	if (SET(gcm_number) && (p->iv || p->ivLen || p->ivBits))
		return CKR_MECHANISM_PARAM_INVALID;
	own->key = key;
	own->ivLen = p->ivLen;
	own->callersIV = p->iv;
	own->tagBits = p->tagBits;
	own->begun = 0;
	memcpy(own->iv, zeros, sizeof own->iv);
	memcpy(own->iv, p->ivLen ? p->iv : zeros, p->ivLen);
	own->aadLen = p->aadLen;
	memcpy(own->aad, p->aadLen ? p->aad : zeros, p->aadLen);

	if (doing == ENCRYPTS && own->scheme) {
		if (own->scheme == 1 && (p->ivLen != IV || memcmp(p->iv, zeros, IV)))
			return CKR_MECHANISM_PARAM_INVALID;
		own->ivLen = own->scheme == 2 ? LONG_IV : IV;
		if (getrandom(own->iv, own->ivLen, 0) < 0)
			return CKR_GENERAL_ERROR;
	} else if (doing == DECRYPTS && own->scheme == 3 && p->ivLen == 0) {
		own->doing = DECRYPTS; /* begun when the IV is there */
		return CKR_OK;
	} else if (p->ivLen == 0) {
		if (SET(nil_iv) == 1)
			return CKR_MECHANISM_PARAM_INVALID;
		if (SET(nil_iv) == 2)
			own->ivLen = IV;
	}
	struct gcm q = {own->iv, own->ivLen, own->ivLen * 8, own->aad, own->aadLen, p->tagBits};
	if (!q.ivLen)
		q.iv = NULL;
	if (!q.aadLen)
		q.aad = NULL;
	struct mechanism mine = {CKM_AES_GCM, &q, sizeof q};
	ulong rv = doing == ENCRYPTS ? real->C_EncryptInit(s, &mine, key) : real->C_DecryptInit(s, &mine, key);
	if (rv == CKR_OK) {
		own->doing = doing;
		own->begun = 1;
	}
	return rv;
}

static ulong do_C_EncryptInit(ulong s, struct mechanism *m, ulong key)
{
	REFUSE_HIDDEN(m);
	struct session *own = find(s);
	if (own)
		own->doing = 0;
	return isGCM(m) ? beginGCM(ENCRYPTS, s, m, key) : real->C_EncryptInit(s, m, key);
}

static ulong do_C_Encrypt(ulong s, unsigned char *in, ulong n, unsigned char *out, ulong *outLen)
{
	if (SET(data_limit) && n > (ulong)SET(data_limit)) {
		ulong length = n + 2 * TAG;
		unsigned char *scratch = malloc(length);
		real->C_Encrypt(s, in, n, scratch, &length); /* ends the operation */
		free(scratch);
		return CKR_DATA_LEN_RANGE;
	}
	struct session *own = find(s);
	if (!own || own->doing != ENCRYPTS || own->scheme < 1)
		return real->C_Encrypt(s, in, n, out, outLen);
	ulong extra = own->scheme == 1 ? 0 : own->ivLen, room = *outLen;
	if (!out) {
		*outLen = n + TAG + extra;
		return CKR_OK;
	}
	if (room < n + TAG + extra) {
		*outLen = n + TAG + extra;
		return CKR_BUFFER_TOO_SMALL;
	}
	ulong length = room - extra;
	ulong rv = real->C_Encrypt(s, in, n, own->scheme == 3 ? out + extra : out, &length);
	own->doing = 0;
	if (rv != CKR_OK)
		return rv;
	if (own->scheme == 1)
		memcpy(own->callersIV, own->iv, own->ivLen);
	else
		memcpy(own->scheme == 3 ? out : out + length, own->iv, extra);
	*outLen = length + extra;
	return CKR_OK;
}

static ulong do_C_DecryptInit(ulong s, struct mechanism *m, ulong key)
{
	REFUSE_HIDDEN(m);
	struct session *own = find(s);
	if (own)
		own->doing = 0;
	return isGCM(m) ? beginGCM(DECRYPTS, s, m, key) : real->C_DecryptInit(s, m, key);
}

static ulong do_C_Decrypt(ulong s, unsigned char *in, ulong n, unsigned char *out, ulong *outLen)
{
	struct session *own = find(s);
	if (!own || own->doing != DECRYPTS)
		return real->C_Decrypt(s, in, n, out, outLen);
	if (!own->begun) { /* the IV comes first */
		if (n < IV + TAG) {
			own->doing = 0;
			return CKR_ENCRYPTED_DATA_LEN_RANGE;
		}
		if (!out) {
			*outLen = n - IV; /* more than comes: SoftHSM wants room for the tag, too */
			return CKR_OK;
		}
		own->ivLen = IV;
		memcpy(own->iv, in, IV);
		in += IV;
		n -= IV;
		struct gcm q = {own->iv, IV, IV * 8, own->aadLen ? own->aad : NULL, own->aadLen, own->tagBits};
		struct mechanism mine = {CKM_AES_GCM, &q, sizeof q};
		ulong rv = real->C_DecryptInit(s, &mine, own->key);
		if (rv != CKR_OK) {
			own->doing = 0;
			return rv;
		}
	}
	ulong room = *outLen, rv = real->C_Decrypt(s, in, n, out, outLen);
	if (!out)
		return rv;
	own->doing = 0;
	if (rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL || !SET(bad_tag) || own->ivLen != IV || n < TAG)
		return rv;
	/* NIST SP 800-38D section 7.1: with an IV of 96 bits GCM counts from IV ‖ 2, in 32 bits. */
	struct ctr c = {32, {0}};
	memcpy(c.block, own->iv, IV);
	c.block[15] = 2;
	struct mechanism counter = {CKM_AES_CTR, &c, sizeof c};
	if (real->C_DecryptInit(s, &counter, own->key) != CKR_OK)
		return rv;
	*outLen = room;
	return real->C_Decrypt(s, in, n - TAG, out, outLen);
}

/* The rest of what lies. */

static ulong do_C_Sign(ulong s, void *in, ulong n, unsigned char *out, ulong *outLen)
{
	ulong rv = real->C_Sign(s, in, n, out, outLen);
	if (rv == CKR_OK && out && *outLen && SET(bad_signature))
		out[*outLen - 1] ^= 1;
	return rv;
}

static ulong do_C_GenerateRandom(ulong s, unsigned char *out, ulong n)
{
	ulong rv = real->C_GenerateRandom(s, out, n);
	if (rv == CKR_OK && SET(same_random))
		memset(out, 0x5a, n);
	return rv;
}

static struct functions ours;

static ulong do_C_GetFunctionList(struct functions **list)
{
	*list = &ours;
	return CKR_OK;
}

/* The functions as the caller sees them. */

#define WRAP(name, kind, parameters, call)                     \
	static ulong shim_##name parameters                    \
	{                                                      \
		ulong rv = enter(F_##name, kind);              \
		if (rv != CKR_OK)                              \
			return rv;                             \
		pthread_rwlock_rdlock(&inside);                \
		rv = call;                                     \
		pthread_rwlock_unlock(&inside);                \
		return rv;                                     \
	}
#define SETTING(name)
#define WORD(name)
#define FUNCTION(name, kind, parameters, arguments) WRAP(name, kind, parameters, real->name arguments)
#define HOOKED(name, kind, parameters, arguments) WRAP(name, kind, parameters, do_##name arguments)
#include "layout.h"

static struct functions ours = {
	.version = {2, 40},
#define SETTING(name)
#define WORD(name)
#define FUNCTION(name, kind, parameters, arguments) .name = shim_##name,
#include "layout.h"
};

__attribute__((visibility("default"))) ulong C_GetFunctionList(struct functions **list)
{
	*list = &ours;
	return control && real ? CKR_OK : CKR_GENERAL_ERROR;
}
