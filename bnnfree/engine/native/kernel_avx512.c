/* Kernels for AVX-512 (F, BW, VL and DQ); VPOPCNTDQ and VNNI where there are.

   A convolution takes 12 pixels of its output at a time. Their windows are gathered into scratch, each in one run of
   bytes, whatever kernel, stride, dilation and padding are; then, panel by panel of 16 outputs, a core of
   kernel_avx512_cores.c makes the sums and `finish` the epilogue. So the cores know no border, and weights are read in
   the order in which they stand. */

#include "avx512.h"

#ifdef BNNF__X86

#define BLOCK 12 /* pixels whose windows are gathered together */

/* What a gathered window holds: words of signs, made ready for the binary cores; bytes; bytes as i16; floats. */
enum { WORDS, BYTES, SHORTS, FLOATS };

/* -- how a convolution is cut */

/* A class of pixels is a row band and a column band: all its windows lie alike over the border. Where the parts of a
   window come from is told by pieces, for one part after the other: byte i of the part, where it is live, is byte
   from + i behind the place of the window's first tap. */
typedef struct {
    int32_t from;
    uint32_t last; /* 1: of its part; 2: of the window */
    uint64_t live;
} piece;

/* Stands first in packed. */
typedef struct {
    const bnnf__core *cores;
    size_t block, most, beside; /* pixels that are gathered together; pixels and panels that a core makes */
    size_t tap;          /* bytes of a tap, in the input */
    size_t widening;     /* bytes in a gathered window for each of the input */
    size_t part;         /* bytes of the input that are gathered at a time */
    size_t stride;       /* bytes from one gathered window to the next */
    size_t row_steps;    /* of a kernel row, where kernel rows outside the image are left out; else 0 */
    size_t steps, step_weights; /* of a window; bytes of a step's weights, of all panels beside each other */
    size_t lead, panel;  /* bytes before the weights of these panels, and of both */
    size_t classes;
    size_t sums_at, starts_at, pieces_at, weights_at, bytes; /* in packed; where the pieces of each class start */
    int32_t fill;        /* what taps on the padding hold */
} cut;

static size_t window_bytes(const bnnf__op *op, size_t tap) {
    return (size_t)op->record.kernel_h * op->record.kernel_w * tap;
}

/* Can windows with taps of so many bytes be gathered? */
static int can_gather(const bnnf__op *op, size_t tap) {
    const size_t taps = window_bytes(op, 1), classes = class_count(op);
    return op->record.groups == 1 && taps * tap <= WORST_WINDOW && classes <= WORST_PIECES &&
           classes * (taps + taps * tap / 32 + 2) <= WORST_PIECES;
}

static size_t put_piece(piece *to, size_t count, piece *open, uint32_t last) {
    open->last = last;
    if (to) to[count] = *open;
    *open = (piece){0, 0, 0};
    return count + 1;
}

/* The pieces of a class, written where `to` is not NULL; how many. */
static size_t write_pieces(const bnnf__op *op, const cut *k, size_t class, piece *to) {
    const struct bnnf_op_record *w = &op->record;
    const bnnf__band *down = op->row_bands + class / op->column_band_count;
    const bnnf__band *across = op->column_bands + class % op->column_band_count;
    const size_t skipped = k->row_steps ? down->first : 0, part = k->part;
    const size_t rows = k->row_steps ? down->behind - down->first : w->kernel_h;
    const size_t parts = (rows * w->kernel_w * k->tap + part - 1) / part;
    size_t count = 0, now = 0;
    piece open = {0, 0, 0};
    for (size_t i = down->first; i < down->behind; i++)
        for (size_t j = across->first; j < across->behind; j++) {
            const int64_t from = (int64_t)((i * w->dilation_h * op->width + j * w->dilation_w) * k->tap);
            const size_t start = ((i - skipped) * w->kernel_w + j) * k->tap;
            for (size_t at = start, step; at < start + k->tap; at += step) {
                const size_t left = start + k->tap - at, in_part = at % part;
                const int32_t place = (int32_t)(from + (int64_t)(at - start) - (int64_t)in_part);
                step = left < part - in_part ? left : part - in_part;
                for (; now < at / part; now++) count = put_piece(to, count, &open, 1);
                if (open.live && open.from != place) count = put_piece(to, count, &open, 0);
                open.from = place;
                open.live |= ~(uint64_t)0 >> (64 - step) << in_part;
            }
        }
    for (; now + 1 < parts; now++) count = put_piece(to, count, &open, 1);
    return put_piece(to, count, &open, 2);
}

