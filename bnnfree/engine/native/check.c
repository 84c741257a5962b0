/* What must hold of a model beyond its layout: steps 5 to 7 of the order in FORMAT.md. What the ops' fields hold beside
   their record is filled on the way. After it a kernel may trust every number. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

enum field {
    INPUT = 1, OTHER, FACTOR, REAL, BITS, WEIGHTS, SCALE, BIAS, SLOPE, LOW, HIGH, SCALE_AFTER, BIAS_AFTER, THRESHOLD,
    FLIP, WINDOW, PAD_VALUE = WINDOW + 11, OTHER_LAST = WINDOW + 13, MODE, SIZE_H, SIZE_W, REST, FIELDS = REST + 7
};

static const char *const field_name[REST] = {
    "code", "input", "other", "factor", "real", "bits", "weights", "scale", "bias", "slope", "low", "high",
    "scale_after", "bias_after", "threshold", "flip", "kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h",
    "padding_w", "after_h", "after_w", "dilation_h", "dilation_w", "groups", "pad_value", "ceil", "other_last", "mode",
    "size_h", "size_w"};
_Static_assert(sizeof(struct bnnf_op_record) == FIELDS * sizeof(uint32_t), "a record is its fields, 32 bits each");

#define BIT(n) (1u << (n))
#define F32 BIT(BNNF_DTYPE_F32)
#define SIGNS BIT(BNNF_DTYPE_BITS)
#define I8 BIT(BNNF_DTYPE_I8)
#define U8 BIT(BNNF_DTYPE_U8)
#define I32 BIT(BNNF_DTYPE_I32)
#define EPILOGUE \
    (BIT(OTHER) | BIT(FACTOR) | BIT(REAL) | BIT(BITS) | BIT(SCALE) | BIT(BIAS) | BIT(SLOPE) | BIT(LOW) | BIT(HIGH) | \
     BIT(SCALE_AFTER) | BIT(BIAS_AFTER) | BIT(THRESHOLD) | BIT(FLIP))

#define ALL_WINDOW (BIT(13) - 1)
#define WINDOW_OF(f) BIT((f) - WINDOW)

/* As OPS in schema.py: fields that an op needs and those it may have, dtypes of its input and of its weights, fields of
   its window (bit 0: kernel_h), how many modes it has, whether it has a size, and whether it moves values. */
static const struct rule {
    const char *name;
    uint32_t needs, may, inputs, weights, window, modes;
    int sized, moves;
} rules[BNNF_OP_END] = {
    [BNNF_OP_POINTWISE] = {"pointwise", 0, EPILOGUE, F32 | SIGNS | U8, 0, 0, 1, 0, 0},
    [BNNF_OP_BINARY_CONV2D] = {"binary_conv2d", BIT(WEIGHTS), EPILOGUE, SIGNS, SIGNS, ALL_WINDOW, 1, 0, 0},
    [BNNF_OP_PIXEL_CONV2D] = {"pixel_conv2d", BIT(WEIGHTS) | BIT(SCALE) | BIT(BIAS), EPILOGUE, U8, I8, ALL_WINDOW, 1, 0,
                              0},
    [BNNF_OP_CONV2D] = {"conv2d", BIT(WEIGHTS), EPILOGUE, F32, F32 | I8 | SIGNS, ALL_WINDOW, 1, 0, 0},
    [BNNF_OP_MAX_POOL2D] = {"max_pool2d", 0, BIT(REAL) | BIT(BITS), F32 | SIGNS, 0, ALL_WINDOW, 1, 0, 1},
    [BNNF_OP_AVG_POOL2D] = {"avg_pool2d", BIT(REAL), 0, F32, 0, ALL_WINDOW, 1, 0, 0},
    [BNNF_OP_CONCAT] = {"concat", BIT(OTHER), BIT(REAL) | BIT(BITS), F32 | SIGNS, 0, 0, 1, 0, 1},
    [BNNF_OP_SOFTMAX] = {"softmax", BIT(REAL), 0, F32, 0, 0, 1, 0, 0},
    [BNNF_OP_GROUP_NORM] = {"group_norm", BIT(WEIGHTS), EPILOGUE, F32, F32, 0, 1, 0, 0},
    [BNNF_OP_RMS_NORM] = {"rms_norm", BIT(WEIGHTS), EPILOGUE, F32, F32, 0, 1, 0, 0},
    [BNNF_OP_CHANNEL_NORM] = {"channel_norm", BIT(WEIGHTS), EPILOGUE, F32, F32, 0, 2, 0, 0},
    [BNNF_OP_FUNCTION] = {"function", 0, EPILOGUE, F32, 0, 0, 9, 0, 0},
    [BNNF_OP_CONV_TRANSPOSE2D] = {"conv_transpose2d", BIT(WEIGHTS), EPILOGUE, F32, F32,
                                  (BIT(6) - 1) | BIT(8) | BIT(9) | BIT(10), 1, 1, 0},
    [BNNF_OP_TAKE] = {"take", BIT(WEIGHTS), BIT(REAL) | BIT(BITS), F32 | SIGNS, I32, 0, 1, 0, 1},
    [BNNF_OP_CROP] = {"crop", 0, BIT(REAL) | BIT(BITS), F32 | SIGNS, 0, BIT(2) | BIT(3) | BIT(4) | BIT(5), 1, 1, 1},
    [BNNF_OP_PAD] = {"pad", 0, BIT(REAL) | BIT(BITS), F32 | SIGNS, 0,
                     BIT(4) | BIT(5) | BIT(6) | BIT(7) | WINDOW_OF(PAD_VALUE), 4, 0, 1},
    [BNNF_OP_RESIZE] = {"resize", BIT(REAL), 0, F32, 0, 0, 3, 1, 0},
    [BNNF_OP_PIXEL_SHUFFLE] = {"pixel_shuffle", BIT(REAL), 0, F32, 0, BIT(2) | BIT(3), 2, 0, 0},
    [BNNF_OP_REDUCE_CHANNELS] = {"reduce_channels", BIT(REAL), 0, F32, 0, 0, 3, 0, 0},
    [BNNF_OP_XOR] = {"xor", BIT(OTHER) | BIT(BITS), 0, SIGNS, 0, 0, 1, 0, 1},
};

