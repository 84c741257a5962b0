/* A model, a session and the functions between file.c, check.c, text.c, plan.c, threads.c and run.c; no kernel needs
   this file. */

#ifndef BNNFREE_MODEL_H
#define BNNFREE_MODEL_H

#include "internal.h"

#define BNNF__MAX_THREADS 256

/* Where the one line goes that says what is wrong. */
typedef struct bnnf__message {
    char *text; /* may be NULL */
    size_t size;
} bnnf__message;

struct bnnf_model {
    const uint8_t *bytes; /* the file, aligned to 64 */
    size_t size;
    void *own_bytes;      /* the same where they are the model's own, else NULL */
    bnnf__tensor *tensors;
    bnnf__op *ops;
    uint32_t tensor_count, op_count, input, output, class_count;
    size_t file_arena;    /* arena_bytes of the file */
    char *classes;        /* class names, each ended by 0 */
    uint32_t *class_at;   /* where each begins */
    char *metadata;       /* keys and values in turn, each ended by 0; then an empty one */
    void *padded;         /* constants of epilogues with their channels padded */
    void *borders;        /* bands and border classes of the ops */
    void *packed;         /* what the kernels packed */
    size_t packed_bytes;
    size_t activation_bytes; /* of a session's arena: activations, then scratch_bytes for each thread */
    size_t scratch_bytes, arena_bytes;
    int threads, keep, profile;
    const char *isa;
};

/* util.c: writes the message and returns `status`. */
#ifdef __GNUC__
__attribute__((format(printf, 3, 4)))
#endif
int bnnf__fail(const bnnf__message *message, int status, const char *format, ...);
/* util.c: memory aligned to 64, given back by bnnf__free; NULL if there is none. */
void *bnnf__alloc(uint64_t bytes);
void bnnf__free(void *memory);
/* util.c: into rising order, in n log n steps whatever the items are. */
typedef int (*bnnf__compare)(const void *context, uint64_t a, uint64_t b);
void bnnf__sort(uint64_t *items, size_t count, bnnf__compare compare, const void *context);

/* text.c: the rules of FORMAT.md for lines and for metadata; *count is set in any case. */
int bnnf__check_lines(const uint8_t *text, size_t size, const char *what, uint32_t *count,
                      const bnnf__message *message);
int bnnf__check_metadata(const uint8_t *text, size_t size, const bnnf__message *message);

/* file.c: checks model->bytes and fills tensors, ops and classes. */
int bnnf__read_file(bnnf_model *model, const bnnf__message *message);
/* check.c: everything beyond layout and texts; the ops' fields are filled on the way. */
int bnnf__check_model(bnnf_model *model, const bnnf__message *message);

/* plan.c: one axis of a window. */
typedef struct bnnf__side {
    int64_t size, kernel, stride, padding, after, dilation, positions;
} bnnf__side;
bnnf__side bnnf__side_of(const bnnf__op *op, int axis);
/* plan.c: the bands along `side`, written to `bands` unless it is NULL; how many, and in *classes how many different
   sets of taps. */
uint32_t bnnf__bands(const bnnf__side *side, bnnf__band *bands, uint32_t *classes);
/* plan.c: bands, border classes and padded constants; then, with all kernels chosen, the arena. */
int bnnf__plan_ops(bnnf_model *model, const bnnf__message *message);
int bnnf__plan_arena(bnnf_model *model, const bnnf__message *message);

/* dispatch.c: tells the CPU that a loop waits. */
void bnnf__relax(void);

/* threads.c: `threads`, the caller being one, that run `steps` steps one after the other, each in bnnf__parts(threads)
   parts: job(context, step, part, thread). Whoever is free takes the next part, so that a thread that does not get a CPU
   holds up no one; a step begins when all parts of the one before are done. They work in bnnf__pool_bytes of memory,
   which bnnf__pool_stop gives back to the caller; NULL if there are no threads. */
typedef struct bnnf__pool bnnf__pool;
typedef void (*bnnf__job)(void *context, uint32_t step, int part, int thread);
/* Called by the first thread after each step. */
typedef void (*bnnf__watch)(void *context, uint32_t step);
int bnnf__parts(int threads);
size_t bnnf__pool_bytes(int threads, uint32_t steps);
bnnf__pool *bnnf__pool_start(void *memory, int threads, uint32_t steps, bnnf__job job, bnnf__watch watch, void *context);
void bnnf__pool_run(bnnf__pool *pool);
void bnnf__pool_stop(bnnf__pool *pool);

#endif
