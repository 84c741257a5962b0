/* The passes over maps, for one pair of types; see fused.c. */

#define TRUNK_OF(x) CONVERT(get, TRUNK)(x)
#define TO_TRUNK(x) CONVERT(put, TRUNK)(x)
#define SIGN_OF(x) CONVERT(get, SIGNS)(x)
#define TO_SIGN(x) CONVERT(put, SIGNS)(x)

/* act(v): PReLU(v + in) + out */
INLINE R FUNCTION(activated)(R v, R slope, R in, R out) {
    R z = v + in, steep = z > 0 ? (R)1 : slope;
    return z * steep + out;
}

/* s = sign(beta act(v) + threshold). With `moments` [3, C]: t of the sample's first position, sums of what t differs from
   that by, and of its square, over positions; with `counts` [C]: how many are +1. */
INLINE void FUNCTION(sign_sample)(const T *restrict v, S *restrict s, size_t pixels, size_t channels,
                                  const R *restrict slope, const R *restrict in, const R *restrict out, R beta,
                                  const R *restrict threshold, R *restrict moments, R *restrict counts, int measured,
                                  int counted) {
    R *restrict pivots = moments, *restrict sums = moments + channels, *restrict squares = moments + 2 * channels;
    if (measured)
        for (size_t c = 0; c < channels; c++)
            pivots[c] = FUNCTION(activated)(TRUNK_OF(v[c]), slope[c], in[c], out[c]) * beta + threshold[c];
    for (size_t p = 0; p < pixels; p++, v += channels, s += channels)
        for (size_t c = 0; c < channels; c++) {
            R x = FUNCTION(activated)(TRUNK_OF(v[c]), slope[c], in[c], out[c]);
            R t = x * beta + threshold[c];
            s[c] = TO_SIGN(t >= 0 ? (R)1 : (R)-1);
            if (measured) {
                R d = t - pivots[c];
                sums[c] += d;
                squares[c] += d * d;
            }
            if (counted)
                counts[c] += t >= 0 ? (R)1 : (R)0;
        }
}

EACH_CPU void FUNCTION(binarize)(const T *v, S *s, size_t first, size_t last, size_t pixels, size_t channels,
                                 const R *slope, const R *in, const R *out, R beta, const R *threshold, R *moments,
                                 R *counts) {
    for (size_t n = first; n < last; n++) {
        size_t at = n * pixels * channels;
        R *m = moments ? moments + n * 3 * channels : NULL, *k = counts ? counts + n * channels : NULL;
        if (m && k)
            FUNCTION(sign_sample)(v + at, s + at, pixels, channels, slope, in, out, beta, threshold, m, k, 1, 1);
        else if (m)
            FUNCTION(sign_sample)(v + at, s + at, pixels, channels, slope, in, out, beta, threshold, m, k, 1, 0);
        else if (k)
            FUNCTION(sign_sample)(v + at, s + at, pixels, channels, slope, in, out, beta, threshold, m, k, 0, 1);
        else
            FUNCTION(sign_sample)(v + at, s + at, pixels, channels, slope, in, out, beta, threshold, m, k, 0, 0);
    }
}

#ifndef FORWARD_ONLY

/* h = y factor + bias + act(v); without v: h = y factor + bias. */
EACH_CPU void FUNCTION(residual)(const S *restrict y, const T *restrict v, T *restrict h, size_t first, size_t last,
                                 size_t pixels, size_t channels, const R *restrict slope, const R *restrict in,
                                 const R *restrict out, const R *restrict factor, const R *restrict bias) {
    size_t begin = first * pixels, end = last * pixels;
    if (!v) {
        for (size_t p = begin; p < end; p++)
            for (size_t c = 0; c < channels; c++)
                h[p * channels + c] = TO_TRUNK(SIGN_OF(y[p * channels + c]) * factor[c] + bias[c]);
        return;
    }
    for (size_t p = begin; p < end; p++)
        for (size_t c = 0; c < channels; c++) {
            size_t i = p * channels + c;
            R x = FUNCTION(activated)(TRUNK_OF(v[i]), slope[c], in[c], out[c]);
            h[i] = TO_TRUNK(SIGN_OF(y[i]) * factor[c] + bias[c] + x);
        }
}

/* act(v), and act(v) beta, as a map. */
EACH_CPU void FUNCTION(activate)(const T *restrict v, T *restrict x, size_t first, size_t last, size_t pixels,
                                 size_t channels, const R *restrict slope, const R *restrict in,
                                 const R *restrict out, R beta) {
    for (size_t p = first * pixels; p < last * pixels; p++)
        for (size_t c = 0; c < channels; c++) {
            size_t i = p * channels + c;
            x[i] = TO_TRUNK(FUNCTION(activated)(TRUNK_OF(v[i]), slope[c], in[c], out[c]) * beta);
        }
}

