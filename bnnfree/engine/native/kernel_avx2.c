/* Kernels for AVX2, but for the binary convolution, which has a file of its own. */

#include "kernels.h"

#ifdef BNNF__HAVE_AVX2

#include <math.h>

#include "avx2.h"

/* -- pixel_conv2d: 16-bit products --

   Why no vpmaddubsw, which multiplies bytes: it adds two products and saturates at 16 bits, and 255 * 127 * 2 is
   beyond. Pixels and weights are widened to 16 bits for vpmaddwd: a product is at most 255 * 128 = 32640 in size, its
   sum of two at most 65280, both exact in its 32-bit lanes, and the whole sum stays below 2^31 by the format. With
   the 7 low bits of a pixel and its top bit apart vpmaddubsw would not saturate (127 * 128 * 2 = 32512), but takes two
   multiplications and three additions for 32 products, vpmaddwd two and two.

   The strip holds pixels in 16 bits, 0 on the padding. A run is taken in pairs of values; an odd one has a last weight
   of 0, so that what lies behind the run does not count. */

typedef struct pixel_plan {
    uint64_t pitch;      /* values of a row of the strip */
    uint64_t run_pairs;  /* of values, in a run */
    uint32_t strip_rows;
    uint64_t scratch, bytes;
} pixel_plan;

static pixel_plan plan_pixel(const bnnf__op *op) {
    pixel_plan p = {.pitch = seen_columns(op) * op->channels};
    p.run_pairs = ceil_div((uint64_t)taps_of_run(op) * op->channels, 2);
    p.strip_rows = strip_rows(op, 2 * p.pitch, op->height);
    p.scratch = 2 * (p.pitch * least(seen_rows(op, p.strip_rows), op->height) + 1);
    p.bytes = bnnf__align(sizeof p) +
              ceil_div(op->outputs, 16) * op->record.kernel_h * runs_of_row(op) * p.run_pairs * 64;
    return p;
}

int bnnf_pixel_conv2d__avx2_4x16_fits(const bnnf__op *op) {
    const pixel_plan p = plan_pixel(op);
    return p.scratch <= MOST_SCRATCH && p.bytes <= MOST_PACKED;
}

/* [panel of 16 outputs][run][pair][output][2] */
size_t bnnf_pixel_conv2d__avx2_4x16_pack(bnnf__op *op, void *memory) {
    const pixel_plan p = plan_pixel(op);
    op->scratch_bytes = p.scratch;
    if (!memory) return p.bytes;
    memcpy(memory, &p, sizeof p);
    int16_t *to = (int16_t *)((uint8_t *)memory + bnnf__align(sizeof p));
    const uint64_t run_values = (uint64_t)taps_of_run(op) * op->channels;
    const uint64_t runs = (uint64_t)runs_of_row(op) * op->record.kernel_h;
    for (uint32_t panel = 0; panel < op->outputs; panel += 16)
        for (uint64_t run = 0; run < runs; run++)
            for (uint64_t pair = 0; pair < p.run_pairs; pair++)
                for (uint32_t i = 0; i < 32; i++) {
                    const uint64_t o = panel + i / 2, at = 2 * pair + i % 2;
                    const int8_t *weights = (const int8_t *)op->weights + (o * runs + run) * run_values;
                    *to++ = o < op->outputs && at < run_values ? weights[at] : 0;
                }
    return p.bytes;
}

NOINLINE void fill_pixel_strip(const bnnf__op *op, const pixel_plan *p, const strip *s, const uint8_t *input,
                               uint16_t *to) {
    const uint64_t row_values = (uint64_t)op->width * op->channels;
    const uint64_t left = least((uint64_t)op->record.padding_w * op->channels, p->pitch);
    const uint64_t inside = least(row_values, p->pitch - left);
    for (int64_t y = s->from; y < s->to; y++, to += p->pitch) {
        if (!sees(op, s, y)) continue;
        const uint8_t *row = input + (uint64_t)y * row_values;
        uint64_t i = 0;
        memset(to, 0, left * sizeof *to);
        for (; i + 16 <= inside; i += 16) {
            const __m128i pixels = _mm_loadu_si128((const __m128i *)(row + i));
            _mm256_storeu_si256((__m256i *)(to + left + i), _mm256_cvtepu8_epi16(pixels));
        }
        for (; i < inside; i++) to[left + i] = row[i];
        /* one more: an odd run looks beyond the last row */
        memset(to + left + inside, 0, (p->pitch - left - inside + 1) * sizeof *to);
    }
}

