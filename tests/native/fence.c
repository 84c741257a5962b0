/* The linker puts __wrap_x in the place of x in all calls from one file to another (--wrap). */

#define _DEFAULT_SOURCE

#include "fence.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int fence_failing;

static int fails(void) {
    if (!fence_failing || --fence_failing) return 0;
    errno = ENOMEM;
    return 1;
}

#if defined(__SANITIZE_ADDRESS__)
#define POISONS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define POISONS 1
#endif
#endif

#ifdef POISONS

void *fenced(size_t bytes, size_t align) {
    void *memory;
    if (posix_memalign(&memory, align < sizeof memory ? sizeof memory : align, bytes ? bytes : 1)) return NULL;
    return memset(memory, 0xFF, bytes);
}

void unfence(void *memory) { free(memory); }

#else

/* A page that holds the size of the whole, the pages of the caller, a page that may not be touched. */
void *fenced(size_t bytes, size_t align) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (bytes > SIZE_MAX / 2) return NULL;
    size_t whole = (bytes + page - 1) / page * page + 2 * page, taken = (bytes + align - 1) / align * align;
    char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return NULL;
    memcpy(start, &whole, sizeof whole);
    char *end = start + whole - page;
    if (mprotect(start, page, PROT_READ) || mprotect(end, page, PROT_NONE)) abort();
    return memset(end - taken, 0xFF, taken);
}

void unfence(void *memory) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole;
    if (!memory) return;
    /* of no bytes: the page that may not be touched */
    char *start = (char *)((uintptr_t)memory / page * page) - page;
    memcpy(&whole, start, sizeof whole);
    munmap(start, whole);
}

#endif

void *__wrap_bnnf__alloc(uint64_t bytes);
void *__wrap_bnnf__alloc(uint64_t bytes) { return bytes > SIZE_MAX || fails() ? NULL : fenced((size_t)bytes, 64); }

void __wrap_bnnf__free(void *memory);
void __wrap_bnnf__free(void *memory) { unfence(memory); }

void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes) { return fails() ? NULL : __real_malloc(bytes); }

void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes) { return fails() ? NULL : __real_calloc(count, bytes); }

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    return fails() ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}
