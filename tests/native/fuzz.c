/* A fuzz target: the loader on any bytes, and every instruction set on what it takes.

   With clang -fsanitize=fuzzer this is a program of libFuzzer, whose mutations end with the right size and checksum, as
   nothing is read of a file that lacks them. With -DREPLAY it runs each file it is given once and prints its status. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fence.h"
#include "model.h"

#define MOST_WORK (1u << 20)   /* products of what is run: milliseconds */
#define MOST_MEMORY (1u << 26) /* of what is run */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

static int is_small(const bnnf_model *model) {
    uint64_t work = 0;
    for (uint32_t i = 0; i < model->op_count; i++) {
        const bnnf__op *op = &model->ops[i];
        uint64_t taps = op->record.kernel_h ? (uint64_t)op->record.kernel_h * op->record.kernel_w : 1;
        uint64_t of_one = taps * (op->weights ? op->group_channels : 1);
        work += (uint64_t)op->out_height * op->out_width * op->outputs * of_one;
        work += (uint64_t)op->height * op->width * op->channels;
    }
    bnnf_info info = bnnf_model_info(model);
    return work <= MOST_WORK && info.session_bytes <= MOST_MEMORY && info.image_bytes <= MOST_MEMORY;
}

/* The result of some image, all NaN being one. */
static float *run(const bnnf_model *model) {
    bnnf_info info = bnnf_model_info(model);
    uint8_t *pixels = fenced(info.image_bytes, 1);
    float *output = fenced(info.output_values * sizeof *output, sizeof *output);
    bnnf_session *session;
    require(!bnnf_session_create(&session, model, NULL, 0, NULL, 0), "no session");
    for (size_t i = 0; i < info.image_bytes; i++) pixels[i] = (uint8_t)(i * 37 + i / 5);
    require(!bnnf_run(session, pixels, 1, output), "no run");
    for (size_t i = 0; i < info.output_values; i++)
        if (output[i] != output[i]) memset(&output[i], 0xFF, sizeof *output);
    bnnf_session_free(session);
    unfence(pixels);
    return output;
}

/* With one instruction set; *result is NULL where the file is refused or too much work. */
static int load(const uint8_t *bytes, size_t size, const char *isa, int keep, float **result, size_t *result_bytes) {
    char message[100] = "";
    bnnf_model *model;
    bnnf_params params = bnnf_default_params();
    params.isa = isa, params.keep = keep;
    int status = bnnf_model_create(&model, bytes, size, &params, message, sizeof message);
    *result = NULL;
    if (status) {
        require(!model && *message, "an error that is none");
        require(status == BNNF_ERROR_MEMORY || (status >= BNNF_ERROR_MAGIC && status <= BNNF_ERROR_PLAN), message);
        return status;
    }
    if (is_small(model)) {
        *result = run(model);
        *result_bytes = bnnf_model_info(model).output_values * sizeof **result;
    }
    bnnf_model_free(model);
    return status;
}

/* What each instruction set makes of activations that share memory as the file says, and the scalar kernels of some
   that share none, must be the same. */
static int try_file(const uint8_t *data, size_t size) {
    uint8_t *bytes = fenced(size, 64);
    float *first, *other;
    size_t first_bytes = 0, other_bytes = 0;
    memcpy(bytes, data, size);
    int status = load(bytes, size, "scalar", 1, &first, &first_bytes);
    const char *isa;
    for (int i = 0; !status && (isa = bnnf_isa_name(i)); i++) {
        int again = load(bytes, size, isa, 0, &other, &other_bytes);
        require(again == status || again == BNNF_ERROR_MEMORY, "an instruction set refuses what another takes");
        if (first && other)
            require(first_bytes == other_bytes && !memcmp(first, other, first_bytes), "other bits");
        unfence(other);
    }
    unfence(first);
    unfence(bytes);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    try_file(data, size);
    return 0;
}

#ifdef REPLAY

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file || fseek(file, 0, SEEK_END)) return 2;
        size_t size = (size_t)ftell(file);
        uint8_t *bytes = fenced(size, 64);
        rewind(file);
        if (fread(bytes, 1, size, file) != size) return 2;
        fclose(file);
        printf("%d %s\n", try_file(bytes, size), argv[i]);
        unfence(bytes);
    }
    return 0;
}

#else

/* -- mutations that know the format; what they find in a file may be anything */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

static uint32_t state;

static uint32_t below(uint32_t count) { /* xorshift */
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % count;
}

static void seal(uint8_t *data, size_t size) {
    static uint32_t table[256];
    uint64_t bytes = size;
    uint32_t crc = 0xFFFFFFFFu;
    for (uint32_t i = 0; i < 256 && !table[255]; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
    }
    if (size < sizeof(struct bnnf_header_record)) return;
    memcpy(data + offsetof(struct bnnf_header_record, file_bytes), &bytes, sizeof bytes);
    for (size_t i = BNNF_CHECKED_FROM; i < size; i++) crc = crc >> 8 ^ table[(crc ^ data[i]) & 255];
    crc = ~crc;
    memcpy(data + offsetof(struct bnnf_header_record, checksum), &crc, sizeof crc);
}