/* The slope that stands for the sign's derivative at u, in a window of width 1 / inverse. */
INLINE R FUNCTION(ste)(R u, R inverse, int kind) {
    R size = u < 0 ? -u : u;
    if (kind == IDENTITY)
        return 1;
    if (kind == CLIP)
        return size * inverse <= 1 ? (R)1 : (R)0;
    R fall = 2 - 2 * inverse * size;
    return (fall > 0 ? fall : 0) * inverse;
}

/* d v from g = d h (if `added`, act(v) was added to h) and e = d s less take [C] (if `signed_`, the latter if
   `taking`). `window` is k of this sample: the estimator sees k t and its slope counts k times. sums [5, C]: of d threshold, d slope, d in, d out, g. */
INLINE void FUNCTION(backward_sample)(const T *restrict v, const T *restrict g, const S *restrict e, T *restrict d,
                                      size_t pixels, size_t channels, const R *restrict slope, const R *restrict in,
                                      const R *restrict out, R beta, const R *restrict threshold, R inverse, R window,
                                      const R *restrict take, R *restrict sums, int kind, int added, int signed_,
                                      int taking) {
    R *restrict of_threshold = sums, *restrict of_slope = sums + channels, *restrict of_in = sums + 2 * channels;
    R *restrict of_out = sums + 3 * channels, *restrict of_g = sums + 4 * channels;
    for (size_t p = 0; p < pixels; p++)
        for (size_t c = 0; c < channels; c++) {
            size_t i = p * channels + c;
            R z = TRUNK_OF(v[i]) + in[c], low = slope[c];
            R steep = z > 0 ? (R)1 : low, below = z > 0 ? (R)0 : z;
            R dx = 0;
            if (signed_) {
                R t = (z * steep + out[c]) * beta + threshold[c];
                R ds = SIGN_OF(e[i]) - (taking ? take[c] : (R)0);
                R dt = ds * (FUNCTION(ste)(t * window, inverse, kind) * window);
                of_threshold[c] += dt;
                dx = dt * beta;
            }
            if (added) {
                R dh = TRUNK_OF(g[i]) * (signed_ ? (R)1 : beta);
                of_g[c] += dh;
                dx += dh;
            }
            R dz = dx * steep;
            of_slope[c] += dx * below;
            of_in[c] += dz;
            of_out[c] += dx;
            d[i] = TO_TRUNK(dz);
        }
}

#define SAMPLE(kind, added, signed_)                                                                                   \
    do {                                                                                                               \
        if ((signed_) && take)                                                                                         \
            SAMPLE_TAKING(kind, added, signed_, 1);                                                                    \
        else                                                                                                           \
            SAMPLE_TAKING(kind, added, signed_, 0);                                                                    \
    } while (0)
#define SAMPLE_TAKING(kind, added, signed_, taking)                                                                    \
    FUNCTION(backward_sample)(v + at, (added) ? g + at : NULL, (signed_) ? e + at : NULL, d + at, pixels, channels,    \
                              slope, in, out, beta, threshold, inverse, k, (taking) ? take + n * channels : NULL,      \
                              sums + n * 5 * channels, kind, added, signed_, taking)

EACH_CPU void FUNCTION(backward)(const T *v, const T *g, const S *e, T *d, size_t first, size_t last, size_t pixels,
                                 size_t channels, const R *slope, const R *in, const R *out, R beta,
                                 const R *threshold, R inverse, const R *windows, const R *take, R *sums,
                                 int kind) {
    for (size_t n = first; n < last; n++) {
        size_t at = n * pixels * channels;
        R k = windows ? windows[n] : 1;
        if (!e)
            SAMPLE(IDENTITY, 1, 0);
        else if (kind == APPROX && g)
            SAMPLE(APPROX, 1, 1);
        else if (kind == APPROX)
            SAMPLE(APPROX, 0, 1);
        else if (kind == CLIP && g)
            SAMPLE(CLIP, 1, 1);
        else if (kind == CLIP)
            SAMPLE(CLIP, 0, 1);
        else if (g)
            SAMPLE(IDENTITY, 1, 1);
        else
            SAMPLE(IDENTITY, 0, 1);
    }
}

#undef SAMPLE
#undef SAMPLE_TAKING
#endif

#undef TRUNK_OF
#undef TO_TRUNK
#undef SIGN_OF
#undef TO_SIGN
