/* Between kernel_avx512.c and kernel_avx512_cores.c. */

#ifndef BNNFREE_KERNEL_AVX512_H
#define BNNFREE_KERNEL_AVX512_H

#include "kernels.h"

#ifdef BNNF__X86
#include "internal.h"

#define BNNF__LANES 16       /* outputs of a panel: lanes of a register */
#define BNNF__BINARY_TILE 12 /* most pixels of a tile */
#define BNNF__ROWS_TILE 14
#define BNNF__TABLE_TILE 7
#define BNNF__SUM_TILE 6

/* Sums of a tile: for each of its pixels and each output of the panels beside each other the sum over `steps` steps (1
   or more), into sums[panel][most pixels of a tile][lanes]. What a pixel's window holds stands in one run of bytes,
   that of the next pixel `stride` bytes further on. What is `ahead` bytes behind the weights is fetched meanwhile.

   binary: one panel. A step is 64 signs, as two words of 32. In the window each word is the xor of all words up to it.
           Weights u32 [2][lanes] are the same for each output, and the 64 bytes before them those of the step before
           (of the first: zeros). Sums: -2 times how many signs differ; if the window leaves out the first steps of the
           weights, -2 times the popcount of the word before, too;
   table:  binary without VPOPCNTDQ;
   dot:    two panels. A step is 4 pixels u8; weights i8 [2][lanes][4];
   pair:   two panels. A step is 2 pixels as i16; weights i16 [2][lanes][2];
   real:   two panels. A step is a float; weights f32 [2][lanes];
   wide:   one pixel, four panels. A step is a float; weights f32 [4][lanes], or i8. */
typedef void (*bnnf__core)(const void *window, size_t stride, const void *weights, size_t ahead, size_t steps,
                           void *sums);

/* The same for signs that lie as in the image: a window is `rows` runs (0 or more) of `steps` words of 32 signs (1 or
   more), the next run `pitch` bytes further on than the one before. Weights u32 [rows][steps][lanes]. Sums,
   [pixel][lanes]: what is `offset` bytes behind the pixel's start, i32 [lanes], less how many signs differ. */
typedef void (*bnnf__rows_core)(const void *window, size_t stride, const void *weights, size_t rows, size_t steps,
                                size_t pitch, const void *const *starts, size_t offset, void *sums);
extern const bnnf__rows_core bnnf__rows_cores[BNNF__ROWS_TILE + 1];

/* By the number of pixels. */
extern const bnnf__core bnnf__binary_cores[BNNF__BINARY_TILE + 1];
extern const bnnf__core bnnf__table_cores[BNNF__TABLE_TILE + 1];
extern const bnnf__core bnnf__dot_cores[BNNF__SUM_TILE + 1];
extern const bnnf__core bnnf__pair_cores[BNNF__SUM_TILE + 1];
extern const bnnf__core bnnf__real_cores[BNNF__SUM_TILE + 1];
extern const bnnf__core bnnf__wide_real_cores[2], bnnf__wide_whole_cores[2];

#endif
#endif
