/* Kernels in plain C for every op and every shape: what runs where no other kernel fits, and what the others are
   compared with. A kernel's values go to an array of all outputs of a pixel, which `finish` takes through the
   epilogue. */

#include <float.h>
#include <math.h>
#include <string.h>

#include "scalar.h"

#define SPAN 8u /* pixels of a row worked on together, so that weights are read once for all of them */

static uint32_t popcount(uint64_t x) {
#if defined(__POPCNT__) || defined(__aarch64__)
    return (uint32_t)__builtin_popcountll(x);
#else /* a call of the builtin is slower */
    x -= x >> 1 & UINT64_C(0x5555555555555555);
    x = (x & UINT64_C(0x3333333333333333)) + (x >> 2 & UINT64_C(0x3333333333333333));
    x = (x + (x >> 4)) & UINT64_C(0x0F0F0F0F0F0F0F0F);
    return (uint32_t)(x * UINT64_C(0x0101010101010101) >> 56);
#endif
}

/* -- pointwise */

FITS(pointwise__scalar)
PACKS_NOTHING(pointwise__scalar, (size_t)op->outputs * sizeof(float))

RUNS(pointwise__scalar);
RUNS(pointwise__scalar) {
    share s = share_of(op, io);
    float *v = io->scratch;
    const uint32_t n = s.to - s.from;
    for (; n && s.pixel < s.last; s.pixel++) {
        if (op->input_dtype == BNNF_DTYPE_F32) {
            memcpy(v, (const float *)io->input + s.pixel * op->channels + s.from, n * sizeof *v);
        } else if (op->input_dtype == BNNF_DTYPE_U8) {
            const uint8_t *x = (const uint8_t *)io->input + s.pixel * op->channels + s.from;
            for (uint32_t c = 0; c < n; c++) v[c] = (float)x[c];
        } else {
            const uint64_t *x = (const uint64_t *)io->input + s.pixel * op->words + s.from / 64;
            for (uint32_t c = 0; c < n; c++) v[c] = x[c / 64] >> c % 64 & 1 ? -1.0f : 1.0f;
        }
        finish(op, io, s.pixel, s.from, s.to, v, op->epilogue.bias);
    }
}

/* -- binary_conv2d */

/* Scratch: the windows of a span, of one group, as words [SPAN][taps][group_words]; sums [SPAN][outputs]; values; what
   the taps on the padding add to each output. */
static uint64_t window_words(const bnnf__op *op) {
    return (uint64_t)op->record.kernel_h * op->record.kernel_w * op->group_words;
}

FITS(binary_conv2d__scalar)
PACKS_NOTHING(binary_conv2d__scalar,
              bytes_of(SPAN * window_words(op) * 8 + (SPAN + 2) * (uint64_t)op->outputs * sizeof(int32_t)))

/* The channels of a group within a pixel's words: its first bit may stand anywhere in a word. */
static void copy_group(const bnnf__op *op, const uint64_t *pixel, uint32_t group, uint64_t *to) {
    size_t bit = (size_t)group * op->group_channels;
    const uint64_t *from = pixel + bit / 64;
    uint32_t shift = bit % 64, left = op->group_channels;
    for (uint32_t k = 0; k < op->group_words; k++, left -= 64) {
        uint32_t size = left < 64 ? left : 64;
        uint64_t word = from[k] >> shift;
        if (shift && size > 64 - shift) word |= from[k + 1] << (64 - shift);
        to[k] = size < 64 ? word & ((UINT64_C(1) << size) - 1) : word;
    }
}

/* The taps inside the image of every window of a span, one after the other. */
static void copy_windows(const bnnf__op *op, const bnnf__io *io, const span *at, uint32_t group, uint64_t *to) {
    const uint64_t *input = io->input;
    for (uint32_t p = 0; p < at->count; p++)
        for (uint32_t i = at->rows->first; i < at->rows->behind; i++)
            for (uint32_t j = at->columns->first; j < at->columns->behind; j++, to += op->group_words) {
                size_t pixel = seen(op, at, i, j) + (size_t)p * op->record.stride_w;
                copy_group(op, input + pixel * op->words, group, to);
            }
}