/* Where a tile's inputs stand: its positions, kernel rows from one to the next, runs in a row. */
typedef struct window {
    uint32_t rows, runs;
    size_t position_step, row_step, run_step; /* values */
    uint64_t run;                             /* values (of pixels: pairs) */
} window;

INLINE void sum_pixels(const window *win, const uint16_t *at, const int16_t *w, const uint32_t count,
                       int32_t sums[TILE][16]) {
    __m256i sum[TILE][2];
    UNROLL for (uint32_t i = 0; i < count; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (uint32_t row = 0; row < win->rows; row++)
        for (uint32_t run = 0; run < win->runs; run++) {
            const uint16_t *x = at + row * win->row_step + run * win->run_step;
            for (uint64_t k = 0; k < win->run; k++, w += 32, x += 2) {
                const __m256i w0 = _mm256_load_si256((const __m256i *)w);
                const __m256i w1 = _mm256_load_si256((const __m256i *)(w + 16));
                UNROLL for (uint32_t i = 0; i < count; i++) {
                    int32_t two;
                    memcpy(&two, x + i * win->position_step, sizeof two);
                    const __m256i pixels = _mm256_set1_epi32(two);
                    sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(pixels, w0));
                    sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(pixels, w1));
                }
            }
        }
    UNROLL for (uint32_t i = 0; i < count; i++) {
        _mm256_store_si256((__m256i *)sums[i], sum[i][0]);
        _mm256_store_si256((__m256i *)(sums[i] + 8), sum[i][1]);
    }
}

NOINLINE void sum_pixels_2(const window *win, const uint16_t *at, const int16_t *w, int32_t sums[TILE][16]) {
    sum_pixels(win, at, w, 2, sums);
}

NOINLINE void sum_pixels_4(const window *win, const uint16_t *at, const int16_t *w, int32_t sums[TILE][16]) {
    sum_pixels(win, at, w, 4, sums);
}

NOINLINE void sum_pixels_1(const window *win, const uint16_t *at, const int16_t *w, int32_t sums[TILE][16]) {
    sum_pixels(win, at, w, 1, sums);
}

/* One output row, 16 outputs from `panel` on. x: of position 0, at the first kernel row inside. */
AVX2 static void pixel_row(const bnnf__op *op, const bnnf__io *io, const window *win, const uint16_t *x,
                           const int16_t *weights, size_t row, uint32_t panel) {
    const uint32_t to = (uint32_t)least(op->outputs, panel + 16);
    const float *biases = op->pixel_bias + (size_t)op->row_class[row] * op->column_classes * op->outputs;
    _Alignas(32) int32_t sums[TILE][16] = {{0}};
    for (uint32_t at = 0, count; at < op->out_width; at += count) {
        count = (uint32_t)least(op->out_width - at, TILE);
        if (count == 3) count = 2;
        const float *bias[TILE];
        for (uint32_t i = 0; i < TILE; i++)
            bias[i] = biases + (size_t)op->column_class[at + (i < count ? i : 0)] * op->outputs;
        (count == 4 ? sum_pixels_4 : count == 2 ? sum_pixels_2 : sum_pixels_1)(win, x + at * win->position_step,
                                                                               weights, sums);
        uint64_t bits[TILE] = {0};
        for (uint32_t lane = panel; lane < to; lane += LANES) {
            __m256 v[TILE];
            UNROLL for (uint32_t i = 0; i < TILE; i++)
                v[i] = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(sums[i] + (lane - panel))));
            finish(op, io, row * op->out_width + at, count, lane, v, bias, bits, lane - panel);
        }
        if (io->bits) put_bits(op, io, row * op->out_width + at, count, panel, 16, bits);
    }
}

