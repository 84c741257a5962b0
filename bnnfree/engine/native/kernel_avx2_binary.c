/* The binary convolution for AVX2. */

#include "kernels.h"

#ifdef BNNF__HAVE_AVX2

#include "avx2.h"

/* popcount(a xor w) of 4 bits is a table of 16 values of w, chosen by a; vpshufb looks up 32 outputs at once. A byte of
   a table has room for two positions: it holds the count of one in its low half and of the other in its high half, so
   256 tables of 16 bytes serve all pairs of 4 bits, and one lookup counts 4 bits of 2 positions and 32 outputs.

   A step looks up 4 bits ("a cell"); a block is 3 steps, since 3 counts of up to 4 fit into half a byte. The sum s of
   blocks is kept modulo 256, and next to it h, the sum of blocks shifted right by 4, as 16-bit values: the byte above
   leaks its low half into a byte's high half. Up to 21 blocks both counts are below 256 (21 * 12 = 252) and follow:
       odd bytes:  high = h,                        low = s - 16 high    (mod 256)
       even bytes: high = h - 16 low of the odd,    low = s - 16 high    (mod 256)
   That saves a mask per block. 8 vector instructions count 768 bits; one position per lookup takes 12 for that. */

#define BLOCK_STEPS 3u
#define FLUSH_BLOCKS 21u
#define MOST_BLOCKS (65535u / 12) /* so many fit into a 16-bit count */
#define NOTHING 0x80              /* vpshufb gives 0 for it, whatever the table */

/* Positions are taken in pairs (2t, 2t + 1) of an output row. The strip holds, for each slot of an input row, the cells
   of two columns, one stride apart, as offsets of their tables: pair t sees slots from t * pair_slots on. */
typedef struct lut_plan {
    uint32_t cells;                /* of one input position: ceil(channels / 4) */
    uint32_t pairs, pair_slots;
    uint32_t slot_columns;         /* columns from a slot to the next: with one tap across, only those that are seen */
    uint64_t slots, pitch;         /* of a row of the strip: slots, and their cells */
    uint64_t run_blocks, blocks;   /* of a run, and of the window */
    uint32_t strip_rows;
    uint64_t weights, bases, sums, bytes; /* where they stand behind the tables: bytes from the plan on */
    uint64_t scratch;
} lut_plan;

static lut_plan plan_lut(const bnnf__op *op) {
    const struct bnnf_op_record *r = &op->record;
    lut_plan p = {.cells = (uint32_t)ceil_div(op->channels, 4), .pairs = (uint32_t)ceil_div(op->out_width, 2)};
    const int one = r->kernel_w == 1;
    p.slot_columns = one ? 2 * r->stride_w : 1;
    p.pair_slots = one ? 1 : 2 * r->stride_w;
    p.slots = (uint64_t)(p.pairs - 1) * p.pair_slots + (uint64_t)r->dilation_w * (r->kernel_w - 1) + 1;
    p.pitch = p.slots * p.cells;
    p.run_blocks = ceil_div((uint64_t)taps_of_run(op) * p.cells, BLOCK_STEPS);
    p.blocks = p.run_blocks * runs_of_row(op) * r->kernel_h;
    p.strip_rows = strip_rows(op, 2 * p.pitch, op->height);
    /* behind the last cell: what a cell's last word holds beyond it, and the last steps of a run's last block */
    p.scratch = 2 * (p.pitch * least(seen_rows(op, p.strip_rows), op->height) + 16 * op->words + BLOCK_STEPS);
    p.weights = bnnf__align(sizeof p) + 256 * 16;
    p.bases = p.weights + ceil_div(op->outputs, 32) * p.blocks * BLOCK_STEPS * 32;
    p.sums = p.bases + (uint64_t)op->row_band_count * op->column_band_count * 64 * op->out_words * sizeof(int32_t);
    p.bytes = p.sums + ((uint64_t)r->kernel_h + 1) * ((uint64_t)r->kernel_w + 1) * sizeof(int32_t);
    return p;
}

int bnnf_binary_conv2d__avx2lut_4x64_fits(const bnnf__op *op) {
    if (op->record.groups != 1 || op->pixel_bias) return 0;
    const lut_plan p = plan_lut(op);
    return p.scratch <= MOST_SCRATCH && p.bytes <= MOST_PACKED;
}

