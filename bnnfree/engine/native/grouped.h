/* Convolutions of floats in groups, depthwise ones among them, by vectors of LANES outputs. A file of kernels defines
   what a vector is (below) and includes this file.

   An output has one accumulator, which adds products tap by tap and channel by channel, as FORMAT.md orders them. Taps
   on a padding of 0 are left out: they add a zero to a sum that starts as +0 and so is never -0.

   LANES                    floats of a vector
   VECTOR, TARGET           its type; attributes of functions that use it
   ZERO(), EACH(x)          0; x in each lane
   LOAD(p)                  LANES floats, aligned
   LOAD_SOME(p, count)      the first `count` floats at p, nothing behind them is read
   PICK(v, lanes)           v[lanes[k]] in lane k
   ADD_PRODUCT(sum, x, w)   sum + x w, rounded twice
   STORE(p, v)              LANES floats, aligned
   FINISH(op, io, pixel, count, first, sums)   the epilogue for `count` pixels and the outputs of a vector from `first` */

#define TILE 8u /* pixels of a row worked on together */
#define MOST_PACKED (UINT64_C(1) << 28) /* bytes; what is larger is left to the scalar kernel */
#define INLINE_GROUPED static inline __attribute__((always_inline)) TARGET

/* Inputs of a vector of outputs: those of one group, each output's own channel, or channels of several groups that are
   a vector together. Else the vector is not for this kernel. */
enum { ONE_GROUP, OWN_CHANNEL, FEW_GROUPS, MANY_CHANNELS };

/* Kind of the vector from output `first` on. */
static int kind_of(const bnnf__op *op, uint32_t first) {
    const uint32_t behind = op->outputs - first < LANES ? op->outputs : first + LANES;
    const uint32_t groups = (behind - 1) / op->group_outputs - first / op->group_outputs + 1;
    if (groups == 1) return ONE_GROUP;
    if (op->group_channels == 1 && op->group_outputs == 1) return OWN_CHANNEL;
    return (uint64_t)groups * op->group_channels <= LANES ? FEW_GROUPS : MANY_CHANNELS;
}

static uint64_t terms_of(const bnnf__op *op) {
    return (uint64_t)op->record.kernel_h * op->record.kernel_w * op->group_channels;
}

static size_t packed_bytes(const bnnf__op *op) {
    const uint64_t vectors = (op->outputs + LANES - 1) / LANES, most = MOST_PACKED + 1;
    const uint64_t each = terms_of(op) * LANES * sizeof(float);
    return (size_t)(each > most / vectors ? most : each * vectors);
}

static int fits_grouped(const bnnf__op *op) {
    if (op->record.groups == 1 || packed_bytes(op) > MOST_PACKED) return 0;
    for (uint32_t first = 0; first < op->outputs; first += LANES)
        if (kind_of(op, first) == MANY_CHANNELS) return 0;
    return 1;
}

/* Weight of output o, tap and channel `row`, c; bits as +1 and -1. */
static float grouped_weight(const bnnf__op *op, size_t row, uint32_t c) {
    if (op->weights_dtype == BNNF_DTYPE_I8) return (float)((const int8_t *)op->weights)[row * op->group_channels + c];
    if (op->weights_dtype == BNNF_DTYPE_BITS) {
        uint64_t word;
        memcpy(&word, (const char *)op->weights + (row * op->group_words + c / 64) * sizeof word, sizeof word);
        return word >> c % 64 & 1 ? -1.0f : 1.0f;
    }
    float w;
    memcpy(&w, (const char *)op->weights + (row * op->group_channels + c) * sizeof w, sizeof w);
    return w;
}

/* [vector][tap][channel of the group][LANES], 0 beyond the last output. */
static size_t pack_grouped(bnnf__op *op, float *to) {
    const size_t taps = (size_t)op->record.kernel_h * op->record.kernel_w;
    op->scratch_bytes = 0;
    if (!to) return packed_bytes(op);
    for (uint32_t first = 0; first < op->outputs; first += LANES)
        for (size_t tap = 0; tap < taps; tap++)
            for (uint32_t c = 0; c < op->group_channels; c++)
                for (uint32_t o = first; o < first + LANES; o++)
                    *to++ = o < op->outputs ? grouped_weight(op, o * taps + tap, c) : 0.0f;
    return packed_bytes(op);
}

/* What the pixels of a tile see. `corner`: the channels of the vector in the input under the first tap inside, of the
   first pixel; taps outside the bands are on the padding. */
typedef struct view {
    const bnnf__band *down, *across;
    const float *corner, *weights;
    size_t pixel_step, row_step, tap_step; /* floats from a pixel, kernel row or tap to the next */
    uint32_t live;                         /* channels that there are from the corner on, up to LANES */
    int32_t lanes[LANES];                  /* FEW_GROUPS: where in the vector of inputs each output's group begins */
} view;