/* For each output what padding adds: pad_value times the sum of the weights of each tap outside. */
static void pad_sums(const bnnf__op *op, const span *at, const share *s, int32_t *sums) {
    const struct bnnf_op_record *r = &op->record;
    const uint64_t *w = (const uint64_t *)op->weights + s->from * window_words(op);
    for (uint32_t o = s->from; o < s->to; o++) {
        int32_t sum = 0;
        for (uint32_t i = 0; i < r->kernel_h; i++)
            for (uint32_t j = 0; j < r->kernel_w; j++, w += op->group_words) {
                if (i >= at->rows->first && i < at->rows->behind && j >= at->columns->first && j < at->columns->behind)
                    continue;
                sum += (int32_t)op->group_channels;
                for (uint32_t k = 0; k < op->group_words; k++) sum -= 2 * (int32_t)popcount(w[k]);
            }
        sums[o - s->from] = sum * r->pad_value;
    }
}

/* Sums of output `o` at each pixel of a span, whose windows stand in x. */
static void sum_signs(const bnnf__op *op, const span *at, const uint64_t *x, uint32_t o, int32_t pad, int32_t *sums) {
    const struct bnnf_op_record *r = &op->record;
    const size_t row = (size_t)r->kernel_w * op->group_words;
    const uint64_t *weights = (const uint64_t *)op->weights + ((size_t)o * r->kernel_h + at->rows->first) * row +
                              (size_t)at->columns->first * op->group_words;
    const uint32_t rows = at->rows->behind - at->rows->first, columns = at->columns->behind - at->columns->first;
    const size_t run = (size_t)columns * op->group_words;
    const int32_t products = (int32_t)(rows * columns * op->group_channels);
    for (uint32_t p = 0; p < at->count; p++) {
        uint32_t differ = 0;
        const uint64_t *w = weights;
        for (uint32_t i = 0; i < rows; i++, w += row, x += run)
            for (size_t k = 0; k < run; k++) differ += popcount(x[k] ^ w[k]);
        sums[(size_t)p * op->outputs] = products - 2 * (int32_t)differ + pad;
    }
}

RUNS(binary_conv2d__scalar);
RUNS(binary_conv2d__scalar) {
    uint64_t *windows = io->scratch;
    int32_t *sums = (int32_t *)(windows + SPAN * (size_t)window_words(op)), *pad = sums + SPAN * (size_t)op->outputs;
    float *v = (float *)(pad + op->outputs);
    share s = share_of(op, io);
    span at = {0};
    while (next_span(op, &s, &at, SPAN)) {
        if (op->record.pad_value) pad_sums(op, &at, &s, pad);
        uint32_t group = BNNF__NONE;
        for (uint32_t o = s.from; o < s.to; o++) {
            if (o / op->group_outputs != group) copy_windows(op, io, &at, group = o / op->group_outputs, windows);
            sum_signs(op, &at, windows, o, op->record.pad_value ? pad[o - s.from] : 0, sums + (o - s.from));
        }
        const float *bias = op->pixel_bias ? border_bias(op, &at) : op->epilogue.bias;
        for (uint32_t p = 0; p < at.count; p++)
            finish_sums(op, io, at.pixel + p, s.from, s.to, sums + (size_t)p * op->outputs, v, bias);
    }
}

/* -- pixel_conv2d and conv2d */

/* Both sum LANES outputs at once, each on its own: a loop of fixed length over neighbours, which compilers turn into
   what vectors the CPU has. Weights are packed as [outputs / LANES][kernel_h][kernel_w][group_channels][LANES], with
   zeros beyond the last output; a block stays in the cache for all pixels of a span. Scratch: [SPAN][epilogue.lanes]
   sums, and floats of one pixel. */
#define LANES 16u

static uint64_t packed_values(const bnnf__op *op) {
    const uint64_t terms = (uint64_t)op->record.kernel_h * op->record.kernel_w * op->group_channels;
    return terms * ((op->outputs + LANES - 1) / LANES * LANES);
}

/* Where the weight of output o, tap and channel t stands. */
static size_t packed_at(const bnnf__op *op, size_t o, size_t t) {
    const size_t terms = (size_t)op->record.kernel_h * op->record.kernel_w * op->group_channels;
    return (o / LANES * terms + t) * LANES + o % LANES;
}

FITS(pixel_conv2d__scalar)

PACKS(pixel_conv2d__scalar);
PACKS(pixel_conv2d__scalar) {
    const size_t terms = (size_t)op->record.kernel_h * op->record.kernel_w * op->channels;
    const size_t size = bytes_of(packed_values(op) * sizeof(int16_t));
    const int8_t *from = op->weights;
    int16_t *to = memory;
    op->scratch_bytes = (SPAN + 1) * (size_t)op->epilogue.lanes * sizeof(float);
    if (!memory) return size;
    memset(to, 0, size);
    for (size_t o = 0; o < op->outputs; o++)
        for (size_t t = 0; t < terms; t++) to[packed_at(op, o, t)] = *from++;
    return size;
}

