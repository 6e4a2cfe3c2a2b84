/*
 * What the shim and the test share: the names, in this order, of the settings and of
 * the PKCS #11 functions. The Go side reads this very file, so that the two cannot differ.
 *
 * The control file, mapped by both, is an array of 64-bit words: first one for each
 * setting, then WORDS for each function, then the name of SoftHSM's environment variable.
 */

/* SETTING(name): 0 is off, for all of them. */
SETTING(iv)                /* AES-GCM: 1 made here and written back, 2 appended to the ciphertext, 3 prepended */
SETTING(gcm_number)        /* AES-GCM has this number, and not its own; it takes no IV, and prepends one made here */
SETTING(nil_iv)            /* AES-GCM without an IV: 1 refused, 2 taken for twelve zeros */
SETTING(bad_tag)           /* 1: C_Decrypt gives the plaintext of a ciphertext whose tag is wrong */
SETTING(data_limit)        /* C_Encrypt takes at most so many bytes */
SETTING(sensitive)         /* derived secrets: 1 CKA_SENSITIVE=false is refused, 2 taken for true */
SETTING(derive_value_len)  /* CKA_VALUE_LEN in C_DeriveKey: 1 required, 2 refused */
SETTING(unwrap_value_len)  /* CKA_VALUE_LEN in C_UnwrapKey: 1 required, 2 refused */
SETTING(vendor_kdf)        /* 1: CKD_NULL is refused */
SETTING(point_out)         /* CKA_EC_POINT is read 1 raw, 2 in a DER OCTET STRING */
SETTING(point_in)          /* the point of CKM_ECDH1_DERIVE must be 1 raw, 2 in a DER OCTET STRING */
SETTING(derived)           /* CKM_ECDH1_DERIVE lies: 1 always the same secret, 2 with another point */
SETTING(derived_every)     /* only each so-many-th derive lies; 0: each */
SETTING(extraction)        /* 1: CKA_VALUE of sensitive keys can be read and unextractable keys wrapped, by the look of it */
SETTING(duplicates)        /* 1: C_FindObjects names each object twice */
SETTING(bad_signature)     /* 1: one bit of what C_Sign makes is wrong */
SETTING(same_random)       /* 1: C_GenerateRandom gives the same each time */
SETTING(pin_locked)        /* 1: C_GetTokenInfo says that the user's PIN is locked */
SETTING(write_protected)   /* 1: C_GetTokenInfo says that the token is */
SETTING(hidden_1)          /* mechanisms that the token does not have */
SETTING(hidden_2)
SETTING(hidden_3)
SETTING(hidden_4)
SETTING(gone)              /* 1: the token is not there */
SETTING(gone_level)        /* what its return leaves void: 1 sessions, 2 the login, 3 the initialisation */
SETTING(gone_times)        /* how often it went */

/* WORD(name): of each function. */
WORD(calls)   /* how often it was called */
WORD(code)    /* what the next calls answer, instead of doing anything */
WORD(fails)   /* how many calls; -1: all */
WORD(delay)   /* milliseconds that the next calls wait before they do anything */
WORD(delays)  /* how many calls; -1: all */
WORD(held)    /* how many are waiting at this moment */

/*
 * FUNCTION(name, kind, parameters, arguments), in the order of CK_FUNCTION_LIST (PKCS #11
 * v2.40). The kind says what the first argument is: SESSION, SLOT or nothing of these.
 * Pointers that the shim does not look into are void pointers. HOOKED ones have a do_ of
 * their own in shim.c; the others are only forwarded.
 */