/* Adds the terms of one tap; x: NULL on the padding. */
INLINE_GROUPED void add_terms(const bnnf__op *op, const view *at, const float *x, const float *w, const int kind,
                              const uint32_t count, VECTOR sums[TILE]) {
    const uint32_t channels = op->group_channels;
    VECTOR seen[TILE];
    if (!x || kind == OWN_CHANNEL || kind == FEW_GROUPS) {
        const VECTOR pad = EACH((float)op->record.pad_value);
        UNROLL for (uint32_t p = 0; p < count; p++)
            seen[p] = x ? LOAD_SOME(x + p * at->pixel_step, at->live) : pad;
    }
    if (!x || kind == OWN_CHANNEL) {
        for (uint32_t c = 0; c < channels; c++) {
            const VECTOR weights = LOAD(w + c * LANES);
            UNROLL for (uint32_t p = 0; p < count; p++) sums[p] = ADD_PRODUCT(sums[p], seen[p], weights);
        }
    } else if (kind == ONE_GROUP) {
        for (uint32_t c = 0; c < channels; c++) {
            const VECTOR weights = LOAD(w + c * LANES);
            UNROLL for (uint32_t p = 0; p < count; p++)
                sums[p] = ADD_PRODUCT(sums[p], EACH(x[p * at->pixel_step + c]), weights);
        }
    } else {
        INDICES lanes = LOAD_INDICES(at->lanes);
        for (uint32_t c = 0; c < channels; c++, lanes = NEXT_INDICES(lanes)) {
            const VECTOR weights = LOAD(w + c * LANES);
            UNROLL for (uint32_t p = 0; p < count; p++)
                sums[p] = ADD_PRODUCT(sums[p], PICK(seen[p], lanes), weights);
        }
    }
}

INLINE_GROUPED void sum_tile(const bnnf__op *op, const view *at, const int kind, const uint32_t count, float *to) {
    const struct bnnf_op_record *r = &op->record;
    const int all = r->pad_value != 0;
    const bnnf__band rows = all ? (bnnf__band){0, 0, 0, r->kernel_h} : *at->down;
    const bnnf__band columns = all ? (bnnf__band){0, 0, 0, r->kernel_w} : *at->across;
    VECTOR sums[TILE];
    UNROLL for (uint32_t p = 0; p < count; p++) sums[p] = ZERO();
    for (uint32_t i = rows.first; i < rows.behind; i++)
        for (uint32_t j = columns.first; j < columns.behind; j++) {
            const float *w = at->weights + ((size_t)i * r->kernel_w + j) * op->group_channels * LANES, *x = NULL;
            if (!all || (i >= at->down->first && i < at->down->behind && j >= at->across->first &&
                         j < at->across->behind))
                x = at->corner + (i - at->down->first) * at->row_step + (j - at->across->first) * at->tap_step;
            add_terms(op, at, x, w, kind, count, sums);
        }
    UNROLL for (uint32_t p = 0; p < count; p++) STORE(to + p * LANES, sums[p]);
}

#define SUM_TILE(name, kind)                                                                                     \
    static __attribute__((noinline)) TARGET void name(const bnnf__op *op, const view *at, uint32_t count, float *to) { \
        if (count == 8) sum_tile(op, at, kind, 8, to);                                                           \
        else if (count == 4) sum_tile(op, at, kind, 4, to);                                                      \
        else if (count == 2) sum_tile(op, at, kind, 2, to);                                                      \
        else sum_tile(op, at, kind, 1, to);                                                                      \
    }
SUM_TILE(sum_one_group, ONE_GROUP)
SUM_TILE(sum_own_channel, OWN_CHANNEL)
SUM_TILE(sum_few_groups, FEW_GROUPS)

/* An output row for the vector from output `first` on. */
TARGET static void grouped_row(const bnnf__op *op, const bnnf__io *io, view *at, const bnnf__band *down, size_t row,
                               uint32_t first) {
    const struct bnnf_op_record *r = &op->record;
    const int kind = kind_of(op, first);
    const uint32_t channel = first / op->group_outputs * op->group_channels;
    _Alignas(64) float sums[TILE * LANES];
    at->down = down;
    at->live = op->channels - channel < LANES ? op->channels - channel : LANES;
    for (const bnnf__band *b = op->column_bands; b < op->column_bands + op->column_band_count; b++) {
        const int inside = down->first < down->behind && b->first < b->behind;
        at->across = b;
        for (uint32_t column = b->from, count; column < b->to; column += count) {
            for (count = TILE; count > b->to - column;) count /= 2;
            if (inside) {
                const size_t y = row * r->stride_h + (size_t)down->first * r->dilation_h - r->padding_h;
                const size_t x = (size_t)column * r->stride_w + (size_t)b->first * r->dilation_w - r->padding_w;
                at->corner = (const float *)io->input + (y * op->width + x) * op->channels + channel;
            }
            (kind == ONE_GROUP     ? sum_one_group
             : kind == OWN_CHANNEL ? sum_own_channel
                                   : sum_few_groups)(op, at, count, sums);
            FINISH(op, io, row * op->out_width + column, count, first, sums);
        }
    }
}

TARGET static void run_grouped(const bnnf__op *op, const bnnf__io *io) {
    const bnnf__range part = bnnf__range_of(op->out_height, op->out_words, io);
    const uint64_t last = 64 * (uint64_t)part.word_end, behind = last < op->outputs ? last : op->outputs;
    const uint64_t each = terms_of(op) * LANES;
    view at = {.pixel_step = (size_t)op->record.stride_w * op->channels,
               .row_step = (size_t)op->record.dilation_h * op->width * op->channels,
               .tap_step = (size_t)op->record.dilation_w * op->channels};
    for (uint64_t first = 64 * (uint64_t)part.word; first < behind; first += LANES) {
        const uint32_t group = (uint32_t)first / op->group_outputs;
        for (uint32_t k = 0; k < LANES; k++) {
            const uint32_t o = first + k < op->outputs ? (uint32_t)first + k : op->outputs - 1;
            at.lanes[k] = (int32_t)((o / op->group_outputs - group) * op->group_channels);
        }
        at.weights = (const float *)op->packed + first / LANES * each;
        const bnnf__band *down = op->row_bands;
        for (size_t row = part.row; row < part.row_end; row++) {
            while (row >= down->to) down++;
            grouped_row(op, io, &at, down, row, (uint32_t)first);
        }
    }
}