AVX2 void bnnf_pixel_conv2d__avx2_4x16_run(const bnnf__op *op, const bnnf__io *io) {
    const pixel_plan *p = op->packed;
    const int16_t *packed = (const int16_t *)((const uint8_t *)op->packed + bnnf__align(sizeof *p));
    const bnnf__range part = bnnf__range_of(op->out_height, op->out_words, io);
    const uint32_t runs = runs_of_row(op);
    const uint64_t row_weights = runs * p->run_pairs * 32, to = least(op->outputs, 64 * part.word_end);
    uint16_t *pixels = io->scratch;
    window win = {.runs = runs, .run = p->run_pairs, .row_step = p->pitch * op->record.dilation_h};
    win.position_step = (size_t)op->record.stride_w * op->channels;
    win.run_step = (size_t)op->record.dilation_w * op->channels;
    for (size_t at = part.row; at < part.row_end; at += p->strip_rows) {
        const strip s = strip_of(op, at, least(at + p->strip_rows, part.row_end), 0);
        fill_pixel_strip(op, p, &s, io->input, pixels);
        for (uint64_t panel = 64 * part.word; panel < to; panel += 16) {
            const int16_t *weights = packed + panel / 16 * op->record.kernel_h * row_weights;
            const bnnf__band *band = op->row_bands;
            for (size_t row = s.row; row < s.row_end; row++) {
                while (row >= band->to) band++;
                const int64_t y = (int64_t)row * op->record.stride_h - op->record.padding_h +
                                  (int64_t)band->first * op->record.dilation_h - s.from;
                win.rows = band->behind - band->first;
                pixel_row(op, io, &win, pixels + (win.rows ? (uint64_t)y * p->pitch : 0),
                          weights + band->first * row_weights, row, (uint32_t)panel);
            }
        }
    }
}

/* -- conv2d: one accumulator per output, in the order of the format --

   Taps on padding are values of the strip, pad_value; without padding the input itself is read. Weights of i8 and of
   bits stay bytes for an output of one position: there memory is what takes the time, and each is used once. */

typedef struct conv_plan {
    uint64_t pitch; /* values of a row of the strip; 0: there is none */
    uint64_t run;   /* values of a run */
    uint32_t strip_rows;
    int bytes_as_weights;
    uint64_t scratch, bytes;
} conv_plan;

static conv_plan plan_conv(const bnnf__op *op) {
    conv_plan p = {.run = (uint64_t)taps_of_run(op) * op->channels, .strip_rows = op->out_height};
    const uint64_t terms = p.run * runs_of_row(op) * op->record.kernel_h;
    if (op->record.padding_h || op->record.padding_w || op->record.after_h || op->record.after_w) {
        p.pitch = seen_columns(op) * op->channels;
        p.strip_rows = strip_rows(op, 4 * p.pitch, seen_rows(op, op->out_height));
        p.scratch = 4 * p.pitch * seen_rows(op, p.strip_rows);
    }
    p.bytes_as_weights = op->out_height == 1 && op->out_width == 1 && op->weights_dtype != BNNF_DTYPE_F32;
    p.bytes = bnnf__align(sizeof p) + 64 * (uint64_t)op->out_words * terms * (p.bytes_as_weights ? 1 : 4);
    return p;
}

int bnnf_conv2d__avx2_4x16_fits(const bnnf__op *op) {
    if (op->record.groups != 1) return 0;
    const conv_plan p = plan_conv(op);
    return p.scratch <= MOST_SCRATCH && p.bytes <= MOST_PACKED;
}

static float real_weight(const bnnf__op *op, uint64_t o, uint64_t k, uint64_t terms) {
    if (op->weights_dtype == BNNF_DTYPE_F32) return ((const float *)op->weights)[o * terms + k];
    if (op->weights_dtype == BNNF_DTYPE_I8) return ((const int8_t *)op->weights)[o * terms + k];
    const uint64_t c = k % op->channels, tap = (o * terms + k) / op->channels;
    return ((const uint64_t *)op->weights)[tap * op->words + c / 64] >> c % 64 & 1 ? -1.0f : 1.0f;
}

/* [panel of 16 outputs][term][output], panels up to a whole word */
size_t bnnf_conv2d__avx2_4x16_pack(bnnf__op *op, void *memory) {
    const conv_plan p = plan_conv(op);
    op->scratch_bytes = p.scratch;
    if (!memory) return p.bytes;
    memcpy(memory, &p, sizeof p);
    uint8_t *to = (uint8_t *)memory + bnnf__align(sizeof p);
    const uint64_t terms = p.run * runs_of_row(op) * op->record.kernel_h;
    for (uint64_t panel = 0; panel < 64 * (uint64_t)op->out_words; panel += 16)
        for (uint64_t k = 0; k < terms; k++)
            for (uint64_t o = panel; o < panel + 16; o++) {
                const float w = o < op->outputs ? real_weight(op, o, k, terms) : 0.0f;
                if (p.bytes_as_weights) *to++ = (uint8_t)(int8_t)w;
                else memcpy(to, &w, sizeof w), to += sizeof w;
            }
    return p.bytes;
}