static cut cut_of(const bnnf__op *op, const bnnf__core *cores, size_t most, size_t beside, size_t tap, int kind,
                  size_t step_window, size_t step_weights) {
    const struct bnnf_op_record *r = &op->record;
    cut k = {.cores = cores, .most = most, .beside = beside, .tap = tap, .step_weights = step_weights * beside};
    k.block = most < BLOCK ? BLOCK / most * most : most;
    k.widening = kind == SHORTS ? 2 : 1;
    k.part = kind == WORDS || kind == FLOATS ? 64 : 32;
    const size_t row = r->kernel_w * tap * k.widening, window = r->kernel_h * row;
    /* Whole parts are stored. An odd number of cache lines: pixels a multiple of 4096 bytes apart would drive each
       other out of the cache. */
    k.stride = bnnf__align(window) | BNNF__ALIGN;
    k.steps = (window + step_window - 1) / step_window;
    k.row_steps = r->pad_value == 0 && row % step_window == 0 ? row / step_window : 0;
    k.lead = kind == WORDS ? 64 : 0;
    k.panel = bnnf__align(k.lead + k.steps * k.step_weights);
    k.classes = class_count(op);
    return k;
}

/* Where all stands in packed; sums: i32 of each class and output. */
static void place(bnnf__op *op, cut *k, size_t sums) {
    size_t pieces = 0;
    for (size_t class = 0; class < k->classes; class++) pieces += write_pieces(op, k, class, NULL);
    k->sums_at = bnnf__align(sizeof *k);
    k->starts_at = bnnf__align(k->sums_at + sums * sizeof(int32_t));
    k->pieces_at = bnnf__align(k->starts_at + k->classes * sizeof(uint32_t));
    k->weights_at = bnnf__align(k->pieces_at + pieces * sizeof(piece));
    k->bytes = k->weights_at + (panels_of(op) + k->beside - 1) / k->beside * k->panel;
    op->scratch_bytes = k->block * k->stride;
}

/* All but sums and weights. */
static void pack_cut(const bnnf__op *op, const cut *k, char *memory) {
    memset(memory, 0, k->bytes);
    memcpy(memory, k, sizeof *k);
    uint32_t *starts = (uint32_t *)(memory + k->starts_at), start = 0;
    for (size_t class = 0; class < k->classes; class++) {
        starts[class] = start;
        start += (uint32_t)write_pieces(op, k, class, (piece *)(memory + k->pieces_at) + start);
    }
}

/* -- gathering windows */

/* The last word before `at`. */
static inline int32_t word_before(const uint8_t *at) {
    int32_t word;
    memcpy(&word, at - sizeof word, sizeof word);
    return word;
}

/* Words of 32 bits, each of which becomes the xor of all up to it and of `before`, as the binary cores want them. */
INLINE_AVX512 __m512i run_up(__m512i v, int32_t before) {
    const __m512i third = _mm512_set_epi32(11, 11, 11, 11, 11, 11, 11, 11, 3, 3, 3, 3, 3, 3, 3, 3);
    v = _mm512_xor_si512(v, _mm512_slli_epi64(v, 32));
    v = _mm512_xor_si512(v, _mm512_maskz_shuffle_epi32(0xCCCC, v, _MM_PERM_BBBB));
    v = _mm512_xor_si512(v, _mm512_maskz_permutexvar_epi32(0xF0F0, third, v));
    v = _mm512_xor_si512(v, _mm512_maskz_permutexvar_epi32(0xFF00, _mm512_set1_epi32(7), v));
    return _mm512_xor_si512(v, _mm512_set1_epi32(before));
}

/* Where the next part of a window comes from, for each of `count` pixels: x, and `across` further each; and where it
   goes: y, and k->stride further each. */
typedef struct {
    const cut *k;
    const piece *p;
    const uint8_t *x;
    uint8_t *y;
    size_t across, count;
    int first; /* of the window */
} part;

/* A part of 64 bytes from `pieces` pieces (0: any number); this and kind are constants, so that the loop has few
   branches. */