/* Sums of a block of outputs at pixel p of a span. */
static void sum_pixels(const bnnf__op *op, const bnnf__io *io, const span *at, uint32_t p, const int16_t *block,
                       int32_t *to) {
    const struct bnnf_op_record *r = &op->record;
    int32_t sums[LANES] = {0};
    for (uint32_t i = at->rows->first; i < at->rows->behind; i++)
        for (uint32_t j = at->columns->first; j < at->columns->behind; j++) {
            const size_t pixel = seen(op, at, i, j) + (size_t)p * r->stride_w;
            const uint8_t *x = (const uint8_t *)io->input + pixel * op->channels;
            const int16_t *w = block + ((size_t)i * r->kernel_w + j) * op->channels * LANES;
            for (uint32_t c = 0; c < op->channels; c++, w += LANES) {
                const int16_t value = x[c];
                for (uint32_t k = 0; k < LANES; k++) sums[k] += value * w[k];
            }
        }
    memcpy(to, sums, sizeof sums);
}

RUNS(pixel_conv2d__scalar);
RUNS(pixel_conv2d__scalar) {
    const size_t lanes = op->epilogue.lanes;
    int32_t *sums = io->scratch;
    float *v = (float *)(sums + SPAN * lanes);
    share s = share_of(op, io);
    span at = {0};
    while (next_span(op, &s, &at, SPAN)) {
        for (uint32_t o = s.from; o < s.to; o += LANES) {
            const int16_t *block = (const int16_t *)op->packed + packed_at(op, o, 0);
            for (uint32_t p = 0; p < at.count; p++)
                sum_pixels(op, io, &at, p, block, sums + p * lanes + (o - s.from));
        }
        const float *bias = border_bias(op, &at);
        for (uint32_t p = 0; p < at.count; p++)
            finish_sums(op, io, at.pixel + p, s.from, s.to, sums + p * lanes, v, bias);
    }
}

FITS(conv2d__scalar)

static float real_weight(const bnnf__op *op, size_t row, uint32_t c) {
    if (op->weights_dtype == BNNF_DTYPE_F32) return ((const float *)op->weights)[row * op->group_channels + c];
    if (op->weights_dtype == BNNF_DTYPE_I8) return (float)((const int8_t *)op->weights)[row * op->group_channels + c];
    return ((const uint64_t *)op->weights)[row * op->group_words + c / 64] >> c % 64 & 1 ? -1.0f : 1.0f;
}

PACKS(conv2d__scalar);
PACKS(conv2d__scalar) {
    const size_t taps = (size_t)op->record.kernel_h * op->record.kernel_w;
    const size_t size = bytes_of(packed_values(op) * sizeof(float));
    float *to = memory;
    op->scratch_bytes = SPAN * (size_t)op->epilogue.lanes * sizeof(float);
    if (!memory) return size;
    memset(to, 0, size);
    for (size_t o = 0; o < op->outputs; o++)
        for (size_t t = 0; t < taps; t++)
            for (uint32_t c = 0; c < op->group_channels; c++)
                to[packed_at(op, o, t * op->group_channels + c)] = real_weight(op, o * taps + t, c);
    return size;
}

/* The terms of one tap for a block of outputs; x: the channels of the first output's group in the input's pixel, lane k
   has its own ahead[k] channels behind them; NULL on the padding. */
static void add_tap(const bnnf__op *op, const float *x, const uint32_t *ahead, const float *w, float *v) {
    const float pad = (float)op->record.pad_value;
    const int one_group = ahead[LANES - 1] == 0;
    for (uint32_t c = 0; c < op->group_channels; c++, w += LANES) {
        if (!x || one_group) {
            const float value = x ? x[c] : pad;
            for (uint32_t k = 0; k < LANES; k++) v[k] = v[k] + value * w[k];
        } else {
            for (uint32_t k = 0; k < LANES; k++) v[k] = v[k] + x[ahead[k] + c] * w[k];
        }
    }
}

/* Sums of a block of outputs, from output o on, at pixel p of a span. Why taps on a padding of 0 are left out: they add
   a zero to a sum that starts as +0 and so is never -0. */
