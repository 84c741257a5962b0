/* The functions of bnnfree.h: making a model, running it, asking about it. */

#define _POSIX_C_SOURCE 199309L /* clock_gettime, which C11 alone has not */

#include <fenv.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model.h"

struct bnnf_session {
    const bnnf_model *model;
    void *memory; /* what was allocated, all in one: the session, nanoseconds, the pool and an arena of its own */
    char *arena;
    bnnf__pool *pool;
    uint64_t *nanoseconds; /* of each op */
    int has_run;
    uint64_t last;         /* when the op before ended */
    const uint8_t *pixels; /* of this image */
};

/* Where the parts of a session lie, from an address aligned to 64 on: a session is made by the sizes that
   bnnf_model_info tells. No sum overflows, as bnnf__plan_arena leaves room. */
typedef struct layout {
    size_t nanoseconds, pool, arena, bytes; /* bytes: with what it takes to align it */
} layout;

static layout layout_of(const bnnf_model *model) {
    layout l;
    l.nanoseconds = bnnf__align(sizeof(bnnf_session));
    l.pool = l.nanoseconds + bnnf__align(model->op_count * sizeof(uint64_t));
    l.arena = l.pool + bnnf__align(bnnf__pool_bytes(model->threads, model->op_count));
    l.bytes = l.arena + model->arena_bytes + BNNF__ALIGN - 1;
    return l;
}

/* -- models */

bnnf_params bnnf_default_params(void) { return (bnnf_params){.isa = NULL, .threads = 1, .keep = 0, .profile = 0}; }

static int take_params(bnnf_model *model, const bnnf_params *params, const bnnf__message *message) {
    bnnf_params p = params ? *params : bnnf_default_params();
    if (p.threads < 1 || p.threads > BNNF__MAX_THREADS)
        return bnnf__fail(message, BNNF_ERROR_ARGUMENT, "threads: got %d, expected 1 to %d.", p.threads,
                          BNNF__MAX_THREADS);
    for (int i = 0; bnnf_isa_name(i); i++)
        if (!p.isa || !strcmp(p.isa, bnnf_isa_name(i))) {
            model->isa = bnnf_isa_name(i);
            break;
        }
    if (!model->isa)
        return bnnf__fail(message, BNNF_ERROR_ARGUMENT, "isa: got %.32s, which this CPU or this build does not run.",
                          p.isa);
#ifdef BNNF_NO_THREADS
    p.threads = 1;
#endif
    model->threads = p.threads;
    model->keep = p.keep;
    model->profile = p.profile;
    return BNNF_OK;
}

/* All that the kernels pack in one block. Why counted first: a file can ask for more than there is, by sharing one
   constant among many ops; then this fails before anything is written. */
static int pack(bnnf_model *model, const bnnf__message *message) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < model->op_count; i++) {
        bnnf__op *op = &model->ops[i];
        op->kernel = bnnf__pick(op, model->isa);
        op->packed_bytes = op->kernel->pack(op, NULL);
        bytes += ((uint64_t)op->packed_bytes + BNNF__ALIGN - 1) / BNNF__ALIGN * BNNF__ALIGN;
    }
    model->packed = bnnf__alloc(bytes);
    if (!model->packed) return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    char *at = model->packed;
    for (uint32_t i = 0; i < model->op_count; i++) {
        bnnf__op *op = &model->ops[i];
        op->packed = at;
        at += bnnf__align(op->kernel->pack(op, at));
    }
    model->packed_bytes = (size_t)bytes;
    return BNNF_OK;
}

static int fill_model(bnnf_model *model, const bnnf__message *message) {
    int status;
    if ((status = bnnf__read_file(model, message)) || (status = bnnf__plan_ops(model, message))) return status;
    if ((status = pack(model, message))) return status;
    return bnnf__plan_arena(model, message);
}

/* Of bytes that are aligned to 64, or of bytes of its own in the model's possession from here on. */
static int make_model(bnnf_model **made, const void *bytes, size_t size, void *own, const bnnf_params *params,
                      const bnnf__message *message) {
    bnnf_model *model = calloc(1, sizeof *model);
    if (!model) {
        bnnf__free(own);
        return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    }
    model->bytes = bytes;
    model->size = size;
    model->own_bytes = own;
    int status = take_params(model, params, message);
    fenv_t environment; /* see bnnf_run: floats are checked and converted here too */
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    if (!status) status = fill_model(model, message);
    fesetenv(&environment);
    if (status) bnnf_model_free(model);
    else *made = model;
    return status;
}