INLINE_AVX512 void gather_64(part g, int pieces, int kind) {
    const piece *p = g.p;
    const __m512i fill = _mm512_set1_epi32(g.k->fill);
    for (size_t i = 0; i < g.count; i++, g.x += g.across, g.y += g.k->stride) {
        __m512i v = _mm512_mask_loadu_epi8(fill, p[0].live, g.x + p[0].from);
        if (pieces > 1) v = _mm512_mask_loadu_epi8(v, p[1].live, g.x + p[1].from);
        if (pieces > 2) v = _mm512_mask_loadu_epi8(v, p[2].live, g.x + p[2].from);
        for (size_t n = 1; pieces == 0 && !p[n - 1].last; n++)
            v = _mm512_mask_loadu_epi8(v, p[n].live, g.x + p[n].from);
        if (kind == WORDS) v = run_up(v, g.first ? 0 : word_before(g.y));
        _mm512_storeu_si512(g.y, v);
    }
}

/* A part of 32 bytes, or of 32 that become 64. */
INLINE_AVX512 void gather_32(part g, int pieces, int kind) {
    const piece *p = g.p;
    for (size_t i = 0; i < g.count; i++, g.x += g.across, g.y += g.k->stride) {
        __m256i v = _mm256_maskz_loadu_epi8((__mmask32)p[0].live, g.x + p[0].from);
        if (pieces > 1) v = _mm256_mask_loadu_epi8(v, (__mmask32)p[1].live, g.x + p[1].from);
        if (pieces > 2) v = _mm256_mask_loadu_epi8(v, (__mmask32)p[2].live, g.x + p[2].from);
        for (size_t n = 1; pieces == 0 && !p[n - 1].last; n++)
            v = _mm256_mask_loadu_epi8(v, (__mmask32)p[n].live, g.x + p[n].from);
        if (kind == SHORTS) _mm512_storeu_si512(g.y, _mm512_cvtepu8_epi16(v));
        else _mm256_storeu_si256((__m256i *)g.y, v);
    }
}

/* The last 16 bytes of a window of words, or fewer. */
INLINE_AVX512 void gather_16(part g) {
    const piece *p = g.p;
    for (size_t i = 0; i < g.count; i++, g.x += g.across, g.y += g.k->stride) {
        __m128i v = _mm_maskz_loadu_epi8((__mmask16)p[0].live, g.x + p[0].from);
        for (size_t n = 1; !p[n - 1].last; n++) v = _mm_mask_loadu_epi8(v, (__mmask16)p[n].live, g.x + p[n].from);
        v = _mm_xor_si128(v, _mm_slli_epi64(v, 32));
        v = _mm_xor_si128(v, _mm_maskz_shuffle_epi32(12, v, _MM_PERM_BBBB));
        _mm_storeu_si128((__m128i *)g.y, _mm_xor_si128(v, _mm_set1_epi32(g.first ? 0 : word_before(g.y))));
    }
}

/* Windows of `count` pixels of one class in one row: their first taps stand at `from` and `across` further each. */
INLINE_AVX512 void gather(uint8_t *to, const cut *k, const piece *p, const uint8_t *from, size_t across, size_t count,
                          int kind) {
    part g = {k, p, from, to, across, count, 1};
    for (size_t pieces, left = k->steps * 8;; left -= 64, g.first = 0, g.y += k->part * k->widening, g.p += pieces) {
        for (pieces = 1; !g.p[pieces - 1].last; pieces++) continue;
        if (kind == WORDS && left <= 16) {
            gather_16(g);
        } else if (kind == WORDS || kind == FLOATS) {
            if (pieces == 1) gather_64(g, 1, kind);
            else if (pieces == 2) gather_64(g, 2, kind);
            else if (pieces == 3) gather_64(g, 3, kind);
            else gather_64(g, 0, kind);
        } else {
            if (pieces == 1) gather_32(g, 1, kind);
            else if (pieces == 2) gather_32(g, 2, kind);
            else if (pieces == 3) gather_32(g, 3, kind);
            else gather_32(g, 0, kind);
        }
        if (g.p[pieces - 1].last == 2) return;
    }
}

/* -- convolutions */

/* Where a tile stands: in the row band `band`, from row r, column q on. */
typedef struct {
    size_t band, r, q, column_band;
} spot;

