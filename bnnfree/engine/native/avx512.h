/* What the files of AVX-512 kernels share: the share of a part, and the epilogue. */

#ifndef BNNFREE_AVX512_H
#define BNNFREE_AVX512_H

#include "kernel_avx512.h"

#ifdef BNNF__X86
#include <immintrin.h>
#include <string.h>

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define INLINE_AVX512 static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES BNNF__LANES
#define WORD_PANELS 4 /* panels of a 64-bit word */
/* After all other layers weights come from a far cache: they are fetched a page ahead, beyond which the processor does
   not look by itself. Never past the last ones: that may be what another thread writes. */
#define AHEAD 4096
/* What is larger is left to other kernels, so that scratch and packed stay small. */
#define WORST_WINDOW (1u << 20) /* bytes */
#define WORST_PIECES (1u << 18)
#define WORST_SUMS (1u << 22)

/* What an epilogue starts from: counts of differing signs, halves of the sums of signs, sums of pixels, float sums; or
   an input of pointwise. */
enum { COUNTS, HALVES, PIXELS, REALS, INPUT_F32, INPUT_BITS, INPUT_U8 };

/* -- shares */

typedef struct {
    size_t from, to;     /* pixels */
    size_t first, behind; /* panels */
} share;

static size_t panels_of(const bnnf__op *op) { return (op->outputs + LANES - 1) / LANES; }

/* Pixels are shared as long as each part has `least`, so that no two parts read the same input; else the panels, 64
   outputs at a time, so that no two parts write the same word. */
static inline share share_of(const bnnf__op *op, const bnnf__io *io, size_t least) {
    const size_t pixels = (size_t)op->out_height * op->out_width, panels = panels_of(op);
    const size_t groups = (panels + WORD_PANELS - 1) / WORD_PANELS, parts = (size_t)io->parts;
    share s = {0, pixels, 0, panels};
    if (pixels >= least * parts || groups < parts) {
        bnnf__share(pixels, io->part, io->parts, &s.from, &s.to);
    } else {
        bnnf__share(groups, io->part, io->parts, &s.first, &s.behind);
        s.first *= WORD_PANELS;
        s.behind = s.behind * WORD_PANELS < panels ? s.behind * WORD_PANELS : panels;
    }
    return s;
}

/* -- the epilogue */

/* The parts that an op's epilogue has. */
enum { SCALE = 1, BIAS = 2, OTHER = 4, SLOPE = 8, LOW = 16, HIGH = 32, REAL = 64, BITS = 128, SUM_THRESHOLD = 256,
       FACTOR = 512, SCALE_AFTER = 1024, BIAS_AFTER = 2048, OTHER_LAST = 4096 };

static inline int parts_of(const bnnf__op *op, const bnnf__io *io) {
    const bnnf__epilogue *e = &op->epilogue;
    return (e->scale ? SCALE : 0) | (e->bias ? BIAS : 0) | (io->other ? OTHER : 0) | (e->slope ? SLOPE : 0) |
           (e->low ? LOW : 0) | (e->high ? HIGH : 0) | (io->real ? REAL : 0) | (io->bits ? BITS : 0) |
           (e->sum_threshold ? SUM_THRESHOLD : 0) | (io->factor ? FACTOR : 0) | (e->scale_after ? SCALE_AFTER : 0) |
           (e->bias_after ? BIAS_AFTER : 0) | (e->other_last ? OTHER_LAST : 0);
}

/* A second activation of `channels` for a panel from `channel` on, where that is no run of its channels. */
static __attribute__((noinline)) void repeat(const float *from, size_t channels, size_t channel, float *to) {
    for (size_t k = 0; k < LANES; k++) to[k] = from[(channel + k) % channels];
}

/* Its values for the panel from channel c on, at a pixel. */
INLINE_AVX512 __m512 second(const float *pixel, size_t channels, size_t outputs, size_t c, __mmask16 live) {
    if (channels == outputs || channels % LANES == 0) return _mm512_maskz_loadu_ps(live, pixel + c % channels);
    float copy[LANES];
    repeat(pixel, channels, c, copy);
    return _mm512_maskz_loadu_ps(live, copy);
}

/* Behind the last panel: the rest of the last word of bits, of `pixels` pixels from `pixel` on. */
static __attribute__((noinline)) void clear_spare(const bnnf__op *op, const bnnf__io *io, size_t pixel, size_t pixels) {
    const size_t used = panels_of(op) * 2, all = (size_t)op->out_words * 8;
    if (!io->bits || used >= all) return;
    uint8_t *bits = (uint8_t *)io->bits + pixel * all;
    for (size_t i = 0; i < pixels; i++, bits += all) memset(bits + used, 0, all - used);
}

