/* What the files of kernels in plain C share: the share of a part, spans of pixels, and the epilogue. */

#ifndef BNNFREE_SCALAR_H
#define BNNFREE_SCALAR_H

#include <float.h>
#include <string.h>

#include "internal.h"

#if FLT_EVAL_METHOD != 0
#error "floats must be computed as floats: on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif
#if defined __FAST_MATH__ || (defined __FINITE_MATH_ONLY__ && __FINITE_MATH_ONLY__)
#error "-ffast-math and -ffinite-math-only change results"
#endif

#define FITS(name)                                \
    int bnnf_##name##_fits(const bnnf__op *op);   \
    int bnnf_##name##_fits(const bnnf__op *op) {  \
        (void)op;                                 \
        return 1;                                 \
    }
#define PACKS(name) size_t bnnf_##name##_pack(bnnf__op *op, void *memory)
#define RUNS(name) void bnnf_##name##_run(const bnnf__op *op, const bnnf__io *io)
#define PACKS_NOTHING(name, scratch)       \
    PACKS(name);                           \
    PACKS(name) {                          \
        (void)memory;                      \
        op->scratch_bytes = (scratch);     \
        return 0;                          \
    }

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* A size that malloc refuses where size_t does not hold it. */
static inline size_t bytes_of(uint64_t bytes) { return bytes > SIZE_MAX / 2 ? SIZE_MAX / 2 : (size_t)bytes; }

/* -- shares and spans */

/* What a part works on: pixels of the output in order, and of each the outputs from, to. Many pixels are shared out as
   they are; few are worked on by all, each with its own words of channels. */
typedef struct share {
    size_t pixel, last;
    uint32_t from, to;
} share;

static inline share share_of(const bnnf__op *op, const bnnf__io *io) {
    size_t pixels = (size_t)op->out_height * op->out_width, from = 0, to = op->out_words;
    share s = {0, pixels, 0, 0};
    if (pixels < 4 * (size_t)io->parts && op->out_words > 1)
        bnnf__share(op->out_words, io->part, io->parts, &from, &to);
    else
        bnnf__share(pixels, io->part, io->parts, &s.pixel, &s.last);
    s.from = (uint32_t)least(64 * from, op->outputs);
    s.to = (uint32_t)least(64 * to, op->outputs);
    return s;
}

/* Neighbours within a row of the output that see the same taps. */
typedef struct span {
    size_t pixel;             /* the first */
    uint32_t row, column, count;
    const bnnf__band *rows, *columns;
} span;

/* Moves on to the next span of the share, of up to `most` pixels; start with all zero. */
static inline int next_span(const bnnf__op *op, share *s, span *at, uint32_t most) {
    if (s->from == s->to || s->pixel == s->last) return 0;
    at->pixel = s->pixel;
    at->row = (uint32_t)(s->pixel / op->out_width);
    at->column = (uint32_t)(s->pixel % op->out_width);
    if (!at->rows) at->rows = op->row_bands;
    if (!at->columns || at->columns->from > at->column) at->columns = op->column_bands;
    while (at->rows->to <= at->row) at->rows++;
    while (at->columns->to <= at->column) at->columns++;
    at->count = (uint32_t)least(least(at->columns->to - at->column, most), s->last - s->pixel);
    s->pixel += at->count;
    return 1;
}

/* The input pixel that tap (i, j) of the span's first window sees, which must lie inside. */
static inline size_t seen(const bnnf__op *op, const span *at, uint32_t i, uint32_t j) {
    const struct bnnf_op_record *r = &op->record;
    size_t row = (size_t)at->row * r->stride_h + (size_t)i * r->dilation_h - r->padding_h;
    size_t column = (size_t)at->column * r->stride_w + (size_t)j * r->dilation_w - r->padding_w;
    return row * op->width + column;
}

/* The biases of a span, where they depend on its border class. */
static inline const float *border_bias(const bnnf__op *op, const span *at) {
    const float *row = op->pixel_bias + (size_t)op->row_class[at->row] * op->column_classes * op->outputs;
    return row + (size_t)op->column_class[at->column] * op->outputs;
}

/* -- the epilogue */

static inline void add_other(const bnnf__epilogue *e, const bnnf__io *io, size_t pixel, uint32_t from, uint32_t n, float *v) {
    if (!io->other) return;
    const float *other = io->other + pixel * e->other_step;
    uint32_t k = from % e->other_channels;
    for (uint32_t c = 0; c < n; c++) {
        v[c] = v[c] + other[k];
        if (++k == e->other_channels) k = 0;
    }
}

/* The values of outputs from..to of a pixel: v[0] is that of output `from`, a multiple of 64. */
static inline void finish(const bnnf__op *op, const bnnf__io *io, size_t pixel, uint32_t from, uint32_t to, float *v,
                   const float *bias) {
    const bnnf__epilogue *e = &op->epilogue;
    const uint32_t n = to - from;
    if (e->scale)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] * e->scale[from + c];
    if (bias)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] + bias[from + c];
    if (io->factor) {
        const float *factor = io->factor + pixel * e->factor_step;
        uint32_t k = from % e->factor_channels;
        for (uint32_t c = 0; c < n; c++) {
            v[c] = v[c] * factor[k];
            if (++k == e->factor_channels) k = 0;
        }
    }
    if (!e->other_last) add_other(e, io, pixel, from, n, v);
    if (e->slope)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] >= 0 ? v[c] : v[c] * e->slope[from + c];
    if (e->low)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] > e->low[from + c] ? v[c] : e->low[from + c];
    if (e->high)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] < e->high[from + c] ? v[c] : e->high[from + c];
    if (e->scale_after)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] * e->scale_after[from + c];
    if (e->bias_after)
        for (uint32_t c = 0; c < n; c++) v[c] = v[c] + e->bias_after[from + c];
    if (e->other_last) add_other(e, io, pixel, from, n, v);
    if (io->real) memcpy(io->real + pixel * op->outputs + from, v, n * sizeof *v);
    if (!io->bits) return;
    uint64_t *bits = io->bits + pixel * op->out_words + from / 64;
    for (uint32_t start = 0; start < n; start += 64, bits++) {
        uint64_t word = 0;
        for (uint32_t c = 0; c < 64 && start + c < n; c++) {
            float threshold = e->threshold ? e->threshold[from + start + c] : 0;
            word |= (uint64_t)!(v[start + c] >= threshold) << c;
        }
        *bits = e->flip ? word ^ e->flip[(from + start) / 64] : word;
    }
}

/* The same for sums of signs: v is scratch for as many floats. */
static inline void finish_sums(const bnnf__op *op, const bnnf__io *io, size_t pixel, uint32_t from, uint32_t to,
                        const int32_t *sums, float *v, const float *bias) {
    const bnnf__epilogue *e = &op->epilogue;
    const uint32_t n = to - from;
    if (!e->sum_threshold) {
        for (uint32_t c = 0; c < n; c++) v[c] = (float)sums[c];
        finish(op, io, pixel, from, to, v, bias);
        return;
    }
    uint64_t *bits = io->bits + pixel * op->out_words + from / 64;
    for (uint32_t start = 0; start < n; start += 64, bits++) {
        uint64_t word = 0;
        for (uint32_t c = 0; c < 64 && start + c < n; c++)
            word |= (uint64_t)(sums[start + c] < e->sum_threshold[from + start + c]) << c;
        *bits = e->flip ? word ^ e->flip[(from + start) / 64] : word;
    }
}

#endif
