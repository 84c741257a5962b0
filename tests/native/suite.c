/* Runs the engine on cases from files and compares bit by bit. tests/cases.py writes them.

   suite LIST: a line of the list is one of

       run NAME COUNT         NAME.bnnf turns COUNT images, NAME.pixels, into NAME.floats: with every instruction set,
                              1 to 3 threads, memory of its own and the caller's, all images at once and one by one
       exhaust NAME COUNT     the same is refused, and nothing is left behind, whichever allocation fails
       refuse NAME STATUS     NAME.bnnf is refused with this bnnf_status; with 0, with any that the format has

   Prints what was done; 1 if anything was not as it should be. */

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bnnfree.h"
#include "fence.h"

typedef struct block {
    uint8_t *bytes;
    size_t size;
} block;

typedef struct golden {
    char name[160]; /* of the case, and how it is run */
    block file, pixels, floats;
    size_t count;
} golden;

static int wrong, runs, refusals;

static void fail(const char *name, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("%s: ", name);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    wrong++;
}

static block read_whole(const char *name, const char *ending, size_t align) {
    char path[160];
    snprintf(path, sizeof path, "%s%s", name, ending);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) {
        perror(path);
        exit(2);
    }
    block b = {.size = (size_t)ftell(file)};
    rewind(file);
    b.bytes = fenced(b.size, align);
    if (fread(b.bytes, 1, b.size, file) != b.size) exit(2);
    fclose(file);
    return b;
}

/* -- running */

static void compare(const char *name, const float *got, const uint8_t *expected, size_t values) {
    for (size_t i = 0; i < values; i++) {
        float wanted;
        memcpy(&wanted, expected + i * sizeof wanted, sizeof wanted);
        if (memcmp(&got[i], &wanted, sizeof wanted) && (got[i] == got[i] || wanted == wanted)) {
            fail(name, "value %zu: got %a, expected %a", i, (double)got[i], (double)wanted);
            return;
        }
    }
}

static void run(const golden *g, bnnf_session *session, size_t values) {
    for (size_t each = g->count;; each = 1) {
        float *got = fenced(each * values * sizeof *got, sizeof *got);
        for (size_t i = 0; i < g->count; i += each) {
            const uint8_t *pixels = g->pixels.bytes + i * (g->pixels.size / g->count);
            if (bnnf_run(session, pixels, each, got)) fail(g->name, "bnnf_run says no");
            compare(g->name, got, g->floats.bytes + i * values * sizeof *got, each * values);
        }
        unfence(got);
        if (each == 1) return;
    }
}

/* A session, by its own thread or by the caller's. */
typedef struct use {
    const golden *golden;
    const bnnf_model *model;
    void *arena;
} use;

static void *use_session(void *argument) {
    const use *u = argument;
    const golden *g = u->golden;
    bnnf_info info = bnnf_model_info(u->model);
    bnnf_session *session;
    char message[256];
    if (bnnf_session_create(&session, u->model, u->arena, info.arena_bytes, message, sizeof message)) {
        fail(g->name, "no session: %s", message);
        return NULL;
    }
    run(g, session, info.output_values);
    for (uint32_t i = 0; i < info.tensors; i++) {
        size_t size = bnnf_read_activation(session, i, NULL, 0);
        void *bytes = fenced(size, 1);
        if (bnnf_read_activation(session, i, bytes, size) != size)
            fail(g->name, "tensor %u has two sizes", (unsigned)i);
        unfence(bytes);
    }
    for (uint32_t i = 0; i <= info.ops; i++) bnnf_op_nanoseconds(session, i);
    bnnf_session_free(session);
    return NULL;
}

static void use_model(const golden *g, bnnf_model *model) {
    bnnf_info info = bnnf_model_info(model);
    if (info.image_bytes * g->count != g->pixels.size || info.output_values * g->count * 4 != g->floats.size) {
        fail(g->name, "another size of images or results");
        return;
    }
    void *arena = fenced(info.arena_bytes, 64);
    use alone = {g, model, NULL}, lent = {g, model, arena};
    pthread_t other;
    if (pthread_create(&other, NULL, use_session, &alone)) exit(2);
    use_session(&lent); /* two sessions of one model at a time */
    pthread_join(other, NULL);
    unfence(arena);
    size_t letters = 0;
    for (uint32_t i = 0; i <= info.classes; i++) letters += strlen(bnnf_class_name(model, i));
    for (uint32_t i = 0; i <= info.ops; i++) letters += strlen(bnnf_kernel_name(model, i));
    if (!letters) fail(g->name, "no names");
    bnnf_session *session = NULL;
    void *room = fenced(info.arena_bytes + 1, 64);
    if (bnnf_session_create(&session, model, room, info.arena_bytes - 1, NULL, 0) != BNNF_ERROR_ARGUMENT || session)
        fail(g->name, "takes an arena that is too small");
    if (bnnf_session_create(&session, model, (char *)room + 1, info.arena_bytes, NULL, 0) != BNNF_ERROR_ARGUMENT)
        fail(g->name, "takes an arena that is not aligned");
    unfence(room);
    runs++;
}

