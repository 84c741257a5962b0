/* What the kernels for AVX2 share: the epilogue, and the geometry of strips. Every function names its instruction set,
   so that the files need no flags. Nothing uses FMA: products and sums are rounded one by one, as FORMAT.md has it.

   Outputs are made in words of 64 channels, and parts take whole words or whole rows: no two parts write one word.
   Convolutions look at the image through a strip in scratch: input rows in the form that the inner loop wants, with
   columns of padding, so that all positions of an output row run the same code. */

#ifndef BNNFREE_AVX2_H
#define BNNFREE_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "internal.h"
#include "kernels.h"

#define DECLARE(code, isa, name)                           \
    int bnnf_##name##_fits(const bnnf__op *op);            \
    size_t bnnf_##name##_pack(bnnf__op *op, void *memory); \
    void bnnf_##name##_run(const bnnf__op *op, const bnnf__io *io);
BNNF__KERNELS_AVX2(DECLARE)

#define AVX2 __attribute__((target("avx2")))
#define INLINE AVX2 static inline __attribute__((always_inline))
#define NOINLINE AVX2 static __attribute__((noinline))
/* Why: at -O2 gcc leaves loops over arrays of registers as they are, and the arrays in memory. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define LANES 8u            /* floats of a register */
#define TILE 4u             /* positions made at a time */
#define STRIP_BYTES 98304u  /* of a strip that holds more than one output row: stays in the L2 cache */
#define MOST_SCRATCH (UINT64_C(1) << 26) /* what is larger is left to the scalar kernels */
#define MOST_PACKED (UINT64_C(1) << 28)

static inline uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

/* -- epilogue -- */

INLINE __m256i first_lanes(uint32_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* `count` floats, up to 8; nothing behind them is touched. */
INLINE __m256 load(const float *from, uint32_t count) {
    return count >= LANES ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first_lanes(count));
}

INLINE void store(float *to, uint32_t count, __m256 v) {
    if (count >= LANES) _mm256_storeu_ps(to, v);
    else _mm256_maskstore_ps(to, first_lanes(count), v);
}

/* Channels `lane` to lane + count - 1 of a second activation of `channels` at a position, repeated where it has fewer
   than the output. */
INLINE __m256 load_second(const bnnf__op *op, const float *pixel, uint32_t channels, uint32_t lane, uint32_t count) {
    const uint32_t at = channels == op->outputs ? lane : lane % channels;
    if (at + count <= channels) return load(pixel + at, count);
    float repeated[LANES] = {0};
    for (uint32_t i = 0, c = at; i < count; i++) {
        repeated[i] = pixel[c];
        if (++c == channels) c = 0;
    }
    return _mm256_loadu_ps(repeated);
}

/* Puts the signs of 8 lanes at bit `shift`, a multiple of 8. Why as a byte: with shifts gcc takes the words of four
   positions into a vector register and back. */
INLINE void add_bits(uint64_t *bits, __m256 lanes, uint32_t shift) {
    ((uint8_t *)bits)[shift / 8] = (uint8_t)_mm256_movemask_ps(lanes);
}

/* Writes the bits of `lanes` (16 or 64) channels from `from` on, for `count` positions: 64 as a word; of 16 the first
   of a word write it and the others add to it. */
INLINE void put_bits(const bnnf__op *op, const bnnf__io *io, size_t pixel, uint32_t count, uint32_t from,
                     const uint32_t lanes, const uint64_t bits[TILE]) {
    const uint32_t valid = (uint32_t)least(op->outputs - from, lanes), shift = from % 64;
    const uint64_t mask = ~UINT64_C(0) >> (64 - valid), flip = op->epilogue.flip ? op->epilogue.flip[from / 64] : 0;
    uint64_t *word = io->bits + pixel * op->out_words + from / 64;
    for (uint32_t i = 0; i < count; i++, word += op->out_words) {
        const uint64_t value = ((bits[i] ^ flip >> shift) & mask) << shift;
        *word = shift ? *word | value : value;
    }
}

INLINE void add_other(const bnnf__op *op, const bnnf__io *io, size_t pixel, const uint32_t count, uint32_t lane,
                      uint32_t valid, __m256 v[TILE]) {
    const bnnf__epilogue *e = &op->epilogue;
    if (!io->other) return;
    const float *other = io->other + pixel * e->other_step;
    UNROLL for (uint32_t i = 0; i < TILE; i++)
        if (i < count)
            v[i] = _mm256_add_ps(v[i], load_second(op, other + i * e->other_step, e->other_channels, lane, valid));
}

/* The epilogue for 8 channels from `lane` on of `count` positions (up to 4) from `pixel` on. bias: of each position,
   for a bias that depends on it; NULL: that of the epilogue. Bits are added to `bits` from bit `shift` on. */
