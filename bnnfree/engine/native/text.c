/* The texts of a packed file: lines of UTF-8. */

#include <string.h>

#include "model.h"

#define NOT_TEXT 0xFFFFFFFFu

/* The code point at *at, which moves on; NOT_TEXT where there is no shortest UTF-8 of a Unicode scalar value. */
static uint32_t next_code(const uint8_t **at, const uint8_t *end) {
    static const uint32_t least[4] = {0, 0x80, 0x800, 0x10000};
    const uint8_t *p = *at;
    uint32_t code = *p++;
    int more = code < 0x80 ? 0 : code < 0xC0 ? -1 : code < 0xE0 ? 1 : code < 0xF0 ? 2 : code < 0xF8 ? 3 : -1;
    if (more < 0 || end - p < more) return NOT_TEXT;
    if (more) code &= 0x3Fu >> more;
    for (int i = 0; i < more; i++) {
        if ((*p & 0xC0) != 0x80) return NOT_TEXT;
        code = code << 6 | (*p++ & 0x3Fu);
    }
    if (code < least[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return NOT_TEXT;
    *at = p;
    return code;
}

/* Lines of text: no control character, none empty, the last ended. How many, and in *longest the bytes of the longest of
   every `step`-th, from the first on. */
static int count_lines(const uint8_t *text, size_t size, const char *what, size_t step, size_t *lines, size_t *longest,
                       const bnnf__message *message) {
    const uint8_t *at = text, *end = text + size, *start = text;
    *lines = *longest = 0;
    while (at < end) {
        const uint8_t *before = at;
        uint32_t code = next_code(&at, end);
        if (code == NOT_TEXT) return bnnf__fail(message, BNNF_ERROR_TEXT, "%s: not UTF-8.", what);
        if (code != '\n') {
            if (code < 0x20 || (code >= 0x7F && code <= 0x9F))
                return bnnf__fail(message, BNNF_ERROR_TEXT, "%s: got a control character, expected none.", what);
            continue;
        }
        if (before == start) return bnnf__fail(message, BNNF_ERROR_TEXT, "%s: got an empty line.", what);
        if (*lines % step == 0 && (size_t)(before - start) > *longest) *longest = (size_t)(before - start);
        start = at;
        ++*lines;
    }
    if (start != end) return bnnf__fail(message, BNNF_ERROR_TEXT, "%s: the last line has no end.", what);
    return BNNF_OK;
}

static int check_longest(size_t longest, const char *what, const bnnf__message *message) {
    if (longest <= BNNF_MAX_LINE) return BNNF_OK;
    return bnnf__fail(message, BNNF_ERROR_LIMIT, "%s: got a line of %zu bytes, expected up to %d.", what, longest,
                      (int)BNNF_MAX_LINE);
}

int bnnf__check_lines(const uint8_t *text, size_t size, const char *what, uint32_t *count,
                      const bnnf__message *message) {
    size_t lines, longest;
    int status = count_lines(text, size, what, 1, &lines, &longest, message);
    if (!status) status = check_longest(longest, what, message);
    *count = status ? 0 : (uint32_t)lines;
    return status;
}

/* -- metadata: two lines an entry, its key and its value */

static size_t line_size(const uint8_t *line) {
    size_t size = 0;
    while (line[size] != '\n') size++;
    return size;
}

/* By size, then by bytes; each item is where a key begins in the text that is `context`. */
static int compare_keys(const void *context, uint64_t a, uint64_t b) {
    const uint8_t *first = (const uint8_t *)context + a, *second = (const uint8_t *)context + b;
    const size_t size = line_size(first), other = line_size(second);
    return size != other ? (size > other) - (size < other) : memcmp(first, second, size);
}

int bnnf__check_metadata(const uint8_t *text, size_t size, const bnnf__message *message) {
    size_t lines, longest;
    int status = count_lines(text, size, "metadata", 2, &lines, &longest, message);
    if (status) return status;
    if (lines % 2) return bnnf__fail(message, BNNF_ERROR_TEXT, "metadata: the last key has no value.");
    if (lines / 2 > BNNF_MAX_KEYS)
        return bnnf__fail(message, BNNF_ERROR_LIMIT, "metadata: got %zu keys, expected up to %d.", lines / 2,
                          (int)BNNF_MAX_KEYS);
    if ((status = check_longest(longest, "metadata", message)) || !lines) return status;
    uint64_t keys[BNNF_MAX_KEYS];
    size_t count = 0;
    for (size_t at = 0; at < size; count++) {
        keys[count] = at;
        at += line_size(text + at) + 1;
        at += line_size(text + at) + 1;
    }
    bnnf__sort(keys, count, compare_keys, text);
    for (size_t i = 1; i < count; i++)
        if (!compare_keys(text, keys[i - 1], keys[i]))
            return bnnf__fail(message, BNNF_ERROR_TEXT, "metadata: a key stands twice.");
    return BNNF_OK;
}
