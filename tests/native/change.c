/* Bytes that another process writes to while a model of them is made: change FILE FROM COUNT FILL. One run for each
   allocation of bnnf_model_create, during which COUNT bytes from FROM on become the byte FILL. A line for each: the
   bytes asked for, the status, and how many class names there are that the file did not hold. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bnnfree.h"

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);

static unsigned char *bytes;
static size_t from, count, asked;
static int fill, left;

void *__wrap_malloc(size_t size) {
    if (left && --left == 0) {
        memset(bytes + from, fill, count);
        asked = size;
    }
    return __real_malloc(size);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    FILE *file = fopen(argv[1], "rb");
    if (!file || fseek(file, 0, SEEK_END)) return 2;
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *good = __real_malloc(size), *memory = __real_malloc(size + 64);
    bytes = (unsigned char *)memory + 64 - (size_t)memory % 64;
    if (fread(good, 1, size, file) != size) return 2;
    fclose(file);
    from = strtoul(argv[2], NULL, 10), count = strtoul(argv[3], NULL, 10), fill = atoi(argv[4]);
    bnnf_model *expected, *model;
    char message[256];
    if (bnnf_model_open(&expected, argv[1], NULL, message, sizeof message)) return 2;
    for (int n = 1; left == 0; n++) {
        memcpy(bytes, good, size);
        left = n;
        int status = bnnf_model_create(&model, bytes, size, NULL, message, sizeof message), other = 0;
        if (left) {
            bnnf_model_free(model);
            break;
        }
        for (size_t i = 0; !status && i < bnnf_model_info(expected).classes; i++)
            other += strcmp(bnnf_class_name(model, i), bnnf_class_name(expected, i)) != 0;
        printf("%zu %d %d\n", asked, status, other);
        bnnf_model_free(model);
    }
    bnnf_model_free(expected);
    free(memory);
    free(good);
    return 0;
}
