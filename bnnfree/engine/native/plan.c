/* What is worked out once per model: which taps of a window lie inside the image where, constants with their channels
   padded, and where the activations live. */

#include <stdlib.h>
#include <string.h>

#include "model.h"

static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

static int64_t ceil_divide(int64_t a, int64_t b) { return -floor_divide(-a, b); }

static int64_t clamp(int64_t value, int64_t most) { return value < 0 ? 0 : value > most ? most : value; }

bnnf__side bnnf__side_of(const bnnf__op *op, int axis) {
    const struct bnnf_op_record *r = &op->record;
    bnnf__side s =
        axis ? (bnnf__side){op->width, r->kernel_w, r->stride_w, r->padding_w, r->after_w, r->dilation_w, 0}
             : (bnnf__side){op->height, r->kernel_h, r->stride_h, r->padding_h, r->after_h, r->dilation_h, 0};
    int64_t reach = s.size + s.padding + s.after, span = s.dilation * (s.kernel - 1) + 1;
    s.positions = floor_divide(reach - span, s.stride) + 1;
    if (r->ceil && (s.positions - 1) * s.stride + span < reach && s.positions * s.stride < s.size + s.padding)
        s.positions++;
    return s;
}

/* At position r the taps from ceil((padding - r stride) / dilation) on are not before the image, and those from
   ceil((size + padding - r stride) / dilation) on are behind it. Both fall as r rises, so that a band ends where the
   first of the two falls below what it is; there are at most 2 kernel + 2 bands, whatever the number of positions. */
uint32_t bnnf__bands(const bnnf__side *side, bnnf__band *bands, uint32_t *classes) {
    const int64_t d = side->dilation, s = side->stride, near = side->padding, far = side->size + side->padding;
    bnnf__band last = {0, 0, 0, 0};
    uint32_t count = 0, some = 0, none = 0;
    for (int64_t r = 0; r < side->positions;) {
        int64_t first = clamp(ceil_divide(near - r * s, d), side->kernel);
        int64_t behind = clamp(ceil_divide(far - r * s, d), side->kernel), next = side->positions;
        if (first && ceil_divide(near - (first - 1) * d, s) < next) next = ceil_divide(near - (first - 1) * d, s);
        if (behind && ceil_divide(far - (behind - 1) * d, s) < next) next = ceil_divide(far - (behind - 1) * d, s);
        bnnf__band band = {(uint32_t)r, (uint32_t)next, (uint32_t)first, (uint32_t)behind};
        if (first >= behind) band.first = band.behind = 0;
        if (count && last.behind == 0 && band.behind == 0) { /* no tap inside, as in the band before */
            band.from = last.from;
            count--;
        } else if (band.behind) {
            some++;
        } else {
            none = 1;
        }
        if (bands) bands[count] = band;
        count++;
        last = band;
        r = next;
    }
    if (classes) *classes = some + none;
    return count;
}

/* The border class of each position: classes are numbered as they first occur, "no tap inside" is one. */
static void fill_classes(const bnnf__band *bands, uint32_t count, uint32_t *class_of) {
    uint32_t next = 0, none = BNNF__NONE;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = bands[i].behind || none == BNNF__NONE ? next++ : none;
        if (!bands[i].behind) none = number;
        for (uint32_t r = bands[i].from; r < bands[i].to; r++) class_of[r] = number;
    }
}

/* Bands, and of pixel_conv2d classes; places them from `memory` on, or counts alone where that is NULL. */
static uint64_t plan_borders(bnnf__op *op, char *memory) {
    uint64_t bytes = 0;
    for (int axis = 0; axis < 2; axis++) {
        bnnf__side side = bnnf__side_of(op, axis);
        bnnf__band *bands = memory ? (bnnf__band *)(void *)(memory + bytes) : NULL;
        uint32_t count = bnnf__bands(&side, bands, NULL), *class_of = NULL;
        bytes += count * sizeof *bands;
        if (op->row_classes) {
            if (memory) {
                class_of = (uint32_t *)(void *)(memory + bytes);
                fill_classes(bands, count, class_of);
            }
            bytes += (uint64_t)side.positions * sizeof *class_of;
        }
        if (axis) op->column_bands = bands, op->column_band_count = count, op->column_class = class_of;
        else op->row_bands = bands, op->row_band_count = count, op->row_class = class_of;
    }
    return bytes;
}

static int plan_all_borders(bnnf_model *model, const bnnf__message *message) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < model->op_count; i++)
        if (model->ops[i].banded) bytes += plan_borders(&model->ops[i], NULL);
    if (!bytes) return BNNF_OK;
    model->borders = bnnf__alloc(bytes);
    if (!model->borders) return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    char *at = model->borders;
    for (uint32_t i = 0; i < model->op_count; i++)
        if (model->ops[i].banded) at += plan_borders(&model->ops[i], at);
    return BNNF_OK;
}

