/* From the bytes of a file to tensors, ops and class names: header, tables, texts and layout (steps 1 to 4 of the order
   in FORMAT.md; check.c has the rest). Nothing is taken from the bytes before it is checked, every size is computed in
   64 bits without overflow, and time and memory are in proportion to the file. */

#include <stdlib.h>
#include <string.h>

#include "model.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the engine uses the constants of a file in place: it needs a little-endian CPU"
#endif

typedef struct bnnf_header_record header_record;
typedef struct bnnf_tensor_record tensor_record;

typedef struct reader {
    bnnf_model *model;
    const bnnf__message *message;
    header_record header;
    uint64_t at;                                        /* where the last section or constant ended */
    uint64_t tensors, ops, names, classes, metadata;    /* where each section begins */
} reader;

/* CRC-32, eight bytes a step: table[k][b] is what byte b does k bytes later. */
static uint32_t crc32(const uint8_t *bytes, size_t size) {
    uint32_t table[8][256], crc = 0xFFFFFFFFu;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (0xEDB88320u & (0u - (c & 1)));
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++) table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    for (; size >= 8; size -= 8, bytes += 8) {
        uint32_t low, high;
        memcpy(&low, bytes, 4);
        memcpy(&high, bytes + 4, 4);
        low ^= crc;
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    for (; size; size--) crc = crc >> 8 ^ table[0][(crc ^ *bytes++) & 255];
    return ~crc;
}

static int is_zero(const void *from, size_t size) {
    const uint8_t *bytes = from;
    for (size_t i = 0; i < size; i++)
        if (bytes[i]) return 0;
    return 1;
}

static int read_header(reader *r) {
    const bnnf_model *model = r->model;
    header_record *h = &r->header;
    if (model->size < BNNF_MAGIC_BYTES || memcmp(model->bytes, BNNF_MAGIC, BNNF_MAGIC_BYTES))
        return bnnf__fail(r->message, BNNF_ERROR_MAGIC,
                          "got other first bytes than those of a packed model (.bnnf). Is it one?");
    if (model->size < sizeof *h)
        return bnnf__fail(r->message, BNNF_ERROR_SIZE, "got %zu bytes, expected at least %zu.", model->size, sizeof *h);
    memcpy(h, model->bytes, sizeof *h);
    if (h->version != BNNF_VERSION)
        return bnnf__fail(r->message, BNNF_ERROR_VERSION,
                          "got format version %u, expected %u. Export it again with this bnnfree.",
                          (unsigned)h->version, (unsigned)BNNF_VERSION);
    if (h->file_bytes != model->size)
        return bnnf__fail(r->message, BNNF_ERROR_SIZE, "got %zu bytes, expected the %llu that its header counts.",
                          model->size, (unsigned long long)h->file_bytes);
    if (crc32(model->bytes + BNNF_CHECKED_FROM, model->size - BNNF_CHECKED_FROM) != h->checksum)
        return bnnf__fail(r->message, BNNF_ERROR_CHECKSUM,
                          "its checksum is not that of its bytes. Copy or export it again.");
    if (h->zero || !is_zero(h->rest, sizeof h->rest))
        return bnnf__fail(r->message, BNNF_ERROR_LAYOUT, "got values in the header where zeros belong.");
    if (!h->tensor_count || h->tensor_count > BNNF_MAX_RECORDS || !h->op_count || h->op_count > BNNF_MAX_RECORDS)
        return bnnf__fail(r->message, BNNF_ERROR_LIMIT, "got %u tensors and %u ops, expected 1 to %u of each.",
                          (unsigned)h->tensor_count, (unsigned)h->op_count, (unsigned)BNNF_MAX_RECORDS);
    if (h->name_bytes > BNNF_MAX_TEXT || h->class_bytes > BNNF_MAX_TEXT || h->metadata_bytes > BNNF_MAX_TEXT)
        return bnnf__fail(r->message, BNNF_ERROR_LIMIT,
                          "got %u bytes of names, %u of classes, %u of metadata, expected up to %u.",
                          (unsigned)h->name_bytes, (unsigned)h->class_bytes, (unsigned)h->metadata_bytes,
                          (unsigned)BNNF_MAX_TEXT);
    return BNNF_OK;
}

/* Moves on to the next multiple of 64; what lies between must be zero. */
static int skip_gap(reader *r) {
    uint64_t start = (r->at + BNNF__ALIGN - 1) / BNNF__ALIGN * BNNF__ALIGN;
    uint64_t end = start < r->model->size ? start : r->model->size;
    if (r->at < end && !is_zero(r->model->bytes + r->at, (size_t)(end - r->at)))
        return bnnf__fail(r->message, BNNF_ERROR_LAYOUT, "got values between offsets %llu and %llu, expected zeros.",
                          (unsigned long long)r->at, (unsigned long long)end);
    r->at = start;
    return BNNF_OK;
}

