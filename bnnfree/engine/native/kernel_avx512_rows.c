/* Binary convolution for AVX-512 with VPOPCNTDQ whose windows hold few words: gathering windows, as kernel_avx512.c
   does, would take too much of the time. Instead the rows of the input that a row of the output sees are copied with
   their border, and all windows of the row lie in that copy, overlapping. */

#include "avx512.h"

#ifdef BNNF__X86

#define SPAN 112  /* pixels whose rows are copied together, in one row of the output */
/* Above these windows are gathered sooner than signs counted: words of 32 signs of a window, and bytes of all weights,
   which are read again for each tile. */
#define MOST_WORDS 18
#define MOST_WEIGHTS 16384

/* Stands first in packed. */
typedef struct {
    size_t words;       /* of 32 signs, of a pixel */
    size_t step;        /* bytes from the window of one pixel to the next */
    size_t pitch;       /* bytes from one copied row to the next */
    size_t span, width; /* pixels that are copied together; pixels of an output row */
    size_t panel;       /* bytes of a panel's weights */
    size_t sums_at, weights_at, bytes; /* in packed */
} layout;

/* A convolution of single pixels that takes them all knows no rows: the whole map is one. */
static int is_flat(const bnnf__op *op) {
    const struct bnnf_op_record *r = &op->record;
    return r->kernel_h == 1 && r->kernel_w == 1 && r->stride_h == 1 && r->stride_w == 1 && !r->padding_h &&
           !r->padding_w && !r->after_h && !r->after_w;
}

static layout layout_of(const bnnf__op *op) {
    const struct bnnf_op_record *r = &op->record;
    layout k = {.words = (op->channels + 31) / 32, .width = op->out_width * (is_flat(op) ? op->out_height : 1)};
    k.step = r->stride_w * k.words * 4;
    k.span = k.width < SPAN ? k.width : SPAN;
    /* Copies end with whole registers. */
    k.pitch = bnnf__align(((k.span - 1) * r->stride_w + r->kernel_w) * k.words * 4 + 64) | BNNF__ALIGN;
    k.panel = r->kernel_h * r->kernel_w * k.words * LANES * 4;
    k.sums_at = bnnf__align(sizeof k);
    k.weights_at = bnnf__align(k.sums_at + class_count(op) * panels_of(op) * LANES * sizeof(int32_t));
    k.bytes = k.weights_at + panels_of(op) * k.panel;
    return k;
}

/* Half the sum of signs comes out, so that it must be even, and the scale is doubled, so that it must not be close to
   the largest float. */
static int can_halve(const bnnf__op *op) {
    const float *scale = op->epilogue.scale;
    for (size_t c = 0; c < op->outputs && scale; c++)
        if (!(scale[c] < 0x1p126f && scale[c] > -0x1p126f)) return 0;
    return op->channels % 2 == 0;
}

int bnnf_binary_conv2d__avx512vpopcnt_rows_14x16_fits(const bnnf__op *op) {
    const struct bnnf_op_record *r = &op->record;
    const uint64_t words = (uint64_t)r->kernel_h * r->kernel_w * ((op->channels + 31) / 32);
    return __builtin_cpu_supports("avx512vpopcntdq") && r->groups == 1 && !op->pixel_bias && r->dilation_w == 1 &&
           r->stride_w <= r->kernel_w && words <= MOST_WORDS && words * panels_of(op) * LANES * 4 <= MOST_WEIGHTS &&
           class_count(op) * op->outputs <= WORST_SUMS && can_halve(op);
}

size_t bnnf_binary_conv2d__avx512vpopcnt_rows_14x16_pack(bnnf__op *op, void *memory) {
    const layout k = layout_of(op);
    const size_t taps = op->record.kernel_h * op->record.kernel_w;
    op->scratch_bytes = op->record.kernel_h * k.pitch;
    if (!memory) return k.bytes;
    memset(memory, 0, k.bytes);
    memcpy(memory, &k, sizeof k);
    int32_t *sums = (int32_t *)((char *)memory + k.sums_at);
    pack_class_sums(op, sums);
    for (size_t i = 0; i < class_count(op) * panels_of(op) * LANES; i++) sums[i] /= 2;
    for (size_t o = 0; o < op->outputs; o++) {
        uint32_t *to = (uint32_t *)((char *)memory + k.weights_at + o / LANES * k.panel) + o % LANES;
        for (size_t i = 0; i < taps; i++)
            for (size_t n = 0; n < k.words; n++, to += LANES)
                *to = (uint32_t)(weight_word(op, (o * taps + i) * op->words + n / 2) >> n % 2 * 32);
    }
    return k.bytes;
}

