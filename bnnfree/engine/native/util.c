/* Messages, memory, sorting. */

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "model.h"

int bnnf__fail(const bnnf__message *message, int status, const char *format, ...) {
    if (message->text && message->size) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message->text, message->size, format, arguments);
        va_end(arguments);
    }
    return status;
}

/* Why not aligned_alloc: Windows and older systems have none. */
void *bnnf__alloc(uint64_t bytes) {
    if (bytes > SIZE_MAX - BNNF__ALIGN - sizeof(void *)) return NULL;
    char *memory = malloc((size_t)bytes + BNNF__ALIGN + sizeof(void *));
    if (!memory) return NULL;
    uintptr_t start = (uintptr_t)(memory + sizeof(void *));
    char *aligned = memory + sizeof(void *) + (BNNF__ALIGN - start % BNNF__ALIGN) % BNNF__ALIGN;
    ((void **)(void *)aligned)[-1] = memory;
    return aligned;
}

void bnnf__free(void *memory) {
    if (memory) free(((void **)memory)[-1]);
}

/* Heapsort. Why not qsort: that of some C libraries is quadratic for an input made for it. */
void bnnf__sort(uint64_t *items, size_t count, bnnf__compare compare, const void *context) {
    for (size_t left = count / 2, n = count; n > 1;) {
        uint64_t moved;
        if (left) {
            moved = items[--left];
        } else {
            moved = items[--n];
            items[n] = items[0];
        }
        size_t at = left, child;
        while ((child = 2 * at + 1) < n) {
            if (child + 1 < n && compare(context, items[child + 1], items[child]) > 0) child++;
            if (compare(context, moved, items[child]) >= 0) break;
            items[at] = items[child];
            at = child;
        }
        items[at] = moved;
    }
}
