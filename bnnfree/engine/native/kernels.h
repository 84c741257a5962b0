/* One line per kernel: op, instruction set, tile, fits, pack, run. The first that fits is taken, so the faster stand
   first; the scalar ones fit everything. Instruction sets stand in the order of dispatch.c. The file dispatch.c, the
   tests and the benchmark go through this table.

   To add a kernel: its functions in kernel_<isa>.c and a line here. A line K(OP, isa, name) stands for three functions
   with external linkage, which dispatch.c declares: bnnf_<name>_fits, bnnf_<name>_pack and bnnf_<name>_run. */

#ifndef BNNFREE_KERNELS_H
#define BNNFREE_KERNELS_H

#include "internal.h" /* a file of kernels for another CPU would else hold no declaration, which C forbids */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(BNNF_NO_SIMD)
#define BNNF__X86 1
#if __has_include("kernel_avx512.c")
#define BNNF__HAVE_AVX512 1
#endif
#if __has_include("kernel_avx2.c")
#define BNNF__HAVE_AVX2 1
#endif
#endif

#ifdef BNNF__HAVE_AVX512
#define BNNF__KERNELS_AVX512(K) \
    K(BINARY_CONV2D, "avx512", binary_conv2d__avx512vpopcnt_rows_14x16) \
    K(BINARY_CONV2D, "avx512", binary_conv2d__avx512vpopcnt_12x16) \
    K(PIXEL_CONV2D, "avx512", pixel_conv2d__avx512vnni_6x32) \
    K(BINARY_CONV2D, "avx512base", binary_conv2d__avx512_7x16) \
    K(PIXEL_CONV2D, "avx512base", pixel_conv2d__avx512_6x32) \
    K(CONV2D, "avx512base", conv2d__avx512_grouped_8x16) \
    K(CONV2D, "avx512base", conv2d__avx512_6x32) \
    K(POINTWISE, "avx512base", pointwise__avx512) \
    K(MAX_POOL2D, "avx512base", max_pool2d__avx512) \
    K(AVG_POOL2D, "avx512base", avg_pool2d__avx512) \
    K(GROUP_NORM, "avx512base", group_norm__avx512) \
    K(RMS_NORM, "avx512base", rms_norm__avx512)
#else
#define BNNF__KERNELS_AVX512(K)
#endif

#ifdef BNNF__HAVE_AVX2
#define BNNF__KERNELS_AVX2(K) \
    K(BINARY_CONV2D, "avx2", binary_conv2d__avx2lut_4x64) \
    K(PIXEL_CONV2D, "avx2", pixel_conv2d__avx2_4x16) \
    K(CONV2D, "avx2", conv2d__avx2_grouped_8x8) \
    K(CONV2D, "avx2", conv2d__avx2_4x16) \
    K(POINTWISE, "avx2", pointwise__avx2) \
    K(MAX_POOL2D, "avx2", max_pool2d__avx2) \
    K(AVG_POOL2D, "avx2", avg_pool2d__avx2) \
    K(GROUP_NORM, "avx2", group_norm__avx2) \
    K(RMS_NORM, "avx2", rms_norm__avx2)
#else
#define BNNF__KERNELS_AVX2(K)
#endif

#define BNNF__KERNELS(K) \
    BNNF__KERNELS_AVX512(K) \
    BNNF__KERNELS_AVX2(K) \
    K(POINTWISE, "scalar", pointwise__scalar) \
    K(BINARY_CONV2D, "scalar", binary_conv2d__scalar) \
    K(PIXEL_CONV2D, "scalar", pixel_conv2d__scalar) \
    K(CONV2D, "scalar", conv2d__scalar) \
    K(MAX_POOL2D, "scalar", max_pool2d__scalar) \
    K(AVG_POOL2D, "scalar", avg_pool2d__scalar) \
    K(CONCAT, "scalar", concat__scalar) \
    K(SOFTMAX, "scalar", softmax__scalar) \
    K(GROUP_NORM, "scalar", group_norm__scalar) \
    K(RMS_NORM, "scalar", rms_norm__scalar) \
    K(CHANNEL_NORM, "scalar", channel_norm__scalar) \
    K(FUNCTION, "scalar", function__scalar) \
    K(CONV_TRANSPOSE2D, "scalar", conv_transpose2d__scalar) \
    K(TAKE, "scalar", take__scalar) \
    K(CROP, "scalar", crop__scalar) \
    K(PAD, "scalar", pad__scalar) \
    K(RESIZE, "scalar", resize__scalar) \
    K(PIXEL_SHUFFLE, "scalar", pixel_shuffle__scalar) \
    K(REDUCE_CHANNELS, "scalar", reduce_channels__scalar) \
    K(XOR, "scalar", xor__scalar)

#endif
