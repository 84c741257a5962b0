/* How many products of signs per second could a CPU take: xor, popcount and add out of registers, nothing else.
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

/* Twelve sums that do not wait for each other, each in a register of its own: why no array and no loop. */
#define TWELVE(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)

TARGET("avx512f,avx512vpopcntdq") static uint64_t run_avx512(uint64_t rounds) {
    __m512i x = _mm512_set1_epi64(0x0123456789ABCDEF), w = _mm512_set1_epi64(0x5A5A3C3C0F0F1111);
#define START(i) __m512i sum##i = _mm512_setzero_si512();
#define STEP(i) CHANGES(x); sum##i = _mm512_add_epi32(sum##i, _mm512_popcnt_epi32(_mm512_xor_si512(x, w)));
#define END(i) CHANGES(sum##i);
    TWELVE(START)
    for (uint64_t r = 0; r < rounds; r++) { TWELVE(STEP) }
    TWELVE(END)
#undef START
#undef STEP
#undef END
    return rounds * 12 * 512;
}

/* The bits of half a byte by table look-up (Mula et al. 2017), counted in bytes, which hold 31 steps. */
TARGET("avx2") static uint64_t run_avx2(uint64_t rounds) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i x = _mm256_set1_epi64x(0x0123456789ABCDEF), w = _mm256_set1_epi64x(0x5A5A3C3C0F0F1111);
    __m256i sum = zero, bytes0, bytes1, bytes2;
#define STEP(i) { \
        CHANGES(x); \
        __m256i v = _mm256_xor_si256(x, w); \
        __m256i down = _mm256_and_si256(_mm256_srli_epi32(v, 4), low); \
        __m256i counts = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low)); \
        bytes##i = _mm256_add_epi8(bytes##i, _mm256_add_epi8(counts, _mm256_shuffle_epi8(table, down))); }
#define STEPS(i) STEP(0) STEP(1) STEP(2)
    for (uint64_t r = 0; r < rounds; r++) {
        bytes0 = bytes1 = bytes2 = zero;
        TWELVE(STEPS)
        __m256i all = _mm256_add_epi64(_mm256_sad_epu8(bytes0, zero), _mm256_sad_epu8(bytes1, zero));
        sum = _mm256_add_epi64(sum, _mm256_add_epi64(all, _mm256_sad_epu8(bytes2, zero)));
    }
    CHANGES(sum);
#undef STEP
#undef STEPS
    return rounds * 36 * 256;
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

/* isa: 0 scalar, 1 avx2, 2 avx512, which the caller knows to run here. Returns how many products that were. */
__attribute__((visibility("default"))) uint64_t bench_products(int isa, uint64_t rounds) {
#ifdef X86
    if (isa == 2) return run_avx512(rounds);
    if (isa == 1) return run_avx2(rounds);
#endif
    (void)isa;
    return run_scalar(rounds);
}
