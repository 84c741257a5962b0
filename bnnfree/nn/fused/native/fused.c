/* Element-wise passes of training, for CPUs; what they compute is said by bnnfree/nn/fused/passes.py, the reference.

   Maps are NHWC and dense: a sample is `pixels` rows of `channels` values. Every function takes the samples [first,
   last) of a map, so that threads share one; sums over positions are kept per sample, so the number of threads changes
   no bit. Per-channel parameters are always there: a slope of 1 and shifts of 0 where a block has none.

   passes.h and weights.h are included once for each pair of types: T of the trunk, S of signs and of gradients with respect to them;
   R is what is calculated with. All loops are over channels and without branches, so that compilers vectorise them. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define EACH_CPU
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef uint16_t bf16;

INLINE double get_f64(double x) { return x; }
INLINE float get_f32(float x) { return x; }
INLINE float get_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE double put_f64(double x) { return x; }
INLINE float put_f32(float x) { return x; }
/* Rounds to nearest, ties to even; what is not a number stays none. */
INLINE bf16 put_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = 0x7fc0;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

/* Signs as int8.py has them, and weights of +-1 as they are. */
INLINE uint8_t put_u8(float x) { return x < 0 ? (uint8_t)0 : (uint8_t)2; }
INLINE int8_t put_s8(float x) { return x < 0 ? (int8_t)-1 : (int8_t)1; }

enum { APPROX, CLIP, IDENTITY };

#define PASTE(a, b, c) a##_##b##_##c
#define NAMED(a, b, c) PASTE(a, b, c)
#define FUNCTION(name) NAMED(name, TRUNK, SIGNS)
#define CONVERT2(a, b) a##_##b
#define CONVERT(a, b) CONVERT2(a, b)

#define R double
#define TRUNK f64
#define T double
#define SIGNS f64
#define S double
#include "passes.h"
#include "weights.h"

#undef R
#undef TRUNK
#undef T
#undef SIGNS
#undef S
#define R float
#define TRUNK f32
#define T float
#define SIGNS f32
#define S float
#include "passes.h"
#include "weights.h"

#undef SIGNS
#undef S
#define SIGNS bf16
#define S bf16
#include "passes.h"
#include "weights.h"

#define FORWARD_ONLY
#undef SIGNS
#undef S
#define SIGNS u8
#define S uint8_t
#include "passes.h"

#undef SIGNS
#undef S
#define SIGNS s8
#define S int8_t
#include "weights.h"
#undef FORWARD_ONLY

#undef TRUNK
#undef T
#undef SIGNS
#undef S
#define TRUNK bf16
#define T bf16
#define SIGNS bf16
#define S bf16
#include "passes.h"