/* Cell `cell` of the bits of tap (i, j) of output o. */
static uint8_t weight_cell(const bnnf__op *op, uint32_t o, uint64_t i, uint64_t j, uint64_t cell) {
    const uint64_t *words = op->weights;
    const uint64_t tap = ((uint64_t)o * op->record.kernel_h + i) * op->record.kernel_w + j;
    return words[tap * op->words + cell / 16] >> 4 * (cell % 16) & 15;
}

/* [word of 64 outputs][run][block][step][panel of 32][byte]. Byte 2l is output l, byte 2l + 1 output 16 + l, since the
   counts of even and of odd bytes are taken apart. */
static void pack_lut_weights(const bnnf__op *op, const lut_plan *p, uint8_t *to) {
    const uint64_t run_cells = (uint64_t)taps_of_run(op) * p->cells, runs = runs_of_row(op);
    for (uint32_t word = 0; word < op->out_words; word++) {
        const uint32_t panels = op->outputs - 64 * word > 32 ? 2 : 1;
        for (uint64_t run = 0; run < runs * op->record.kernel_h; run++)
            for (uint64_t step = 0; step < BLOCK_STEPS * p->run_blocks; step++)
                for (uint32_t byte = 0; byte < 32 * panels; byte++) {
                    const uint32_t o = 64 * word + byte / 32 * 32 + byte % 2 * 16 + byte % 32 / 2;
                    *to++ = o >= op->outputs || step >= run_cells
                                ? NOTHING
                                : weight_cell(op, o, run / runs, run % runs + step / p->cells, step % p->cells);
                }
    }
}

/* bases[row band][column band][output], so that the convolution is base - 2 (what is counted). Counted are the taps in
   rows inside the image, on columns of padding as if +1 were there, which gives popcount(w): with 0 that is taken
   out again, with pad_value all taps on the padding are put in. `sums`: room for running sums. */
static void pack_lut_bases(const bnnf__op *op, int32_t *bases, int32_t *sums) {
    const uint32_t height = op->record.kernel_h, width = op->record.kernel_w;
    const size_t pitch = (size_t)width + 1, lanes = 64 * (size_t)op->out_words;
    const int32_t channels = (int32_t)op->channels;
    memset(bases, 0, (size_t)op->row_band_count * op->column_band_count * lanes * sizeof *bases);
    memset(sums, 0, pitch * (height + 1) * sizeof *sums);
    for (uint32_t o = 0; o < op->outputs; o++) {
        const uint64_t *words = (const uint64_t *)op->weights + (uint64_t)o * height * width * op->words;
        for (uint32_t i = 0; i < height; i++)
            for (uint32_t j = 0; j < width; j++) {
                int32_t *sum = sums + (i + 1) * pitch + j + 1;
                *sum = sum[-1] + sum[-(ptrdiff_t)pitch] - sum[-(ptrdiff_t)pitch - 1];
                for (uint32_t k = 0; k < op->words; k++) *sum += __builtin_popcountll(*words++);
            }
        int32_t *base = bases + o;
        for (uint32_t a = 0; a < op->row_band_count; a++)
            for (uint32_t b = 0; b < op->column_band_count; b++, base += lanes) {
                const bnnf__band *row = op->row_bands + a, *column = op->column_bands + b;
                const int32_t *top = sums + row->first * pitch, *bottom = sums + row->behind * pitch;
                const int32_t inside = bottom[column->behind] - bottom[column->first] - top[column->behind] +
                                       top[column->first];
                const int32_t counted = bottom[width] - top[width], all = sums[height * pitch + width];
                const int32_t taps = (int32_t)((row->behind - row->first) * (column->behind - column->first));
                const int32_t padded = (int32_t)(height * width) - taps;
                *base = taps * channels + 2 * (counted - inside) +
                        op->record.pad_value * (padded * channels - 2 * (all - inside));
            }
    }
}

size_t bnnf_binary_conv2d__avx2lut_4x64_pack(bnnf__op *op, void *memory) {
    const lut_plan p = plan_lut(op);
    op->scratch_bytes = p.scratch;
    if (!memory) return p.bytes;
    uint8_t *bytes = memory, *table = bytes + bnnf__align(sizeof p);
    memcpy(memory, &p, sizeof p);
    for (int a = 0; a < 256; a++)
        for (int w = 0; w < 16; w++)
            *table++ = (uint8_t)(__builtin_popcount((a & 15) ^ w) | __builtin_popcount(a >> 4 ^ w) << 4);
    pack_lut_weights(op, &p, bytes + p.weights);
    pack_lut_bases(op, (int32_t *)(bytes + p.bases), (int32_t *)(bytes + p.sums));
    return p.bytes;
}

