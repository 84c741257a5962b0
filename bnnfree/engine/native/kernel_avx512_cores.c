/* The inner loops of the AVX-512 convolutions: a tile of some pixels times 16 or 32 outputs, the sums in registers.

   They are assembly because they use all 32 registers, where compilers spill. A tile's pixels are reached from two
   pointers, to its first pixel and its eighth, and three strides: pixels 0, 1, 2, 4 by s, 3 and 6 by 3s, 5 by 5s. That
   takes few registers and leaves the distance of two pixels free.

   Counting differing signs costs 10 instructions per 4 words of 32 signs and 16 outputs, where xor, vpopcntd and add
   cost 12. With d(k) the xor of word k of a pixel and of an output, P(k) = d(1) ^ ... ^ d(k) is one vpxord, as window
   and weights hold such sums already. P(k), d(k+1) and d(k+2) are as much as their xor, P(k+2), once and their majority
   twice; the majority is one vpternlogd of P(k), P(k+1) and P(k+2). So two words take 2 vpxord, 1 vpternlogd,
   1 vpopcntd and 1 vpaddd, and what is left in the end, P of all words, is counted once. */

#include "kernel_avx512.h"

#ifdef BNNF__X86
#include <immintrin.h>

#define BASE "avx512f,avx512bw,avx512vl,avx512dq"
#define POPCOUNT BASE ",avx512vpopcntdq"
#define VNNI BASE ",avx512vnni"