NOINLINE void fill_conv_strip(const bnnf__op *op, const conv_plan *p, const strip *s, const float *input, float *to) {
    const uint64_t row_values = (uint64_t)op->width * op->channels;
    const uint64_t left = least((uint64_t)op->record.padding_w * op->channels, p->pitch);
    const uint64_t inside = least(row_values, p->pitch - left);
    const float pad = (float)op->record.pad_value;
    for (int64_t y = s->from; y < s->to; y++, to += p->pitch) {
        const int outside = y < 0 || y >= op->height;
        for (uint64_t i = 0; i < (outside ? p->pitch : left); i++) to[i] = pad;
        if (outside) continue;
        memcpy(to + left, input + (uint64_t)y * row_values, inside * sizeof *to);
        for (uint64_t i = left + inside; i < p->pitch; i++) to[i] = pad;
    }
}

/* 8 weights. */
INLINE __m256 load_weights(const uint8_t *w, int bytes) {
    if (!bytes) return _mm256_load_ps((const float *)w);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}

/* Sums of `count` positions and `panels` panels of 16 outputs. */
INLINE void sum_reals(const window *win, const float *at, const uint8_t *w, const uint32_t count,
                      const uint32_t panels, const int bytes, float sums[TILE][64]) {
    const size_t size = bytes ? 1 : 4, panel_step = win->rows * win->runs * win->run * 16 * size;
    __m256 sum[TILE][8];
    UNROLL for (uint32_t i = 0; i < count; i++)
        UNROLL for (uint32_t j = 0; j < 2 * panels; j++) sum[i][j] = _mm256_setzero_ps();
    for (uint32_t row = 0; row < win->rows; row++)
        for (uint32_t run = 0; run < win->runs; run++) {
            const float *x = at + row * win->row_step + run * win->run_step;
            for (uint64_t k = 0; k < win->run; k++, w += 16 * size, x++) {
                __m256 values[TILE];
                UNROLL for (uint32_t i = 0; i < count; i++) values[i] = _mm256_broadcast_ss(x + i * win->position_step);
                UNROLL for (uint32_t j = 0; j < 2 * panels; j++) {
                    const __m256 weights = load_weights(w + j / 2 * panel_step + j % 2 * 8 * size, bytes);
                    UNROLL for (uint32_t i = 0; i < count; i++)
                        sum[i][j] = _mm256_add_ps(sum[i][j], _mm256_mul_ps(values[i], weights));
                }
            }
        }
    UNROLL for (uint32_t i = 0; i < count; i++)
        UNROLL for (uint32_t j = 0; j < 2 * panels; j++) _mm256_store_ps(sums[i] + 8 * j, sum[i][j]);
}

#define SUM_REALS(name, count, panels, bytes)                                                                  \
    NOINLINE void name(const window *win, const float *at, const uint8_t *w, float sums[TILE][64]) {           \
        sum_reals(win, at, w, count, panels, bytes, sums);                                                     \
    }
SUM_REALS(sum_reals_1x16, 1, 1, 0)
SUM_REALS(sum_reals_2x16, 2, 1, 0)
SUM_REALS(sum_reals_4x16, 4, 1, 0)
SUM_REALS(sum_reals_1x64, 1, 4, 0)
SUM_REALS(sum_reals_1x64_bytes, 1, 4, 1)

/* One output row, `lanes` outputs from `from` on. */
AVX2 static void conv_row(const bnnf__op *op, const bnnf__io *io, const window *win, const float *x,
                          const uint8_t *weights, size_t row, uint32_t from, uint32_t lanes, int bytes) {
    const uint32_t to = (uint32_t)least(op->outputs, from + lanes);
    _Alignas(32) float sums[TILE][64] = {{0}};
    for (uint32_t at = 0, count; at < op->out_width; at += count) {
        count = (uint32_t)least(op->out_width - at, TILE);
        if (count == 3) count = 2;
        (lanes == 64 ? bytes ? sum_reals_1x64_bytes : sum_reals_1x64
         : count == 4 ? sum_reals_4x16
         : count == 2 ? sum_reals_2x16
                      : sum_reals_1x16)(win, x + at * win->position_step, weights, sums);
        uint64_t bits[TILE] = {0};
        for (uint32_t lane = from; lane < to; lane += LANES) {
            __m256 v[TILE];
            UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_load_ps(sums[i] + (lane - from));
            finish(op, io, row * op->out_width + at, count, lane, v, NULL, bits, lane - from);
        }
        if (io->bits) put_bits(op, io, row * op->out_width + at, count, from, lanes, bits);
    }
}

