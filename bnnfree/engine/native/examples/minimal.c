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