enum mark { USED = 1, HAS_INFINITY = 2, HAS_NAN = 4 };

typedef struct checker {
    bnnf_model *model;
    const bnnf__message *message;
    uint8_t *marks; /* of each tensor */
    uint64_t work;
    uint32_t number; /* of the op looked at */
    bnnf__op *op;
    const struct rule *rule;
    uint32_t field[FIELDS]; /* its record */
    bnnf__side side[2];
} checker;

#define FAIL(c, status, format, ...) \
    bnnf__fail((c)->message, status, "op %u (%s): " format, (unsigned)(c)->number, (c)->rule->name, __VA_ARGS__)

/* a * b, UINT64_MAX where that is more than 64 bits hold. */
static uint64_t times(uint64_t a, uint64_t b) { return b && a > UINT64_MAX / b ? UINT64_MAX : a * b; }

static int pooling(const checker *c) {
    return c->field[0] == BNNF_OP_MAX_POOL2D || c->field[0] == BNNF_OP_AVG_POOL2D;
}

/* -- tensors */

static int check_tensors(const bnnf_model *model, const bnnf__message *message) {
    const bnnf__tensor *image = &model->tensors[model->input], *output = &model->tensors[model->output];
    for (uint32_t i = 0; i < model->tensor_count; i++)
        if ((model->tensors[i].place == BNNF_PLACE_IMAGE) != (i == model->input))
            return bnnf__fail(message, BNNF_ERROR_TENSOR, "tensor %u: expected the input alone to be an image.",
                              (unsigned)i);
    if (image->dtype != BNNF_DTYPE_U8 || image->rank != 3 || image->offset)
        return bnnf__fail(message, BNNF_ERROR_TENSOR, "tensor %u: expected u8 [height, width, channels] as the image.",
                          (unsigned)model->input);
    if (output->place != BNNF_PLACE_ACTIVATION || output->dtype != BNNF_DTYPE_F32)
        return bnnf__fail(message, BNNF_ERROR_TENSOR, "tensor %u: expected an activation of f32 as the output.",
                          (unsigned)model->output);
    if (model->class_count && model->class_count != output->shape[output->rank - 1])
        return bnnf__fail(message, BNNF_ERROR_TENSOR, "got %u class names for %u outputs.",
                          (unsigned)model->class_count, (unsigned)output->shape[output->rank - 1]);
    if (model->file_arena > BNNF_MAX_BYTES)
        return bnnf__fail(message, BNNF_ERROR_LIMIT, "got an arena of %zu bytes, expected up to %u.",
                          model->file_arena, (unsigned)BNNF_MAX_BYTES);
    for (uint32_t i = 0; i < model->tensor_count; i++) {
        const bnnf__tensor *t = &model->tensors[i];
        if (t->place == BNNF_PLACE_CONSTANT) continue;
        uint64_t values = times(times(t->shape[0], t->shape[1]), times(t->shape[2], t->shape[3]));
        if (values > BNNF_MAX_VALUES)
            return bnnf__fail(message, BNNF_ERROR_LIMIT, "tensor %u: got %llu values, expected up to %u.", (unsigned)i,
                              (unsigned long long)values, (unsigned)BNNF_MAX_VALUES);
        if (t->place == BNNF_PLACE_ACTIVATION &&
            (t->rank != 3 || (t->dtype != BNNF_DTYPE_F32 && t->dtype != BNNF_DTYPE_BITS)))
            return bnnf__fail(message, BNNF_ERROR_TENSOR, "tensor %u: got dtype %u, rank %u for an activation.",
                              (unsigned)i, t->dtype, t->rank);
    }
    return BNNF_OK;
}

/* Bits above the last channel must be 0: a sum of signs would count them. Marks infinities and NaN. */
static int check_constants(checker *c) {
    for (uint32_t i = 0; i < c->model->tensor_count; i++) {
        const bnnf__tensor *t = &c->model->tensors[i];
        if (t->place != BNNF_PLACE_CONSTANT) continue;
        uint32_t last = t->shape[t->rank - 1];
        if (t->dtype == BNNF_DTYPE_BITS && last % 64) {
            const uint64_t *words = t->data;
            size_t row = (last + 63) / 64, count = t->bytes / 8;
            for (size_t k = row - 1; k < count; k += row)
                if (words[k] >> last % 64)
                    return bnnf__fail(c->message, BNNF_ERROR_CONSTANT, "tensor %u: has bits above its last channel.",
                                      (unsigned)i);
        } else if (t->dtype == BNNF_DTYPE_F32) {
            const float *values = t->data;
            for (size_t k = 0; k < t->bytes / 4; k++)
                if (!isfinite(values[k])) c->marks[i] |= isnan(values[k]) ? HAS_NAN : HAS_INFINITY;
        }
    }
    return BNNF_OK;
}

/* -- the fields of an op */

static uint32_t dtypes_of(const checker *c, int field) {
    switch (field) {
    case INPUT: return c->rule->inputs;
    case OTHER:
        if (c->field[0] == BNNF_OP_CONCAT || c->field[0] == BNNF_OP_XOR)
            return BIT(c->model->tensors[c->field[INPUT]].dtype);
        return F32;
    case BITS:
    case FLIP: return SIGNS;
    case WEIGHTS: return c->rule->weights;
    case THRESHOLD: return c->field[0] == BNNF_OP_BINARY_CONV2D ? F32 | I32 : F32;
    default: return F32;
    }
}

