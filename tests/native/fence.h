/* Memory whose every byte beyond the end is watched, and allocations that fail when a test says so. */

#ifndef BNNFREE_TESTS_FENCE_H
#define BNNFREE_TESTS_FENCE_H

#include <stddef.h>

/* `bytes` of memory at a multiple of `align`, up to 64, filled with 0xFF: floats that nobody has written are NaN. Under
   AddressSanitizer the first byte beyond is poisoned; without it a page that may not be touched begins less than
   `align` bytes beyond, which stops loads by inline assembly too. NULL if there is no memory. */
void *fenced(size_t bytes, size_t align);
void unfence(void *memory);

/* The how-manieth allocation from now on fails, of the engine's and of its threads; 0: none. */
extern int fence_failing;

#endif