/* Cells of two positions (NULL: on the padding) as offsets of tables; writes whole words. */
INLINE void fill_slot(const uint64_t *a, const uint64_t *b, uint32_t words, uint16_t *to) {
    const __m128i low = _mm_set1_epi8(15);
    for (uint32_t k = 0; k < words; k++, to += 16) {
        const __m128i x = _mm_cvtsi64_si128(a ? (long long)a[k] : 0), y = _mm_cvtsi64_si128(b ? (long long)b[k] : 0);
        const __m128i even = _mm_or_si128(_mm_and_si128(x, low), _mm_slli_epi64(_mm_and_si128(y, low), 4));
        const __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi64(x, 4), low), _mm_andnot_si128(low, y));
        const __m256i cells = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
        _mm256_storeu_si256((__m256i *)to, _mm256_slli_epi16(cells, 4));
    }
}

/* From left to right and from top to bottom: what a slot's last word holds beyond its cells the next one overwrites. */
NOINLINE void fill_lut_strip(const bnnf__op *op, const lut_plan *p, const strip *s, const uint64_t *input,
                             uint16_t *cells) {
    for (int64_t y = s->from; y < s->to; y++, cells += p->pitch) {
        if (!sees(op, s, y)) continue;
        const uint64_t *row = input + (uint64_t)y * op->width * op->words;
        for (uint64_t slot = 0; slot < p->slots; slot++) {
            const int64_t x = (int64_t)(slot * p->slot_columns) - op->record.padding_w, z = x + op->record.stride_w;
            fill_slot(x >= 0 && x < op->width ? row + (uint64_t)x * op->words : NULL,
                      z >= 0 && z < op->width ? row + (uint64_t)z * op->words : NULL, op->words,
                      cells + slot * p->cells);
        }
        /* a run's last block looks beyond the row: there must be offsets of tables, whichever */
        memset(cells + p->pitch, 0, BLOCK_STEPS * sizeof *cells);
    }
}

/* Sums of a pair and a panel. */
typedef struct lut_sum {
    __m256i sum, high;
} lut_sum;

/* Adds 8-bit sums to the 16-bit counts of two positions, 32 outputs each: see above. */
INLINE void flush_lut(lut_sum of, int first, uint16_t *counts) {
    const __m256i s = of.sum, h = of.high;
    const __m256i byte = _mm256_set1_epi16(255);
    const __m256i odd_high = _mm256_srli_epi16(h, 8);
    const __m256i odd = _mm256_srli_epi16(s, 8);
    const __m256i odd_low = _mm256_and_si256(_mm256_sub_epi16(odd, _mm256_slli_epi16(odd_high, 4)), byte);
    const __m256i even_high = _mm256_and_si256(_mm256_sub_epi16(h, _mm256_slli_epi16(odd_low, 4)), byte);
    const __m256i even_low = _mm256_and_si256(_mm256_sub_epi16(s, _mm256_slli_epi16(even_high, 4)), byte);
    const __m256i add[4] = {even_low, odd_low, even_high, odd_high};
    UNROLL for (int i = 0; i < 4; i++) {
        __m256i *to = (__m256i *)(counts + i / 2 * 64 + i % 2 * 16);
        _mm256_store_si256(to, first ? add[i] : _mm256_add_epi16(_mm256_load_si256(to), add[i]));
    }
}

/* What a call of the core counts: `blocks` blocks from number `from` on, of all from the first row of the band. */
typedef struct lut_job {
    const uint8_t *tables, *weights;
    const uint16_t *cells; /* of the first pair, at the first kernel row */
    size_t pair_step, row_step, run_step;
    uint64_t run_blocks, runs, from, blocks;
    uint16_t *counts;      /* [4 positions][64 outputs] */
} lut_job;

INLINE __m256i look_up(const uint8_t *tables, uint16_t cells, const uint8_t *w) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(tables + cells)));
    return _mm256_shuffle_epi8(table, _mm256_load_si256((const __m256i *)w));
}

INLINE lut_sum add_block(lut_sum s, const uint8_t *tables, const uint16_t *cells, const uint8_t *w, int panels) {
    __m256i block = look_up(tables, cells[0], w);
    block = _mm256_add_epi8(block, look_up(tables, cells[1], w + 32 * panels));
    block = _mm256_add_epi8(block, look_up(tables, cells[2], w + 64 * panels));
    s.sum = _mm256_add_epi8(s.sum, block);
    s.high = _mm256_add_epi8(s.high, _mm256_srli_epi16(block, 4));
    return s;
}