AVX2 void bnnf_conv2d__avx2_4x16_run(const bnnf__op *op, const bnnf__io *io) {
    const conv_plan *p = op->packed;
    const uint8_t *packed = (const uint8_t *)op->packed + bnnf__align(sizeof *p);
    const bnnf__range part = bnnf__range_of(op->out_height, op->out_words, io);
    const uint64_t pitch = p->pitch ? p->pitch : (uint64_t)op->width * op->channels;
    const uint64_t to = least(op->outputs, 64 * part.word_end);
    const uint32_t lanes = op->out_height == 1 && op->out_width == 1 ? 64 : 16;
    window win = {.rows = op->record.kernel_h, .runs = runs_of_row(op), .run = p->run};
    win.position_step = (size_t)op->record.stride_w * op->channels;
    win.row_step = pitch * op->record.dilation_h;
    win.run_step = (size_t)op->record.dilation_w * op->channels;
    const uint64_t weight_bytes = win.rows * win.runs * win.run * (p->bytes_as_weights ? 1 : 4);
    for (size_t at = part.row; at < part.row_end; at += p->strip_rows) {
        const strip s = strip_of(op, at, least(at + p->strip_rows, part.row_end), 1);
        const float *values = (const float *)io->input + (p->pitch ? 0 : at * op->record.stride_h * pitch);
        if (p->pitch) {
            fill_conv_strip(op, p, &s, io->input, io->scratch);
            values = io->scratch;
        }
        for (uint64_t panel = 64 * part.word; panel < to; panel += lanes)
            for (size_t row = s.row; row < s.row_end; row++)
                conv_row(op, io, &win, values + (row - at) * op->record.stride_h * pitch,
                         packed + panel * weight_bytes, row, (uint32_t)panel, lanes, p->bytes_as_weights);
    }
}

/* -- pointwise -- */

int bnnf_pointwise__avx2_fits(const bnnf__op *op) {
    (void)op;
    return 1;
}

size_t bnnf_pointwise__avx2_pack(bnnf__op *op, void *memory) {
    (void)memory;
    op->scratch_bytes = 0;
    return 0;
}

/* Channels `lane` to lane + count - 1 of a position as floats. */
INLINE __m256 load_input(const bnnf__op *op, const void *input, size_t pixel, uint32_t lane, uint32_t count,
                         const int dtype) {
    if (dtype == BNNF_DTYPE_F32) return load((const float *)input + pixel * op->channels + lane, count);
    if (dtype == BNNF_DTYPE_BITS) {
        const uint8_t bits = ((const uint8_t *)((const uint64_t *)input + pixel * op->words))[lane / 8];
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i is = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), bit), bit);
        return _mm256_or_ps(_mm256_set1_ps(1.0f), _mm256_and_ps(_mm256_castsi256_ps(is), _mm256_set1_ps(-0.0f)));
    }
    uint8_t bytes[LANES] = {0};
    const uint8_t *from = (const uint8_t *)input + pixel * op->channels + lane;
    if (count >= LANES) memcpy(bytes, from, LANES);
    else memcpy(bytes, from, count);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)));
}

/* `count` positions from `pixel` on, channels [from, to). */
INLINE void points(const bnnf__op *op, const bnnf__io *io, size_t pixel, const uint32_t count, uint32_t from,
                   uint32_t to, const int dtype) {
    for (uint32_t word = from; word < to; word += 64) {
        uint64_t bits[TILE] = {0};
        for (uint32_t lane = word; lane < least(to, word + 64); lane += LANES) {
            const uint32_t valid = (uint32_t)least(to - lane, LANES);
            __m256 v[TILE];
            UNROLL for (uint32_t i = 0; i < TILE; i++)
                v[i] = load_input(op, io->input, pixel + (i < count ? i : 0), lane, valid, dtype);
            finish(op, io, pixel, count, lane, v, NULL, bits, lane - word);
        }
        if (io->bits) put_bits(op, io, pixel, count, word, 64, bits);
    }
}

