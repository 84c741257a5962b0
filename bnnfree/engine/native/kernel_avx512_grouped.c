/* conv2d in groups with AVX-512. */

#include "kernels.h"

#ifdef BNNF__HAVE_AVX512
#include "avx512.h"

#define TARGET WITH_AVX512
#define UNROLL _Pragma("GCC unroll 16")
#define VECTOR __m512
#define INDICES __m512i
#define ZERO() _mm512_setzero_ps()
#define EACH(x) _mm512_set1_ps(x)
#define LOAD(p) _mm512_load_ps(p)
#define LOAD_SOME(p, count) _mm512_maskz_loadu_ps((__mmask16)((1u << (count)) - 1), p)
#define LOAD_INDICES(p) _mm512_loadu_si512(p)
#define NEXT_INDICES(lanes) _mm512_add_epi32(lanes, _mm512_set1_epi32(1))
#define PICK(v, lanes) _mm512_permutexvar_ps(lanes, v)
#define ADD_PRODUCT(sum, x, w) _mm512_add_ps(sum, _mm512_mul_ps(x, w))
#define STORE(p, v) _mm512_store_ps(p, v)
#define FINISH finish_vector

WITH_AVX512 static void finish_vector(const bnnf__op *op, const bnnf__io *io, size_t pixel, uint32_t count,
                                      uint32_t first, const float *sums) {
    finish(op, io, pixel, count, first / LANES, NULL, (const char *)sums, LANES * sizeof *sums, REALS,
           parts_of(op, io));
}

#include "grouped.h"

int bnnf_conv2d__avx512_grouped_8x16_fits(const bnnf__op *op) { return fits_grouped(op); }

size_t bnnf_conv2d__avx512_grouped_8x16_pack(bnnf__op *op, void *memory) { return pack_grouped(op, memory); }

WITH_AVX512 void bnnf_conv2d__avx512_grouped_8x16_run(const bnnf__op *op, const bnnf__io *io) {
    run_grouped(op, io);
}

#else
typedef int bnnf__no_avx512_grouped; /* C forbids a file without a declaration */
#endif