/* `count` pixels without the words that hold no channel; up to 64 bytes more are written. */
INLINE_AVX512 void copy_pixels(const bnnf__op *op, const layout *k, const uint64_t *from, uint8_t *to, size_t count) {
    if (k->words == 1) {
        for (size_t i = 0; i < count; i += 8, to += 32) {
            const __mmask8 live = (__mmask8)(count - i < 8 ? (1u << (count - i)) - 1 : 0xFF);
            _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(live, from + i)));
        }
    } else if (k->words % 2) {
        for (size_t i = 0; i < count; i++, from += op->words, to += k->words * 4) memcpy(to, from, k->words * 4);
    } else {
        for (size_t i = 0; i < count * op->words; i += 8) {
            const size_t left = count * op->words - i;
            const __mmask8 live = (__mmask8)(left < 8 ? (1u << left) - 1 : 0xFF);
            _mm512_storeu_si512(to + i * 8, _mm512_maskz_loadu_epi64(live, from + i));
        }
    }
}

/* What `count` pixels from (r, q) on see of the input, a row of it for each kernel row inside the image; beside the
   image there are zeros. */
INLINE_AVX512 void copy_rows(const bnnf__op *op, const bnnf__io *io, const layout *k, const bnnf__band *down, size_t r,
                             size_t q, size_t count) {
    const struct bnnf_op_record *w = &op->record;
    const int64_t width = is_flat(op) ? (int64_t)k->width : (int64_t)op->width;
    const int64_t left = (int64_t)(q * w->stride_w) - w->padding_w;
    const int64_t right = left + (int64_t)((count - 1) * w->stride_w + w->kernel_w);
    const int64_t first = left < 0 ? 0 : left, behind = right < width ? right : width;
    const size_t before = first < behind ? (size_t)(first - left) : 0;
    const size_t inside = first < behind ? (size_t)(behind - first) : 0;
    const size_t after = (size_t)(right - left) - before - inside, pixel = k->words * 4;
    uint8_t *to = io->scratch;
    for (size_t i = down->first; i < down->behind; i++, to += k->pitch) {
        const size_t row = r * w->stride_h + i * w->dilation_h - w->padding_h;
        const uint64_t *from = (const uint64_t *)io->input + (row * op->width + (size_t)first) * op->words;
        if (before) memset(to, 0, before * pixel);
        copy_pixels(op, k, from, to + before * pixel, inside);
        if (after) memset(to + (before + inside) * pixel, 0, after * pixel);
    }
}

WITH_AVX512 void bnnf_binary_conv2d__avx512vpopcnt_rows_14x16_run(const bnnf__op *op, const bnnf__io *io) {
    const layout *k = op->packed;
    const share s = share_of(op, io, 8);
    const int32_t *class_sums = (const int32_t *)((const char *)op->packed + k->sums_at);
    const bnnf__band *down = op->row_bands;
    const int parts = parts_of(op, io);
    int32_t sums[BNNF__ROWS_TILE * LANES] __attribute__((aligned(64)));
    for (size_t pixel = s.from, count; pixel < s.to; pixel += count) {
        const size_t r = pixel / k->width, q = pixel % k->width;
        count = k->width - q < k->span ? k->width - q : k->span;
        if (s.to - pixel < count) count = s.to - pixel;
        while (!is_flat(op) && r >= down->to) down++;
        copy_rows(op, io, k, down, r, q, count);
        const bnnf__band *across = op->column_bands;
        const size_t rows = down->behind - down->first, steps = op->record.kernel_w * k->words;
        for (size_t at = 0, tile; at < count; at += tile) {
            const void *starts[BNNF__ROWS_TILE];
            const size_t tiles = (count - at + BNNF__ROWS_TILE - 1) / BNNF__ROWS_TILE;
            tile = (count - at + tiles - 1) / tiles;
            for (size_t i = 0; i < tile; i++) {
                while (!is_flat(op) && q + at + i >= across->to) across++;
                const size_t class = (size_t)(down - op->row_bands) * op->column_band_count +
                                     (size_t)(across - op->column_bands);
                starts[i] = class_sums + class * panels_of(op) * LANES;
            }
            const uint8_t *w = (const uint8_t *)op->packed + k->weights_at + s.first * k->panel;
            const uint8_t *window = (const uint8_t *)io->scratch + at * k->step;
            for (size_t panel = s.first; panel < s.behind; panel++, w += k->panel) {
                bnnf__rows_cores[tile](window, k->step, w + down->first * steps * LANES * 4, rows, steps, k->pitch,
                                       starts, panel * LANES * 4, sums);
                finish(op, io, pixel + at, tile, panel, NULL, (const char *)sums, LANES * 4, HALVES, parts);
            }
        }
    }
}

#endif