static int check_fields(checker *c) {
    const bnnf__tensor *tensors = c->model->tensors;
    const uint32_t *field = c->field;
    uint32_t needs = c->rule->needs | BIT(INPUT), allowed = needs | c->rule->may;
    for (int f = INPUT; f < WINDOW; f++) {
        if (field[f] == BNNF__NONE) {
            if (needs & BIT(f)) return FAIL(c, BNNF_ERROR_OP, "lacks its %s.", field_name[f]);
            continue;
        }
        if (!(allowed & BIT(f)))
            return FAIL(c, BNNF_ERROR_OP, "has a %s, which this op does not take.", field_name[f]);
        if (field[f] >= c->model->tensor_count)
            return FAIL(c, BNNF_ERROR_OP, "got tensor %u of %u as %s.", (unsigned)field[f],
                        (unsigned)c->model->tensor_count, field_name[f]);
        const bnnf__tensor *t = &tensors[field[f]];
        int fits = f > BITS ? t->place == BNNF_PLACE_CONSTANT
                            : t->place == BNNF_PLACE_ACTIVATION || (f == INPUT && t->place == BNNF_PLACE_IMAGE);
        if (!fits || !(dtypes_of(c, f) & BIT(t->dtype)))
            return FAIL(c, BNNF_ERROR_OP, "its %s is of another place or dtype (%u, %u).", field_name[f], t->place,
                        t->dtype);
    }
    const int results = (field[REAL] != BNNF__NONE) + (field[BITS] != BNNF__NONE);
    if (!results || (c->rule->moves && results > 1))
        return FAIL(c, BNNF_ERROR_OP, "writes %s.", results ? "two results" : "nothing");
    if (c->rule->moves && (field[BITS] == BNNF__NONE) == (tensors[field[INPUT]].dtype == BNNF_DTYPE_BITS))
        return FAIL(c, BNNF_ERROR_OP, "writes %s than that of its input.", "another dtype");
    if (field[BITS] == BNNF__NONE && (field[THRESHOLD] != BNNF__NONE || field[FLIP] != BNNF__NONE))
        return FAIL(c, BNNF_ERROR_OP, "has a %s but writes no bits.", "threshold");
    if (field[THRESHOLD] != BNNF__NONE && tensors[field[THRESHOLD]].dtype == BNNF_DTYPE_I32)
        for (int f = OTHER; f < THRESHOLD; f++)
            if (f != BITS && f != WEIGHTS && field[f] != BNNF__NONE)
                return FAIL(c, BNNF_ERROR_OP, "has a threshold of its sum, and %s as well.", field_name[f]);
    return BNNF_OK;
}

/* The fields that are neither tensors nor a window; those that are kept for later stand in file.c. */
static int check_options(checker *c) {
    const uint32_t *field = c->field;
    const int adds = field[OTHER] != BNNF__NONE && c->rule->may & BIT(OTHER);
    if (field[OTHER_LAST] > 1 || (field[OTHER_LAST] && !adds))
        return FAIL(c, BNNF_ERROR_OP, "got other_last %u, expected 0, or 1 where the epilogue adds an other.",
                    (unsigned)field[OTHER_LAST]);
    if (field[MODE] >= c->rule->modes)
        return FAIL(c, BNNF_ERROR_OP, "got mode %u, expected 0 to %u.", (unsigned)field[MODE],
                    (unsigned)c->rule->modes - 1);
    for (int f = SIZE_H; f <= SIZE_W; f++) {
        if (!c->rule->sized && field[f])
            return FAIL(c, BNNF_ERROR_OP, "has a %s, which this op does not take.", field_name[f]);
        if (c->rule->sized && (!field[f] || field[f] > BNNF_MAX_SIDE))
            return FAIL(c, BNNF_ERROR_OP, "got %s %u, expected 1 to %u.", field_name[f], (unsigned)field[f],
                        (unsigned)BNNF_MAX_SIDE);
    }
    return BNNF_OK;
}

static int check_window(checker *c) {
    const uint32_t *field = c->field;
    const struct bnnf_op_record *w = &c->op->record;
    for (int f = WINDOW; f < OTHER_LAST; f++) {
        if (!(c->rule->window & WINDOW_OF(f))) {
            if (field[f]) return FAIL(c, BNNF_ERROR_OP, "has a %s, which this op does not take.", field_name[f]);
            continue;
        }
        if (f >= PAD_VALUE) continue;
        if (field[f] > BNNF_MAX_SIDE)
            return FAIL(c, BNNF_ERROR_LIMIT, "got %s %u, expected up to %u.", field_name[f], (unsigned)field[f],
                        (unsigned)BNNF_MAX_SIDE);
        if (!field[f] && (f < WINDOW + 4 || f > WINDOW + 7)) /* a padding may be 0 */
            return FAIL(c, BNNF_ERROR_OP, "got %s 0, expected 1 or more.", field_name[f]);
    }
    if (w->pad_value < -1 || w->pad_value > 1 || w->ceil > 1)
        return FAIL(c, BNNF_ERROR_OP, "got pad_value %d and ceil %u, expected -1 to 1 and 0 or 1.", (int)w->pad_value,
                    (unsigned)w->ceil);
    if ((uint64_t)w->kernel_h * w->kernel_w > BNNF_MAX_TAPS)
        return FAIL(c, BNNF_ERROR_LIMIT, "got a window of %u x %u, expected up to %u taps.", (unsigned)w->kernel_h,
                    (unsigned)w->kernel_w, (unsigned)BNNF_MAX_TAPS);
    if ((pooling(c) || w->code == BNNF_OP_PIXEL_CONV2D) && (w->groups != 1 || w->pad_value))
        return FAIL(c, BNNF_ERROR_OP, "got %u groups and pad_value %d, expected 1 and 0.", (unsigned)w->groups,
                    (int)w->pad_value);
    const uint32_t rows = w->padding_h > w->after_h ? w->padding_h : w->after_h;
    const uint32_t columns = w->padding_w > w->after_w ? w->padding_w : w->after_w;
    if (pooling(c) && (2 * rows > w->kernel_h || 2 * columns > w->kernel_w))
        return FAIL(c, BNNF_ERROR_OP, "got padding %u, %u, expected up to half its kernel.", (unsigned)rows,
                    (unsigned)columns);
    if (w->ceil && !pooling(c)) return FAIL(c, BNNF_ERROR_OP, "has %s, which this op does not take.", "ceil");
    if (w->code == BNNF_OP_PAD && w->mode && w->pad_value)
        return FAIL(c, BNNF_ERROR_OP, "has a %s, which its mode does not take.", "pad_value");
    return BNNF_OK;
}