static void sum_floats(const bnnf__op *op, const bnnf__io *io, const span *at, uint32_t p, uint32_t o, float *to) {
    const struct bnnf_op_record *r = &op->record;
    const bnnf__band *rows = at->rows, *columns = at->columns;
    const int all = r->pad_value != 0;
    const uint32_t group = o / op->group_outputs;
    const float *block = (const float *)op->packed + packed_at(op, o, 0);
    uint32_t ahead[LANES];
    float v[LANES] = {0};
    for (uint32_t k = 0; k < LANES; k++) {
        const uint32_t output = (uint32_t)least(o + k, op->outputs - 1);
        ahead[k] = (output / op->group_outputs - group) * op->group_channels;
    }
    for (uint32_t i = all ? 0 : rows->first; i < (all ? r->kernel_h : rows->behind); i++)
        for (uint32_t j = all ? 0 : columns->first; j < (all ? r->kernel_w : columns->behind); j++) {
            const float *x = NULL;
            if (i >= rows->first && i < rows->behind && j >= columns->first && j < columns->behind)
                x = (const float *)io->input + (seen(op, at, i, j) + (size_t)p * r->stride_w) * op->channels +
                    (size_t)group * op->group_channels;
            add_tap(op, x, ahead, block + ((size_t)i * r->kernel_w + j) * op->group_channels * LANES, v);
        }
    memcpy(to, v, sizeof v);
}

RUNS(conv2d__scalar);
RUNS(conv2d__scalar) {
    const size_t lanes = op->epilogue.lanes;
    float *v = io->scratch;
    share s = share_of(op, io);
    span at = {0};
    while (next_span(op, &s, &at, SPAN)) {
        for (uint32_t o = s.from; o < s.to; o += LANES)
            for (uint32_t p = 0; p < at.count; p++) sum_floats(op, io, &at, p, o, v + p * lanes + (o - s.from));
        for (uint32_t p = 0; p < at.count; p++)
            finish(op, io, at.pixel + p, s.from, s.to, v + p * lanes, op->epilogue.bias);
    }
}

/* -- poolings */

FITS(max_pool2d__scalar)
PACKS_NOTHING(max_pool2d__scalar, 0)

/* Of signs: +1 where any of the window is. */
static void pool_bits(const bnnf__op *op, const bnnf__io *io, const span *at, size_t from, size_t to) {
    uint64_t *v = io->bits + at->pixel * op->out_words;
    for (size_t k = from; k < to; k++) v[k] = ~UINT64_C(0);
    for (uint32_t i = at->rows->first; i < at->rows->behind; i++)
        for (uint32_t j = at->columns->first; j < at->columns->behind; j++) {
            const uint64_t *x = (const uint64_t *)io->input + seen(op, at, i, j) * op->words;
            for (size_t k = from; k < to; k++) v[k] &= x[k];
        }
}

/* Why -infinity first where the first tap is outside: a NaN behind it is not larger, and must not win. */
RUNS(max_pool2d__scalar);
RUNS(max_pool2d__scalar) {
    share s = share_of(op, io);
    span at = {0};
    while (next_span(op, &s, &at, 1)) {
        if (io->bits) {
            pool_bits(op, io, &at, s.from / 64, (s.to + 63) / 64);
            continue;
        }
        float *v = io->real + at.pixel * op->outputs;
        int started = at.rows->first == 0 && at.columns->first == 0;
        for (uint32_t c = s.from; c < s.to && !started; c++) v[c] = -INFINITY;
        for (uint32_t i = at.rows->first; i < at.rows->behind; i++)
            for (uint32_t j = at.columns->first; j < at.columns->behind; j++) {
                const float *x = (const float *)io->input + seen(op, &at, i, j) * op->channels;
                if (started && i + j == 0) memcpy(v + s.from, x + s.from, (s.to - s.from) * sizeof *v);
                else for (uint32_t c = s.from; c < s.to; c++) v[c] = x[c] > v[c] ? x[c] : v[c];
            }
    }
}

FITS(avg_pool2d__scalar)
PACKS_NOTHING(avg_pool2d__scalar, 0)

RUNS(avg_pool2d__scalar);
RUNS(avg_pool2d__scalar) {
    share s = share_of(op, io);
    span at = {0};
    while (next_span(op, &s, &at, 1)) {
        const bnnf__band *rows = at.rows, *columns = at.columns;
        const float count = (float)((rows->behind - rows->first) * (columns->behind - columns->first));
        float *v = io->real + at.pixel * op->outputs;
        for (uint32_t c = s.from; c < s.to; c++) v[c] = 0;
        for (uint32_t i = rows->first; i < rows->behind; i++)
            for (uint32_t j = columns->first; j < columns->behind; j++) {
                const float *x = (const float *)io->input + seen(op, &at, i, j) * op->channels;
                for (uint32_t c = s.from; c < s.to; c++) v[c] = v[c] + x[c];
            }
        for (uint32_t c = s.from; c < s.to; c++) v[c] = v[c] / count;
    }
}

