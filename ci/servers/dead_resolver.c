/* SPDX-License-Identifier: Apache-2.0
 *
 * When preloaded, makes the resolver fail for every name under "dead.example": getaddrinfo returns an error after ten
 * seconds, as glibc does when no name server answers. Other names are resolved as usual.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

typedef int resolve(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    static const char dead[] = "dead.example";
    size_t length = node ? strlen(node) : 0;
    if (length >= sizeof dead - 1 && strcmp(node + length - (sizeof dead - 1), dead) == 0
        && !(hints && hints->ai_flags & AI_NUMERICHOST)) {
        sleep(10);
        return EAI_AGAIN;
    }
    return ((resolve *)dlsym(RTLD_NEXT, "getaddrinfo"))(node, service, hints, found);
}