static int check_reads(checker *c) {
    for (int f = INPUT; f <= FACTOR; f++) {
        uint32_t index = c->field[f];
        if (index == BNNF__NONE || index == c->model->input) continue;
        if (c->model->tensors[index].written == BNNF__NONE)
            return FAIL(c, BNNF_ERROR_GRAPH, "reads tensor %u, which no op before it writes.", (unsigned)index);
        c->model->tensors[index].last_read = c->number;
    }
    for (int f = INPUT; f < WINDOW; f++)
        if (f != REAL && f != BITS && c->field[f] != BNNF__NONE) c->marks[c->field[f]] |= USED;
    return BNNF_OK;
}

/* -- geometry */

/* Rows or columns of the input with its padding; a window that hangs over the far edge needs one stride more. */
static uint64_t padded(const checker *c, int axis) {
    const bnnf__side *s = &c->side[axis];
    return (uint64_t)(s->size + s->padding + s->after + (c->op->record.ceil ? s->stride : 0));
}

static int check_sides(checker *c) {
    bnnf__op *op = c->op;
    op->banded = 1;
    for (int axis = 0; axis < 2; axis++) c->side[axis] = bnnf__side_of(op, axis);
    uint64_t pixel = op->input_dtype == BNNF_DTYPE_BITS  ? (uint64_t)op->words * 8
                     : op->input_dtype == BNNF_DTYPE_F32 ? (uint64_t)op->channels * 4
                                                         : op->channels;
    if (times(padded(c, 0) * padded(c, 1), pixel) > BNNF_MAX_BYTES)
        return FAIL(c, BNNF_ERROR_LIMIT, "its padded input takes more than %u bytes.", (unsigned)BNNF_MAX_BYTES);
    for (int axis = 0; axis < 2; axis++) {
        const bnnf__side *s = &c->side[axis];
        if (pooling(c) && (s->padding || s->after) && s->dilation > s->size)
            return FAIL(c, BNNF_ERROR_GRAPH, "a window may see nothing of the image: its dilation is above %u.",
                        (unsigned)s->size);
        if (s->positions < 1)
            return FAIL(c, BNNF_ERROR_GRAPH, "got an image side of %u, smaller than its window.", (unsigned)s->size);
    }
    if (c->side[0].positions > (int64_t)BNNF_MAX_VALUES || c->side[1].positions > (int64_t)BNNF_MAX_VALUES)
        return FAIL(c, BNNF_ERROR_LIMIT, "its result has more than %u values.", (unsigned)BNNF_MAX_VALUES);
    op->out_height = (uint32_t)c->side[0].positions;
    op->out_width = (uint32_t)c->side[1].positions;
    return BNNF_OK;
}

static int check_weights(checker *c) {
    bnnf__op *op = c->op;
    const struct bnnf_op_record *r = &op->record;
    const bnnf__tensor *w = &c->model->tensors[r->weights];
    if (op->channels % r->groups)
        return FAIL(c, BNNF_ERROR_GRAPH, "got %u groups for %u channels.", (unsigned)r->groups, (unsigned)op->channels);
    op->group_channels = op->channels / r->groups;
    if (w->rank != 4 || w->shape[1] != r->kernel_h || w->shape[2] != r->kernel_w ||
        w->shape[3] != op->group_channels || w->shape[0] % r->groups)
        return FAIL(c, BNNF_ERROR_GRAPH, "got other weights than [outputs, %u, %u, %u].", (unsigned)r->kernel_h,
                    (unsigned)r->kernel_w, (unsigned)op->group_channels);
    op->outputs = w->shape[0];
    op->group_outputs = op->outputs / r->groups;
    op->group_words = (op->group_channels + 63) / 64;
    op->weights_dtype = w->dtype;
    op->weights = w->data;
    uint64_t terms = (uint64_t)r->kernel_h * r->kernel_w * op->group_channels;
    if (r->code == BNNF_OP_BINARY_CONV2D && terms > BNNF_MAX_SUM)
        return FAIL(c, BNNF_ERROR_LIMIT, "got %llu products in a sum, expected up to %u.", (unsigned long long)terms,
                    (unsigned)BNNF_MAX_SUM);
    if (r->code == BNNF_OP_PIXEL_CONV2D && terms * 255 * 128 >= UINT64_C(1) << 31)
        return FAIL(c, BNNF_ERROR_LIMIT, "got %llu products in a sum, which could leave 32 bits.",
                    (unsigned long long)terms);
    return BNNF_OK;
}

