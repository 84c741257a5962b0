/* The texts of a packed file: UTF-8, lines, JSON. Why no library function here: strtod and its kind depend on the
   locale of the program around us. */

#include <stdlib.h>
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

int bnnf__check_lines(const uint8_t *text, size_t size, const char *what, uint32_t *count,
                      const bnnf__message *message) {
    const uint8_t *at = text, *end = text + size, *start = text;
    size_t lines = 0, longest = 0;
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
        if ((size_t)(before - start) > longest) longest = (size_t)(before - start);
        start = at;
        lines++;
    }
    if (start != end) return bnnf__fail(message, BNNF_ERROR_TEXT, "%s: the last line has no end.", what);
    if (longest > BNNF_MAX_LINE)
        return bnnf__fail(message, BNNF_ERROR_LIMIT, "%s: got a line of %zu bytes, expected up to %d.", what, longest,
                          (int)BNNF_MAX_LINE);
    *count = (uint32_t)lines;
    return BNNF_OK;
}

/* -- JSON */

/* The decoded keys of all objects that are open stand in `bytes` one after the other; a key is where, times 2^32, and
   its size. */
typedef struct parser {
    const uint8_t *at, *end;
    uint8_t *bytes;
    uint64_t *keys;
    uint32_t byte_count, key_count;
    int status;
    const char *wrong;
} parser;

static int refuse(parser *p, const char *wrong) {
    if (!p->status) p->status = BNNF_ERROR_TEXT, p->wrong = wrong;
    return 0;
}

static int refuse_limit(parser *p, const char *wrong) {
    if (!p->status) p->status = BNNF_ERROR_LIMIT, p->wrong = wrong;
    return 0;
}

static int next_is(parser *p, uint8_t c) { return p->at < p->end && *p->at == c; }

static int take(parser *p, uint8_t c) {
    if (!next_is(p, c)) return 0;
    p->at++;
    return 1;
}

static void skip_space(parser *p) {
    while (next_is(p, ' ') || next_is(p, '\t') || next_is(p, '\n') || next_is(p, '\r')) p->at++;
}

/* The four hexadecimal digits of an escape, NOT_TEXT if they are none. */
static uint32_t four_digits(parser *p) {
    uint32_t value = 0;
    if (p->end - p->at < 4) return NOT_TEXT;
    for (int i = 0; i < 4; i++) {
        uint32_t c = *p->at++, letter = c | 0x20;
        if (c >= '0' && c <= '9') c -= '0';
        else if (letter >= 'a' && letter <= 'f') c = letter - 'a' + 10;
        else return NOT_TEXT;
        value = value << 4 | c;
    }
    return value;
}

/* What stands behind a backslash. */
static uint32_t escape(parser *p) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (p->at == p->end) return NOT_TEXT;
    uint8_t c = *p->at++;
    if (c != 'u') {
        const char *found = c ? strchr(from, c) : NULL;
        return found ? (uint32_t)to[found - from] : NOT_TEXT;
    }
    uint32_t code = four_digits(p);
    if (code < 0xD800 || code >= 0xE000) return code;
    if (code >= 0xDC00 || !take(p, '\\') || !take(p, 'u')) return NOT_TEXT; /* a lone surrogate */
    uint32_t low = four_digits(p);
    if (low < 0xDC00 || low >= 0xE000) return NOT_TEXT;
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
}

/* Never more bytes than the text takes in the file: an escape is at least as long as what it stands for. */
static void append(parser *p, uint32_t code) {
    uint8_t *to = p->bytes + p->byte_count;
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const uint8_t lead[4] = {0, 0xC0, 0xE0, 0xF0};
    for (int i = more; i > 0; i--, code >>= 6) to[i] = (uint8_t)(0x80 | (code & 0x3F));
    to[0] = (uint8_t)(lead[more] | code);
    p->byte_count += (uint32_t)more + 1;
}

static int string(parser *p, int keep) {
    if (!take(p, '"')) return refuse(p, "a text is missing");
    while (!take(p, '"')) {
        if (p->at == p->end) return refuse(p, "a text has no end");
        uint32_t code = take(p, '\\') ? escape(p) : *p->at < 0x20 ? NOT_TEXT : next_code(&p->at, p->end);
        if (code == NOT_TEXT) return refuse(p, "a text with a wrong escape, a control character or no UTF-8");
        if (keep) append(p, code);
    }
    return 1;
}

static int digits(parser *p) {
    const uint8_t *from = p->at;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') p->at++;
    return p->at > from;
}

/* Whether the number from..to, of JSON's form and not negative, rounds to infinity in float64: is it 2^1024 - 2^970,
   half a step above the largest, or more? Exact, and in the time of reading it. */
static int is_beyond_double(const uint8_t *from, const uint8_t *to) {
    static const char limit[] =
        "1797693134862315807937289714053034150799341327100378269361737789804449682927647509466490179775872070"
        "9633028641669288791094655554785194040263065748867150582068190890200070838367627385484581771153176447"
        "5730270069855571366959622842914819860834936475292719074168444365510704342711559699508093042880177904"
        "174497792";
    const uint8_t *e = from;
    while (e < to && *e != 'e' && *e != 'E') e++;
    int64_t exponent = 0, places = -1; /* the number is d.ddd times ten to the power of places + exponent */
    if (e < to) {
        const uint8_t *d = e + 1;
        int negative = *d == '-';
        for (d += *d == '-' || *d == '+'; d < to; d++)
            if (exponent < 1000000000) exponent = exponent * 10 + (*d - '0');
        if (negative) exponent = -exponent;
    }
    const uint8_t *dot = from, *first = from;
    while (dot < e && *dot != '.') dot++;
    while (first < e && (*first == '0' || *first == '.')) first++;
    if (first == e) return 0;
    places = first < dot ? dot - first - 1 : dot - first;
    if (places + exponent != 308) return places + exponent > 308;
    size_t i = 0;
    for (; first < e && i < sizeof limit - 1; first++) {
        if (*first == '.') continue;
        if (*first != (uint8_t)limit[i]) return *first > (uint8_t)limit[i];
        i++;
    }
    for (; i < sizeof limit - 1; i++) /* digits that are not there are 0 */
        if (limit[i] != '0') return 0;
    return 1;
}