/* Counts for `pairs` pairs of positions and `panels` panels of 32 outputs. */
INLINE void count_lut(const lut_job *job, const int pairs, const int panels) {
    const lut_sum zero = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const uint8_t *tables = job->tables, *w = job->weights + job->from * BLOCK_STEPS * 32 * (uint64_t)panels;
    uint64_t run = job->from / job->run_blocks, block = job->from % job->run_blocks, left = job->blocks;
    uint64_t room = FLUSH_BLOCKS;
    int first = 1;
    /* no array: compilers leave one in memory */
    lut_sum a0 = zero, a1 = zero, b0 = zero, b1 = zero;
    while (left) {
        const uint16_t *cells = job->cells + run / job->runs * job->row_step + run % job->runs * job->run_step;
        const uint16_t *a = cells + BLOCK_STEPS * block, *b = a + job->pair_step;
        uint64_t n = least(least(job->run_blocks - block, room), left);
        left -= n;
        room -= n;
        block += n;
        if (block == job->run_blocks) block = 0, run++;
        do {
            a0 = add_block(a0, tables, a, w, panels);
            if (panels > 1) a1 = add_block(a1, tables, a, w + 32, panels);
            if (pairs > 1) b0 = add_block(b0, tables, b, w, panels);
            if (pairs > 1 && panels > 1) b1 = add_block(b1, tables, b, w + 32, panels);
            w += BLOCK_STEPS * 32 * panels;
            a += BLOCK_STEPS;
            b += BLOCK_STEPS;
        } while (--n);
        if (room && left) continue;
        flush_lut(a0, first, job->counts);
        if (panels > 1) flush_lut(a1, first, job->counts + 32);
        if (pairs > 1) flush_lut(b0, first, job->counts + 128);
        if (pairs > 1 && panels > 1) flush_lut(b1, first, job->counts + 160);
        a0 = a1 = b0 = b1 = zero;
        first = 0;
        room = FLUSH_BLOCKS;
    }
}

/* Why: else gcc copies every sum once per block and spills some; about a tenth of the speed. */
#ifdef __clang__
#define IN_PLACE
#else
#define IN_PLACE __attribute__((optimize("no-tree-coalesce-vars")))
#endif

IN_PLACE NOINLINE void count_lut_1x1(const lut_job *job) { count_lut(job, 1, 1); }
IN_PLACE NOINLINE void count_lut_1x2(const lut_job *job) { count_lut(job, 1, 2); }
IN_PLACE NOINLINE void count_lut_2x1(const lut_job *job) { count_lut(job, 2, 1); }
IN_PLACE NOINLINE void count_lut_2x2(const lut_job *job) { count_lut(job, 2, 2); }

static void count_lut_for(const lut_job *job, uint32_t count, uint32_t outputs) {
    if (count > 2) (outputs > 32 ? count_lut_2x2 : count_lut_2x1)(job);
    else (outputs > 32 ? count_lut_1x2 : count_lut_1x1)(job);
}

/* The epilogue of a tile: channels [from, to), part of one word. bases: of each position, from channel `from` on. */
INLINE void finish_lut(const bnnf__op *op, const bnnf__io *io, size_t pixel, const uint32_t count, uint32_t from,
                       uint32_t to, const uint16_t *counts, const int32_t *const *bases) {
    uint64_t bits[TILE] = {0};
    for (size_t at = 0; at < to - from; at += LANES) {
        const uint32_t lane = from + (uint32_t)at;
        __m256i sum[TILE];
        UNROLL for (size_t i = 0; i < TILE; i++) {
            const __m256i wide = _mm256_cvtepu16_epi32(_mm_load_si128((const __m128i *)(counts + 64 * i + at)));
            const __m256i base = _mm256_loadu_si256((const __m256i *)(bases[i] + at));
            sum[i] = _mm256_sub_epi32(base, _mm256_add_epi32(wide, wide));
        }
        if (op->epilogue.sum_threshold) {
            const __m256i threshold = _mm256_load_si256((const __m256i *)(op->epilogue.sum_threshold + lane));
            UNROLL for (uint32_t i = 0; i < TILE; i++)
                add_bits(&bits[i], _mm256_castsi256_ps(_mm256_cmpgt_epi32(threshold, sum[i])), (uint32_t)at);
            continue;
        }
        __m256 v[TILE];
        UNROLL for (uint32_t i = 0; i < TILE; i++) v[i] = _mm256_cvtepi32_ps(sum[i]);
        finish(op, io, pixel, count, lane, v, NULL, bits, (uint32_t)at);
    }
    if (io->bits) put_bits(op, io, pixel, count, from, 64, bits);
}