/* %[n] and %[m] are how often two loops run. */
#define CORE(name, isa, n_steps, m_steps, code)                                                                       \
    static __attribute__((noinline, target(isa))) void name(const void *window, size_t stride, const void *weights,   \
                                                            size_t ahead, size_t steps, void *sums) {                 \
        const char *eighth = (const char *)window + 7 * stride;                                                       \
        size_t n = n_steps, m = m_steps;                                                                              \
        __asm__ volatile(code                                                                                         \
                         : [a] "+r"(window), [b] "+r"(eighth), [w] "+r"(weights), [n] "+r"(n), [m] "+r"(m)            \
                         : [s] "r"(stride), [t] "r"(3 * stride), [f] "r"(5 * stride), [h] "r"(ahead), [o] "r"(sums)   \
                         : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",    \
                           "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",   \
                           "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",  \
                           "xmm29", "xmm30", "xmm31");                                                                \
    }

/* TILE<n>(M) is M for each of n pixels: its number p, which is its register, too; two more, p + 14 and, of the first
   seven, p + 7; its address. */
#define TILE1(M) M(0, 14, 7, "(%[a])")
#define TILE2(M) TILE1(M) M(1, 15, 8, "(%[a],%[s])")
#define TILE3(M) TILE2(M) M(2, 16, 9, "(%[a],%[s],2)")
#define TILE4(M) TILE3(M) M(3, 17, 10, "(%[a],%[t])")
#define TILE5(M) TILE4(M) M(4, 18, 11, "(%[a],%[s],4)")
#define TILE6(M) TILE5(M) M(5, 19, 12, "(%[a],%[f])")
#define TILE7(M) TILE6(M) M(6, 20, 13, "(%[a],%[t],2)")
#define TILE8(M) TILE7(M) M(7, 21, _, "(%[b])")
#define TILE9(M) TILE8(M) M(8, 22, _, "(%[b],%[s])")
#define TILE10(M) TILE9(M) M(9, 23, _, "(%[b],%[s],2)")
#define TILE11(M) TILE10(M) M(10, 24, _, "(%[b],%[t])")
#define TILE12(M) TILE11(M) M(11, 25, _, "(%[b],%[s],4)")
#define TILE13(M) TILE12(M) M(12, 26, _, "(%[b],%[f])")
#define TILE14(M) TILE13(M) M(13, 27, _, "(%[b],%[t],2)")

#define ZERO(z) "vpxord %%zmm" #z ", %%zmm" #z ", %%zmm" #z "\n\t"
#define FETCH(at) "prefetcht0 " #at "(%[w],%[h])\n\t"
#define ADVANCE(window_bytes, weight_bytes)    \
    "add $" #window_bytes ", %[a]\n\t"         \
    "add $" #window_bytes ", %[b]\n\t"         \
    "add $" #weight_bytes ", %[w]\n\t"
#define STORE_SUM(p, q, r, x) "vmovdqu32 %%zmm" #p ", 64*" #p "(%[o])\n\t"

/* -- signs: the count in register p, P in p + 14, weights in 27 to 30. 0x5c: the majority of P(k), P(k) ^ P(k+1) and
   P(k+1) ^ P(k+2), where the operands are P(k+2), P(k), P(k+1), the last the destination. */

#define XOR(x, w, z) "vpxord " x "%{1to16%}, %%zmm" #w ", %%zmm" #z "\n\t"
#define MAJORITY(after, before, z) "vpternlogd $0x5c, %%zmm" #after ", %%zmm" #before ", %%zmm" #z "\n\t"
#define COUNT(z, p) "vpopcntd %%zmm" #z ", %%zmm" #z "\n\tvpsubd %%zmm" #z ", %%zmm" #p ", %%zmm" #p "\n\t"

#define INIT_BINARY(p, q, r, x) ZERO(p) "vmovdqu32 -64(%[w]), %%zmm" #q "\n\t"
#define STEPS_BINARY(p, q, r, x) \
    XOR(x, 27, 31) XOR("4" x, 28, 13) MAJORITY(13, q, 31) COUNT(31, p) \
    XOR("12" x, 30, q) XOR("8" x, 29, 31) MAJORITY(q, 13, 31) COUNT(31, p)
#define STEP_BINARY(p, q, r, x) \
    XOR(x, 27, 31) XOR("4" x, 28, 13) MAJORITY(13, q, 31) COUNT(31, p) "vmovdqa32 %%zmm13, %%zmm" #q "\n\t"
#define DOUBLE(z) "vpaddd %%zmm" #z ", %%zmm" #z ", %%zmm" #z "\n\t"
#define FINISH_BINARY(p, q, r, x) DOUBLE(p) COUNT(q, p) DOUBLE(p) STORE_SUM(p, q, r, x)

#define BINARY_CODE(tile)                      \
    tile(INIT_BINARY)                          \
    "test %[n], %[n]\n\t"                      \
    "jz 2f\n\t"                                \
    ".p2align 5\n"                             \
    "1:\n\t"                                   \
    "vmovdqu32 (%[w]), %%zmm27\n\t"            \
    "vmovdqu32 64(%[w]), %%zmm28\n\t"          \
    "vmovdqu32 128(%[w]), %%zmm29\n\t"         \
    "vmovdqu32 192(%[w]), %%zmm30\n\t"         \
    FETCH(0) FETCH(64) FETCH(128) FETCH(192)   \
    tile(STEPS_BINARY)                         \
    ADVANCE(16, 256)                           \
    "dec %[n]\n\t"                             \
    "jnz 1b\n"                                 \
    "2:\n\t"                                   \
    "test %[m], %[m]\n\t"                      \
    "jz 3f\n\t"                                \
    "vmovdqu32 (%[w]), %%zmm27\n\t"            \
    "vmovdqu32 64(%[w]), %%zmm28\n\t"          \
    tile(STEP_BINARY)                          \
    "3:\n\t"                                   \
    tile(FINISH_BINARY)

/* -- signs as they lie: xor, vpopcntd, vpsubd, for all pixels one after the other. The sum in register p, weights in
   28. */

#define INIT_ROW(p, q, r, x) "mov 8*" #p "(%[z]), %[n]\n\tvmovdqu32 (%[n],%[i]), %%zmm" #p "\n\t"
#define XOR_ROW(p, q, r, x) XOR(x, 28, q)
#define POPCOUNT_ROW(p, q, r, x) "vpopcntd %%zmm" #q ", %%zmm" #q "\n\t"
#define SUBTRACT_ROW(p, q, r, x) "vpsubd %%zmm" #q ", %%zmm" #p ", %%zmm" #p "\n\t"

#define ROWS_CODE(tile)                                 \
    tile(INIT_ROW)                                      \
    "test %[m], %[m]\n\t"                               \
    "jz 3f\n"                                           \
    "1:\n\t"                                            \
    "mov %[c], %[n]\n\t"                                \
    ".p2align 5\n"                                      \
    "2:\n\t"                                            \
    "vmovdqu32 (%[w]), %%zmm28\n\t"                     \
    tile(XOR_ROW) tile(POPCOUNT_ROW) tile(SUBTRACT_ROW) \
    ADVANCE(4, 64)                                      \
    "dec %[n]\n\t"                                      \
    "jnz 2b\n\t"                                        \
    "add %[g], %[a]\n\t"                                \
    "add %[g], %[b]\n\t"                                \
    "dec %[m]\n\t"                                      \
    "jnz 1b\n"                                          \
    "3:\n\t"                                            \
    tile(STORE_SUM)

#define ROWS_CORE(n_pixels)                                                                                           \
    static __attribute__((noinline, target(POPCOUNT))) void rows##n_pixels(                                           \
        const void *window, size_t stride, const void *weights, size_t rows, size_t steps, size_t pitch,              \
        const void *const *starts, size_t offset, void *sums) {                                                       \
        const char *eighth = (const char *)window + 7 * stride;                                                       \
        size_t n;                                                                                                     \
        __asm__ volatile(ROWS_CODE(TILE##n_pixels)                                                                    \
                         : [a] "+r"(window), [b] "+r"(eighth), [w] "+r"(weights), [m] "+r"(rows), [n] "=&r"(n)        \
                         : [s] "r"(stride), [t] "r"(3 * stride), [f] "r"(5 * stride), [o] "r"(sums), [c] "r"(steps),  \
                           [g] "r"(pitch - 4 * steps), [z] "r"(starts), [i] "r"(offset)                               \
                         : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",    \
                           "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",   \
                           "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",  \
                           "xmm29", "xmm30", "xmm31");                                                                \
    }

/* -- sums of products, for two panels: the second one's in register p + 14, weights in 28 and 29, the pixel's in 30. A
   load takes as long as a product: two panels share it. */

#define INIT_SUMS(p, q, r, x) ZERO(p) ZERO(q)
#define STORE_SUMS(p, q, r, x) STORE_SUM(p, q, r, x) "vmovdqu32 %%zmm" #q ", 64*" #p "+64*6(%[o])\n\t"
#define BROADCAST(x) "vpbroadcastd " x ", %%zmm30\n\t"
#define DOT(w, p) "vpdpbusd %%zmm" #w ", %%zmm30, %%zmm" #p "\n\t"
#define PAIR(w, p) "vpmaddwd %%zmm" #w ", %%zmm30, %%zmm31\n\tvpaddd %%zmm31, %%zmm" #p ", %%zmm" #p "\n\t"
#define REAL(w, p) "vmulps %%zmm" #w ", %%zmm30, %%zmm31\n\tvaddps %%zmm31, %%zmm" #p ", %%zmm" #p "\n\t"
#define STEP_DOT(p, q, r, x) BROADCAST(x) DOT(28, p) DOT(29, q)
#define STEP_PAIR(p, q, r, x) BROADCAST(x) PAIR(28, p) PAIR(29, q)
#define STEP_REAL(p, q, r, x) BROADCAST(x) REAL(28, p) REAL(29, q)

#define SUM_CODE(tile, step)                 \
    tile(INIT_SUMS)                          \
    ".p2align 5\n"                           \
    "1:\n\t"                                 \
    "vmovdqu32 (%[w]), %%zmm28\n\t"          \
    "vmovdqu32 64(%[w]), %%zmm29\n\t"        \
    tile(step)                               \
    ADVANCE(4, 128)                          \
    "dec %[n]\n\t"                           \
    "jnz 1b\n\t"                             \
    tile(STORE_SUMS)

#define BINARY_CORE(n) CORE(binary##n, POPCOUNT, steps / 2, steps % 2, BINARY_CODE(TILE##n))
#define SUM_CORES(n)                                              \
    CORE(dot##n, VNNI, steps, 0, SUM_CODE(TILE##n, STEP_DOT))     \
    CORE(pair##n, BASE, steps, 0, SUM_CODE(TILE##n, STEP_PAIR))   \
    CORE(real##n, BASE, steps, 0, SUM_CODE(TILE##n, STEP_REAL))
#define UP_TO_6(M) M(1) M(2) M(3) M(4) M(5) M(6)
#define UP_TO_7(M) UP_TO_6(M) M(7)
#define UP_TO_12(M) UP_TO_7(M) M(8) M(9) M(10) M(11) M(12)
UP_TO_12(BINARY_CORE)
UP_TO_12(ROWS_CORE) ROWS_CORE(13) ROWS_CORE(14)
UP_TO_6(SUM_CORES)

#define TABLE_OF_6(x) NULL, x##1, x##2, x##3, x##4, x##5, x##6
const bnnf__core bnnf__binary_cores[BNNF__BINARY_TILE + 1] = {
    TABLE_OF_6(binary), binary7, binary8, binary9, binary10, binary11, binary12};
const bnnf__rows_core bnnf__rows_cores[BNNF__ROWS_TILE + 1] = {
    TABLE_OF_6(rows), rows7, rows8, rows9, rows10, rows11, rows12, rows13, rows14};
const bnnf__core bnnf__dot_cores[BNNF__SUM_TILE + 1] = {TABLE_OF_6(dot)};
const bnnf__core bnnf__pair_cores[BNNF__SUM_TILE + 1] = {TABLE_OF_6(pair)};
const bnnf__core bnnf__real_cores[BNNF__SUM_TILE + 1] = {TABLE_OF_6(real)};

/* -- signs without vpopcntd. Two majorities go through a full adder of their own, and what is worth four is counted in
   bytes, a half at a time, by table. Bytes of fours in register p, P in p + 14, what is worth two in p + 7; the table
   in 21, the mask in 22, weights in 23 to 26. A byte grows by 8 at most in two steps, so that after LONGEST steps the
   bytes have to be added up. */

#define LONGEST 62

typedef struct {
    __m512i table, mask;
    struct {
        __m512i fours, twos, odd;
    } pixel[BNNF__TABLE_TILE];
} table_state;

#define INIT_TABLE(p, q, r, x) ZERO(p) ZERO(r) "vmovdqu32 192*" #p "+256(%[o]), %%zmm" #q "\n\t"
#define STEPS_TABLE(p, q, r, x)                                 \
    XOR(x, 23, 27) XOR("4" x, 24, 28) MAJORITY(28, q, 27)       \
    XOR("12" x, 26, q) XOR("8" x, 25, 29) MAJORITY(q, 28, 29)   \
    "vmovdqa32 %%zmm" #r ", %%zmm28\n\t"                        \
    "vpternlogd $0x96, %%zmm27, %%zmm29, %%zmm" #r "\n\t"       \
    "vpternlogd $0xd4, %%zmm" #r ", %%zmm28, %%zmm27\n\t"       \
    "vpsrlw $4, %%zmm27, %%zmm28\n\t"                           \
    "vpandd %%zmm27, %%zmm22, %%zmm27\n\t"                      \
    "vpandd %%zmm28, %%zmm22, %%zmm28\n\t"                      \
    "vpshufb %%zmm27, %%zmm21, %%zmm27\n\t"                     \
    "vpshufb %%zmm28, %%zmm21, %%zmm28\n\t"                     \
    "vpaddb %%zmm27, %%zmm" #p ", %%zmm" #p "\n\t"              \
    "vpaddb %%zmm28, %%zmm" #p ", %%zmm" #p "\n\t"
#define FINISH_TABLE(p, q, r, x)                                \
    "vmovdqu32 %%zmm" #p ", 192*" #p "+128(%[o])\n\t"           \
    "vmovdqu32 %%zmm" #r ", 192*" #p "+192(%[o])\n\t"           \
    "vmovdqu32 %%zmm" #q ", 192*" #p "+256(%[o])\n\t"
#define TABLE_CODE(tile)                     \
    "vmovdqu32 (%[o]), %%zmm21\n\t"          \
    "vmovdqu32 64(%[o]), %%zmm22\n\t"        \
    tile(INIT_TABLE)                         \
    ".p2align 5\n"                           \
    "1:\n\t"                                 \
    "vmovdqu32 (%[w]), %%zmm23\n\t"          \
    "vmovdqu32 64(%[w]), %%zmm24\n\t"        \
    "vmovdqu32 128(%[w]), %%zmm25\n\t"       \
    "vmovdqu32 192(%[w]), %%zmm26\n\t"       \
    tile(STEPS_TABLE)                        \
    ADVANCE(16, 256)                         \
    "dec %[n]\n\t"                           \
    "jnz 1b\n\t"                             \
    tile(FINISH_TABLE)

#define TABLE_STEPS(n) CORE(table_steps##n, BASE, steps / 2, 0, TABLE_CODE(TILE##n))
UP_TO_7(TABLE_STEPS)
static const bnnf__core table_steps[BNNF__TABLE_TILE + 1] = {TABLE_OF_6(table_steps), table_steps7};

#define WITH_AVX512 __attribute__((target(BASE)))

/* Sums of the bits of each 32: of bytes, and of words by the table. */
static inline WITH_AVX512 __m512i widen(__m512i bytes) {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
}

static inline WITH_AVX512 __m512i bits_of(const table_state *s, __m512i v) {
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), s->mask);
    return widen(_mm512_add_epi8(_mm512_shuffle_epi8(s->table, _mm512_and_si512(v, s->mask)),
                                 _mm512_shuffle_epi8(s->table, high)));
}

static WITH_AVX512 void table_sums(size_t pixels, const char *window, size_t stride, const char *weights, size_t steps,
                                   int32_t (*sums)[BNNF__LANES]) {
    table_state s;
    s.table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    s.mask = _mm512_set1_epi8(15);
    for (size_t i = 0; i < pixels; i++) {
        s.pixel[i].odd = _mm512_loadu_si512(weights - 64);
        _mm512_storeu_si512(sums[i], _mm512_setzero_si512());
    }
    while (steps > 1) {
        const size_t now = steps < LONGEST ? steps / 2 * 2 : LONGEST;
        table_steps[pixels](window, stride, weights, 0, now, &s);
        window += now * 8, weights += now * 128, steps -= now;
        for (size_t i = 0; i < pixels; i++) {
            const __m512i twos = _mm512_slli_epi32(bits_of(&s, s.pixel[i].twos), 1);
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(widen(s.pixel[i].fours), 2), twos);
            _mm512_storeu_si512(sums[i], _mm512_add_epi32(sum, _mm512_loadu_si512(sums[i])));
        }
    }
    for (size_t i = 0; i < pixels; i++) {
        __m512i p = s.pixel[i].odd, sum = _mm512_add_epi32(bits_of(&s, p), _mm512_loadu_si512(sums[i]));
        for (size_t k = 0; k < 2 * steps; k++) { /* the last of an odd number */
            int32_t x;
            __builtin_memcpy(&x, window + i * stride + 4 * k, sizeof x);
            const __m512i next = _mm512_xor_si512(_mm512_set1_epi32(x), _mm512_loadu_si512(weights + 64 * k));
            sum = _mm512_add_epi32(sum, bits_of(&s, _mm512_xor_si512(p, next)));
            p = next;
        }
        _mm512_storeu_si512(sums[i], _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(sum, sum)));
    }
}

#define TABLE_CORE(n)                                                                                        \
    static void table##n(const void *window, size_t stride, const void *weights, size_t ahead, size_t steps, \
                         void *sums) {                                                                       \
        (void)ahead;                                                                                         \
        table_sums(n, window, stride, weights, steps, sums);                                                 \
    }
UP_TO_7(TABLE_CORE)
const bnnf__core bnnf__table_cores[BNNF__TABLE_TILE + 1] = {TABLE_OF_6(table), table7};

/* -- one pixel, four panels: so many sums hide the latency of an addition */

#define ADD_PRODUCTS(load, lanes)                                        \
    a = _mm512_add_ps(a, _mm512_mul_ps(v, load(w)));                     \
    b = _mm512_add_ps(b, _mm512_mul_ps(v, load(w + (lanes))));           \
    c = _mm512_add_ps(c, _mm512_mul_ps(v, load(w + 2 * (lanes))));       \
    d = _mm512_add_ps(d, _mm512_mul_ps(v, load(w + 3 * (lanes))))

#define WIDE_CORE(name, type, load)                                                                             \
    static WITH_AVX512 void name(const void *window, size_t stride, const void *weights, size_t ahead,          \
                                 size_t steps, void *sums) {                                                    \
        const float *x = window;                                                                                \
        const type *w = weights;                                                                                \
        float *to = sums;                                                                                       \
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;                                                    \
        (void)stride;                                                                                           \
        for (size_t i = 0; i < steps; i++, w += 64) {                                                           \
            const __m512 v = _mm512_set1_ps(x[i]);                                                              \
            _mm_prefetch((const char *)w + ahead, _MM_HINT_T0);                                                 \
            ADD_PRODUCTS(load, 16);                                                                             \
        }                                                                                                       \
        _mm512_storeu_ps(to, a), _mm512_storeu_ps(to + 16, b), _mm512_storeu_ps(to + 32, c);                    \
        _mm512_storeu_ps(to + 48, d);                                                                           \
    }

static inline WITH_AVX512 __m512 whole_weights(const int8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}

WIDE_CORE(wide_real, float, _mm512_loadu_ps)
WIDE_CORE(wide_whole, int8_t, whole_weights)
const bnnf__core bnnf__wide_real_cores[2] = {NULL, wide_real}, bnnf__wide_whole_cores[2] = {NULL, wide_whole};

#endif
