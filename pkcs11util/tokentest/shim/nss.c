/*
 * A PKCS #11 module for tests that forwards to NSS's software token and initialises it with
 * the string that it wants in the reserved field of C_Initialize, PARAMETERS. With SIZES it also
 * answers what C_Encrypt is asked for in the first of two calls, which NSS 3.87 gets wrong for AES-GCM.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

typedef unsigned long ulong;

struct attribute;
struct mechanism;
struct token;

struct initialise { void *mutexes[4]; ulong flags; void *reserved; };

struct functions {
	unsigned char version[2];
#define SETTING(name)
#define WORD(name)
#define FUNCTION(name, kind, parameters, arguments) ulong (*name) parameters;
#include "layout.h"
};

enum { CKR_OK = 0, CKR_GENERAL_ERROR = 5, LONGER = 32 };

static struct functions *real, ours;

static ulong initialise(void *args)
{
	struct initialise own = {0};
	if (args)
		own = *(struct initialise *)args;
	own.reserved = PARAMETERS;
	return real->C_Initialize(&own);
}

#ifdef SIZES
static ulong encrypt(ulong s, unsigned char *in, ulong n, unsigned char *out, ulong *outLen)
{
	if (out)
		return real->C_Encrypt(s, in, n, out, outLen);
	*outLen = n + LONGER;
	return CKR_OK;
}
#endif

__attribute__((visibility("default"))) ulong C_GetFunctionList(struct functions **list)
{
	if (!real) {
		void *module = dlopen(MODULE, RTLD_NOW | RTLD_LOCAL);
		ulong (*get)(struct functions **) = module ? (ulong (*)(struct functions **))dlsym(module, "C_GetFunctionList") : NULL;
		if (!get || get(&real) != CKR_OK) {
			fprintf(stderr, "nss: cannot load %s: %s\n", MODULE, dlerror());
			return CKR_GENERAL_ERROR;
		}
		memcpy(&ours, real, sizeof ours);
		ours.C_Initialize = initialise;
#ifdef SIZES
		ours.C_Encrypt = encrypt;
#endif
	}
	*list = &ours;
	return CKR_OK;
}