/* Counts and epilogue of one tile: up to 4 positions of an output row, from `pixel` on, and a word of outputs. */
AVX2 static void lut_tile(const bnnf__op *op, const bnnf__io *io, lut_job *job, size_t pixel, uint32_t count,
                          uint32_t word, const int32_t *bases[TILE]) {
    const uint32_t from = 64 * word, to = (uint32_t)least(op->outputs, from + 64);
    const uint64_t blocks = job->blocks;
    int32_t partial[TILE][64];
    for (job->from = 0; blocks - job->from > MOST_BLOCKS; job->from += MOST_BLOCKS) {
        job->blocks = MOST_BLOCKS;
        count_lut_for(job, count, to - from);
        for (uint32_t i = 0; i < TILE; i++) {
            for (uint32_t c = 0; c < 64; c++) partial[i][c] = bases[i][c] - 2 * job->counts[64 * i + c];
            bases[i] = partial[i];
        }
    }
    job->blocks = blocks - job->from;
    if (job->blocks) count_lut_for(job, count, to - from);
    else memset(job->counts, 0, 64 * TILE * sizeof *job->counts);
    job->blocks = blocks;
    if (count == TILE) finish_lut(op, io, pixel, TILE, from, to, job->counts, bases);
    else finish_lut(op, io, pixel, count, from, to, job->counts, bases);
}

/* One output row of a strip, one word of outputs. */
AVX2 static void lut_row(const bnnf__op *op, const bnnf__io *io, lut_job *job, size_t row, uint32_t word,
                         const int32_t *bases) {
    const uint16_t *cells = job->cells;
    const size_t lanes = 64 * (size_t)op->out_words;
    const bnnf__band *band = op->column_bands;
    for (uint32_t at = 0; at < op->out_width; at += TILE) {
        const uint32_t count = (uint32_t)least(op->out_width - at, TILE);
        const int32_t *base[TILE];
        for (uint32_t i = 0; i < TILE; i++) {
            if (i < count && at + i >= band->to) band++, bases += lanes;
            base[i] = bases;
        }
        job->cells = cells + at / 2 * job->pair_step;
        lut_tile(op, io, job, row * op->out_width + at, count, word, base);
    }
    job->cells = cells;
}

AVX2 void bnnf_binary_conv2d__avx2lut_4x64_run(const bnnf__op *op, const bnnf__io *io) {
    const lut_plan *p = op->packed;
    const uint8_t *packed = op->packed;
    const bnnf__range part = bnnf__range_of(op->out_height, op->out_words, io);
    _Alignas(32) uint16_t counts[TILE * 64] = {0};
    uint16_t *cells = io->scratch;
    lut_job job = {.tables = packed + bnnf__align(sizeof *p), .counts = counts, .run_blocks = p->run_blocks};
    job.pair_step = (size_t)p->pair_slots * p->cells;
    job.row_step = p->pitch * op->record.dilation_h;
    job.run_step = (size_t)op->record.dilation_w * p->cells;
    job.runs = runs_of_row(op);
    const uint64_t row_blocks = p->run_blocks * job.runs;
    const size_t lanes = 64 * (size_t)op->out_words;
    for (size_t at = part.row; at < part.row_end; at += p->strip_rows) {
        const strip s = strip_of(op, at, least(at + p->strip_rows, part.row_end), 0);
        fill_lut_strip(op, p, &s, io->input, cells);
        for (size_t word = part.word; word < part.word_end; word++) {
            const uint64_t panels = op->outputs - 64 * word > 32 ? 2 : 1;
            const uint8_t *weights = packed + p->weights + word * p->blocks * BLOCK_STEPS * 64;
            const bnnf__band *band = op->row_bands;
            for (size_t row = s.row; row < s.row_end; row++) {
                while (row >= band->to) band++;
                const int64_t y = (int64_t)row * op->record.stride_h - op->record.padding_h +
                                  (int64_t)band->first * op->record.dilation_h - s.from;
                job.cells = cells + (band->first < band->behind ? (uint64_t)y * p->pitch : 0);
                job.weights = weights + band->first * row_blocks * BLOCK_STEPS * 32 * panels;
                job.blocks = (band->behind - band->first) * row_blocks;
                lut_row(op, io, &job, row, (uint32_t)word,
                        (const int32_t *)(packed + p->bases) +
                            (size_t)(band - op->row_bands) * op->column_band_count * lanes + 64 * word);
            }
        }
    }
}

#endif