/* -- constants */

/* One value per channel, with the channels padded; a constant that ops share is copied once. */
typedef struct padder {
    bnnf_model *model;
    const void **copies; /* of each tensor; NULL: not yet */
    char *at;            /* NULL while counting */
    uint64_t bytes;
} padder;

static const void *padded(padder *p, uint32_t index) {
    if (index == BNNF__NONE) return NULL;
    const bnnf__tensor *t = &p->model->tensors[index];
    if (t->shape[0] % 64 == 0) return t->data;
    if (!p->copies[index]) {
        size_t size = (t->shape[0] + (size_t)63) / 64 * 64 * 4;
        p->copies[index] = t->data;
        p->bytes += size;
        if (p->at) {
            memset(p->at, 0, size);
            memcpy(p->at, t->data, t->bytes);
            p->copies[index] = p->at;
            p->at += size;
        }
    }
    return p->copies[index];
}

/* Of a second activation of the epilogue: its channels, and the floats from one output pixel's to the next. */
static void second(const bnnf__op *op, const bnnf__tensor *t, uint32_t *channels, uint32_t *step) {
    const int same = t->shape[0] == op->out_height && t->shape[1] == op->out_width;
    *channels = t->shape[2];
    *step = same ? t->shape[2] : 0;
}

static void plan_epilogue(padder *p, bnnf__op *op) {
    const struct bnnf_op_record *r = &op->record;
    const bnnf__tensor *tensors = p->model->tensors;
    bnnf__epilogue *e = &op->epilogue;
    e->lanes = op->out_words * 64;
    e->scale = padded(p, r->scale);
    if (op->row_classes) op->pixel_bias = tensors[r->bias].data;
    else e->bias = padded(p, r->bias);
    e->slope = padded(p, r->slope);
    e->low = padded(p, r->low);
    e->high = padded(p, r->high);
    e->scale_after = padded(p, r->scale_after);
    e->bias_after = padded(p, r->bias_after);
    e->other_last = (int)r->other_last;
    if (r->threshold != BNNF__NONE && tensors[r->threshold].dtype == BNNF_DTYPE_I32)
        e->sum_threshold = padded(p, r->threshold);
    else e->threshold = padded(p, r->threshold);
    if (r->flip != BNNF__NONE) e->flip = tensors[r->flip].data;
    if (r->other != BNNF__NONE) second(op, &tensors[r->other], &e->other_channels, &e->other_step);
    if (r->factor != BNNF__NONE) second(op, &tensors[r->factor], &e->factor_channels, &e->factor_step);
}

static int plan_epilogues(bnnf_model *model, const bnnf__message *message) {
    padder p = {.model = model, .copies = calloc(model->tensor_count, sizeof *p.copies)};
    if (!p.copies) return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    for (uint32_t i = 0; i < model->op_count; i++) plan_epilogue(&p, &model->ops[i]);
    model->padded = p.at = bnnf__alloc(p.bytes);
    if (p.at) {
        memset(p.copies, 0, model->tensor_count * sizeof *p.copies);
        for (uint32_t i = 0; i < model->op_count; i++) plan_epilogue(&p, &model->ops[i]);
    }
    free(p.copies);
    return model->padded ? BNNF_OK : bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
}

int bnnf__plan_ops(bnnf_model *model, const bnnf__message *message) {
    int status = plan_all_borders(model, message);
    return status ? status : plan_epilogues(model, message);
}

/* -- the arena */

/* Activations lie where the file's own plan, which was checked, puts them; with `keep` each has memory of its own. */
int bnnf__plan_arena(bnnf_model *model, const bnnf__message *message) {
    uint64_t bytes = model->keep ? 0 : model->file_arena, scratch = 0;
    for (uint32_t i = 0; i < model->tensor_count && model->keep; i++) {
        bnnf__tensor *t = &model->tensors[i];
        if (t->place != BNNF_PLACE_ACTIVATION) continue;
        t->offset = (size_t)bytes;
        bytes += bnnf__align(t->bytes);
    }
    for (uint32_t i = 0; i < model->op_count; i++)
        if (model->ops[i].scratch_bytes > scratch) scratch = model->ops[i].scratch_bytes;
    scratch = (scratch + BNNF__ALIGN - 1) / BNNF__ALIGN * BNNF__ALIGN;
    if (bytes + scratch * (uint64_t)model->threads > SIZE_MAX / 2) /* the rest of a session comes on top */
        return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    model->activation_bytes = (size_t)bytes;
    model->scratch_bytes = (size_t)scratch;
    model->arena_bytes = (size_t)(bytes + scratch * (uint64_t)model->threads);
    return BNNF_OK;
}
