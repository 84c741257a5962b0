/* conv2d in groups with AVX2. */

#include "kernels.h"

#ifdef BNNF__HAVE_AVX2
#include "avx2.h"

#undef TILE
#undef MOST_PACKED
#define TARGET AVX2
#define VECTOR __m256
#define INDICES __m256i
#define ZERO() _mm256_setzero_ps()
#define EACH(x) _mm256_set1_ps(x)
#define LOAD(p) _mm256_load_ps(p)
#define LOAD_SOME(p, count) load(p, count)
#define LOAD_INDICES(p) _mm256_loadu_si256((const __m256i *)(p))
#define NEXT_INDICES(lanes) _mm256_add_epi32(lanes, _mm256_set1_epi32(1))
#define PICK(v, lanes) _mm256_permutevar8x32_ps(v, lanes)
#define ADD_PRODUCT(sum, x, w) _mm256_add_ps(sum, _mm256_mul_ps(x, w))
#define STORE(p, v) _mm256_store_ps(p, v)
#define FINISH finish_vector

/* The epilogue makes 4 pixels at a time; bits are put 8 at a time into their words. */
AVX2 static void finish_vector(const bnnf__op *op, const bnnf__io *io, size_t pixel, uint32_t count, uint32_t first,
                               const float *sums) {
    for (uint32_t at = 0; at < count; at += 4) {
        const uint32_t some = count - at < 4 ? count - at : 4;
        uint64_t bits[4] = {0};
        __m256 v[4];
        for (uint32_t i = 0; i < 4; i++) v[i] = i < some ? _mm256_load_ps(sums + (at + i) * LANES) : ZERO();
        finish(op, io, pixel + at, some, first, v, NULL, bits, 0);
        if (io->bits) put_bits(op, io, pixel + at, some, first, LANES, bits);
    }
}

#include "grouped.h"

int bnnf_conv2d__avx2_grouped_8x8_fits(const bnnf__op *op) { return fits_grouped(op); }

size_t bnnf_conv2d__avx2_grouped_8x8_pack(bnnf__op *op, void *memory) { return pack_grouped(op, memory); }

AVX2 void bnnf_conv2d__avx2_grouped_8x8_run(const bnnf__op *op, const bnnf__io *io) { run_grouped(op, io); }

#else
typedef int bnnf__no_avx2_grouped; /* C forbids a file without a declaration */
#endif