static int read_section(reader *r, uint64_t bytes, uint64_t *start) {
    int status = skip_gap(r);
    if (status) return status;
    if (r->at > r->model->size || bytes > r->model->size - r->at)
        return bnnf__fail(r->message, BNNF_ERROR_SIZE, "got %zu bytes, too few for the tables the header counts.",
                          r->model->size);
    *start = r->at;
    r->at += bytes;
    return BNNF_OK;
}

static int read_sections(reader *r) {
    const header_record *h = &r->header;
    int status;
    r->at = sizeof *h;
    if ((status = read_section(r, (uint64_t)h->tensor_count * sizeof(tensor_record), &r->tensors))) return status;
    if ((status = read_section(r, (uint64_t)h->op_count * sizeof(struct bnnf_op_record), &r->ops))) return status;
    if ((status = read_section(r, h->name_bytes, &r->names))) return status;
    if ((status = read_section(r, h->class_bytes, &r->classes))) return status;
    return read_section(r, h->metadata_bytes, &r->metadata);
}

/* Bytes of a tensor with sides of up to MAX_SIDE; UINT64_MAX where 64 bits do not hold them. */
static uint64_t tensor_bytes(const tensor_record *t) {
    static const uint8_t width[] = {4, 8, 1, 1, 4};
    uint64_t product = width[t->dtype];
    for (int i = 0; i < t->rank; i++) {
        uint64_t side = t->shape[i];
        if (t->dtype == BNNF_DTYPE_BITS && i == t->rank - 1) side = (side + 63) / 64;
        if (product > UINT64_MAX / side) return UINT64_MAX;
        product *= side;
    }
    return product;
}

static int read_tensor(reader *r, uint32_t index) {
    tensor_record t;
    memcpy(&t, r->model->bytes + r->tensors + (uint64_t)index * sizeof t, sizeof t);
    if (t.dtype > BNNF_DTYPE_I32 || t.place > BNNF_PLACE_IMAGE || t.rank < 1 || t.rank > 4 || t.zero || t.zeros)
        return bnnf__fail(r->message, BNNF_ERROR_TENSOR,
                          "tensor %u: got dtype %u, place %u, rank %u, which are not all known.", (unsigned)index,
                          t.dtype, t.place, t.rank);
    for (int i = t.rank; i < 4; i++)
        if (t.shape[i] != 1)
            return bnnf__fail(r->message, BNNF_ERROR_TENSOR, "tensor %u: got size %u beyond its rank, expected 1.",
                              (unsigned)index, (unsigned)t.shape[i]);
    for (int i = 0; i < t.rank; i++)
        if (!t.shape[i])
            return bnnf__fail(r->message, BNNF_ERROR_TENSOR, "tensor %u: got a size of 0, expected 1 or more.",
                              (unsigned)index);
    for (int i = 0; i < t.rank; i++)
        if (t.shape[i] > BNNF_MAX_SIDE)
            return bnnf__fail(r->message, BNNF_ERROR_LIMIT, "tensor %u: got a size of %u, expected up to %u.",
                              (unsigned)index, (unsigned)t.shape[i], (unsigned)BNNF_MAX_SIDE);
    uint64_t bytes = tensor_bytes(&t);
    if (bytes == UINT64_MAX || t.bytes != bytes)
        return bnnf__fail(r->message, BNNF_ERROR_TENSOR, "tensor %u: got %llu bytes, which its shape does not take.",
                          (unsigned)index, (unsigned long long)t.bytes);
    bnnf__tensor *to = &r->model->tensors[index];
    memcpy(to->shape, t.shape, sizeof to->shape);
    to->dtype = t.dtype;
    to->place = t.place;
    to->rank = t.rank;
    /* beyond the largest arena and file all are refused alike, where size_t is 32 bits too */
    to->offset = t.offset > SIZE_MAX ? SIZE_MAX : (size_t)t.offset;
    to->bytes = t.bytes > SIZE_MAX ? SIZE_MAX : (size_t)t.bytes;
    to->written = to->last_read = BNNF__NONE;
    return BNNF_OK;
}

static int map_constant(reader *r, uint32_t index) {
    bnnf__tensor *t = &r->model->tensors[index];
    int status = skip_gap(r);
    if (status) return status;
    if (t->offset != r->at)
        return bnnf__fail(r->message, BNNF_ERROR_LAYOUT, "tensor %u: got offset %zu, expected %llu: %s.",
                          (unsigned)index, t->offset, (unsigned long long)r->at,
                          t->offset > r->at ? "a hole" : "an overlap");
    if (t->offset > r->model->size || t->bytes > r->model->size - t->offset)
        return bnnf__fail(r->message, BNNF_ERROR_SIZE,
                          "tensor %u: got %zu bytes in all, too few for a constant of %zu.", (unsigned)index,
                          r->model->size, t->bytes);
    t->data = r->model->bytes + t->offset;
    r->at += t->bytes;
    return BNNF_OK;
}