enum section { TENSORS, OPS, NAMES, CLASSES, METADATA, CONSTANTS, SECTIONS };

/* Where each section begins; those that would begin beyond the file, at its end. */
static void find_sections(const uint8_t *data, size_t size, size_t start[SECTIONS + 1]) {
    struct bnnf_header_record h;
    memcpy(&h, data, sizeof h);
    uint64_t bytes[] = {(uint64_t)h.tensor_count * sizeof(struct bnnf_tensor_record),
                        (uint64_t)h.op_count * sizeof(struct bnnf_op_record), h.name_bytes, h.class_bytes,
                        h.metadata_bytes}, at = sizeof h;
    for (int i = 0; i < SECTIONS; i++) {
        start[i] = at < size ? (size_t)at : size;
        if (i < CONSTANTS) at = (at + bytes[i] + 63) / 64 * 64;
    }
    start[SECTIONS] = size;
}

/* Over one field of 32 bits of the header or of a record: a telling value, a neighbour, or what another record has. */
static void change_field(uint8_t *data, size_t start, size_t end, size_t record) {
    static const uint32_t telling[] = {0, 1, 2, 3, 63, 64, 65, 255, 1u << 16, 1u << 18, 1u << 20, 1u << 24, 1u << 30,
                                       0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFFu};
    uint32_t records = (uint32_t)((end - start) / record), value;
    if (!records) return;
    size_t field = 4 * (size_t)below((uint32_t)record / 4);
    uint8_t *at = data + start + below(records) * record + field;
    memcpy(&value, at, sizeof value);
    switch (below(5)) {
    case 0: value = telling[below(sizeof telling / sizeof telling[0])]; break;
    case 1: value += below(2) ? 1 : 0xFFFFFFFFu; break;
    case 2: value = below(2) ? value * 2 : value / 2; break;
    case 3: value = below(48); break;
    default: memcpy(&value, data + start + below(records) * record + field, sizeof value);
    }
    memcpy(at, &value, sizeof value);
}

/* A text within the room that it has up to the next section, zeros behind it; the metadata of a file without constants
   to its end, which moves. Returns the size of the file. */
static size_t change_text(uint8_t *data, const size_t *start, enum section text, size_t max_size) {
    static const size_t field[SECTIONS] = {[NAMES] = offsetof(struct bnnf_header_record, name_bytes),
                                           [CLASSES] = offsetof(struct bnnf_header_record, class_bytes),
                                           [METADATA] = offsetof(struct bnnf_header_record, metadata_bytes)};
    int ends = text == METADATA && start[CONSTANTS] == start[SECTIONS];
    size_t room = (ends ? max_size : start[text + 1]) - start[text];
    uint32_t bytes;
    memcpy(&bytes, data + field[text], sizeof bytes);
    if (!room || bytes > start[text + 1] - start[text]) return start[SECTIONS];
    bytes = below(4) ? (uint32_t)LLVMFuzzerMutate(data + start[text], bytes, room) : below(bytes + 1); /* or cut */
    memcpy(data + field[text], &bytes, sizeof bytes);
    if (ends) return start[text] + bytes;
    memset(data + start[text] + bytes, 0, room - bytes);
    return start[SECTIONS];
}

static void change_constants(uint8_t *data, const size_t *start) {
    size_t bytes = start[SECTIONS] - start[CONSTANTS];
    if (!bytes) return;
    bytes = LLVMFuzzerMutate(data + start[CONSTANTS], bytes, bytes);
    memset(data + start[CONSTANTS] + bytes, 0, start[SECTIONS] - start[CONSTANTS] - bytes);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    size_t start[SECTIONS + 1];
    state = seed | 1;
    below(2);
    uint32_t kind = below(16);
    if (size < sizeof(struct bnnf_header_record) || kind == 0) {
        size = LLVMFuzzerMutate(data, size, max_size);
    } else {
        find_sections(data, size, start);
        if (kind < 4)
            size = change_text(data, start, kind < 2 ? METADATA : kind == 2 ? CLASSES : NAMES, max_size);
        else if (kind == 4) change_constants(data, start);
        else
            for (uint32_t n = 1 + below(3) / 2 * below(4); n; n--) {
                if (kind < 6) change_field(data, 24, 64, 40);
                else if (kind < 10) change_field(data, start[TENSORS], start[OPS], sizeof(struct bnnf_tensor_record));
                else change_field(data, start[OPS], start[NAMES], sizeof(struct bnnf_op_record));
            }
    }
    if (below(32)) seal(data, size);
    return size;
}

#endif
