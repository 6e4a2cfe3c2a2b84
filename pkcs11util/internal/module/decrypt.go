package module

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

// CK_FUNCTION_LIST of PKCS #11 v2.40: a version and then the functions, in the order of its section 3.6.
struct functionList { unsigned char version[2]; void *function[68]; };
enum { C_DECRYPT = 34 };

typedef unsigned long (*getFunctionList)(struct functionList **);
typedef unsigned long (*decryptFunction)(unsigned long, const void *, unsigned long, void *, unsigned long *);

// find returns C_Decrypt of a module that is loaded already.
static void *findDecrypt(const char *path)
{
	void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
	getFunctionList get = handle ? (getFunctionList)dlsym(handle, "C_GetFunctionList") : NULL;
	struct functionList *list = NULL;
	if (!get || get(&list) != 0 || !list)
		return NULL;
	return list->function[C_DECRYPT];
}

static unsigned long decrypt(void *f, unsigned long session, const void *in, unsigned long n, void *out, unsigned long *length)
{
	return ((decryptFunction)f)(session, in, n, out, length);
}
*/
import "C"

import (
	"unsafe"

	"github.com/miekg/pkcs11"
)

// findDecrypt looks C_Decrypt up in the module at path, which is loaded. nil: it has none.
func findDecrypt(path string) unsafe.Pointer {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	return C.findDecrypt(name)
}

// Decrypt is C_Decrypt, called once with room for as much as comes. It takes the place of miekg/pkcs11's, which
// in v1.1.2 keeps its output buffer for good each time that the token refuses a value: whoever may send sealed values
// could fill the memory with forged ones. The caller is inside the module; ciphertext is not empty.
func (m *Module) Decrypt(session pkcs11.SessionHandle, ciphertext []byte) ([]byte, error) {
	if m.decrypt == nil {
		return nil, pkcs11.Error(pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
	}
	plaintext := make([]byte, len(ciphertext))
	length := C.ulong(len(plaintext))
	rv := C.decrypt(m.decrypt, C.ulong(session), unsafe.Pointer(&ciphertext[0]), C.ulong(len(ciphertext)), unsafe.Pointer(&plaintext[0]), &length)
	if rv != pkcs11.CKR_OK {
		return nil, pkcs11.Error(rv)
	}
	return plaintext[:min(int(length), len(plaintext))], nil
}
