// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA driver: writes down what its linker is called with, byte by byte, and links nothing.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INFO_LOG = 3, INFO_LOG_SIZE = 4, ERROR_LOG = 5, ERROR_LOG_SIZE = 6, MOST = 64 };

static unsigned count;
static int options[MOST];
static void **values;
static char image[] = "\177ELF linked";

__attribute__((constructor)) static void unbuffered(void) { setvbuf(stdout, NULL, _IONBF, 0); }

int cuInit(unsigned flags) { return puts("cuInit") < 0; }
int cuCtxGetCurrent(void **context) { return *context = NULL, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)0x77, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return puts("release") < 0; }
int cuCtxPushCurrent_v2(void *context) { return printf("push %p\n", context) < 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = NULL, puts("pop") < 0; }
int cuLinkDestroy(void *state) { return printf("destroy %p\n", state) < 0; }

int cuLinkCreate_v2(unsigned given, int *names, void **given_values, void **state) {
    count = given;
    values = given_values;
    memcpy(options, names, given * sizeof *names);
    for (unsigned i = 0; i < given; i++)
        if (names[i] != INFO_LOG && names[i] != ERROR_LOG)
            printf("option %d = %ld\n", names[i], (long)(intptr_t)given_values[i]);
    *state = (void *)0x99;
    return 0;
}

int cuLinkAddData_v2(void *state, int kind, void *data, size_t size, const char *name, unsigned more, int *n, void **v) {
    printf("add %p kind %d, %zu bytes, the last %d, %s, %u options\n", state, kind, size, ((char *)data)[size - 1], name, more);
    return 0;
}

int cuLinkComplete(void *state, void **out, size_t *size) {
    for (unsigned i = 0; i < count; i++) {
        if (options[i] == INFO_LOG) strcpy(values[i], "all is well");
        if (options[i] == ERROR_LOG) strcpy(values[i], "line 7 isn't PTX");
        // How much was written: into the caller's array, which has to be there still.
        if (options[i] == INFO_LOG_SIZE || options[i] == ERROR_LOG_SIZE) {
            if ((intptr_t)values[i] != 65536) return 1;
            values[i] = (void *)16;
        }
    }
    *out = image;
    *size = sizeof image - 1;
    return getenv("REFUSE") ? 218 : 0;
}

int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
    char versioned[128];
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *found = dlsym(self, versioned);
    if (*found == NULL) *found = dlsym(self, name);
    if (status != NULL) *status = *found == NULL;
    return *found == NULL ? 500 : 0;
}
int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, found, version, flags, NULL);
}