INLINE void pointwise(const bnnf__op *op, const bnnf__io *io, const int dtype) {
    const bnnf__range part = bnnf__range_of((size_t)op->height * op->width, op->out_words, io);
    const uint32_t from = (uint32_t)(64 * part.word), to = (uint32_t)least(op->outputs, 64 * part.word_end);
    size_t pixel = part.row;
    for (; pixel + TILE <= part.row_end; pixel += TILE) points(op, io, pixel, TILE, from, to, dtype);
    if (pixel < part.row_end) points(op, io, pixel, (uint32_t)(part.row_end - pixel), from, to, dtype);
}

NOINLINE void pointwise_f32(const bnnf__op *op, const bnnf__io *io) { pointwise(op, io, BNNF_DTYPE_F32); }
NOINLINE void pointwise_bits(const bnnf__op *op, const bnnf__io *io) { pointwise(op, io, BNNF_DTYPE_BITS); }
NOINLINE void pointwise_u8(const bnnf__op *op, const bnnf__io *io) { pointwise(op, io, BNNF_DTYPE_U8); }

AVX2 void bnnf_pointwise__avx2_run(const bnnf__op *op, const bnnf__io *io) {
    if (op->input_dtype == BNNF_DTYPE_F32) pointwise_f32(op, io);
    else if (op->input_dtype == BNNF_DTYPE_BITS) pointwise_bits(op, io);
    else pointwise_u8(op, io);
}

/* -- norms -- */

int bnnf_group_norm__avx2_fits(const bnnf__op *op) { return bnnf_pointwise__avx2_fits(op); }
int bnnf_rms_norm__avx2_fits(const bnnf__op *op) { return bnnf_pointwise__avx2_fits(op); }

size_t bnnf_group_norm__avx2_pack(bnnf__op *op, void *memory) {
    (void)memory;
    op->scratch_bytes = BNNF__STATISTICS_BYTES(op);
    return 0;
}

size_t bnnf_rms_norm__avx2_pack(bnnf__op *op, void *memory) { return bnnf_group_norm__avx2_pack(op, memory); }

/* `count` positions from `pixel` on. */
INLINE void normed(const bnnf__op *op, const bnnf__io *io, const bnnf__statistics *s, size_t pixel,
                   const uint32_t count) {
    for (uint32_t word = s->from; word < s->to; word += 64) {
        uint64_t bits[TILE] = {0};
        for (uint32_t lane = word; lane < least(s->to, word + 64); lane += LANES) {
            const uint32_t valid = (uint32_t)least(s->to - lane, LANES);
            const __m256 mean = _mm256_loadu_ps(s->mean + (lane - s->from));
            const __m256 factor = _mm256_loadu_ps(s->factor + (lane - s->from));
            __m256 v[TILE];
            UNROLL for (uint32_t i = 0; i < TILE; i++) {
                const __m256 x = load_input(op, io->input, pixel + (i < count ? i : 0), lane, valid, BNNF_DTYPE_F32);
                v[i] = _mm256_mul_ps(_mm256_sub_ps(x, mean), factor);
            }
            finish(op, io, pixel, count, lane, v, NULL, bits, lane - word);
        }
        if (io->bits) put_bits(op, io, pixel, count, word, 64, bits);
    }
}

AVX2 void bnnf_group_norm__avx2_run(const bnnf__op *op, const bnnf__io *io) {
    const bnnf__statistics s = bnnf__norm_statistics(op, io);
    const size_t pixels = (size_t)op->height * op->width;
    size_t pixel = 0;
    for (; pixel + TILE <= pixels; pixel += TILE) normed(op, io, &s, pixel, TILE);
    if (pixel < pixels) normed(op, io, &s, pixel, (uint32_t)(pixels - pixel));
}

AVX2 void bnnf_rms_norm__avx2_run(const bnnf__op *op, const bnnf__io *io) { bnnf_group_norm__avx2_run(op, io); }

/* -- poolings -- */

/* The window of one output position: rows and columns of the input from `from`, every `step`, `count` of them. */
typedef struct taps {
    uint32_t from, step, count;
    int from_first; /* the window's first tap is inside */
} taps;