static int check_groups(checker *c) {
    const bnnf__tensor *eps = &c->model->tensors[c->op->record.weights];
    if (eps->rank != 1 || c->op->channels % eps->shape[0] ||
        (c->field[0] == BNNF_OP_CHANNEL_NORM && eps->shape[0] > 1))
        return FAIL(c, BNNF_ERROR_GRAPH, "got other weights than [groups], which divides %u channels.",
                    (unsigned)c->op->channels);
    c->op->group_channels = c->op->group_outputs = c->op->channels / eps->shape[0];
    c->op->group_words = (c->op->group_channels + 63) / 64;
    c->op->weights_dtype = eps->dtype;
    c->op->weights = eps->data;
    return BNNF_OK;
}

/* Positions at which a window has its first or its last tap outside. */
static int64_t border_positions(const bnnf__side *s) {
    int64_t near = (s->padding + s->stride - 1) / s->stride; /* the first that begins inside */
    int64_t reach = s->size + s->padding - s->dilation * (s->kernel - 1) - 1;
    int64_t far = reach < 0 ? 0 : reach / s->stride + 1; /* the first that ends behind the image */
    if (near > s->positions) near = s->positions;
    if (far < near) far = near;
    if (far > s->positions) far = s->positions;
    return near + s->positions - far;
}

static int check_border(checker *c) {
    uint32_t *classes[2] = {&c->op->row_classes, &c->op->column_classes};
    for (int axis = 0; axis < 2; axis++) {
        int64_t border = border_positions(&c->side[axis]);
        if (border > (int64_t)BNNF_MAX_BORDER)
            return FAIL(c, BNNF_ERROR_LIMIT, "got %llu positions at the border, expected up to %u.",
                        (unsigned long long)border, (unsigned)BNNF_MAX_BORDER);
        bnnf__bands(&c->side[axis], NULL, classes[axis]);
    }
    return BNNF_OK;
}

/* A second activation of the epilogue: the output's rows and columns, or one of each; channels that divide its own. */
static int check_second(const checker *c, int f) {
    if (c->field[f] == BNNF__NONE) return BNNF_OK;
    const bnnf__tensor *t = &c->model->tensors[c->field[f]];
    const int same = t->shape[0] == c->op->out_height && t->shape[1] == c->op->out_width;
    if ((!same && (t->shape[0] != 1 || t->shape[1] != 1)) || c->op->outputs % t->shape[2])
        return FAIL(c, BNNF_ERROR_GRAPH, "its %s is [%u, %u, %u], which does not fit.", field_name[f],
                    (unsigned)t->shape[0], (unsigned)t->shape[1], (unsigned)t->shape[2]);
    return BNNF_OK;
}

/* Does the bias of the op depend on the border class? */
static int is_dependent(const checker *c) {
    if (c->field[0] == BNNF_OP_PIXEL_CONV2D) return 1;
    return c->field[0] == BNNF_OP_BINARY_CONV2D && c->field[BIAS] != BNNF__NONE &&
           c->model->tensors[c->field[BIAS]].rank == 3;
}

static int check_epilogue(checker *c) {
    bnnf__op *op = c->op;
    int status;
    for (int f = SCALE; f < WINDOW; f++) {
        if (c->field[f] == BNNF__NONE) continue;
        const bnnf__tensor *t = &c->model->tensors[c->field[f]];
        const int dependent = f == BIAS && is_dependent(c);
        if (dependent && (status = check_border(c))) return status;
        int fits = dependent ? t->rank == 3 && t->shape[0] == op->row_classes && t->shape[1] == op->column_classes &&
                                   t->shape[2] == op->outputs
                             : t->rank == 1 && t->shape[0] == op->outputs;
        if (!fits) return FAIL(c, BNNF_ERROR_GRAPH, "its %s has another shape than its outputs.", field_name[f]);
    }
    if (op->row_classes && op->record.pad_value)
        return FAIL(c, BNNF_ERROR_GRAPH, "has a pad value, and a bias that depends on the %s.", "padding");
    if ((status = check_second(c, OTHER))) return status;
    return check_second(c, FACTOR);
}

/* -- shapes of what ops write */

static int check_joined(checker *c) {
    const bnnf__tensor *other = &c->model->tensors[c->field[OTHER]];
    bnnf__op *op = c->op;
    if (other->shape[0] != op->height || other->shape[1] != op->width ||
        (c->field[0] == BNNF_OP_XOR && other->shape[2] != op->channels))
        return FAIL(c, BNNF_ERROR_GRAPH, "its other is [%u, %u, %u], which does not fit.", (unsigned)other->shape[0],
                    (unsigned)other->shape[1], (unsigned)other->shape[2]);
    if (c->field[0] == BNNF_OP_CONCAT) op->outputs += other->shape[2];
    return BNNF_OK;
}