INLINE void finish(const bnnf__op *op, const bnnf__io *io, size_t pixel, const uint32_t count, uint32_t lane,
                   __m256 v[TILE], const float *const *bias, uint64_t bits[TILE], uint32_t shift) {
    const bnnf__epilogue *e = &op->epilogue;
    const uint32_t valid = (uint32_t)least(op->outputs - lane, LANES);
    if (e->scale) {
        const __m256 scale = _mm256_load_ps(e->scale + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_mul_ps(v[i], scale);
    }
    if (bias) {
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_add_ps(v[i], load(bias[i] + lane, valid));
    } else if (e->bias) {
        const __m256 same = _mm256_load_ps(e->bias + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_add_ps(v[i], same);
    }
    if (io->factor) {
        const float *factor = io->factor + pixel * e->factor_step;
        UNROLL for (uint32_t i = 0; i < TILE; i++)
            if (i < count)
                v[i] = _mm256_mul_ps(v[i], load_second(op, factor + i * e->factor_step, e->factor_channels, lane, valid));
    }
    if (!e->other_last) add_other(op, io, pixel, count, lane, valid, v);
    if (e->slope) {
        const __m256 slope = _mm256_load_ps(e->slope + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++)
            v[i] = _mm256_blendv_ps(_mm256_mul_ps(v[i], slope), v[i],
                                    _mm256_cmp_ps(v[i], _mm256_setzero_ps(), _CMP_GE_OQ));
    }
    /* maxps(a, b) is a > b ? a : b, also for zeros of two signs and for NaN: in this order what the format says. */
    if (e->low) {
        const __m256 low = _mm256_load_ps(e->low + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_max_ps(v[i], low);
    }
    if (e->high) {
        const __m256 high = _mm256_load_ps(e->high + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_min_ps(v[i], high);
    }
    if (e->scale_after) {
        const __m256 scale = _mm256_load_ps(e->scale_after + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_mul_ps(v[i], scale);
    }
    if (e->bias_after) {
        const __m256 same = _mm256_load_ps(e->bias_after + lane);
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_add_ps(v[i], same);
    }
    if (e->other_last) add_other(op, io, pixel, count, lane, valid, v);
    if (io->real) {
        UNROLL for (uint32_t i = 0; i < TILE; i++)
            if (i < count) store(io->real + (pixel + i) * op->outputs + lane, valid, v[i]);
    }
    if (io->bits) {
        const __m256 threshold = e->threshold ? _mm256_load_ps(e->threshold + lane) : _mm256_setzero_ps();
        UNROLL for (uint32_t i = 0; i < TILE; i++)
            add_bits(&bits[i], _mm256_cmp_ps(v[i], threshold, _CMP_NGE_UQ), shift);
    }
}

/* -- strips -- */

/* Input rows that `rows` output rows see, from the first to the last. */
static inline uint64_t seen_rows(const bnnf__op *op, uint64_t rows) {
    return (rows - 1) * op->record.stride_h + (uint64_t)op->record.dilation_h * (op->record.kernel_h - 1) + 1;
}

/* How many output rows a strip serves whose input rows take `row_bytes` each, and are `most` at the most. */
static inline uint32_t strip_rows(const bnnf__op *op, uint64_t row_bytes, uint64_t most) {
    if (row_bytes * most <= STRIP_BYTES) return op->out_height;
    const uint64_t one = seen_rows(op, 1), fit = STRIP_BYTES / row_bytes;
    return fit <= one ? 1 : (uint32_t)least((fit - one) / op->record.stride_h + 1, op->out_height);
}

/* Columns, padding included, that the output columns see. */
static inline uint64_t seen_columns(const bnnf__op *op) {
    return (uint64_t)(op->out_width - 1) * op->record.stride_w +
           (uint64_t)op->record.dilation_w * (op->record.kernel_w - 1) + 1;
}

/* A strip for output rows [row, row_end): input rows [from, to), counted with the rows of padding as negative and
   beyond the height; `from` is row 0 of the strip. */
typedef struct strip {
    size_t row, row_end;
    int64_t from, to;
} strip;

static inline strip strip_of(const bnnf__op *op, size_t row, size_t row_end, int with_padding) {
    strip s = {row, row_end, (int64_t)row * op->record.stride_h - op->record.padding_h, 0};
    s.to = s.from + (int64_t)seen_rows(op, row_end - row);
    if (!with_padding) {
        if (s.from < 0) s.from = 0;
        if (s.to > op->height) s.to = op->height;
    }
    return s;
}

/* Does an output row of the strip see input row y? (With a dilation: perhaps.) */
static inline int sees(const bnnf__op *op, const strip *s, int64_t y) {
    if (op->record.dilation_h != 1) return 1;
    const int64_t at = y + op->record.padding_h, row = at / op->record.stride_h;
    return at - (int64_t)least((uint64_t)row, s->row_end - 1) * op->record.stride_h < op->record.kernel_h;
}

/* The window's taps as runs of values that lie next to each other: a kernel row is one run, or where there is a
   dilation one per tap. */
static inline uint32_t runs_of_row(const bnnf__op *op) { return op->record.dilation_w == 1 ? 1 : op->record.kernel_w; }

static inline uint32_t taps_of_run(const bnnf__op *op) { return op->record.dilation_w == 1 ? op->record.kernel_w : 1; }

#endif
