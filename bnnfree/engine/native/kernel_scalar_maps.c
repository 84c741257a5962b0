/* Kernels in plain C of functions of single values, and of ops that move, repeat or reduce the values of maps. */

#include <math.h>
#include <string.h>

#include "scalar.h"

/* -- function and softmax */

/* e to the x, as FORMAT.md says it; 2^n is a normal number, and the product is rounded once. */
static float exponential(float x) {
    static const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    if (x < -87.0f) x = -87.0f;
    if (x > 88.0f) x = 88.0f;
    const float n = rintf(x * 1.44269504f);
    float z = x - n * 0.693359375f;
    z = z - n * -0.000212194440f;
    float y = 1.0f / 5040, power;
    for (int i = 0; i < 7; i++) y = y * z + factors[i];
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

static float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static float hyperbolic_tangent(float x) {
    const float t = exponential(-2.0f * fabsf(x));
    return copysignf((1.0f - t) / (1.0f + t), x);
}

static float error_function(float x) {
    static const float factors[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    const float size = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * size);
    float y = 1.061405429f;
    for (int i = 0; i < 4; i++) y = y * t + factors[i];
    const float tail = y * t * exponential(-(size * size));
    return copysignf(1.0f - tail, x);
}

static float gelu(float x) { return x * (0.5f * (1.0f + error_function(x * 0.70710678f))); }

static float gelu_tanh(float x) {
    const float cube = x * x * x;
    return x * sigmoid(1.5957691f * (x + 0.044715f * cube));
}

static float silu(float x) { return x * sigmoid(x); }

static float elu(float x) { return x > 0 ? x : exponential(x) - 1.0f; }

static float reciprocal(float x) { return 1.0f / x; }

/* In the order of the modes of BNNF_OP_FUNCTION. */
static float (*const functions[])(float) = {sigmoid, hyperbolic_tangent, gelu, gelu_tanh, silu, elu, exponential,
                                            sqrtf, reciprocal};

FITS(function__scalar)
PACKS_NOTHING(function__scalar, (size_t)op->outputs * sizeof(float))

RUNS(function__scalar);
RUNS(function__scalar) {
    float (*const f)(float) = functions[op->record.mode];
    share s = share_of(op, io);
    float *v = io->scratch;
    const uint32_t n = s.to - s.from;
    for (; n && s.pixel < s.last; s.pixel++) {
        const float *x = (const float *)io->input + s.pixel * op->channels + s.from;
        for (uint32_t c = 0; c < n; c++) v[c] = isnan(x[c]) ? NAN : f(x[c]);
        finish(op, io, s.pixel, s.from, s.to, v, op->epilogue.bias);
    }
}

FITS(softmax__scalar)
PACKS_NOTHING(softmax__scalar, 0)

static void softmax(const float *x, float *to, uint32_t channels) {
    float most = x[0], sum = 0;
    int broken = 0;
    for (uint32_t c = 0; c < channels; c++) {
        broken |= isnan(x[c]) || x[c] == INFINITY;
        if (x[c] > most) most = x[c];
    }
    broken |= most == -INFINITY;
    for (uint32_t c = 0; c < channels && !broken; c++) {
        to[c] = exponential(x[c] - most);
        sum = sum + to[c];
    }
    for (uint32_t c = 0; c < channels; c++) to[c] = broken ? NAN : to[c] / sum;
}

RUNS(softmax__scalar);
RUNS(softmax__scalar) {
    size_t pixel, last;
    bnnf__share((size_t)op->height * op->width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++)
        softmax((const float *)io->input + pixel * op->channels, io->real + pixel * op->outputs, op->channels);
}

/* -- over channels */

FITS(channel_norm__scalar)
PACKS_NOTHING(channel_norm__scalar, (size_t)op->outputs * sizeof(float))

/* Mean over all channels of x, or with `mean` of their squared distances from it. */
static float mean_of(const float *x, uint32_t channels, const float *mean) {
    float sum = 0;
    for (uint32_t c = 0; c < channels; c++) {
        const float d = mean ? x[c] - *mean : x[c];
        sum = sum + (mean ? d * d : d);
    }
    return sum / (float)channels;
}

RUNS(channel_norm__scalar);
RUNS(channel_norm__scalar) {
    const float eps = *(const float *)op->weights;
    share s = share_of(op, io);
    float *v = io->scratch;
    const uint32_t n = s.to - s.from;
    for (; n && s.pixel < s.last; s.pixel++) {
        const float *x = (const float *)io->input + s.pixel * op->channels;
        const float mean = op->record.mode ? 0.0f : mean_of(x, op->channels, NULL);
        const float factor = 1.0f / sqrtf(mean_of(x, op->channels, &mean) + eps);
        for (uint32_t c = 0; c < n; c++) v[c] = (x[s.from + c] - mean) * factor;
        finish(op, io, s.pixel, s.from, s.to, v, op->epilogue.bias);
    }
}

FITS(reduce_channels__scalar)
PACKS_NOTHING(reduce_channels__scalar, 0)

RUNS(reduce_channels__scalar);
RUNS(reduce_channels__scalar) {
    enum { MEAN, SUM, MAX };
    size_t pixel, last;
    bnnf__share((size_t)op->height * op->width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        const float *x = (const float *)io->input + pixel * op->channels;
        float v = op->record.mode == MAX ? x[0] : 0;
        for (uint32_t c = 0; c < op->channels; c++) {
            if (op->record.mode == MAX) v = x[c] > v ? x[c] : v;
            else v = v + x[c];
        }
        io->real[pixel] = op->record.mode == MEAN ? v / (float)op->channels : v;
    }
}

/* -- moving values: the bytes of a pixel are words of bits or floats */

/* Appends `count` bits to words of which `at` are used; those behind are 0. */
static void append_bits(uint64_t *words, size_t at, const uint64_t *from, size_t count) {
    const size_t shift = at % 64;
    words += at / 64;
    for (size_t k = 0; k < (count + 63) / 64; k++) {
        words[k] |= from[k] << shift;
        if (shift && count - 64 * k > 64 - shift) words[k + 1] |= from[k] >> (64 - shift);
    }
}

FITS(concat__scalar)
PACKS_NOTHING(concat__scalar, 0)

RUNS(concat__scalar);
RUNS(concat__scalar) {
    const uint32_t first = op->channels, second = op->outputs - first;
    size_t pixel, last;
    bnnf__share((size_t)op->height * op->width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        if (io->bits) {
            uint64_t *to = io->bits + pixel * op->out_words;
            const uint64_t *other = (const uint64_t *)(const void *)io->other + pixel * ((second + 63) / 64);
            memset(to, 0, op->out_words * sizeof *to);
            append_bits(to, 0, (const uint64_t *)io->input + pixel * op->words, first);
            append_bits(to, first, other, second);
        } else {
            float *to = io->real + pixel * op->outputs;
            memcpy(to, (const float *)io->input + pixel * first, first * sizeof *to);
            memcpy(to + first, io->other + pixel * second, second * sizeof *to);
        }
    }
}

FITS(take__scalar)
PACKS_NOTHING(take__scalar, 0)

RUNS(take__scalar);
RUNS(take__scalar) {
    const int32_t *index = op->weights;
    size_t pixel, last;
    bnnf__share((size_t)op->height * op->width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        if (io->bits) {
            const uint64_t *from = (const uint64_t *)io->input + pixel * op->words;
            uint64_t *to = io->bits + pixel * op->out_words;
            memset(to, 0, op->out_words * sizeof *to);
            for (uint32_t o = 0; o < op->outputs; o++)
                to[o / 64] |= (from[index[o] / 64] >> index[o] % 64 & 1) << o % 64;
        } else {
            const float *from = (const float *)io->input + pixel * op->channels;
            float *to = io->real + pixel * op->outputs;
            for (uint32_t o = 0; o < op->outputs; o++) to[o] = index[o] < 0 ? 0.0f : from[index[o]];
        }
    }
}

static size_t pixel_bytes(const bnnf__op *op) {
    return op->input_dtype == BNNF_DTYPE_BITS ? op->words * sizeof(uint64_t) : op->channels * sizeof(float);
}

static char *result_of(const bnnf__io *io) { return io->bits ? (char *)io->bits : (char *)io->real; }

FITS(crop__scalar)
PACKS_NOTHING(crop__scalar, 0)

RUNS(crop__scalar);
RUNS(crop__scalar) {
    const struct bnnf_op_record *r = &op->record;
    const size_t size = pixel_bytes(op);
    size_t pixel, last;
    bnnf__share((size_t)op->out_height * op->out_width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        const size_t row = r->padding_h + pixel / op->out_width * r->stride_h;
        const size_t column = r->padding_w + pixel % op->out_width * r->stride_w;
        memcpy(result_of(io) + pixel * size, (const char *)io->input + (row * op->width + column) * size, size);
    }
}

FITS(pad__scalar)
PACKS_NOTHING(pad__scalar, 0)

/* In the order of the modes of BNNF_OP_PAD. */
enum { CONSTANT, REFLECT, REPLICATE, CIRCULAR };

/* Row or column of an axis of `size` that stands at `at`; -1 for the value of the padding. */
static int64_t source_of(int64_t at, int64_t size, uint32_t mode) {
    if (at >= 0 && at < size) return at;
    if (mode == REPLICATE) return at < 0 ? 0 : size - 1;
    if (mode == CIRCULAR) return at < 0 ? at + size : at - size;
    if (mode == REFLECT) return at < 0 ? -at : 2 * (size - 1) - at;
    return -1;
}

static void fill_pixel(const bnnf__op *op, char *to) {
    const uint32_t spare = op->channels % 64;
    for (uint32_t c = 0; op->input_dtype == BNNF_DTYPE_F32 && c < op->channels; c++)
        memcpy(to + c * sizeof(float), &(float){(float)op->record.pad_value}, sizeof(float));
    for (uint32_t k = 0; op->input_dtype == BNNF_DTYPE_BITS && k < op->words; k++) {
        uint64_t word = op->record.pad_value < 0 ? ~UINT64_C(0) : 0;
        if (k + 1 == op->words && spare) word &= (UINT64_C(1) << spare) - 1;
        memcpy(to + k * sizeof word, &word, sizeof word);
    }
}

RUNS(pad__scalar);
RUNS(pad__scalar) {
    const struct bnnf_op_record *r = &op->record;
    const size_t size = pixel_bytes(op);
    size_t pixel, last;
    bnnf__share((size_t)op->out_height * op->out_width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        const int64_t row = source_of((int64_t)(pixel / op->out_width) - r->padding_h, op->height, r->mode);
        const int64_t column = source_of((int64_t)(pixel % op->out_width) - r->padding_w, op->width, r->mode);
        char *to = result_of(io) + pixel * size;
        if (row < 0 || column < 0) fill_pixel(op, to);
        else memcpy(to, (const char *)io->input + ((size_t)row * op->width + (size_t)column) * size, size);
    }
}

FITS(pixel_shuffle__scalar)
PACKS_NOTHING(pixel_shuffle__scalar, 0)

RUNS(pixel_shuffle__scalar);
RUNS(pixel_shuffle__scalar) {
    const size_t rows = op->record.stride_h, columns = op->record.stride_w, block = rows * columns;
    size_t pixel, last;
    bnnf__share((size_t)op->out_height * op->out_width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        const size_t row = pixel / op->out_width, column = pixel % op->out_width;
        float *to = io->real + pixel * op->outputs;
        if (op->record.mode) { /* back */
            for (size_t o = 0; o < op->outputs; o++) {
                const size_t place = o % block, y = row * rows + place / columns, x = column * columns + place % columns;
                to[o] = ((const float *)io->input)[(y * op->width + x) * op->channels + o / block];
            }
        } else {
            const size_t from = row / rows * op->width + column / columns, place = row % rows * columns + column % columns;
            const float *values = (const float *)io->input + from * op->channels + place;
            for (size_t o = 0; o < op->outputs; o++) to[o] = values[o * block];
        }
    }
}

FITS(xor__scalar)
PACKS_NOTHING(xor__scalar, 0)

RUNS(xor__scalar);
RUNS(xor__scalar) {
    const uint64_t *a = io->input, *b = (const uint64_t *)(const void *)io->other;
    size_t word, last;
    bnnf__share((size_t)op->height * op->width * op->words, io->part, io->parts, &word, &last);
    for (; word < last; word++) io->bits[word] = a[word] ^ b[word];
}

/* -- resize */

FITS(resize__scalar)
PACKS_NOTHING(resize__scalar, 0)

enum { NEAREST, BILINEAR, CORNERS };

/* Two rows of the input, and the weight of the second. */
typedef struct between {
    size_t first, second;
    float weight;
} between;

static between near_position(size_t r, size_t size, size_t out, uint32_t mode) {
    uint64_t above = (uint64_t)r * size, below = out;
    if (mode == NEAREST) return (between){(size_t)(above / below), (size_t)(above / below), 0};
    if (mode == BILINEAR) {
        above = (2 * (uint64_t)r + 1) * size;
        above = above > out ? above - out : 0;
        below = 2 * (uint64_t)out;
    } else {
        above = (uint64_t)r * (size - 1);
        below = out > 1 ? out - 1 : 1;
    }
    const size_t first = (size_t)(above / below);
    const float weight = (float)(above % below) / (float)below;
    return (between){first, first + 1 < size ? first + 1 : size - 1, weight};
}

RUNS(resize__scalar);
RUNS(resize__scalar) {
    const uint32_t mode = op->record.mode;
    size_t pixel, last;
    bnnf__share((size_t)op->out_height * op->out_width, io->part, io->parts, &pixel, &last);
    for (; pixel < last; pixel++) {
        const between down = near_position(pixel / op->out_width, op->height, op->out_height, mode);
        const between across = near_position(pixel % op->out_width, op->width, op->out_width, mode);
        const float *x = io->input;
        const float *a = x + (down.first * op->width + across.first) * op->channels;
        const float *b = x + (down.first * op->width + across.second) * op->channels;
        const float *c = x + (down.second * op->width + across.first) * op->channels;
        const float *d = x + (down.second * op->width + across.second) * op->channels;
        const float left = 1.0f - across.weight, top = 1.0f - down.weight;
        float *to = io->real + pixel * op->outputs;
        if (mode == NEAREST) {
            memcpy(to, a, op->outputs * sizeof *to);
            continue;
        }
        for (uint32_t o = 0; o < op->outputs; o++) {
            const float above = a[o] * left + b[o] * across.weight;
            const float below = c[o] * left + d[o] * across.weight;
            to[o] = above * top + below * down.weight;
        }
    }
}

/* -- conv_transpose2d */

FITS(conv_transpose2d__scalar)
PACKS_NOTHING(conv_transpose2d__scalar, (size_t)op->outputs * sizeof(float))

/* The input position that output position r sees by tap i, or -1. */
static int64_t reached(int64_t r, int64_t i, int64_t size, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t reach = r + padding - i * dilation;
    return reach >= 0 && reach % stride == 0 && reach / stride < size ? reach / stride : -1;
}

RUNS(conv_transpose2d__scalar);
RUNS(conv_transpose2d__scalar) {
    const struct bnnf_op_record *r = &op->record;
    const size_t inner = op->group_channels;
    share s = share_of(op, io);
    float *v = io->scratch;
    const uint32_t n = s.to - s.from;
    for (; n && s.pixel < s.last; s.pixel++) {
        const int64_t row = (int64_t)(s.pixel / op->out_width), column = (int64_t)(s.pixel % op->out_width);
        memset(v, 0, n * sizeof *v);
        for (uint32_t i = 0; i < r->kernel_h; i++) {
            const int64_t y = reached(row, i, op->height, r->stride_h, r->padding_h, r->dilation_h);
            for (uint32_t j = 0; y >= 0 && j < r->kernel_w; j++) {
                const int64_t x = reached(column, j, op->width, r->stride_w, r->padding_w, r->dilation_w);
                if (x < 0) continue;
                const float *pixel = (const float *)io->input + ((size_t)y * op->width + (size_t)x) * op->channels;
                for (uint32_t o = s.from; o < s.to; o++) {
                    const float *values = pixel + o / op->group_outputs * inner;
                    const size_t tap = ((size_t)o * r->kernel_h + i) * r->kernel_w + j;
                    const float *w = (const float *)op->weights + tap * inner;
                    float sum = v[o - s.from];
                    for (size_t c = 0; c < inner; c++) sum = sum + values[c] * w[c];
                    v[o - s.from] = sum;
                }
            }
        }
        finish(op, io, s.pixel, s.from, s.to, v, op->epilogue.bias);
    }
}
