/* The passes over latent weights, for one pair of types: T of the latents, S of what a convolution is given. A row is
   an output channel, `width` values in whatever order they lie in memory; see fused.c. */

#define TO_SIGN(x) CONVERT(put, SIGNS)(x)
#define SIGN_OF(x) CONVERT(get, SIGNS)(x)

#define LANES 32 /* partial sums of a row: compilers may vectorise them, and must not reorder one sum */

/* `statement` for each i of a row, with j, the partial sum that it belongs to */
#define EACH(statement)                                                                                                \
    for (size_t from = 0; from < whole; from += LANES)                                                                 \
        for (size_t j = 0; j < LANES; j++) {                                                                           \
            size_t i = from + j;                                                                                       \
            statement                                                                                                  \
        }                                                                                                              \
    for (size_t j = 0; j < width - whole; j++) {                                                                       \
        size_t i = whole + j;                                                                                          \
        statement                                                                                                      \
    }

INLINE R FUNCTION(total)(const R *lanes) {
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += lanes[i];
    return (R)sum;
}

/* constants [rows, 2]: a row's mean and 1 / ((std + eps) sqrt(width)), found with `measure`, else read; a row is taken
   as it is without `standardize`. made: sign(z) with `binary`, else z, with z = (w - mean) times the second constant;
   times factor [rows], if given. sizes [rows], if given: mean |z|. expected [rows], if inputs [width] is given: the sum
   over i of made_i inputs_i, without the factor. */
EACH_CPU void FUNCTION(prepare)(const T *restrict weights, S *restrict made, R *restrict constants, size_t first,
                                size_t last, size_t width, R eps, const R *restrict factor, const R *restrict inputs,
                                R *restrict sizes, R *restrict expected, int standardize, int binary, int measure) {
    size_t whole = width / LANES * LANES;
    for (size_t o = first; o < last; o++) {
        const T *restrict w = weights + o * width;
        S *restrict s = made + o * width;
        R mean = 0, unit = 1, size = factor ? factor[o] : 1;
        if (standardize && measure) {
            R sum[LANES] = {0}, squares[LANES] = {0};
            EACH(sum[j] += w[i];)
            mean = FUNCTION(total)(sum) / (R)width;
            EACH(squares[j] += (w[i] - mean) * (w[i] - mean);)
            R std = (R)sqrt((double)FUNCTION(total)(squares) / (double)width);
            unit = 1 / ((std + eps) * (R)sqrt((double)width));
            constants[2 * o] = mean;
            constants[2 * o + 1] = unit;
        } else if (standardize) {
            mean = constants[2 * o];
            unit = constants[2 * o + 1];
        }
        if (binary)
            for (size_t i = 0; i < width; i++)
                s[i] = TO_SIGN((w[i] - mean) * unit >= 0 ? size : -size);
        else
            for (size_t i = 0; i < width; i++)
                s[i] = TO_SIGN((w[i] - mean) * unit * size);
        if (sizes) {
            R sum[LANES] = {0};
            EACH(R z = (w[i] - mean) * unit; sum[j] += z < 0 ? -z : z;)
            sizes[o] = FUNCTION(total)(sum) / (R)width;
        }
        if (inputs) {
            R sum[LANES] = {0};
            EACH(R z = (w[i] - mean) * unit; sum[j] += (binary ? (z >= 0 ? (R)1 : (R)-1) : z) * inputs[i];)
            expected[o] = FUNCTION(total)(sum);
        }
    }
}

#ifndef FORWARD_ONLY

/* d w from `raw`, the gradient of what `prepare` made without its factor, less outer [rows] inputs [width] if these
   are given. undo [rows]: what that gradient is multiplied by to be one of z. dots [rows]: the sum over i of made_i
   times it, which is the factor's gradient. */
EACH_CPU void FUNCTION(weight_gradient)(const T *restrict weights, const S *restrict raw, T *restrict d,
                                        const R *restrict constants, size_t first, size_t last, size_t width, R eps,
                                        const R *restrict undo, const R *restrict outer, const R *restrict inputs,
                                        R *restrict dots, int standardize, int binary) {
    size_t whole = width / LANES * LANES;
    for (size_t o = first; o < last; o++) {
        const T *restrict w = weights + o * width;
        const S *restrict e = raw + o * width;
        T *restrict row = d + o * width;
        R mean = standardize ? constants[2 * o] : 0, unit = standardize ? constants[2 * o + 1] : 1;
        R made[LANES] = {0}, sum[LANES] = {0}, product[LANES] = {0};
        if (inputs)
            for (size_t i = 0; i < width; i++)
                row[i] = SIGN_OF(e[i]) - outer[o] * inputs[i];
        else
            for (size_t i = 0; i < width; i++)
                row[i] = SIGN_OF(e[i]);
        EACH(R z = w[i] - mean; R x = row[i]; made[j] += binary ? (z * unit >= 0 ? x : -x) : z * unit * x; sum[j] += x;
             product[j] += x * z;)
        dots[o] = FUNCTION(total)(made);
        if (!standardize) {
            for (size_t i = 0; i < width; i++)
                row[i] *= undo[o];
            continue;
        }
        /* std + eps = 1 / (unit sqrt(width)); a row of one value has no slope through its deviation */
        R sigma = 1 / (unit * (R)sqrt((double)width)), std = sigma - eps;
        R centre = FUNCTION(total)(sum) / (R)width;
        R along = std > eps * (R)1e-3 ? FUNCTION(total)(product) / (sigma * std * (R)width) : 0;
        R size = unit * undo[o];
        for (size_t i = 0; i < width; i++)
            row[i] = (row[i] - centre - (w[i] - mean) * along) * size;
    }
}

#endif

#undef EACH
#undef LANES
#undef TO_SIGN
#undef SIGN_OF