static taps taps_of(uint32_t position, uint32_t size, uint32_t kernel, uint32_t stride, uint32_t padding,
                    uint32_t dilation) {
    const int64_t at = (int64_t)position * stride - padding;
    const int64_t first = at < 0 ? (-at + dilation - 1) / dilation : 0;
    const int64_t behind = (int64_t)least(kernel, at < size ? ceil_div((uint64_t)(size - at), dilation) : 0);
    const uint32_t count = behind > first ? (uint32_t)(behind - first) : 0;
    return (taps){(uint32_t)(at + first * dilation), dilation, count, first == 0};
}

/* Registers of 8 channels, `count` channels in all. */
INLINE void pool(const bnnf__op *op, const float *input, const taps *rows, const taps *columns, uint32_t count,
                 const uint32_t registers, const int largest, float *to) {
    __m256 v[4];
    /* a first tap on the padding is -infinity, which a NaN does not replace */
    const int replace = rows->from_first && columns->from_first;
    UNROLL for (uint32_t i = 0; i < registers; i++) v[i] = _mm256_set1_ps(largest ? -INFINITY : 0.0f);
    for (uint32_t a = 0; a < rows->count; a++)
        for (uint32_t b = 0; b < columns->count; b++) {
            const size_t y = rows->from + (size_t)a * rows->step, x = columns->from + (size_t)b * columns->step;
            const float *from = input + (y * op->width + x) * op->channels;
            const int first = largest && replace && a == 0 && b == 0;
            UNROLL for (uint32_t i = 0; i < registers; i++) {
                const __m256 tap = load(from + 8 * i, registers > 1 ? LANES : count);
                v[i] = first ? tap : largest ? _mm256_max_ps(tap, v[i]) : _mm256_add_ps(v[i], tap);
            }
        }
    const __m256 number = _mm256_set1_ps((float)((uint64_t)rows->count * columns->count));
    UNROLL for (uint32_t i = 0; i < registers; i++)
        store(to + 8 * i, registers > 1 ? LANES : count, largest ? v[i] : _mm256_div_ps(v[i], number));
}

/* Work is shared by position and 32 channels. */
INLINE void pool_part(const bnnf__op *op, const bnnf__io *io, const int largest) {
    const struct bnnf_op_record *r = &op->record;
    const size_t chunks = (size_t)ceil_div(op->channels, 32);
    size_t item, end;
    bnnf__share((size_t)op->out_height * op->out_width * chunks, io->part, io->parts, &item, &end);
    while (item < end) {
        const size_t pixel = item / chunks;
        const taps rows = taps_of((uint32_t)(pixel / op->out_width), op->height, r->kernel_h, r->stride_h,
                                  r->padding_h, r->dilation_h);
        const taps columns = taps_of((uint32_t)(pixel % op->out_width), op->width, r->kernel_w, r->stride_w,
                                     r->padding_w, r->dilation_w);
        for (; item < end && item / chunks == pixel; item++) {
            const uint32_t from = (uint32_t)(item % chunks) * 32, left = op->channels - from;
            const float *input = (const float *)io->input + from;
            float *to = io->real + pixel * op->channels + from;
            if (left >= 32)
                pool(op, input, &rows, &columns, 32, 4, largest, to);
            else
                for (uint32_t c = 0; c < left; c += LANES)
                    pool(op, input + c, &rows, &columns, (uint32_t)least(left - c, LANES), 1, largest, to + c);
        }
    }
}

int bnnf_max_pool2d__avx2_fits(const bnnf__op *op) { return op->input_dtype == BNNF_DTYPE_F32; }

size_t bnnf_max_pool2d__avx2_pack(bnnf__op *op, void *memory) { return bnnf_pointwise__avx2_pack(op, memory); }

AVX2 void bnnf_max_pool2d__avx2_run(const bnnf__op *op, const bnnf__io *io) { pool_part(op, io, 1); }

int bnnf_avg_pool2d__avx2_fits(const bnnf__op *op) { return bnnf_pointwise__avx2_fits(op); }

size_t bnnf_avg_pool2d__avx2_pack(bnnf__op *op, void *memory) { return bnnf_pointwise__avx2_pack(op, memory); }

AVX2 void bnnf_avg_pool2d__avx2_run(const bnnf__op *op, const bnnf__io *io) { pool_part(op, io, 0); }

#endif