int bnnf_model_create(bnnf_model **model, const void *data, size_t size, const bnnf_params *params, char *message,
                      size_t message_size) {
    const bnnf__message to = {message, message_size};
    if (!model) return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "model: got a null pointer.");
    *model = NULL;
    if (!data) return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "data: got a null pointer.");
    if ((uintptr_t)data % BNNF__ALIGN == 0) return make_model(model, data, size, NULL, params, &to);
    void *copy = bnnf__alloc(size);
    if (!copy) return bnnf__fail(&to, BNNF_ERROR_MEMORY, "not enough memory.");
    memcpy(copy, data, size);
    return make_model(model, copy, size, copy, params, &to);
}

int bnnf_model_open(bnnf_model **model, const char *path, const bnnf_params *params, char *message,
                    size_t message_size) {
    const bnnf__message to = {message, message_size};
    if (!model) return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "model: got a null pointer.");
    *model = NULL;
    if (!path) return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "path: got a null pointer.");
    FILE *file = fopen(path, "rb");
    if (!file) return bnnf__fail(&to, BNNF_ERROR_FILE, "file: cannot be opened.");
    long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    if (size < 0 || size == LONG_MAX || fseek(file, 0, SEEK_SET)) { /* LONG_MAX: a folder */
        fclose(file);
        return bnnf__fail(&to, BNNF_ERROR_FILE, "file: cannot be read.");
    }
    void *bytes = bnnf__alloc((uint64_t)size);
    size_t got = bytes ? fread(bytes, 1, (size_t)size, file) : 0;
    fclose(file);
    if (!bytes) return bnnf__fail(&to, BNNF_ERROR_MEMORY, "not enough memory.");
    if (got != (size_t)size) {
        bnnf__free(bytes);
        return bnnf__fail(&to, BNNF_ERROR_FILE, "file: cannot be read.");
    }
    return make_model(model, bytes, got, bytes, params, &to);
}

void bnnf_model_free(bnnf_model *model) {
    if (!model) return;
    bnnf__free(model->own_bytes);
    bnnf__free(model->borders);
    bnnf__free(model->padded);
    bnnf__free(model->packed);
    free(model->classes);
    free(model->metadata);
    free(model->class_at);
    free(model->tensors);
    free(model->ops);
    free(model);
}

bnnf_info bnnf_model_info(const bnnf_model *model) {
    const bnnf__tensor *image = &model->tensors[model->input], *output = &model->tensors[model->output];
    return (bnnf_info){
        .height = image->shape[0],
        .width = image->shape[1],
        .channels = image->shape[2],
        .output_height = output->shape[0],
        .output_width = output->shape[1],
        .output_channels = output->shape[2],
        .image_bytes = image->bytes,
        .output_values = output->bytes / sizeof(float),
        .arena_bytes = model->arena_bytes,
        .session_bytes = layout_of(model).bytes,
        .packed_bytes = model->packed_bytes,
        .ops = model->op_count,
        .tensors = model->tensor_count,
        .classes = model->class_count,
        .threads = model->threads,
        .isa = model->isa,
    };
}

const char *bnnf_class_name(const bnnf_model *model, size_t index) {
    return index < model->class_count ? model->classes + model->class_at[index] : "";
}

const char *bnnf_metadata(const bnnf_model *model, const char *key) {
    for (const char *at = model->metadata; *at;) {
        const char *value = at + strlen(at) + 1;
        if (!strcmp(at, key)) return value;
        at = value + strlen(value) + 1;
    }
    return NULL;
}

const char *bnnf_kernel_name(const bnnf_model *model, uint32_t index) {
    return index < model->op_count ? model->ops[index].kernel->name : "";
}

/* -- sessions */

static void run_part(void *context, uint32_t index, int part, int thread);
static void take_time(void *context, uint32_t index);