/* The windows of `pixels` pixels into scratch, and where their rows stand: see finish. Moves on behind them. */
INLINE_AVX512 void gather_tile(const bnnf__op *op, const bnnf__io *io, const cut *k, spot *s, size_t pixels,
                               const void **rows, int kind, int source) {
    const struct bnnf_op_record *w = &op->record;
    const char *packed = op->packed;
    uint8_t *to = io->scratch;
    for (size_t i = 0, count; i < pixels; i += count, to += count * k->stride) {
        const bnnf__band *across = op->column_bands + s->column_band;
        const size_t class = s->band * op->column_band_count + s->column_band;
        const int64_t top = (int64_t)(s->r * w->stride_h) - w->padding_h;
        const int64_t left = (int64_t)(s->q * w->stride_w) - w->padding_w;
        const uint8_t *from = (const uint8_t *)io->input + (top * (int64_t)op->width + left) * (int64_t)k->tap;
        const piece *p = (const piece *)(packed + k->pieces_at) + ((const uint32_t *)(packed + k->starts_at))[class];
        const void *row = (const int32_t *)(packed + k->sums_at) + class * panels_of(op) * LANES;
        if (source == PIXELS)
            row = op->pixel_bias +
                  ((size_t)op->row_class[s->r] * op->column_classes + op->column_class[s->q]) * op->outputs;
        count = across->to - s->q < pixels - i ? across->to - s->q : pixels - i;
        gather(to, k, p, from, w->stride_w * k->tap, count, kind);
        for (size_t n = 0; n < count; n++) rows[i + n] = row;
        s->q += count;
        if (s->q < across->to) continue;
        if (++s->column_band == op->column_band_count) s->column_band = 0, s->q = 0, s->r++;
    }
}

static spot spot_of(const bnnf__op *op, size_t pixel) {
    spot s = {0, pixel / op->out_width, pixel % op->out_width, 0};
    while (s.r >= op->row_bands[s.band].to) s.band++;
    while (s.q >= op->column_bands[s.column_band].to) s.column_band++;
    return s;
}

/* Pixels [from, to) of one row band. */
INLINE_AVX512 void run_pixels(const bnnf__op *op, const bnnf__io *io, const cut *k, const share *s, size_t from,
                              size_t to, int kind, int source) {
    const int parts = parts_of(op, io);
    spot now = spot_of(op, from);
    const bnnf__band *band = op->row_bands + now.band;
    const size_t steps = k->row_steps ? k->row_steps * (band->behind - band->first) : k->steps;
    const uint8_t *weights = (const uint8_t *)op->packed + k->weights_at + s->first / k->beside * k->panel;
    const uint8_t *end = (const uint8_t *)op->packed + k->bytes;
    weights += k->lead + k->row_steps * band->first * k->step_weights;
    for (size_t block; from < to; from += block) {
        const void *rows[BLOCK];
        float sums[BLOCK * LANES] __attribute__((aligned(64)));
        const uint8_t *w = weights;
        block = to - from < k->block ? to - from : k->block;
        gather_tile(op, io, k, &now, block, rows, kind, source);
        if (!steps) memset(sums, 0, sizeof sums);
        for (size_t panel = s->first; panel < s->behind; panel += k->beside, w += k->panel)
            for (size_t at = 0; at < block; at += k->most) {
                const uint8_t *window = (const uint8_t *)io->scratch + at * k->stride;
                const size_t pixels = block - at < k->most ? block - at : k->most;
                const size_t ahead = (size_t)(end - w) >= AHEAD + k->panel ? AHEAD : 0;
                if (steps) k->cores[pixels](window, k->stride, w, ahead, steps, sums);
                for (size_t n = 0; n < k->beside && panel + n < s->behind; n++)
                    finish(op, io, from + at, pixels, panel + n, rows + at, (const char *)(sums + n * k->most * LANES),
                           LANES * 4, source, parts);
            }
    }
}

_Static_assert(BNNF__SUM_TILE * 2 <= BLOCK && BNNF__BINARY_TILE <= BLOCK && BNNF__TABLE_TILE <= BLOCK, "sums hold all");