static int read_tensors(reader *r) {
    bnnf_model *model = r->model;
    uint32_t names;
    int status = bnnf__check_lines(model->bytes + r->names, r->header.name_bytes, "names", &names, r->message);
    if (status) return status;
    if (names != model->tensor_count)
        return bnnf__fail(r->message, BNNF_ERROR_TEXT, "got %u names for %u tensors.", (unsigned)names,
                          (unsigned)model->tensor_count);
    for (uint32_t i = 0; i < model->tensor_count; i++)
        if ((status = read_tensor(r, i))) return status;
    for (uint32_t i = 0; i < model->tensor_count; i++)
        if (model->tensors[i].place == BNNF_PLACE_CONSTANT && (status = map_constant(r, i))) return status;
    if (r->at != model->size)
        return bnnf__fail(r->message, BNNF_ERROR_LAYOUT, "got %llu bytes after the last constant, expected none.",
                          (unsigned long long)(model->size - r->at));
    return BNNF_OK;
}

static int read_ops(reader *r) {
    bnnf_model *model = r->model;
    for (uint32_t i = 0; i < model->op_count; i++) {
        struct bnnf_op_record *record = &model->ops[i].record;
        memcpy(record, model->bytes + r->ops + (uint64_t)i * sizeof *record, sizeof *record);
        if (record->code < BNNF_OP_POINTWISE || record->code >= BNNF_OP_END)
            return bnnf__fail(r->message, BNNF_ERROR_OP, "op %u: got code %u, expected %d to %d.", (unsigned)i,
                              (unsigned)record->code, BNNF_OP_POINTWISE, BNNF_OP_END - 1);
        if (!is_zero(record->rest, sizeof record->rest))
            return bnnf__fail(r->message, BNNF_ERROR_OP, "op %u: got values where zeros belong.", (unsigned)i);
    }
    model->input = r->header.input;
    model->output = r->header.output;
    if (model->input >= model->tensor_count || model->output >= model->tensor_count)
        return bnnf__fail(r->message, BNNF_ERROR_TENSOR, "got tensors %u and %u of %u as input and output.",
                          (unsigned)model->input, (unsigned)model->output, (unsigned)model->tensor_count);
    return BNNF_OK;
}

static int read_classes(reader *r) {
    bnnf_model *model = r->model;
    size_t size = r->header.class_bytes;
    if (!size) return BNNF_OK;
    model->classes = malloc(size);
    if (!model->classes) return bnnf__fail(r->message, BNNF_ERROR_MEMORY, "not enough memory.");
    /* The copy is what is counted and walked: the caller's bytes may change meanwhile, however wrong that is. */
    memcpy(model->classes, model->bytes + r->classes, size);
    int status = bnnf__check_lines((const uint8_t *)model->classes, size, "classes", &model->class_count, r->message);
    if (status) return status;
    model->class_at = malloc(model->class_count * sizeof *model->class_at);
    if (!model->class_at) return bnnf__fail(r->message, BNNF_ERROR_MEMORY, "not enough memory.");
    uint32_t start = 0, count = 0;
    for (uint32_t i = 0; i < size; i++) {
        if (model->classes[i] != '\n') continue;
        model->classes[i] = 0;
        model->class_at[count++] = start;
        start = i + 1;
    }
    return BNNF_OK;
}

/* A copy, as of the classes: each line ended by 0, and an empty one at the end. */
static int read_metadata(reader *r) {
    const size_t size = r->header.metadata_bytes;
    char *text = r->model->metadata = malloc(size + 1);
    if (!text) return bnnf__fail(r->message, BNNF_ERROR_MEMORY, "not enough memory.");
    memcpy(text, r->model->bytes + r->metadata, size);
    const int status = bnnf__check_metadata((const uint8_t *)text, size, r->message);
    if (status) return status;
    for (size_t i = 0; i < size; i++)
        if (text[i] == '\n') text[i] = 0;
    text[size] = 0;
    return BNNF_OK;
}

static int check_producer(reader *r) {
    const char *text = r->header.producer;
    size_t size = sizeof r->header.producer;
    while (size && !text[size - 1]) size--;
    for (size_t i = 0; i < size; i++)
        if (text[i] < 0x20 || text[i] > 0x7E)
            return bnnf__fail(r->message, BNNF_ERROR_TEXT, "producer: got byte %u, expected printable ASCII.",
                              (unsigned)(uint8_t)text[i]);
    return BNNF_OK;
}

int bnnf__read_file(bnnf_model *model, const bnnf__message *message) {
    reader r = {.model = model, .message = message};
    int status;
    if ((status = read_header(&r)) || (status = read_sections(&r))) return status;
    model->tensors = calloc(r.header.tensor_count, sizeof *model->tensors);
    model->ops = calloc(r.header.op_count, sizeof *model->ops);
    if (!model->tensors || !model->ops) return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    model->tensor_count = r.header.tensor_count;
    model->op_count = r.header.op_count;
    model->file_arena = r.header.arena_bytes > SIZE_MAX ? SIZE_MAX : (size_t)r.header.arena_bytes;
    if ((status = read_tensors(&r)) || (status = read_ops(&r)) || (status = read_classes(&r))) return status;
    if ((status = read_metadata(&r)) || (status = check_producer(&r))) return status;
    return bnnf__check_model(model, message);
}