/* -- norms */

/* Sums over all positions of up to LANES channels from x on: of their values, or, where there is a `mean`, of the
   squares of their distance from it; that and `to` have LANES floats. */
static void sum_channels(const bnnf__op *op, const float *x, uint32_t lanes, const float *mean, float *to) {
    float total[LANES] = {0}, last[LANES] = {0};
    for (uint32_t i = 0; i < op->height; i++) {
        float sums[LANES] = {0};
        for (uint32_t j = 0; j < op->width; j++, x += op->channels) {
            const float *values = x;
            if (lanes < LANES) values = memcpy(last, x, lanes * sizeof *x);
            if (!mean) {
                for (uint32_t k = 0; k < LANES; k++) sums[k] = sums[k] + values[k];
            } else {
                for (uint32_t k = 0; k < LANES; k++) {
                    const float d = values[k] - mean[k];
                    sums[k] = sums[k] + d * d;
                }
            }
        }
        for (uint32_t k = 0; k < LANES; k++) total[k] = total[k] + sums[k];
    }
    memcpy(to, total, sizeof total);
}

/* The same of the channels from..behind, added up in each group and divided by how many values they are of: stored at
   every channel of the group, the first channel being to[0]. */
static void group_means(const bnnf__op *op, const bnnf__io *io, uint32_t from, uint32_t behind, const float *mean,
                        float *to) {
    const float count = (float)((uint64_t)op->height * op->width * op->group_channels);
    for (uint32_t c = from; c < behind; c += LANES)
        sum_channels(op, (const float *)io->input + c, (uint32_t)least(LANES, behind - c),
                     mean ? mean + (c - from) : NULL, to + (c - from));
    for (float *group = to; group < to + (behind - from); group += op->group_channels) {
        float sum = 0;
        for (uint32_t k = 0; k < op->group_channels; k++) sum = sum + group[k];
        sum = sum / count;
        for (uint32_t k = 0; k < op->group_channels; k++) group[k] = sum;
    }
}

bnnf__statistics bnnf__norm_statistics(const bnnf__op *op, const bnnf__io *io) {
    const size_t lanes = op->epilogue.lanes;
    const float *eps = op->weights;
    bnnf__statistics s = {.mean = io->scratch};
    size_t together = op->group_channels, first, behind;
    while (together % 64) together += op->group_channels;
    bnnf__share((op->channels + together - 1) / together, io->part, io->parts, &first, &behind);
    s.from = (uint32_t)least(first * together, op->channels);
    s.to = (uint32_t)least(behind * together, op->channels);
    s.factor = s.mean + lanes;
    if (s.from == s.to) return s;
    memset(s.mean, 0, lanes * sizeof *s.mean);
    if (op->record.code == BNNF_OP_GROUP_NORM) group_means(op, io, s.from, s.to, NULL, s.mean);
    group_means(op, io, s.from, s.to, s.mean, s.factor);
    for (uint32_t c = s.from; c < s.to; c++)
        s.factor[c - s.from] = 1.0f / sqrtf(s.factor[c - s.from] + eps[c / op->group_channels]);
    return s;
}

FITS(group_norm__scalar)
PACKS_NOTHING(group_norm__scalar, BNNF__STATISTICS_BYTES(op) + (size_t)op->outputs * sizeof(float))

RUNS(group_norm__scalar);
RUNS(group_norm__scalar) {
    const bnnf__statistics s = bnnf__norm_statistics(op, io);
    const size_t pixels = (size_t)op->height * op->width;
    const float *x = (const float *)io->input + s.from;
    float *v = s.factor + op->epilogue.lanes;
    for (size_t pixel = 0; s.from < s.to && pixel < pixels; pixel++, x += op->channels) {
        for (uint32_t c = 0; c < s.to - s.from; c++) v[c] = (x[c] - s.mean[c]) * s.factor[c];
        finish(op, io, pixel, s.from, s.to, v, op->epilogue.bias);
    }
}

FITS(rms_norm__scalar)
PACKS(rms_norm__scalar);
PACKS(rms_norm__scalar) { return bnnf_group_norm__scalar_pack(op, memory); }
RUNS(rms_norm__scalar);
RUNS(rms_norm__scalar) { bnnf_group_norm__scalar_run(op, io); }