/* The value that an epilogue starts from: of a core's sums, or of an input of pointwise. */
INLINE_AVX512 __m512 first_value(const char *at, size_t c, __mmask16 live, int source) {
    if (source == PIXELS) return _mm512_cvtepi32_ps(_mm512_loadu_si512(at));
    if (source == REALS) return _mm512_loadu_ps(at);
    if (source == INPUT_F32) return _mm512_maskz_loadu_ps(live, (const float *)at + c);
    if (source == INPUT_U8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, at + c)));
    uint16_t signs;
    memcpy(&signs, at + c / 8, sizeof signs);
    return _mm512_mask_blend_ps(signs, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

/* finish of `parts`, which are constant where that is to be fast, as source and full are; full: all lanes are
   channels. One pixel after the other: the processor finds what can be done at the same time. */
INLINE_AVX512 void finish_parts(const bnnf__op *op, const bnnf__io *io, size_t pixel, size_t pixels, size_t panel,
                                const void *const *rows, const char *sums, size_t each, int source, int parts,
                                int full) {
    const bnnf__epilogue *e = &op->epilogue;
    const size_t c = panel * LANES, outputs = op->outputs, left = outputs - c;
    const __mmask16 live = full || left >= LANES ? 0xFFFF : (__mmask16)((1u << left) - 1);
    const __m512 zero = _mm512_setzero_ps();
    __m512 scale = parts & SCALE ? _mm512_loadu_ps(e->scale + c) : _mm512_set1_ps(1.0f);
    const __m512 bias = parts & BIAS ? _mm512_loadu_ps(e->bias + c) : zero;
    const __m512 slope = parts & SLOPE ? _mm512_loadu_ps(e->slope + c) : zero;
    const __m512 low = parts & LOW ? _mm512_loadu_ps(e->low + c) : zero;
    const __m512 high = parts & HIGH ? _mm512_loadu_ps(e->high + c) : zero;
    const __m512 threshold = parts & BITS && e->threshold ? _mm512_loadu_ps(e->threshold + c) : zero;
    __m512i sum_threshold = parts & SUM_THRESHOLD ? _mm512_loadu_si512(e->sum_threshold + c) : _mm512_setzero_si512();
    if (source == HALVES) { /* rounded up; the products are the same floats */
        const __m512i odd = _mm512_and_si512(sum_threshold, _mm512_set1_epi32(1));
        sum_threshold = _mm512_add_epi32(_mm512_srai_epi32(sum_threshold, 1), odd);
        scale = _mm512_add_ps(scale, scale);
    }
    uint16_t flip = 0;
    if (parts & BITS && e->flip) memcpy(&flip, (const uint8_t *)e->flip + c / 8, sizeof flip);
    const __m512 scale_after = parts & SCALE_AFTER ? _mm512_loadu_ps(e->scale_after + c) : _mm512_set1_ps(1.0f);
    const __m512 bias_after = parts & BIAS_AFTER ? _mm512_loadu_ps(e->bias_after + c) : zero;
    const float *other = parts & OTHER ? io->other + pixel * e->other_step : NULL;
    const float *factor = parts & FACTOR ? io->factor + pixel * e->factor_step : NULL;
    float *real = parts & REAL ? io->real + pixel * outputs + c : NULL;
    const size_t words = (size_t)op->out_words * 8;
    uint8_t *bits = parts & BITS ? (uint8_t *)io->bits + pixel * words + c / 8 : NULL;
    for (size_t i = 0; i < pixels; i++, sums += each) {
        __mmask16 signs = 0;
        __m512 v;
        if (source == COUNTS || source == HALVES) {
            __m512i sum = _mm512_loadu_si512(sums);
            if (source == COUNTS) sum = _mm512_add_epi32(sum, _mm512_loadu_si512((const int32_t *)rows[i] + c));
            v = _mm512_cvtepi32_ps(sum);
            signs = _mm512_mask_cmplt_epi32_mask(live, sum, sum_threshold);
        } else {
            v = first_value(sums, c, live, source);
        }
        if (!(parts & SUM_THRESHOLD)) {
            if (parts & SCALE || source == HALVES) v = _mm512_mul_ps(v, scale);
            if (source == PIXELS) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(live, (const float *)rows[i] + c));
            if (parts & BIAS) v = _mm512_add_ps(v, bias);
            if (parts & FACTOR) {
                v = _mm512_mul_ps(v, second(factor, e->factor_channels, outputs, c, live));
                factor += e->factor_step;
            }
            if (parts & OTHER && !(parts & OTHER_LAST)) {
                v = _mm512_add_ps(v, second(other, e->other_channels, outputs, c, live));
                other += e->other_step;
            }
            if (parts & SLOPE) v = _mm512_mask_mul_ps(v, _mm512_cmp_ps_mask(v, zero, _CMP_NGE_UQ), v, slope);
            /* max and min give their second operand where both are equal or one is NaN */
            if (parts & LOW) v = _mm512_max_ps(v, low);
            if (parts & HIGH) v = _mm512_min_ps(v, high);
            if (parts & SCALE_AFTER) v = _mm512_mul_ps(v, scale_after);
            if (parts & BIAS_AFTER) v = _mm512_add_ps(v, bias_after);
            if (parts & OTHER_LAST) {
                v = _mm512_add_ps(v, second(other, e->other_channels, outputs, c, live));
                other += e->other_step;
            }
            if (parts & REAL) {
                if (full) _mm512_storeu_ps(real, v);
                else _mm512_mask_storeu_ps(real, live, v);
                real += outputs;
            }
            if (parts & BITS) signs = _mm512_mask_cmp_ps_mask(live, v, threshold, _CMP_NGE_UQ);
        }
        if (parts & BITS) {
            const uint16_t piece = (uint16_t)(signs ^ flip);
            memcpy(bits, &piece, sizeof piece);
            bits += words;
        }
    }
}