static int number(parser *p) {
    const uint8_t *start = p->at;
    int whole = 1;
    take(p, '-');
    const uint8_t *first = p->at;
    if (!take(p, '0') && !digits(p)) return refuse(p, "a value is missing");
    if (take(p, '.')) {
        whole = 0;
        if (!digits(p)) return refuse(p, "a number has no digits behind its point");
    }
    if (take(p, 'e') || take(p, 'E')) {
        whole = 0;
        if (!take(p, '-')) take(p, '+');
        if (!digits(p)) return refuse(p, "a number has no digits in its exponent");
    }
    if (whole && p->at - start > (ptrdiff_t)BNNF_MAX_DIGITS) return refuse_limit(p, "a whole number is too long");
    if (is_beyond_double(first, p->at)) return refuse(p, "a number is beyond float64");
    return 1;
}

static int compare(const void *context, uint64_t a, uint64_t b) {
    const parser *p = context;
    uint32_t a_size = (uint32_t)a, b_size = (uint32_t)b;
    if (a_size != b_size) return a_size < b_size ? -1 : 1;
    return memcmp(p->bytes + (a >> 32), p->bytes + (b >> 32), a_size);
}

static int value(parser *p);

static int object(parser *p) {
    uint32_t first_key = p->key_count, first_byte = p->byte_count;
    do {
        uint32_t at = p->byte_count;
        skip_space(p);
        if (!string(p, 1)) return 0;
        p->keys[p->key_count++] = (uint64_t)at << 32 | (p->byte_count - at);
        skip_space(p);
        if (!take(p, ':')) return refuse(p, "a colon is missing");
        if (!value(p)) return 0;
        skip_space(p);
    } while (take(p, ','));
    if (!take(p, '}')) return refuse(p, "an object has no end");
    uint64_t *keys = p->keys + first_key;
    uint32_t count = p->key_count - first_key;
    bnnf__sort(keys, count, compare, p);
    for (uint32_t i = 1; i < count; i++)
        if (compare(p, keys[i - 1], keys[i]) == 0) return refuse(p, "a key stands twice in its object");
    p->key_count = first_key;
    p->byte_count = first_byte;
    return 1;
}

static int array(parser *p) {
    do {
        if (!value(p)) return 0;
        skip_space(p);
    } while (take(p, ','));
    return take(p, ']') ? 1 : refuse(p, "an array has no end");
}

static int word(parser *p, const char *text) {
    size_t size = strlen(text);
    if ((size_t)(p->end - p->at) < size || memcmp(p->at, text, size)) return 0;
    p->at += size;
    return 1;
}

/* Goes no deeper than the stack allows: is_too_deep comes before. */
static int value(parser *p) {
    int fine;
    skip_space(p);
    if (take(p, '{')) {
        skip_space(p);
        fine = take(p, '}') || object(p);
    } else if (take(p, '[')) {
        skip_space(p);
        fine = take(p, ']') || array(p);
    } else if (next_is(p, '"')) {
        fine = string(p, 0);
    } else {
        fine = word(p, "true") || word(p, "false") || word(p, "null") || number(p);
    }
    return fine;
}

/* Whether more than MAX_DEPTH values stand in each other, as far as brackets and quotes tell. */
static int is_too_deep(const uint8_t *at, const uint8_t *end) {
    int depth = 0, quoted = 0; /* depth: of what is open here; what is open and not empty holds one more */
    for (; at < end; at++) {
        if (*at == '\\') {
            at++;
        } else if (*at == '"') {
            quoted = !quoted;
        } else if (!quoted && (*at == '[' || *at == '{')) {
            const uint8_t *next = at + 1;
            while (next < end && (*next == ' ' || *next == '\t' || *next == '\n' || *next == '\r')) next++;
            int empty = next < end && (*next == ']' || *next == '}');
            if (depth + (empty ? 1 : 2) > (int)BNNF_MAX_DEPTH) return 1;
            if (empty) at = next;
            else depth++;
        } else if (!quoted && (*at == ']' || *at == '}')) {
            depth--;
        }
    }
    return 0;
}

int bnnf__check_metadata(const uint8_t *text, size_t size, const bnnf__message *message) {
    /* a key takes five bytes at least: "":0 and a comma or a brace */
    parser p = {.at = text, .end = text + size, .bytes = malloc(size + 1)};
    p.keys = malloc((size / 5 + 1) * sizeof *p.keys);
    if (!p.bytes || !p.keys) {
        p.status = BNNF_ERROR_MEMORY, p.wrong = "not enough memory";
    } else if (is_too_deep(p.at, p.end)) {
        refuse_limit(&p, "too many values in each other");
    } else {
        skip_space(&p);
        if (!next_is(&p, '{')) refuse(&p, "not an object");
        else value(&p);
        skip_space(&p);
        if (!p.status && p.at != p.end) refuse(&p, "something stands behind the object");
    }
    free(p.bytes);
    free(p.keys);
    return p.status ? bnnf__fail(message, p.status, "metadata: not JSON as it should be: %s.", p.wrong) : BNNF_OK;
}
