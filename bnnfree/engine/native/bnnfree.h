/* bnnfree: runs bit-packed binary networks (.bnnf). C11 and libm; threads behind BNNF_NO_THREADS.

   A whole program: classify one image of raw pixels.

       #include <stdio.h>
       #include <stdlib.h>
       #include "bnnfree.h"

       int main(int argc, char **argv) {
           char message[256];
           bnnf_model *model;
           if (argc < 3 || bnnf_model_open(&model, argv[1], NULL, message, sizeof message))
               return fprintf(stderr, "%s\n", argc < 3 ? "usage: minimal MODEL PIXELS" : message), 1;
           bnnf_info info = bnnf_model_info(model);
           unsigned char *pixels = malloc(info.image_bytes);
           float *logits = malloc(info.output_values * sizeof *logits);
           FILE *file = fopen(argv[2], "rb");
           if (!file || fread(pixels, 1, info.image_bytes, file) != info.image_bytes)
               return fprintf(stderr, "%s: expected %zu bytes of pixels\n", argv[2], info.image_bytes), 1;
           bnnf_session *session;
           if (bnnf_session_create(&session, model, NULL, 0, message, sizeof message))
               return fprintf(stderr, "%s\n", message), 1;
           bnnf_run(session, pixels, 1, logits);
           size_t best = 0;
           for (size_t i = 1; i < info.output_values; i++) if (logits[i] > logits[best]) best = i;
           printf("%s\n", bnnf_class_name(model, best));
           bnnf_session_free(session);
           bnnf_model_free(model);
           return 0;
       }

   Threads: a model does not change once made; any number of threads may make sessions of it and read it. A session
   is for one thread at a time. Nothing is allocated by bnnf_run.
   Results are the same bits for every CPU, instruction set and number of threads. */

#ifndef BNNFREE_H
#define BNNFREE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32) && defined(BNNF_SHARED)
#define BNNF_API __declspec(dllexport)
#elif defined(__GNUC__)
#define BNNF_API __attribute__((visibility("default")))
#else
#define BNNF_API
#endif

typedef struct bnnf_model bnnf_model;
typedef struct bnnf_session bnnf_session;

/* What every function that can fail returns; the rules of the format are those of FORMAT.md. */
enum bnnf_status {
    BNNF_OK = 0,
    BNNF_ERROR_ARGUMENT = 1, /* a null pointer, an unknown instruction set, an arena that is too small */
    BNNF_ERROR_MEMORY = 2,   /* malloc said no */
    BNNF_ERROR_FILE = 3,     /* a file that cannot be read */
    BNNF_ERROR_MAGIC = 10,
    BNNF_ERROR_VERSION,
    BNNF_ERROR_SIZE,
    BNNF_ERROR_CHECKSUM,
    BNNF_ERROR_LIMIT,
    BNNF_ERROR_LAYOUT,
    BNNF_ERROR_TEXT,
    BNNF_ERROR_TENSOR,
    BNNF_ERROR_CONSTANT,
    BNNF_ERROR_OP,
    BNNF_ERROR_GRAPH,
    BNNF_ERROR_PLAN
};

/* How a model is made; start from bnnf_default_params(), so that fields to come have their defaults. */
typedef struct bnnf_params {
    const char *isa; /* instruction set to use: a name of bnnf_isa_name; NULL: the best of this CPU */
    int threads;     /* of a session; 1 by default */
    int keep;        /* 1: every activation has memory of its own and can be read after a run */
    int profile;     /* 1: the time of every op is taken */
} bnnf_params;

typedef struct bnnf_info {
    uint32_t height, width, channels; /* of an image: uint8 [height][width][channels] */
    uint32_t output_height, output_width, output_channels;
    size_t image_bytes;   /* of one image */
    size_t output_values; /* floats of one result */
    size_t arena_bytes;   /* memory that a session works in */
    size_t session_bytes; /* all that a session allocates, arena included; less arena_bytes if it is given one. The
                             stacks of its threads come on top */
    size_t packed_bytes;  /* weights as the kernels want them, made with the model */
    uint32_t ops, tensors, classes;
    int threads;
    const char *isa;
} bnnf_info;

BNNF_API bnnf_params bnnf_default_params(void);

/* Instruction sets that this CPU runs, the best first: "avx512", "avx512base" (without VPOPCNTDQ and VNNI),
   "avx2", "scalar"; NULL from the first i beyond. */
BNNF_API const char *bnnf_isa_name(int i);

/* Makes a model of the bytes of a file, which must stay where they are, unchanged, until the model is freed: a mapped
   file that is written to gives other results, one that is cut short ends the process. params may be NULL;
   message (may be NULL) receives one line that says what is wrong. */
BNNF_API int bnnf_model_create(bnnf_model **model, const void *data, size_t size, const bnnf_params *params,
                               char *message, size_t message_size);
/* The same for a file, which is read into memory. */
BNNF_API int bnnf_model_open(bnnf_model **model, const char *path, const bnnf_params *params, char *message,
                             size_t message_size);
BNNF_API void bnnf_model_free(bnnf_model *model);

BNNF_API bnnf_info bnnf_model_info(const bnnf_model *model);
/* UTF-8, ended by 0; "" beyond the last class. */
BNNF_API const char *bnnf_class_name(const bnnf_model *model, size_t index);
/* Value of a key of the file's metadata, UTF-8, ended by 0, such as "mean"; NULL where there is none. FORMAT.md names
   the keys that the exporter writes. */
BNNF_API const char *bnnf_metadata(const bnnf_model *model, const char *key);
/* Name of the kernel that runs op `index`: op, instruction set, tile. */
BNNF_API const char *bnnf_kernel_name(const bnnf_model *model, uint32_t index);

/* A session works in `arena`, bnnf_info.arena_bytes of memory aligned to 64 that outlives it; NULL: it takes its own. */
BNNF_API int bnnf_session_create(bnnf_session **session, const bnnf_model *model, void *arena, size_t arena_bytes,
                                 char *message, size_t message_size);
BNNF_API void bnnf_session_free(bnnf_session *session);

/* Runs `count` images, one after the other: pixels uint8 [count][height][width][channels] -> output float32
   [count][output_height][output_width][output_channels]. */
BNNF_API int bnnf_run(bnnf_session *session, const uint8_t *pixels, size_t count, float *output);

/* With params.profile: nanoseconds that op `index` took in the runs since the session was made. */
BNNF_API uint64_t bnnf_op_nanoseconds(const bnnf_session *session, uint32_t index);

/* With params.keep: tensor `index` as the last image left it, in the file's layout; its size, or 0 where there is
   none. */
BNNF_API size_t bnnf_read_activation(const bnnf_session *session, uint32_t index, void *bytes, size_t size);

#ifdef __cplusplus
}
#endif
#endif