/* The epilogue of a panel for `pixels` pixels from `pixel` on. rows: for each pixel, of COUNTS the sum of each channel
   where no sign differs, of PIXELS the bias. sums: what the core made, or the input at `pixel`, `each` bytes per pixel.
   parts: parts_of. source is a constant. */
INLINE_AVX512 void finish(const bnnf__op *op, const bnnf__io *io, size_t pixel, size_t pixels, size_t panel,
                          const void *const *rows, const char *sums, size_t each, int source, int parts) {
    const int full = panel * LANES + LANES <= op->outputs, binary = source == COUNTS || source == HALVES;
    enum { FLOAT = SCALE | BIAS | REAL, LAST = FLOAT | OTHER | SLOPE, SIGN = SUM_THRESHOLD | BITS };
#define FINISH(parts, full) finish_parts(op, io, pixel, pixels, panel, rows, sums, each, source, parts, full)
    /* What networks are mostly made of. */
    if (full && binary && parts == (LAST | BITS)) FINISH(LAST | BITS, 1);
    else if (full && binary && parts == LAST) FINISH(LAST, 1);
    else if (full && binary && parts == SIGN) FINISH(SIGN, 1);
    else if (full && source == PIXELS && parts == (SCALE | REAL)) FINISH(SCALE | REAL, 1);
    else if (full && source == PIXELS && parts == (SCALE | REAL | BITS)) FINISH(SCALE | REAL | BITS, 1);
    else if (full && source == INPUT_F32 && parts == BITS) FINISH(BITS, 1);
    else if (full && source != PIXELS && parts == FLOAT) FINISH(FLOAT, 1);
    else FINISH(parts, 0);
#undef FINISH
    if (panel + 1 == panels_of(op)) clear_spare(op, io, pixel, pixels);
}

/* -- packing signs */

static inline size_t class_count(const bnnf__op *op) { return (size_t)op->row_band_count * op->column_band_count; }

static inline uint64_t weight_word(const bnnf__op *op, size_t index) {
    uint64_t word;
    memcpy(&word, (const char *)op->weights + index * sizeof word, sizeof word);
    return word;
}

/* The sum of output o in a class of pixels, where no sign differs inside the image. Kernel rows on the padding are left
   out; taps beside the image are gathered as zeros, so that the negative signs of their weights come to be counted,
   which is taken back here. */
static int32_t class_sum(const bnnf__op *op, const bnnf__band *down, const bnnf__band *across, size_t o) {
    const size_t height = op->record.kernel_h, width = op->record.kernel_w, words = op->words;
    int32_t sum = 0;
    for (size_t i = 0; i < height; i++)
        for (size_t j = 0; j < width; j++) {
            const int seen = i >= down->first && i < down->behind;
            int32_t negative = 0;
            for (size_t n = 0; n < words; n++)
                negative += __builtin_popcountll(weight_word(op, ((o * height + i) * width + j) * words + n));
            if (seen && j >= across->first && j < across->behind) sum += (int32_t)op->channels;
            else sum += op->record.pad_value * ((int32_t)op->channels - 2 * negative) + (seen ? 2 * negative : 0);
        }
    return sum;
}

/* class_sum of each class and output, in panels. */
static inline void pack_class_sums(const bnnf__op *op, int32_t *sums) {
    for (size_t class = 0; class < class_count(op); class++, sums += panels_of(op) * LANES)
        for (size_t o = 0; o < op->outputs; o++)
            sums[o] = class_sum(op, op->row_bands + class / op->column_band_count,
                                op->column_bands + class % op->column_band_count, o);
}

#endif
#endif
