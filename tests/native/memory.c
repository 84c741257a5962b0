/* What the engine allocates and where it writes, for tests/test_native_memory.py: linked with --wrap, so that its calls of
   malloc and the like come here.

   usage: memory MODEL SHARED KEPT, the last two the bytes of the activations where they share memory and where each is
   kept. Prints `name value` pairs, a line for each instruction set, 1 to 3 threads, activations shared and kept, and an
   arena of the session's own and given. */

#define _POSIX_C_SOURCE 200112L
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bnnfree.h"

#define GUARD 4096 /* bytes before and behind each block that must not change */
#define IMAGES 2

void *__real_malloc(size_t size);
void __real_free(void *memory);

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static size_t calls, live, peak, outside; /* outside: bytes of guards that have changed */

typedef struct {
    char *raw;
    size_t size;
} block;

static char guard_byte(size_t i) { return (char)(0xC5 ^ i); }

static void *give(size_t size, size_t align) {
    char *raw = __real_malloc(size + align + 2 * GUARD);
    if (!raw) exit(2);
    char *memory = raw + GUARD;
    memory += (align - (uintptr_t)memory % align) % align;
    for (size_t i = 0; i < GUARD; i++) memory[(ptrdiff_t)i - GUARD] = memory[size + i] = guard_byte(i);
    const block b = {raw, size};
    memcpy(memory - GUARD, &b, sizeof b);
    return memory;
}

static block check_guards(const char *memory) {
    block b;
    memcpy(&b, memory - GUARD, sizeof b);
    for (size_t i = 0; i < GUARD; i++) {
        outside += i >= sizeof b && memory[(ptrdiff_t)i - GUARD] != guard_byte(i);
        outside += memory[b.size + i] != guard_byte(i);
    }
    return b;
}

static void *counted(size_t size, size_t align) {
    pthread_mutex_lock(&mutex);
    calls++;
    live += size;
    if (live > peak) peak = live;
    pthread_mutex_unlock(&mutex);
    return give(size, align);
}

void *__wrap_malloc(size_t size) { return counted(size, 16); }

void *__wrap_aligned_alloc(size_t align, size_t size) { return counted(size, align); }

int __wrap_posix_memalign(void **memory, size_t align, size_t size) {
    *memory = counted(size, align);
    return 0;
}

void *__wrap_calloc(size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return NULL;
    void *memory = counted(count * size, 16);
    memset(memory, 0, count * size);
    return memory;
}

void __wrap_free(void *memory) {
    if (!memory) return;
    const block b = check_guards(memory);
    pthread_mutex_lock(&mutex);
    live -= b.size;
    pthread_mutex_unlock(&mutex);
    __real_free(b.raw);
}

void *__wrap_realloc(void *memory, size_t size) {
    void *more = counted(size, 16);
    if (memory) {
        const block b = check_guards(memory);
        memcpy(more, memory, b.size < size ? b.size : size);
        __wrap_free(memory);
    }
    return more;
}

static void must(int fine, const char *what) {
    if (fine) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* Runs in an arena that holds `fill` at first, and marks what is then another byte. */
static void run_in(bnnf_session *session, const bnnf_info *info, const uint8_t *pixels, float *output, char *arena,
                   char fill, char *touched) {
    memset(arena, fill, info->arena_bytes);
    must(bnnf_run(session, pixels, IMAGES, output) == BNNF_OK, "run");
    for (size_t i = 0; i < info->arena_bytes; i++) touched[i] |= arena[i] != fill;
}

/* One behind the last that is marked. */
static size_t end_of(const char *marks, size_t count) {
    while (count && !marks[count - 1]) count--;
    return count;
}

static void measure(const bnnf_model *model, int keep, int given, size_t activations) {
    const bnnf_info info = bnnf_model_info(model);
    const size_t values = IMAGES * info.output_values * sizeof(float);
    uint8_t *pixels = give(IMAGES * info.image_bytes, 16);
    float *first = give(values, 16), *second = give(values, 16);
    char *arena = give(info.arena_bytes, 64), *touched = give(info.arena_bytes, 16);
    for (size_t i = 0; i < IMAGES * info.image_bytes; i++) pixels[i] = (uint8_t)(i * 37 + i / 251);
    memset(touched, 0, info.arena_bytes);
    bnnf_session *session;
    if (given) {
        const int small = bnnf_session_create(&session, model, arena, info.arena_bytes - 1, NULL, 0);
        const int askew = bnnf_session_create(&session, model, arena + 16, info.arena_bytes, NULL, 0);
        must(small == BNNF_ERROR_ARGUMENT && askew == BNNF_ERROR_ARGUMENT, "an arena that will not do was taken");
    }
    const size_t before = live;
    calls = 0;
    peak = live;
    must(!bnnf_session_create(&session, model, given ? arena : NULL, given ? info.arena_bytes : 0, NULL, 0), "session");
    const size_t create_calls = calls;
    run_in(session, &info, pixels, first, arena, 0x5A, touched);
    run_in(session, &info, pixels, second, arena, (char)0xA5, touched);
    const size_t run_calls = calls - create_calls;
    bnnf_session_free(session);
    check_guards(arena);
    check_guards((char *)first);
    check_guards((char *)second);
    printf("isa %s threads %d keep %d given %d arena_bytes %zu session_bytes %zu packed_bytes %zu peak %zu", info.isa,
           info.threads, keep, given, info.arena_bytes, info.session_bytes, info.packed_bytes, peak - before);
    printf(" create_calls %zu run_calls %zu left %zu outside %zu", create_calls, run_calls, live - before, outside);
    printf(" activations_end %zu end %zu same %d\n", end_of(touched, activations), end_of(touched, info.arena_bytes),
           !memcmp(first, second, values));
    void *all[] = {pixels, first, second, arena, touched};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) __real_free(check_guards(all[i]).raw);
}

int main(int count, char **arguments) {
    must(count == 4, "usage: memory MODEL SHARED KEPT");
    for (int i = 0; bnnf_isa_name(i); i++)
        for (int n = 0; n < 12; n++) {
            bnnf_params params = bnnf_default_params();
            params.isa = bnnf_isa_name(i);
            params.threads = 1 + n / 4;
            params.keep = params.profile = n / 2 % 2;
            bnnf_model *model;
            must(!bnnf_model_open(&model, arguments[1], &params, NULL, 0), "model");
            measure(model, params.keep, n % 2, (size_t)strtoull(arguments[2 + params.keep], NULL, 10));
            bnnf_model_free(model);
            must(live == 0, "a model leaves memory behind");
        }
    return 0;
}