INLINE_AVX512 void convolve(const bnnf__op *op, const bnnf__io *io, int kind, int source) {
    const share s = share_of(op, io, 8);
    for (size_t i = 0; i < op->row_band_count; i++) {
        const bnnf__band *band = op->row_bands + i;
        const size_t start = (size_t)band->from * op->out_width, end = (size_t)band->to * op->out_width;
        const size_t from = start > s.from ? start : s.from, to = end < s.to ? end : s.to;
        if (from < to) run_pixels(op, io, op->packed, &s, from, to, kind, source);
    }
}

/* -- signs */

/* Twice what the core counts for the kernel rows that are left out, if it runs: see bnnf__core. */
static int32_t counted_before(const bnnf__op *op, const bnnf__band *down, size_t o) {
    const size_t row = op->record.kernel_w * op->words;
    uint64_t before = 0;
    for (size_t i = 0; i < down->first * row && down->first < down->behind; i++)
        before ^= weight_word(op, o * op->record.kernel_h * row + i);
    return 2 * __builtin_popcount((uint32_t)(before ^ before >> 32));
}

static size_t pack_binary(bnnf__op *op, char *memory, const bnnf__core *cores, size_t most) {
    const size_t panels = panels_of(op);
    cut k = cut_of(op, cores, most, 1, (size_t)op->words * 8, WORDS, 8, 128);
    k.row_steps = op->record.kernel_w * op->words; /* whatever padding carries: class_sum knows it */
    place(op, &k, k.classes * panels * LANES);
    if (!memory) return k.bytes;
    pack_cut(op, &k, memory);
    int32_t *sums = (int32_t *)(memory + k.sums_at);
    pack_class_sums(op, sums);
    for (size_t class = 0; class < k.classes; class++)
        for (size_t o = 0; o < op->outputs; o++)
            sums[class * panels * LANES + o] += counted_before(op, op->row_bands + class / op->column_band_count, o);
    for (size_t o = 0; o < op->outputs; o++) {
        uint32_t *to = (uint32_t *)(memory + k.weights_at + o / LANES * k.panel + k.lead) + o % LANES;
        uint32_t sum = 0;
        for (size_t i = 0; i < k.steps; i++, to += 2 * LANES) {
            const uint64_t word = weight_word(op, o * k.steps + i);
            to[0] = sum ^= (uint32_t)word;
            to[LANES] = sum ^= (uint32_t)(word >> 32);
        }
    }
    return k.bytes;
}

static WITH_AVX512 void run_binary(const bnnf__op *op, const bnnf__io *io) { convolve(op, io, WORDS, COUNTS); }

int bnnf_binary_conv2d__avx512_7x16_fits(const bnnf__op *op) {
    return can_gather(op, (size_t)op->words * 8) && !op->pixel_bias && class_count(op) * op->outputs <= WORST_SUMS;
}

int bnnf_binary_conv2d__avx512vpopcnt_12x16_fits(const bnnf__op *op) {
    return __builtin_cpu_supports("avx512vpopcntdq") && bnnf_binary_conv2d__avx512_7x16_fits(op);
}

size_t bnnf_binary_conv2d__avx512vpopcnt_12x16_pack(bnnf__op *op, void *memory) {
    return pack_binary(op, memory, bnnf__binary_cores, BNNF__BINARY_TILE);
}

void bnnf_binary_conv2d__avx512vpopcnt_12x16_run(const bnnf__op *op, const bnnf__io *io) { run_binary(op, io); }

size_t bnnf_binary_conv2d__avx512_7x16_pack(bnnf__op *op, void *memory) {
    return pack_binary(op, memory, bnnf__table_cores, BNNF__TABLE_TILE);
}

void bnnf_binary_conv2d__avx512_7x16_run(const bnnf__op *op, const bnnf__io *io) { run_binary(op, io); }

/* -- pixels */