int bnnf_session_create(bnnf_session **made, const bnnf_model *model, void *arena, size_t arena_bytes, char *message,
                        size_t message_size) {
    const bnnf__message to = {message, message_size};
    if (!made) return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "session: got a null pointer.");
    *made = NULL;
    if (!model) return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "model: got a null pointer.");
    if (arena && (arena_bytes < model->arena_bytes || (uintptr_t)arena % BNNF__ALIGN))
        return bnnf__fail(&to, BNNF_ERROR_ARGUMENT, "arena: got %zu bytes, expected %zu, aligned to %u.", arena_bytes,
                          model->arena_bytes, BNNF__ALIGN);
    const layout l = layout_of(model);
    char *memory = malloc(arena ? l.bytes - model->arena_bytes : l.bytes);
    if (!memory) return bnnf__fail(&to, BNNF_ERROR_MEMORY, "not enough memory.");
    char *start = memory + (BNNF__ALIGN - (uintptr_t)memory % BNNF__ALIGN) % BNNF__ALIGN;
    bnnf_session *session = (bnnf_session *)(void *)start;
    memset(start, 0, l.pool);
    session->model = model;
    session->memory = memory;
    session->arena = arena ? arena : start + l.arena;
    session->nanoseconds = (uint64_t *)(void *)(start + l.nanoseconds);
    session->pool =
        bnnf__pool_start(start + l.pool, model->threads, model->op_count, run_part, take_time, session);
    if (!session->pool) {
        free(memory);
        return bnnf__fail(&to, BNNF_ERROR_MEMORY, "not enough memory, or no threads.");
    }
    *made = session;
    return BNNF_OK;
}

void bnnf_session_free(bnnf_session *session) {
    if (!session) return;
    bnnf__pool_stop(session->pool);
    free(session->memory);
}

/* -- running */

static uint64_t now(void) {
    struct timespec t;
#ifdef CLOCK_MONOTONIC
    clock_gettime(CLOCK_MONOTONIC, &t);
#else
    timespec_get(&t, TIME_UTC); /* the time of day */
#endif
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *activation(const bnnf_session *session, uint32_t index) {
    return index == BNNF__NONE ? NULL : session->arena + session->model->tensors[index].offset;
}

static void run_part(void *context, uint32_t index, int part, int thread) {
    const bnnf_session *session = context;
    const bnnf_model *model = session->model;
    const bnnf__op *op = &model->ops[index];
    const struct bnnf_op_record *r = &op->record;
    const bnnf__io io = {
        .input = r->input == model->input ? session->pixels : activation(session, r->input),
        .other = activation(session, r->other),
        .factor = activation(session, r->factor),
        .real = activation(session, r->real),
        .bits = activation(session, r->bits),
        .scratch = session->arena + model->activation_bytes + (size_t)thread * model->scratch_bytes,
        .part = part,
        .parts = bnnf__parts(model->threads),
    };
    op->kernel->run(op, &io);
}

static void take_time(void *context, uint32_t index) {
    bnnf_session *session = context;
    if (!session->model->profile) return;
    const uint64_t end = now();
    if (end > session->last) session->nanoseconds[index] += end - session->last; /* a clock may be set back */
    session->last = end;
}

/* Why with the default environment: a program may have denormals flushed to zero or another rounding, and results are
   the same bits everywhere. */
int bnnf_run(bnnf_session *session, const uint8_t *pixels, size_t count, float *output) {
    if (!session || (count && (!pixels || !output))) return BNNF_ERROR_ARGUMENT;
    if (!count) return BNNF_OK;
    const bnnf_model *model = session->model;
    const bnnf__tensor *image = &model->tensors[model->input], *result = &model->tensors[model->output];
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    for (size_t n = 0; n < count; n++) {
        session->pixels = pixels + n * image->bytes;
        session->last = model->profile ? now() : 0;
        bnnf__pool_run(session->pool);
        memcpy(output + n * (result->bytes / sizeof(float)), activation(session, model->output), result->bytes);
    }
    fesetenv(&environment);
    session->has_run = 1;
    return BNNF_OK;
}

uint64_t bnnf_op_nanoseconds(const bnnf_session *session, uint32_t index) {
    return index < session->model->op_count ? session->nanoseconds[index] : 0;
}

size_t bnnf_read_activation(const bnnf_session *session, uint32_t index, void *bytes, size_t size) {
    const bnnf_model *model = session->model;
    if (!model->keep || !session->has_run || index >= model->tensor_count ||
        model->tensors[index].place != BNNF_PLACE_ACTIVATION)
        return 0;
    size_t needed = model->tensors[index].bytes;
    if (bytes && size >= needed) memcpy(bytes, activation(session, index), needed);
    return needed;
}
