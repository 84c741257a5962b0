/* Runs every pass of bnnfree/nn/fused/native on blocks of memory of exactly the right size, for sanitizers to watch:
   odd sizes, values that are no numbers, every combination of what may be missing. Prints the number of calls. */

#include <stdio.h>
#include <stdlib.h>

#include "fused.c"

static unsigned calls;

/* Bytes of noise: among them, as floats, huge values, denormals, infinities and NaN. */
static void *noise(size_t bytes) {
    unsigned char *block = malloc(bytes);
    static unsigned state = 1;
    for (size_t i = 0; block && i < bytes; i++)
        block[i] = (unsigned char)((state = state * 1103515245 + 12345) >> 16);
    if (!block)
        exit(2);
    return block;
}

#define MAPS(pair, T, S, R)                                                                                            \
    static void maps_##pair(size_t n, size_t pixels, size_t channels) {                                               \
        size_t size = n * pixels * channels;                                                                           \
        T *v = noise(size * sizeof(T)), *g = noise(size * sizeof(T)), *h = noise(size * sizeof(T));                    \
        S *s = noise(size * sizeof(S)), *e = noise(size * sizeof(S));                                                  \
        R *p[5], *windows = noise(n * sizeof(R)), *moments = noise(3 * n * channels * sizeof(R));                      \
        R *take = noise(n * channels * sizeof(R));                                                                     \
        R *counts = noise(n * channels * sizeof(R)), *sums = noise(5 * n * channels * sizeof(R));                      \
        for (int i = 0; i < 5; i++)                                                                                    \
            p[i] = noise(channels * sizeof(R));                                                                        \
        for (int k = 0; k < 4; k++, calls++)                                                                           \
            binarize_##pair(v, s, 0, n, pixels, channels, p[0], p[1], p[2], 2, p[3], k & 1 ? moments : NULL,           \
                            k & 2 ? counts : NULL);                                                                    \
        for (int k = 0; k < 2; k++, calls++)                                                                           \
            residual_##pair(e, k ? v : NULL, h, 0, n, pixels, channels, p[0], p[1], p[2], p[3], p[4]);                 \
        activate_##pair(v, h, 0, n, pixels, channels, p[0], p[1], p[2], 2);                                            \
        calls++;                                                                                                       \
        for (int k = 0; k < 48; k++)                                                                                   \
            if (k & 3)                                                                                                 \
                for (size_t half = n / 2, part = 0; part < 2; part++, calls++)                                         \
                    backward_##pair(v, k & 1 ? g : NULL, k & 2 ? e : NULL, h, part ? half : 0, part ? n : half,        \
                                    pixels, channels, p[0], p[1], p[2], 2, p[3], 1, k & 4 ? windows : NULL,            \
                                    k & 8 ? take : NULL, sums, k / 16);                                                                          \
        for (int i = 0; i < 5; i++)                                                                                    \
            free(p[i]);                                                                                                \
        free(v), free(g), free(h), free(s), free(e), free(windows), free(moments), free(counts), free(sums);           \
        free(take);                                                                                                    \
    }

#define ROWS(pair, T, S, R)                                                                                            \
    static void rows_##pair(size_t rows, size_t width) {                                                               \
        T *w = noise(rows * width * sizeof(T)), *d = noise(rows * width * sizeof(T));                                  \
        S *made = noise(rows * width * sizeof(S)), *raw = noise(rows * width * sizeof(S));                             \
        R *constants = noise(2 * rows * sizeof(R)), *inputs = noise(width * sizeof(R)), *p[4];                         \
        for (int i = 0; i < 4; i++)                                                                                    \
            p[i] = noise(rows * sizeof(R));                                                                            \
        for (int k = 0; k < 64; k++, calls++)                                                                          \
            prepare_##pair(w, made, constants, 0, rows, width, (R)1e-5, k & 1 ? p[0] : NULL, k & 2 ? inputs : NULL,    \
                           k & 4 ? p[1] : NULL, k & 2 ? p[2] : NULL, k & 8, k & 16, k & 32);                           \
        for (int k = 0; k < 8; k++, calls++)                                                                           \
            weight_gradient_##pair(w, raw, d, constants, 0, rows, width, (R)1e-5, p[0], k & 1 ? p[1] : NULL,           \
                                   k & 1 ? inputs : NULL, p[3], k & 2, k & 4);                                         \
        for (int i = 0; i < 4; i++)                                                                                    \
            free(p[i]);                                                                                                \
        free(w), free(d), free(made), free(raw), free(constants), free(inputs);                                        \
    }

MAPS(f64_f64, double, double, double)
MAPS(f32_f32, float, float, float)
MAPS(f32_bf16, float, bf16, float)
MAPS(bf16_bf16, bf16, bf16, float)
ROWS(f64_f64, double, double, double)
ROWS(f32_f32, float, float, float)
ROWS(f32_bf16, float, bf16, float)

int main(void) {
    const size_t sizes[] = {1, 2, 3, 15, 16, 17, 31, 33, 64, 67};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t n = 1; n < 4; n++) {
            maps_f64_f64(n, n * n, sizes[i]);
            maps_f32_f32(n, n * n, sizes[i]);
            maps_f32_bf16(n, n * n, sizes[i]);
            maps_bf16_bf16(n, n * n, sizes[i]);
            rows_f64_f64(n, sizes[i]);
            rows_f32_f32(n, sizes[i]);
            rows_f32_bf16(n, sizes[i]);
        }
    printf("%u\n", calls);
    return 0;
}