static size_t pack_pixel(bnnf__op *op, char *memory, int kind) {
    const size_t terms = window_bytes(op, op->channels), each = kind == BYTES ? 4 : 2;
    const bnnf__core *cores = kind == BYTES ? bnnf__dot_cores : bnnf__pair_cores;
    cut k = cut_of(op, cores, BNNF__SUM_TILE, 2, op->channels, kind, 4, 64);
    k.row_steps = 0; /* a step may belong to two kernel rows */
    place(op, &k, 0);
    if (!memory) return k.bytes;
    pack_cut(op, &k, memory);
    for (size_t o = 0; o < op->outputs; o++) {
        char *panel = memory + k.weights_at + o / (2 * LANES) * k.panel;
        for (size_t i = 0; i < terms; i++) {
            const int8_t w = ((const int8_t *)op->weights)[o * terms + i];
            const size_t at = (i / each * 2 * LANES + o % (2 * LANES)) * each + i % each;
            if (kind == BYTES) ((int8_t *)panel)[at] = w;
            else ((int16_t *)panel)[at] = w;
        }
    }
    return k.bytes;
}

int bnnf_pixel_conv2d__avx512vnni_6x32_fits(const bnnf__op *op) {
    return __builtin_cpu_supports("avx512vnni") && can_gather(op, op->channels);
}

size_t bnnf_pixel_conv2d__avx512vnni_6x32_pack(bnnf__op *op, void *memory) { return pack_pixel(op, memory, BYTES); }

WITH_AVX512 void bnnf_pixel_conv2d__avx512vnni_6x32_run(const bnnf__op *op, const bnnf__io *io) {
    convolve(op, io, BYTES, PIXELS);
}

int bnnf_pixel_conv2d__avx512_6x32_fits(const bnnf__op *op) { return can_gather(op, op->channels); }

size_t bnnf_pixel_conv2d__avx512_6x32_pack(bnnf__op *op, void *memory) { return pack_pixel(op, memory, SHORTS); }

WITH_AVX512 void bnnf_pixel_conv2d__avx512_6x32_run(const bnnf__op *op, const bnnf__io *io) {
    convolve(op, io, SHORTS, PIXELS);
}

/* -- floats */

/* Few pixels, a classifier say: tiles would be too small to hide the latency of additions, and a core makes four panels
   of one pixel. There it is reading the weights that takes time, so that whole numbers stay i8. */
static int is_wide(const bnnf__op *op) { return (size_t)op->out_height * op->out_width < 4; }

static int is_whole(const bnnf__op *op) { return is_wide(op) && op->weights_dtype != BNNF_DTYPE_F32; }

int bnnf_conv2d__avx512_6x32_fits(const bnnf__op *op) { return can_gather(op, (size_t)op->channels * 4); }

/* Weight i of output o; bits as +1 and -1. */
static float real_weight(const bnnf__op *op, size_t o, size_t i, size_t terms) {
    if (op->weights_dtype == BNNF_DTYPE_I8) return ((const int8_t *)op->weights)[o * terms + i];
    if (op->weights_dtype == BNNF_DTYPE_BITS) {
        const size_t tap = o * (terms / op->channels) + i / op->channels, c = i % op->channels;
        return weight_word(op, tap * op->words + c / 64) >> c % 64 & 1 ? -1.0f : 1.0f;
    }
    float w;
    memcpy(&w, (const char *)op->weights + (o * terms + i) * sizeof w, sizeof w);
    return w;
}

static cut real_cut(const bnnf__op *op) {
    const size_t tap = (size_t)op->channels * 4;
    if (is_whole(op)) return cut_of(op, bnnf__wide_whole_cores, 1, 4, tap, FLOATS, 4, LANES);
    if (is_wide(op)) return cut_of(op, bnnf__wide_real_cores, 1, 4, tap, FLOATS, 4, LANES * 4);
    return cut_of(op, bnnf__real_cores, BNNF__SUM_TILE, 2, tap, FLOATS, 4, LANES * 4);
}

size_t bnnf_conv2d__avx512_6x32_pack(bnnf__op *op, void *memory) {
    const float carried = (float)op->record.pad_value;
    cut k = real_cut(op);
    memcpy(&k.fill, &carried, sizeof k.fill);
    place(op, &k, 0);
    if (!memory) return k.bytes;
    pack_cut(op, &k, memory);
    const size_t lanes = k.beside * LANES;
    for (size_t o = 0; o < op->outputs; o++) {
        char *panel = (char *)memory + k.weights_at + o / lanes * k.panel;
        for (size_t i = 0; i < k.steps; i++) {
            const float w = real_weight(op, o, i, k.steps);
            if (is_whole(op)) ((int8_t *)panel)[i * lanes + o % lanes] = (int8_t)w;
            else ((float *)panel)[i * lanes + o % lanes] = w;
        }
    }
    return k.bytes;
}

