/* What the files of the engine share; not for users. Names with two underscores are private.

   Life of a model: file.c checks the bytes and fills tensors and ops; run.c picks a kernel for each op (kernels.h,
   dispatch.c) and has it pack its constants; plan.c places the activations. Life of a run: run.c calls each op's
   kernel once for each part; a kernel does its part of the output, and knows nothing of threads beyond (part, parts).
   Parts of an op run in any order and at the same time, each with the scratch of its thread. */

#ifndef BNNFREE_INTERNAL_H
#define BNNFREE_INTERNAL_H

/* Every product and every sum is rounded on its own, whatever the flags say: many compilers fuse them by default. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <stddef.h>
#include <stdint.h>

#include "bnnfree.h"
#include "format.h"

#define BNNF__ALIGN 64u
#define BNNF__NONE 0xFFFFFFFFu

/* All numbers are those of FORMAT.md, checked by file.c: a kernel may trust them. */
typedef struct bnnf__tensor {
    uint32_t shape[4];
    uint8_t dtype, place, rank;
    size_t bytes;      /* of one image, in the file's layout */
    const void *data;  /* of a constant: in the caller's bytes, at a multiple of its value's size or not (use memcpy
                          unless the caller's bytes are aligned to 64: bnnf_model_create copies them if they are not) */
    size_t offset;     /* of an activation: in the session's arena, made by plan.c */
    uint32_t written, last_read; /* of an activation: ops */
} bnnf__tensor;

/* Output positions along one axis that see the same taps: first <= tap < behind of `kernel`. */
typedef struct bnnf__band {
    uint32_t from, to;       /* output positions [from, to) */
    uint32_t first, behind;  /* taps inside the image; first == behind: none */
} bnnf__band;

/* The epilogue of FORMAT.md with its constants unpacked: each array, where there is one, has `lanes` values, 64-byte
   aligned, the channels padded up with 0 (scale, slope: 0; flips: 0). */
typedef struct bnnf__epilogue {
    const float *scale, *bias, *slope, *low, *high, *scale_after, *bias_after;
    const float *threshold;   /* of v; NULL: 0 */
    const int32_t *sum_threshold; /* of the sum of signs; then nothing else is there but flip */
    const uint64_t *flip;     /* words of bits; NULL: none */
    uint32_t other_channels;  /* channels of `other`; channel c adds its channel c % other_channels */
    uint32_t factor_channels; /* likewise */
    uint32_t other_step, factor_step; /* floats from one output pixel's values of `other`, `factor`, to the next; 0: all
                                         pixels take the same */
    int other_last;           /* `other` is added after the activation */
    uint32_t lanes;           /* channels rounded up to a multiple of 64 */
} bnnf__epilogue;

typedef struct bnnf__op bnnf__op;

/* What one call of a kernel works on; all activations are in the file's layout. */
typedef struct bnnf__io {
    const void *input;   /* float [H][W][C], words [H][W][ceil(C/64)], or pixels [H][W][C] */
    const float *other;  /* [H'][W'][other_channels] or [1][1][other_channels], second input of concat; or NULL */
    const float *factor; /* [H'][W'][factor_channels] or [1][1][factor_channels]; or NULL */
    float *real;         /* [H'][W'][O]; or NULL */
    uint64_t *bits;      /* [H'][W'][ceil(O/64)]; or NULL */
    void *scratch;       /* op->scratch_bytes for this call alone, aligned to 64 */
    int part, parts;     /* this call makes share `part` of `parts` of the output; shares are disjoint and complete */
} bnnf__io;

typedef void (*bnnf__run)(const bnnf__op *op, const bnnf__io *io);
/* Packs the op's constants into `memory` (aligned to 64) and returns how many bytes that takes; with memory NULL it
   only counts. Sets op->scratch_bytes. Called once per model, never while running. */
typedef size_t (*bnnf__pack)(bnnf__op *op, void *memory);
typedef int (*bnnf__fits)(const bnnf__op *op);

/* One line of kernels.h. */
typedef struct bnnf__kernel {
    uint32_t code;     /* BNNF_OP_... */
    const char *isa;   /* "scalar", "avx2", "avx512base", "avx512" */
    const char *name;  /* bnnf_binary_conv2d__avx512vpopcnt_7x32 */
    bnnf__fits fits;   /* can it run this op? */
    bnnf__pack pack;
    bnnf__run run;
} bnnf__kernel;

struct bnnf__op {
    struct bnnf_op_record record;
    uint32_t height, width, channels;           /* of the input */
    uint32_t out_height, out_width, outputs;    /* of the output */
    uint32_t words, out_words;                  /* 64-bit words of a pixel's channels, in and out */
    uint32_t group_channels, group_outputs, group_words;
    uint8_t input_dtype, weights_dtype;         /* BNNF_DTYPE_... */
    uint8_t banded;                             /* 1: its window has bands */
    const void *weights;                        /* as in the file */
    const float *pixel_bias;                    /* bias by border class, of pixel_conv2d and at times of binary_conv2d:
                                                   [row classes][column classes][outputs], in the file; else NULL */
    uint32_t row_classes, column_classes;
    const uint32_t *row_class, *column_class;   /* where there is a pixel_bias: class of each output row */
    const bnnf__band *row_bands, *column_bands; /* of an op with a window: cover the output, in order */
    uint32_t row_band_count, column_band_count;
    bnnf__epilogue epilogue;
    const bnnf__kernel *kernel;
    const void *packed;                         /* what pack wrote */
    size_t packed_bytes, scratch_bytes;
};

/* Of a part of a norm: its channels, which are whole groups and whole words, and of each the mean of its group (of
   rms_norm 0) and what the distance from it is multiplied by, channel `from` first. */
typedef struct bnnf__statistics {
    uint32_t from, to; /* from == to: nothing is left for this part */
    float *mean, *factor;
} bnnf__statistics;
/* kernel_scalar.c: for a norm of every instruction set; they stand first in the scratch. */
#define BNNF__STATISTICS_BYTES(op) (2 * (size_t)(op)->epilogue.lanes * sizeof(float))
bnnf__statistics bnnf__norm_statistics(const bnnf__op *op, const bnnf__io *io);

/* dispatch.c: does this CPU run `isa`? */
int bnnf__cpu_runs(const char *isa);
/* dispatch.c: the first kernel of the table that fits `op`, of instruction set `isa` or a lesser one. */
const bnnf__kernel *bnnf__pick(const bnnf__op *op, const char *isa);

/* Share [from, to) of `count` things for `part` of `parts`. */
static inline void bnnf__share(size_t count, int part, int parts, size_t *from, size_t *to) {
    *from = count * (size_t)part / (size_t)parts;
    *to = count * (size_t)(part + 1) / (size_t)parts;
}

/* Output rows and words of 64 outputs of one part: whichever of the two cuts more evenly is cut. */
typedef struct bnnf__range {
    size_t row, row_end, word, word_end;
} bnnf__range;

static inline bnnf__range bnnf__range_of(size_t rows, size_t words, const bnnf__io *io) {
    bnnf__range r = {0, rows, 0, words};
    const size_t parts = (size_t)io->parts;
    if ((rows + parts - 1) / parts * words <= (words + parts - 1) / parts * rows)
        bnnf__share(rows, io->part, io->parts, &r.row, &r.row_end);
    else
        bnnf__share(words, io->part, io->parts, &r.word, &r.word_end);
    return r;
}

static inline size_t bnnf__align(size_t bytes) { return (bytes + BNNF__ALIGN - 1) / BNNF__ALIGN * BNNF__ALIGN; }

#endif