static int check_transposed(checker *c) {
    const struct bnnf_op_record *r = &c->op->record;
    const int64_t size[2] = {r->size_h, r->size_w}, side[2] = {c->op->height, c->op->width};
    const int64_t kernel[2] = {r->kernel_h, r->kernel_w}, stride[2] = {r->stride_h, r->stride_w};
    const int64_t padding[2] = {r->padding_h, r->padding_w}, dilation[2] = {r->dilation_h, r->dilation_w};
    for (int i = 0; i < 2; i++) {
        const int64_t whole = (side[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i];
        const int64_t most = stride[i] > dilation[i] ? stride[i] : dilation[i];
        if (size[i] < whole || size[i] - whole >= most)
            return FAIL(c, BNNF_ERROR_GRAPH, "got a size of %lld, expected %lld or up to %lld more.", (long long)size[i],
                        (long long)whole, (long long)most - 1);
    }
    c->op->out_height = r->size_h;
    c->op->out_width = r->size_w;
    return check_weights(c);
}

static int check_taken(checker *c) {
    const bnnf__tensor *t = &c->model->tensors[c->field[WEIGHTS]];
    const int32_t *index = t->data, least = c->op->input_dtype == BNNF_DTYPE_BITS ? 0 : -1;
    if (t->rank != 1) return FAIL(c, BNNF_ERROR_GRAPH, "got other weights than %s.", "[channels]");
    for (uint32_t i = 0; i < t->shape[0]; i++) {
        int32_t value;
        memcpy(&value, index + i, sizeof value);
        if (value < least || value >= (int64_t)c->op->channels)
            return FAIL(c, BNNF_ERROR_CONSTANT, "its weights name channel %ld of %u.", (long)value,
                        (unsigned)c->op->channels);
    }
    c->op->outputs = t->shape[0];
    c->op->weights = t->data;
    return BNNF_OK;
}

static int check_cropped(checker *c) {
    const struct bnnf_op_record *r = &c->op->record;
    if (r->padding_h + (uint64_t)r->stride_h * (r->size_h - 1) >= c->op->height ||
        r->padding_w + (uint64_t)r->stride_w * (r->size_w - 1) >= c->op->width)
        return FAIL(c, BNNF_ERROR_GRAPH, "its last row or column is beyond [%u, %u].", (unsigned)c->op->height,
                    (unsigned)c->op->width);
    c->op->out_height = r->size_h;
    c->op->out_width = r->size_w;
    return BNNF_OK;
}

static int check_surrounded(checker *c) {
    enum { CONSTANT, REFLECT, REPLICATE, CIRCULAR };
    const struct bnnf_op_record *r = &c->op->record;
    bnnf__op *op = c->op;
    const uint64_t most[2] = {op->height - (uint64_t)(r->mode == REFLECT), op->width - (uint64_t)(r->mode == REFLECT)};
    const uint64_t around[2][2] = {{r->padding_h, r->after_h}, {r->padding_w, r->after_w}};
    for (int i = 0; i < 2 && (r->mode == REFLECT || r->mode == CIRCULAR); i++)
        if (around[i][0] > most[i] || around[i][1] > most[i])
            return FAIL(c, BNNF_ERROR_GRAPH, "its padding is more than %llu.", (unsigned long long)most[i]);
    if (op->input_dtype == BNNF_DTYPE_BITS && r->mode == CONSTANT && !r->pad_value)
        return FAIL(c, BNNF_ERROR_GRAPH, "pads signs with %s, expected 1 or -1.", "0");
    const uint64_t rows = op->height + around[0][0] + around[0][1], columns = op->width + around[1][0] + around[1][1];
    if (rows > BNNF_MAX_SIDE || columns > BNNF_MAX_SIDE)
        return FAIL(c, BNNF_ERROR_LIMIT, "its result has sides above %u.", (unsigned)BNNF_MAX_SIDE);
    op->out_height = (uint32_t)rows;
    op->out_width = (uint32_t)columns;
    return BNNF_OK;
}

static int check_shuffled(checker *c) {
    bnnf__op *op = c->op;
    const uint64_t rows = op->record.stride_h, columns = op->record.stride_w, block = rows * columns;
    if (op->record.mode ? op->height % rows || op->width % columns : op->channels % block != 0)
        return FAIL(c, BNNF_ERROR_GRAPH, "its blocks of %llu x %llu do not divide its input.", (unsigned long long)rows,
                    (unsigned long long)columns);
    const uint64_t height = op->record.mode ? op->height / rows : op->height * rows;
    const uint64_t width = op->record.mode ? op->width / columns : op->width * columns;
    const uint64_t channels = op->record.mode ? times(op->channels, block) : op->channels / block;
    if (height > BNNF_MAX_SIDE || width > BNNF_MAX_SIDE)
        return FAIL(c, BNNF_ERROR_LIMIT, "its result has sides above %u.", (unsigned)BNNF_MAX_SIDE);
    if (channels > BNNF_MAX_VALUES)
        return FAIL(c, BNNF_ERROR_LIMIT, "its result has more than %u values.", (unsigned)BNNF_MAX_VALUES);
    op->out_height = (uint32_t)height;
    op->out_width = (uint32_t)width;
    op->outputs = (uint32_t)channels;
    return BNNF_OK;
}

static int check_result(checker *c) {
    bnnf__op *op = c->op;
    int status;
    switch (op->record.code) {
    case BNNF_OP_BINARY_CONV2D:
    case BNNF_OP_PIXEL_CONV2D:
    case BNNF_OP_CONV2D: return (status = check_sides(c)) ? status : check_weights(c);
    case BNNF_OP_MAX_POOL2D:
    case BNNF_OP_AVG_POOL2D: return check_sides(c);
    case BNNF_OP_CONCAT:
    case BNNF_OP_XOR: return check_joined(c);
    case BNNF_OP_GROUP_NORM:
    case BNNF_OP_RMS_NORM:
    case BNNF_OP_CHANNEL_NORM: return check_groups(c);
    case BNNF_OP_CONV_TRANSPOSE2D: return check_transposed(c);
    case BNNF_OP_TAKE: return check_taken(c);
    case BNNF_OP_CROP: return check_cropped(c);
    case BNNF_OP_PAD: return check_surrounded(c);
    case BNNF_OP_PIXEL_SHUFFLE: return check_shuffled(c);
    case BNNF_OP_RESIZE: op->out_height = op->record.size_h, op->out_width = op->record.size_w; return BNNF_OK;
    case BNNF_OP_REDUCE_CHANNELS: op->outputs = 1; return BNNF_OK;
    default: return BNNF_OK;
    }
}

static int check_shapes(checker *c) {
    bnnf__op *op = c->op;
    const bnnf__tensor *input = &c->model->tensors[c->field[INPUT]];
    op->height = op->out_height = input->shape[0];
    op->width = op->out_width = input->shape[1];
    op->channels = op->outputs = op->group_channels = op->group_outputs = input->shape[2];
    op->words = op->group_words = (op->channels + 63) / 64;
    op->input_dtype = input->dtype;
    int status = check_result(c);
    if (status) return status;
    op->out_words = (op->outputs + 63) / 64;
    if (times(times(op->out_height, op->out_width), op->outputs) > BNNF_MAX_VALUES)
        return FAIL(c, BNNF_ERROR_LIMIT, "its result has more than %u values.", (unsigned)BNNF_MAX_VALUES);
    return c->rule->may & BIT(SCALE) ? check_epilogue(c) : BNNF_OK;
}

static int check_values(checker *c) {
    for (int f = WEIGHTS; f < WINDOW; f++) {
        if (c->field[f] == BNNF__NONE) continue;
        uint8_t marks = c->marks[c->field[f]];
        if (marks & HAS_NAN || (marks & HAS_INFINITY && f != LOW && f != HIGH && f != THRESHOLD))
            return FAIL(c, BNNF_ERROR_CONSTANT, "its %s holds what is no finite number.", field_name[f]);
    }
    return BNNF_OK;
}

static int check_work(checker *c) {
    const bnnf__op *op = c->op;
    uint64_t terms = 1, taken = (uint64_t)op->height * op->width * op->channels;
    uint64_t results = times((uint64_t)op->out_height * op->out_width, op->outputs);
    if (op->banded) taken = padded(c, 0) * padded(c, 1) * op->channels;
    if (op->record.kernel_h)
        terms = (uint64_t)op->record.kernel_h * op->record.kernel_w * (c->rule->weights ? op->group_channels : 1);
    if (results < BNNF_LEAST_WORK) results = BNNF_LEAST_WORK;
    uint64_t work = times(results, terms);
    if (work > BNNF_MAX_WORK || (c->work += taken + work) > BNNF_MAX_WORK)
        return FAIL(c, BNNF_ERROR_LIMIT, "up to here one image takes more than %llu products.",
                    (unsigned long long)BNNF_MAX_WORK);
    return BNNF_OK;
}

static int check_writes(checker *c) {
    const bnnf__op *op = c->op;
    for (int f = REAL; f <= BITS; f++) {
        if (c->field[f] == BNNF__NONE) continue;
        bnnf__tensor *t = &c->model->tensors[c->field[f]];
        if (t->written != BNNF__NONE)
            return FAIL(c, BNNF_ERROR_GRAPH, "writes tensor %u, which is written already.", (unsigned)c->field[f]);
        if (t->shape[0] != op->out_height || t->shape[1] != op->out_width || t->shape[2] != op->outputs)
            return FAIL(c, BNNF_ERROR_GRAPH, "tensor %u is [%u, %u, %u], expected [%u, %u, %u].",
                        (unsigned)c->field[f], (unsigned)t->shape[0], (unsigned)t->shape[1], (unsigned)t->shape[2],
                        (unsigned)op->out_height, (unsigned)op->out_width, (unsigned)op->outputs);
        t->written = t->last_read = c->number;
    }
    return BNNF_OK;
}

static int check_op(checker *c, uint32_t number) {
    int status;
    c->number = number;
    c->op = &c->model->ops[number];
    c->rule = &rules[c->op->record.code];
    memcpy(c->field, &c->op->record, sizeof c->field);
    if ((status = check_fields(c)) || (status = check_options(c)) || (status = check_window(c))) return status;
    if ((status = check_reads(c))) return status;
    if ((status = check_shapes(c)) || (status = check_values(c)) || (status = check_work(c))) return status;
    return check_writes(c);
}

/* -- the arena */

/* Memory by the places where an activation begins or ends: leaf i of the tree is the bytes from edge i to the next.
   A node holds whether all of it is taken, and whether any. Living activations share no byte, so that what one took is
   given back as it was taken. */
typedef struct space {
    uint64_t *edges;
    size_t edge_count, leaves;
    uint8_t *all, *any;
} space;

static int compare_edges(const void *context, uint64_t a, uint64_t b) {
    (void)context;
    return (a > b) - (a < b);
}

static size_t edge_at(const space *s, uint64_t value) {
    size_t from = 0, to = s->edge_count;
    while (to - from > 1) {
        size_t middle = from + (to - from) / 2;
        if (s->edges[middle] <= value) from = middle;
        else to = middle;
    }
    return from;
}

static int is_taken(const space *s, size_t node, size_t first, size_t behind, size_t from, size_t to) {
    if (to <= first || behind <= from || !s->any[node]) return 0;
    if (s->all[node] || (from <= first && behind <= to)) return 1;
    size_t middle = first + (behind - first) / 2;
    return is_taken(s, 2 * node, first, middle, from, to) || is_taken(s, 2 * node + 1, middle, behind, from, to);
}

static void take(space *s, size_t node, size_t first, size_t behind, size_t from, size_t to, uint8_t taken) {
    if (to <= first || behind <= from) return;
    if (from <= first && behind <= to) {
        s->all[node] = s->any[node] = taken;
        return;
    }
    size_t middle = first + (behind - first) / 2;
    take(s, 2 * node, first, middle, from, to, taken);
    take(s, 2 * node + 1, middle, behind, from, to, taken);
    s->any[node] = s->any[2 * node] || s->any[2 * node + 1];
}

static uint64_t end_of(const bnnf__tensor *t) { return (uint64_t)t->offset + bnnf__align(t->bytes); }

/* Offsets and ends within the arena, whose top is used; fills the edges. */
static int check_offsets(const bnnf_model *model, space *s, const bnnf__message *message) {
    uint64_t top = 0;
    for (uint32_t i = 0; i < model->tensor_count; i++) {
        const bnnf__tensor *t = &model->tensors[i];
        if (t->place != BNNF_PLACE_ACTIVATION) continue;
        if (t->offset % BNNF__ALIGN || t->offset > model->file_arena ||
            bnnf__align(t->bytes) > model->file_arena - t->offset)
            return bnnf__fail(message, BNNF_ERROR_PLAN,
                              "tensor %u: got offset %zu, expected a multiple of %u with %zu bytes inside the arena "
                              "of %zu.", (unsigned)i, t->offset, BNNF__ALIGN, t->bytes, model->file_arena);
        s->edges[s->edge_count++] = t->offset;
        s->edges[s->edge_count++] = end_of(t);
        if (end_of(t) > top) top = end_of(t);
    }
    if (top != model->file_arena)
        return bnnf__fail(message, BNNF_ERROR_PLAN, "got an arena of %zu bytes, expected the %llu that are used.",
                          model->file_arena, (unsigned long long)top);
    bnnf__sort(s->edges, s->edge_count, compare_edges, NULL);
    size_t kept = 0;
    for (size_t i = 0; i < s->edge_count; i++)
        if (!kept || s->edges[kept - 1] != s->edges[i]) s->edges[kept++] = s->edges[i];
    s->edge_count = kept;
    return BNNF_OK;
}

/* The tensor whose place `real` of an op may take: its `other`, which nothing reads afterwards, which is not its input
   too, and which has the shape of `real`. Else BNNF__NONE. */
static uint32_t replaced(const bnnf_model *model, uint32_t number) {
    const struct bnnf_op_record *r = &model->ops[number].record;
    if (r->real == BNNF__NONE || r->other == BNNF__NONE || r->code == BNNF_OP_CONCAT || r->other == r->input ||
        r->other == r->factor || r->other == model->input)
        return BNNF__NONE;
    const bnnf__tensor *other = &model->tensors[r->other], *real = &model->tensors[r->real];
    const int same = other->rank == real->rank && !memcmp(other->shape, real->shape, sizeof real->shape);
    return same && other->last_read == number && other->offset == real->offset ? r->other : BNNF__NONE;
}

/* Op by op: what it writes takes its place, then what it was the last to read gives its own back. */
static int check_overlaps(const bnnf_model *model, space *s, const bnnf__message *message) {
    for (uint32_t number = 0; number < model->op_count; number++) {
        const struct bnnf_op_record *r = &model->ops[number].record;
        const uint32_t written[2] = {r->real, r->bits}, before = replaced(model, number);
        const uint32_t other = before == BNNF__NONE ? r->other : BNNF__NONE;
        const uint32_t touched[5] = {r->input, other, r->factor, r->real, r->bits};
        for (int i = 0; i < 2; i++) {
            if (written[i] == BNNF__NONE || (i == 0 && before != BNNF__NONE)) continue;
            const bnnf__tensor *t = &model->tensors[written[i]];
            size_t from = edge_at(s, t->offset), to = edge_at(s, end_of(t));
            if (is_taken(s, 1, 0, s->leaves, from, to))
                return bnnf__fail(message, BNNF_ERROR_PLAN,
                                  "tensor %u: shares memory in the arena with another that is alive.",
                                  (unsigned)written[i]);
            take(s, 1, 0, s->leaves, from, to, 1);
        }
        for (int i = 0; i < 5; i++) {
            if (touched[i] == BNNF__NONE || touched[i] == model->input) continue;
            const bnnf__tensor *t = &model->tensors[touched[i]];
            if (t->last_read == number) take(s, 1, 0, s->leaves, edge_at(s, t->offset), edge_at(s, end_of(t)), 0);
        }
    }
    return BNNF_OK;
}

static int check_arena(const bnnf_model *model, const bnnf__message *message) {
    space s = {.leaves = 1};
    while (s.leaves < 2 * (size_t)model->tensor_count) s.leaves *= 2;
    s.edges = malloc(2 * (size_t)model->tensor_count * sizeof *s.edges);
    s.all = calloc(2, 2 * s.leaves);
    if (s.all) s.any = s.all + 2 * s.leaves;
    int status = s.edges && s.all ? check_offsets(model, &s, message)
                                  : bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    if (!status) status = check_overlaps(model, &s, message);
    free(s.edges);
    free(s.all);
    return status;
}

int bnnf__check_model(bnnf_model *model, const bnnf__message *message) {
    int status = check_tensors(model, message);
    if (status) return status;
    checker c = {.model = model, .message = message, .marks = calloc(model->tensor_count, 1)};
    if (!c.marks) return bnnf__fail(message, BNNF_ERROR_MEMORY, "not enough memory.");
    status = check_constants(&c);
    for (uint32_t i = 0; i < model->op_count && !status; i++) status = check_op(&c, i);
    c.marks[model->output] |= USED;
    for (uint32_t i = 0; i < model->tensor_count && !status; i++) {
        if (model->tensors[i].place == BNNF_PLACE_ACTIVATION && model->tensors[i].written == BNNF__NONE)
            status = bnnf__fail(message, BNNF_ERROR_GRAPH, "tensor %u: no op writes it.", (unsigned)i);
        else if (!(c.marks[i] & USED))
            status = bnnf__fail(message, BNNF_ERROR_GRAPH, "tensor %u: nothing uses it.", (unsigned)i);
    }
    free(c.marks);
    if (status) return status;
    model->tensors[model->output].last_read = model->op_count;
    return check_arena(model, message);
}