WITH_AVX512 void bnnf_conv2d__avx512_6x32_run(const bnnf__op *op, const bnnf__io *io) {
    convolve(op, io, FLOATS, REALS);
}

/* -- pointwise */

int bnnf_pointwise__avx512_fits(const bnnf__op *op) {
    (void)op;
    return 1;
}

size_t bnnf_pointwise__avx512_pack(bnnf__op *op, void *memory) {
    (void)memory;
    op->scratch_bytes = 0;
    return 0;
}

INLINE_AVX512 void run_pointwise(const bnnf__op *op, const bnnf__io *io, size_t each, int source) {
    const size_t together = 12; /* pixels that stay in the cache from panel to panel */
    const share s = share_of(op, io, 1);
    const int parts = parts_of(op, io);
    for (size_t from = s.from; from < s.to; from += together) {
        const size_t pixels = s.to - from < together ? s.to - from : together;
        for (size_t panel = s.first; panel < s.behind; panel++)
            finish(op, io, from, pixels, panel, NULL, (const char *)io->input + from * each, each, source, parts);
    }
}

WITH_AVX512 void bnnf_pointwise__avx512_run(const bnnf__op *op, const bnnf__io *io) {
    if (op->input_dtype == BNNF_DTYPE_F32) run_pointwise(op, io, (size_t)op->channels * 4, INPUT_F32);
    else if (op->input_dtype == BNNF_DTYPE_BITS) run_pointwise(op, io, (size_t)op->words * 8, INPUT_BITS);
    else run_pointwise(op, io, op->channels, INPUT_U8);
}

/* -- norms */

int bnnf_group_norm__avx512_fits(const bnnf__op *op) { return bnnf_pointwise__avx512_fits(op); }
int bnnf_rms_norm__avx512_fits(const bnnf__op *op) { return bnnf_pointwise__avx512_fits(op); }

size_t bnnf_group_norm__avx512_pack(bnnf__op *op, void *memory) {
    (void)memory;
    op->scratch_bytes = BNNF__STATISTICS_BYTES(op);
    return 0;
}

size_t bnnf_rms_norm__avx512_pack(bnnf__op *op, void *memory) { return bnnf_group_norm__avx512_pack(op, memory); }

WITH_AVX512 void bnnf_group_norm__avx512_run(const bnnf__op *op, const bnnf__io *io) {
    enum { TOGETHER = 12 }; /* pixels that stay in the cache from panel to panel */
    const bnnf__statistics s = bnnf__norm_statistics(op, io);
    const size_t all = (size_t)op->height * op->width;
    const int parts = parts_of(op, io);
    float v[TOGETHER * LANES];
    for (size_t from = 0; s.from < s.to && from < all; from += TOGETHER) {
        const size_t pixels = all - from < TOGETHER ? all - from : TOGETHER;
        for (size_t c = s.from; c < s.to; c += LANES) {
            const __m512 mean = _mm512_loadu_ps(s.mean + (c - s.from));
            const __m512 factor = _mm512_loadu_ps(s.factor + (c - s.from));
            const __mmask16 live = s.to - c < LANES ? (__mmask16)((1u << (s.to - c)) - 1) : 0xFFFF;
            const float *x = (const float *)io->input + from * op->channels + c;
            for (size_t i = 0; i < pixels; i++, x += op->channels)
                _mm512_storeu_ps(v + i * LANES,
                                 _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(live, x), mean), factor));
            finish(op, io, from, pixels, c / LANES, NULL, (const char *)v, sizeof(float) * LANES, REALS, parts);
        }
    }
}

WITH_AVX512 void bnnf_rms_norm__avx512_run(const bnnf__op *op, const bnnf__io *io) {
    bnnf_group_norm__avx512_run(op, io);
}

/* -- poolings */

/* A statement for each i below 4: written out, so that each v[i] is a register. */
#define ONE(n, ...)       \
    {                     \
        enum { i = (n) }; \
        __VA_ARGS__;      \
    }
#define EACH(...)                                                                                     \
    do {                                                                                              \
        ONE(0, __VA_ARGS__) ONE(1, __VA_ARGS__) ONE(2, __VA_ARGS__) ONE(3, __VA_ARGS__)               \
    } while (0)