static void run_case(const char *name, golden *g) {
    const char *isa;
    for (int i = 0; (isa = bnnf_isa_name(i)); i++)
        for (int threads = 1; threads <= 3; threads++) {
            snprintf(g->name, sizeof g->name, "%s, %s, %d threads", name, isa, threads);
            fprintf(stderr, "%s\n", g->name); /* the last line tells what crashed */
            bnnf_params params = bnnf_default_params();
            params.isa = isa, params.threads = threads, params.keep = params.profile = threads == 2;
            bnnf_model *model;
            char message[256];
            if (bnnf_model_create(&model, g->file.bytes, g->file.size, &params, message, sizeof message)) {
                fail(g->name, "refused: %s", message);
                return;
            }
            use_model(g, model);
            bnnf_model_free(model);
        }
}

/* -- refusing */

/* What is left of fence_failing goes to *left. */
static int make_and_run(const golden *g, const uint8_t *bytes, int *left) {
    bnnf_model *model;
    bnnf_session *session = NULL;
    bnnf_params params = bnnf_default_params();
    params.threads = 3;
    int status = bnnf_model_create(&model, bytes, g->file.size, &params, NULL, 0);
    if (!status) status = bnnf_session_create(&session, model, NULL, 0, NULL, 0);
    *left = fence_failing;
    fence_failing = 0;
    if (!status) run(g, session, bnnf_model_info(model).output_values);
    bnnf_session_free(session);
    bnnf_model_free(model);
    return status;
}

static void exhaust(const char *name, golden *g) {
    uint8_t *room = fenced(g->file.size + 1, 64); /* not aligned, so that the engine makes a copy */
    memcpy(room + 1, g->file.bytes, g->file.size);
    for (int n = 1, left = 0; !left; n++) {
        snprintf(g->name, sizeof g->name, "%s, allocation %d fails", name, n);
        fence_failing = n;
        int status = make_and_run(g, room + 1, &left), expected = left ? BNNF_OK : BNNF_ERROR_MEMORY;
        if (status != expected) fail(g->name, "status %d, expected %d", status, expected);
        if (n > 1000) break;
        refusals += status != BNNF_OK;
    }
    unfence(room);
}

static void judge(const char *name, int got, int expected, const char *message, size_t size) {
    if (expected ? got != expected : got < BNNF_ERROR_MAGIC || got > BNNF_ERROR_PLAN)
        fail(name, "status %d, expected %d", got, expected);
    size_t length = 0;
    while (length < size && message[length] >= 0x20 && message[length] < 0x7F) length++;
    if (size && (!length != (size == 1) || length == size || message[length])) fail(name, "its message is no line");
}

static void refuse(const char *name, int expected) {
    static size_t sizes[] = {256, 1, 0, 9};
    char path[160];
    block file = read_whole(name, ".bnnf", 1);
    fprintf(stderr, "%s\n", name);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        char *message = fenced(sizes[i], 1);
        uint8_t *room = fenced(file.size + i, 64);
        bnnf_model *model = NULL;
        memcpy(room + i, file.bytes, file.size);
        judge(name, bnnf_model_create(&model, room + i, file.size, NULL, message, sizes[i]), expected, message,
              sizes[i]);
        unfence(room);
        unfence(message);
        if (model) fail(name, "is made all the same");
    }
    char *message = fenced(256, 1);
    bnnf_model *model = NULL;
    snprintf(path, sizeof path, "%s.bnnf", name);
    judge(name, bnnf_model_open(&model, path, NULL, message, 256), expected, message, 256);
    if (model) fail(name, "is made of its path all the same");
    unfence(message);
    unfence(file.bytes);
    refusals++;
}

int main(int argc, char **argv) {
    char what[16], name[100];
    int number, cases = 0;
    FILE *list = argc == 2 ? fopen(argv[1], "r") : NULL;
    if (!list) return 2;
    while (fscanf(list, "%15s %99s %d", what, name, &number) == 3) {
        cases++;
        if (!strcmp(what, "refuse")) {
            refuse(name, number);
            continue;
        }
        golden g = {"", read_whole(name, ".bnnf", 64), read_whole(name, ".pixels", 1),
                    read_whole(name, ".floats", 1), (size_t)number};
        if (!strcmp(what, "run")) run_case(name, &g);
        else if (!strcmp(what, "exhaust")) exhaust(name, &g);
        else fail(name, "what is %s?", what);
        unfence(g.file.bytes), unfence(g.pixels.bytes), unfence(g.floats.bytes);
    }
    fclose(list);
    printf("%d cases, %d runs, %d refusals, %d wrong\n", cases, runs, refusals, wrong);
    return wrong != 0;
}
