package module

/*
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
static void trim(void) { malloc_trim(0); }
#else
static void trim(void) {}
#endif
*/
import "C"

// trim gives memory that a module has freed back to the system. glibc keeps it otherwise, a
// share for each thread, as large as that thread ever needed.
func trim() { C.trim() }