/* Four registers of channels from c on (those of `live`; full: all of them) of the window of pixel (r, q), whose taps
   inside the image are those of the bands. largest and full are constants. */
INLINE_AVX512 void pool(const bnnf__op *op, const bnnf__io *io, const bnnf__band *down, const bnnf__band *across,
                        size_t r, size_t q, size_t c, uint64_t live, int full, int largest) {
    const struct bnnf_op_record *w = &op->record;
    const size_t channels = op->channels, rows = down->behind - down->first, columns = across->behind - across->first;
    const size_t top = r * w->stride_h + down->first * w->dilation_h - w->padding_h;
    const size_t left = q * w->stride_w + across->first * w->dilation_w - w->padding_w;
    const float *line = (const float *)io->input + (top * op->width + left) * channels + c;
    const size_t down_step = op->width * channels * w->dilation_h, step = channels * w->dilation_w;
    float *real = io->real + (r * op->out_width + q) * channels + c;
    __m512 v[4];
    /* A largest value starts from the first tap; where that is on the padding it is -infinity. */
    const __m512 start = largest ? _mm512_set1_ps(-__builtin_inff()) : _mm512_setzero_ps();
    EACH(v[i] = start);
#define LIVE(i) (full ? 0xFFFF : (__mmask16)(live >> 16 * ((i) % 4)))
    if (largest && down->first == 0 && across->first == 0) EACH(v[i] = _mm512_maskz_loadu_ps(LIVE(i), line + 16 * i));
    for (size_t y = 0; y < rows; y++, line += down_step) {
        const float *tap = line;
        for (size_t x = 0; x < columns; x++, tap += step) {
            if (largest) EACH(v[i] = _mm512_max_ps(_mm512_maskz_loadu_ps(LIVE(i), tap + 16 * i), v[i]));
            else EACH(v[i] = _mm512_add_ps(v[i], _mm512_maskz_loadu_ps(LIVE(i), tap + 16 * i)));
        }
    }
    const __m512 taps = _mm512_set1_ps((float)(rows * columns));
    if (!largest) EACH(v[i] = _mm512_div_ps(v[i], taps));
    if (full) EACH(_mm512_storeu_ps(real + 16 * i, v[i]));
    else EACH(_mm512_mask_storeu_ps(real + 16 * i, LIVE(i), v[i]));
#undef LIVE
}

INLINE_AVX512 void run_pool(const bnnf__op *op, const bnnf__io *io, int largest) {
    const share s = share_of(op, io, 1);
    const size_t end = s.behind * LANES < op->channels ? s.behind * LANES : op->channels;
    spot now = spot_of(op, s.from);
    for (size_t pixel = s.from; pixel < s.to; pixel++, now.q++) {
        if (now.q == op->out_width) now.q = 0, now.r++, now.column_band = 0;
        while (now.r >= op->row_bands[now.band].to) now.band++;
        while (now.q >= op->column_bands[now.column_band].to) now.column_band++;
        const bnnf__band *down = op->row_bands + now.band, *across = op->column_bands + now.column_band;
        size_t c = s.first * LANES;
        for (; c + 64 <= end; c += 64) pool(op, io, down, across, now.r, now.q, c, 0, 1, largest);
        if (c < end) pool(op, io, down, across, now.r, now.q, c, ~(uint64_t)0 >> (64 - (end - c)), 0, largest);
    }
}

int bnnf_max_pool2d__avx512_fits(const bnnf__op *op) { return op->input_dtype == BNNF_DTYPE_F32; }
size_t bnnf_max_pool2d__avx512_pack(bnnf__op *op, void *memory) { return bnnf_pointwise__avx512_pack(op, memory); }
WITH_AVX512 void bnnf_max_pool2d__avx512_run(const bnnf__op *op, const bnnf__io *io) { run_pool(op, io, 1); }

int bnnf_avg_pool2d__avx512_fits(const bnnf__op *op) { return bnnf_pointwise__avx512_fits(op); }
size_t bnnf_avg_pool2d__avx512_pack(bnnf__op *op, void *memory) { return bnnf_pointwise__avx512_pack(op, memory); }
WITH_AVX512 void bnnf_avg_pool2d__avx512_run(const bnnf__op *op, const bnnf__io *io) { run_pool(op, io, 0); }

#endif