#ifndef HOOKED
#define HOOKED(name, kind, parameters, arguments) FUNCTION(name, kind, parameters, arguments)
#endif
HOOKED(C_Initialize, GENERAL, (void *args), (args))
HOOKED(C_Finalize, GENERAL, (void *reserved), (reserved))
FUNCTION(C_GetInfo, GENERAL, (void *info), (info))
HOOKED(C_GetFunctionList, GENERAL, (struct functions **list), (list))
HOOKED(C_GetSlotList, GENERAL, (unsigned char present, ulong *slots, ulong *count), (present, slots, count))
FUNCTION(C_GetSlotInfo, SLOT, (ulong slot, void *info), (slot, info))
HOOKED(C_GetTokenInfo, SLOT, (ulong slot, struct token *info), (slot, info))
HOOKED(C_GetMechanismList, SLOT, (ulong slot, ulong *list, ulong *count), (slot, list, count))
HOOKED(C_GetMechanismInfo, SLOT, (ulong slot, ulong type, void *info), (slot, type, info))
FUNCTION(C_InitToken, SLOT, (ulong slot, void *pin, ulong pinLen, void *label), (slot, pin, pinLen, label))
FUNCTION(C_InitPIN, SESSION, (ulong s, void *pin, ulong pinLen), (s, pin, pinLen))
FUNCTION(C_SetPIN, SESSION, (ulong s, void *old, ulong oldLen, void *new, ulong newLen), (s, old, oldLen, new, newLen))
HOOKED(C_OpenSession, SLOT, (ulong slot, ulong flags, void *app, void *notify, ulong *s), (slot, flags, app, notify, s))
HOOKED(C_CloseSession, SESSION, (ulong s), (s))
HOOKED(C_CloseAllSessions, SLOT, (ulong slot), (slot))
FUNCTION(C_GetSessionInfo, SESSION, (ulong s, void *info), (s, info))
FUNCTION(C_GetOperationState, SESSION, (ulong s, void *out, ulong *outLen), (s, out, outLen))
FUNCTION(C_SetOperationState, SESSION, (ulong s, void *state, ulong n, ulong enc, ulong auth), (s, state, n, enc, auth))
FUNCTION(C_Login, SESSION, (ulong s, ulong user, void *pin, ulong pinLen), (s, user, pin, pinLen))
FUNCTION(C_Logout, SESSION, (ulong s), (s))
FUNCTION(C_CreateObject, SESSION, (ulong s, struct attribute *t, ulong n, ulong *object), (s, t, n, object))
FUNCTION(C_CopyObject, SESSION, (ulong s, ulong o, struct attribute *t, ulong n, ulong *object), (s, o, t, n, object))
FUNCTION(C_DestroyObject, SESSION, (ulong s, ulong o), (s, o))
FUNCTION(C_GetObjectSize, SESSION, (ulong s, ulong o, ulong *size), (s, o, size))
HOOKED(C_GetAttributeValue, SESSION, (ulong s, ulong o, struct attribute *t, ulong n), (s, o, t, n))
FUNCTION(C_SetAttributeValue, SESSION, (ulong s, ulong o, struct attribute *t, ulong n), (s, o, t, n))
FUNCTION(C_FindObjectsInit, SESSION, (ulong s, struct attribute *t, ulong n), (s, t, n))
HOOKED(C_FindObjects, SESSION, (ulong s, ulong *objects, ulong max, ulong *count), (s, objects, max, count))
FUNCTION(C_FindObjectsFinal, SESSION, (ulong s), (s))
HOOKED(C_EncryptInit, SESSION, (ulong s, struct mechanism *m, ulong key), (s, m, key))
HOOKED(C_Encrypt, SESSION, (ulong s, unsigned char *in, ulong n, unsigned char *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_EncryptUpdate, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_EncryptFinal, SESSION, (ulong s, void *out, ulong *outLen), (s, out, outLen))
HOOKED(C_DecryptInit, SESSION, (ulong s, struct mechanism *m, ulong key), (s, m, key))
HOOKED(C_Decrypt, SESSION, (ulong s, unsigned char *in, ulong n, unsigned char *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_DecryptUpdate, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_DecryptFinal, SESSION, (ulong s, void *out, ulong *outLen), (s, out, outLen))
FUNCTION(C_DigestInit, SESSION, (ulong s, struct mechanism *m), (s, m))
FUNCTION(C_Digest, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_DigestUpdate, SESSION, (ulong s, void *in, ulong n), (s, in, n))
FUNCTION(C_DigestKey, SESSION, (ulong s, ulong key), (s, key))
FUNCTION(C_DigestFinal, SESSION, (ulong s, void *out, ulong *outLen), (s, out, outLen))
HOOKED(C_SignInit, SESSION, (ulong s, struct mechanism *m, ulong key), (s, m, key))
HOOKED(C_Sign, SESSION, (ulong s, void *in, ulong n, unsigned char *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_SignUpdate, SESSION, (ulong s, void *in, ulong n), (s, in, n))
FUNCTION(C_SignFinal, SESSION, (ulong s, void *out, ulong *outLen), (s, out, outLen))
FUNCTION(C_SignRecoverInit, SESSION, (ulong s, struct mechanism *m, ulong key), (s, m, key))
FUNCTION(C_SignRecover, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_VerifyInit, SESSION, (ulong s, struct mechanism *m, ulong key), (s, m, key))
FUNCTION(C_Verify, SESSION, (ulong s, void *in, ulong n, void *sig, ulong sigLen), (s, in, n, sig, sigLen))
FUNCTION(C_VerifyUpdate, SESSION, (ulong s, void *in, ulong n), (s, in, n))
FUNCTION(C_VerifyFinal, SESSION, (ulong s, void *sig, ulong sigLen), (s, sig, sigLen))
FUNCTION(C_VerifyRecoverInit, SESSION, (ulong s, struct mechanism *m, ulong key), (s, m, key))
FUNCTION(C_VerifyRecover, SESSION, (ulong s, void *sig, ulong sigLen, void *out, ulong *outLen), (s, sig, sigLen, out, outLen))
FUNCTION(C_DigestEncryptUpdate, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_DecryptDigestUpdate, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_SignEncryptUpdate, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
FUNCTION(C_DecryptVerifyUpdate, SESSION, (ulong s, void *in, ulong n, void *out, ulong *outLen), (s, in, n, out, outLen))
HOOKED(C_GenerateKey, SESSION, (ulong s, struct mechanism *m, struct attribute *t, ulong n, ulong *key), (s, m, t, n, key))
HOOKED(C_GenerateKeyPair, SESSION, (ulong s, struct mechanism *m, struct attribute *pub, ulong pubLen, struct attribute *priv, ulong privLen, ulong *pubKey, ulong *privKey), (s, m, pub, pubLen, priv, privLen, pubKey, privKey))
HOOKED(C_WrapKey, SESSION, (ulong s, struct mechanism *m, ulong by, ulong key, unsigned char *out, ulong *outLen), (s, m, by, key, out, outLen))
HOOKED(C_UnwrapKey, SESSION, (ulong s, struct mechanism *m, ulong by, void *in, ulong inLen, struct attribute *t, ulong n, ulong *key), (s, m, by, in, inLen, t, n, key))
HOOKED(C_DeriveKey, SESSION, (ulong s, struct mechanism *m, ulong base, struct attribute *t, ulong n, ulong *key), (s, m, base, t, n, key))
FUNCTION(C_SeedRandom, SESSION, (ulong s, void *seed, ulong n), (s, seed, n))
HOOKED(C_GenerateRandom, SESSION, (ulong s, unsigned char *out, ulong n), (s, out, n))
FUNCTION(C_GetFunctionStatus, SESSION, (ulong s), (s))
FUNCTION(C_CancelFunction, SESSION, (ulong s), (s))
FUNCTION(C_WaitForSlotEvent, GENERAL, (ulong flags, ulong *slot, void *reserved), (flags, slot, reserved))

#undef SETTING
#undef WORD
#undef FUNCTION
#undef HOOKED
