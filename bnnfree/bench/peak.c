/* How many products of signs per second could a CPU take: the instructions that count, on registers, nothing else.
   Not part of the engine: bnnfree/bench/peak.py compiles it and takes the time. */

#include <stdint.h>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define TARGET(name) __attribute__((noinline, target(name)))
/* The compiler must think that x changes, or it would leave the work out. */
#define CHANGES(x) __asm__ volatile("" : "+v"(x))
#endif

#ifdef X86

/* Sums that do not wait for each other, each in a register of its own: why no array and no loop. */
#define TWELVE(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define SIX(F) F(0) F(1) F(2) F(3) F(4) F(5)
#define FOUR(F) F(0) F(1) F(2) F(3)

/* The macros START, STEP and END of a sum, for each of them. */
#define RUN(MANY) \
    MANY(START) \
    for (uint64_t r = 0; r < rounds; r++) { MANY(STEP) } \
    MANY(END)

TARGET("avx512f,avx512vpopcntdq") static uint64_t run_avx512(uint64_t rounds) {
    __m512i x = _mm512_set1_epi64(0x0123456789ABCDEF), w = _mm512_set1_epi64(0x5A5A3C3C0F0F1111);
#define START(i) __m512i sum##i = _mm512_setzero_si512();
#define STEP(i) CHANGES(x); sum##i = _mm512_add_epi32(sum##i, _mm512_popcnt_epi32(_mm512_xor_si512(x, w)));
#define END(i) CHANGES(sum##i);
    RUN(TWELVE)
#undef START
#undef STEP
#undef END
    return rounds * 12 * 512;
}

/* Without VPOPCNTDQ: the 15 instructions of kernel_avx512_cores.c for 2048 products, which count by table what two full
   adders leave. */
TARGET("avx512f,avx512bw") static uint64_t run_avx512_base(uint64_t rounds) {
    __m512i x = _mm512_set1_epi64(0x0123456789ABCDEF), w = _mm512_set1_epi64(0x5A5A3C3C0F0F1111);
    const __m512i table = _mm512_set1_epi64(0x0302020102010100), mask = _mm512_set1_epi8(15);
#define START(i) __m512i sum##i = _mm512_setzero_si512(), odd##i = sum##i, twos##i = sum##i;
#define XOR(to) CHANGES(x); const __m512i to = _mm512_xor_si512(x, w);
#define STEP(i) { \
        XOR(a) XOR(b) XOR(c) XOR(d) \
        const __m512i p = _mm512_ternarylogic_epi64(a, odd##i, b, 0x5c), before = twos##i; \
        const __m512i q = _mm512_ternarylogic_epi64(c, b, d, 0x5c); \
        odd##i = d; \
        twos##i = _mm512_ternarylogic_epi64(before, p, q, 0x96); \
        const __m512i fours = _mm512_ternarylogic_epi64(p, before, twos##i, 0xd4); \
        const __m512i low = _mm512_and_si512(fours, mask), high = _mm512_and_si512(_mm512_srli_epi16(fours, 4), mask); \
        sum##i = _mm512_add_epi8(sum##i, _mm512_shuffle_epi8(table, low)); \
        sum##i = _mm512_add_epi8(sum##i, _mm512_shuffle_epi8(table, high)); }
#define END(i) CHANGES(sum##i); CHANGES(odd##i); CHANGES(twos##i);
    RUN(SIX)
#undef START
#undef STEP
#undef END
    return rounds * 6 * 2048;
}

/* AVX2 counts by table look-up, two positions at a time: the 8 instructions of kernel_avx2_binary.c for 768 products. */
TARGET("avx2") static uint64_t run_avx2(uint64_t rounds) {
    __m256i table = _mm256_set1_epi64x(0x0123456789ABCDEF), w = _mm256_set1_epi64x(0x0A0A0C0C0F0F0101);
#define START(i) __m256i sum##i = _mm256_setzero_si256(), high##i = _mm256_setzero_si256();
#define LOOK(to) __m256i to; CHANGES(w); to = _mm256_shuffle_epi8(table, w);
#define STEP(i) { \
        LOOK(a) LOOK(b) LOOK(c) \
        __m256i block = _mm256_add_epi8(_mm256_add_epi8(a, b), c); \
        sum##i = _mm256_add_epi8(sum##i, block); \
        high##i = _mm256_add_epi16(high##i, _mm256_srli_epi16(block, 4)); }
#define END(i) CHANGES(sum##i); CHANGES(high##i);
    RUN(FOUR)
#undef START
#undef STEP
#undef END
    return rounds * 4 * 768;
}

#endif

#ifdef X86
TARGET("popcnt")
#endif
static uint64_t run_scalar(uint64_t rounds) {
    uint64_t a = 0, b = 0, c = 0, d = 0, x = 0x0123456789ABCDEF, w = 0x5A5A3C3C0F0F1111;
#define STEP(sum) __asm__ volatile("" : "+r"(x)); sum += (uint64_t)__builtin_popcountll(x ^ w);
    for (uint64_t r = 0; r < rounds; r++) { STEP(a) STEP(b) STEP(c) STEP(d) }
    volatile uint64_t sink = a + b + c + d;
    (void)sink;
    return rounds * 4 * 64;
}

/* isa: 0 scalar, 1 avx2, 2 avx512, 3 avx512 without VPOPCNTDQ, which the caller knows to run here. Returns how many
   products that were. */
__attribute__((visibility("default"))) uint64_t bench_products(int isa, uint64_t rounds) {
#ifdef X86
    if (isa == 2 && __builtin_cpu_supports("avx512vpopcntdq")) return run_avx512(rounds);
    if (isa == 2 || isa == 3) return run_avx512_base(rounds);
    if (isa == 1) return run_avx2(rounds);
#endif
    (void)isa;
    return run_scalar(rounds);
}
