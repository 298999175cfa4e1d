/* The encoder of one row, once for all instruction sets: float weights to int4 or int8 with the scales that lose least.
 *
 * What moves: a row through the core's nearest cache, a dozen times; arithmetic bounds it. offmoe/pack/fit.py
 * defines the result, and this gives it bit for bit: the same operations on the same operands, sums in sixteen lanes of
 * spans of at most 128 values, their halves added, then span by span. So no product and sum may become one operation
 * (-ffp-contract=off), and nothing depends on how rows are divided among threads.
 */
#include <float.h>

#include "half.h"

#define INLINE static inline __attribute__((always_inline))
#define ROUNDING 12582912.0f /* 1.5 * 2^23: adding it rounds what is below 2^22 to an integer, ties to even */

/* How one group is written, and the squared error of that. */
struct fit {
    float scale, zero, error;
};

/* What is the same for all groups of a weight. */
struct grid {
    int count, span, type, asymmetric;
    float low, high;
};

INLINE floats floats_as(floats v, int type) {
    return type == SCALE_BF16 ? floats_round_bf16(v) : type == SCALE_FP16 ? floats_round_fp16(v) : v;
}

/* A scale with an inverse: a group of zeros, or of numbers too small for a scale, becomes zeros of scale 1. */
INLINE float usable(float scale) { return scale < FLT_MIN && scale > -FLT_MIN ? 1.0f : scale; }

INLINE float nearest_zero(float zero) {
    zero = zero > 0 ? zero : 0;
    zero = zero < 15 ? zero : 15;
    return (zero + ROUNDING) - ROUNDING;
}

/* inverse: of the scale; a division here takes twice the time of all the rest */
INLINE floats levels_of(floats w, const struct grid *g, float inverse, float zero) {
    floats x = floats_mul(w, floats_set(inverse));
    if (g->asymmetric) x = floats_add(x, floats_set(zero));
    x = floats_min(floats_max(x, floats_set(g->low)), floats_set(g->high));
    return floats_sub(floats_add(x, floats_set(ROUNDING)), floats_set(ROUNDING));
}

/* A group written with a scale that can be stored, as it will be read back. */
INLINE struct fit fit_stored(const float *w, const struct grid *g, float scale, float inverse, float zero) {
    struct fit out = {scale, zero, 0};
    for (int start = 0; start < g->count; start += g->span) {
        floats sum = floats_zero();
        for (int i = start; i < start + g->span; i += TILE) {
            floats x = floats_load(w + i), level = levels_of(x, g, inverse, zero);
            if (g->asymmetric) level = floats_sub(level, floats_set(zero));
            floats d = floats_sub(floats_mul(level, floats_set(scale)), x);
            sum = floats_add(sum, floats_mul(d, d));
        }
        out.error += floats_sum(sum);
    }
    return out;
}

INLINE struct fit fit_at(const float *w, const struct grid *g, float scale, float zero) {
    scale = usable(floats_first(floats_as(floats_set(scale), g->type)));
    return fit_stored(w, g, scale, 1 / scale, zero);
}

/* The better of two; the first where they are equal, or the second's error is not a number. */
INLINE struct fit better(struct fit a, struct fit b) { return b.error < a.error ? b : a; }

/* The best of the scales step * factors; with zero points each has the one that puts `middle` in the middle. */
INLINE struct fit best_of(const float *w, const struct grid *g, const struct encoding *e, float step, float middle) {
    float scale[TILE], inverse[TILE], zero[TILE] = {0};
    struct fit best = {0};
    floats_store(scale, floats_mul(floats_set(step), floats_load(e->factors)));
    if (g->asymmetric)
        for (int i = 0; i < e->candidates; i++) zero[i] = nearest_zero(7.5f - middle / usable(scale[i]));
    floats_store(scale, floats_as(floats_load(scale), g->type));
    for (int i = 0; i < TILE; i++) scale[i] = usable(scale[i]);
    floats_store(inverse, floats_div(floats_set(1), floats_load(scale)));
    for (int i = 0; i < e->candidates; i++) {
        struct fit f = fit_stored(w, g, scale[i], inverse[i], zero[i]);
        best = i ? better(best, f) : f;
    }
    return best;
}

/* Least squares: the slope of w - mean over the levels - middle of a fit. */
INLINE float slope(const float *w, const struct grid *g, const struct fit *f, float middle, float mean) {
    const float inverse = 1 / f->scale;
    float product = 0, square = 0;
    for (int start = 0; start < g->count; start += g->span) {
        floats p = floats_zero(), s = floats_zero();
        for (int i = start; i < start + g->span; i += TILE) {
            floats x = floats_load(w + i), level = levels_of(x, g, inverse, f->zero);
            if (g->asymmetric) level = floats_sub(level, floats_set(middle)), x = floats_sub(x, floats_set(mean));
            p = floats_add(p, floats_mul(level, x));
            s = floats_add(s, floats_mul(level, level));
        }
        product += floats_sum(p), square += floats_sum(s);
    }
    return product / (square > 1 ? square : 1.0f);
}

/* Means of the values and of the levels of a fit, or of the values alone. */
INLINE float mean_of(const float *w, const struct grid *g, const struct fit *f) {
    floats sum = floats_zero(); /* groups with zero points are one span */
    for (int i = 0; i < g->count; i += TILE) {
        floats x = floats_load(w + i);
        sum = floats_add(sum, f ? levels_of(x, g, 1 / f->scale, f->zero) : x);
    }
    return floats_sum(sum) / (float)g->count;
}

INLINE struct fit fit_symmetric(const float *w, const struct grid *g, const struct encoding *e, float low, float high) {
    struct fit best = best_of(w, g, e, (high >= -low ? high : low) / g->low, 0); /* the largest value on the lowest level */
    for (int i = 0; i < e->refits; i++) best = better(best, fit_at(w, g, slope(w, g, &best, 0, 0), 0));
    return best;
}

INLINE struct fit fit_asymmetric(const float *w, const struct grid *g, const struct encoding *e, float low, float high) {
    high = high > 0 ? high : 0, low = low < 0 ? low : 0;
    const float mean = mean_of(w, g, NULL);
    struct fit best = best_of(w, g, e, (high - low) / 15, (high + low) / 2);
    for (int i = 0; i < e->refits; i++) {
        const float levels = mean_of(w, g, &best), scale = slope(w, g, &best, levels, mean);
        best = better(best, fit_at(w, g, scale, nearest_zero(levels - mean / usable(scale))));
        best = better(best, fit_at(w, g, slope(w, g, &best, best.zero, 0), best.zero));
    }
    return best;
}

INLINE floats values_at(const void *p, size_t index, int type) {
    return type == SCALE_BF16   ? floats_bf16((const uint16_t *)p + index)
           : type == SCALE_FP16 ? floats_fp16((const uint16_t *)p + index)
                                : floats_load((const float *)p + index);
}

/* The levels of a fit, as nibbles with 8 added where there are no zero points, or as bytes. */
INLINE void write_levels(const float *w, const struct grid *g, const struct encoding *e, const struct fit *f, uint8_t *out) {
    const floats more = floats_set(e->bits == 4 && !e->zeros ? 8 : 0);
    for (int i = 0; i < g->count; i += TILE) {
        floats level = floats_add(levels_of(floats_load(w + i), g, 1 / f->scale, f->zero), more);
        if (e->bits == 8) {
            bytes_store(out + i, level);
            continue;
        }
        uint64_t eight[2];
        bytes_store((uint8_t *)eight, level);
        for (int half = 0; half < 2; half++) { /* two nibbles per byte, the first one low */
            uint64_t v = (eight[half] | eight[half] >> 4) & 0x00ff00ff00ff00ffu;
            v = (v | v >> 8) & 0x0000ffff0000ffffu;
            const uint32_t word = (uint32_t)(v | v >> 16);
            memcpy(out + i / 2 + 4 * half, &word, 4);
        }
    }
}

INLINE void encode_group(const struct encoding *e, const struct grid *g, const float *w, size_t index) {
    float low[TILE], high[TILE];
    floats least = floats_load(w), most = least;
    for (int i = TILE; i < g->count; i += TILE) {
        least = floats_min(least, floats_load(w + i)), most = floats_max(most, floats_load(w + i));
    }
    floats_store(low, least), floats_store(high, most);
    for (int l = 1; l < TILE; l++) {
        low[0] = low[l] < low[0] ? low[l] : low[0], high[0] = high[l] > high[0] ? high[l] : high[0];
    }
    const struct fit f = g->asymmetric ? fit_asymmetric(w, g, e, low[0], high[0]) : fit_symmetric(w, g, e, low[0], high[0]);
    if (g->asymmetric) e->zeros[index] = (uint8_t)f.zero;
    if (g->type == SCALE_FP32)
        memcpy((float *)e->scales + index, &f.scale, 4);
    else if (g->type == SCALE_FP16)
        ((uint16_t *)e->scales)[index] = half_of(f.scale);
    else
        memcpy((uint16_t *)e->scales + index, (const uint8_t *)&f.scale + 2, 2); /* rounded already */
    write_levels(w, g, e, &f, e->words + index * (size_t)g->count * e->bits / 8);
}

/* All groups of a row; count and type are constants where it is called, so that loops have a known length. */
INLINE void encode_groups(const struct encoding *e, int row, const float *w, const int count, const int asymmetric) {
    const int top = 1 << (e->bits - 1), groups = e->cols / count;
    struct grid g = {count, 128, e->scale_type, asymmetric, asymmetric ? 0 : (float)-top, asymmetric ? 15 : (float)(top - 1)};
    while (count % g.span) g.span /= 2;
    for (int i = 0; i < groups; i++) encode_group(e, &g, w + (size_t)i * count, (size_t)row * groups + i);
}

int ENCODE(const struct encoding *e, int row, float *w) {
    floats wrong = floats_zero();
    for (int i = 0; i < e->cols; i += TILE) {
        floats x = values_at(e->weight, (size_t)row * e->cols + i, e->weight_type);
        wrong = floats_add(wrong, floats_sub(x, x)); /* 0, or not a number */
        floats_store(w + i, x);
    }
    if (floats_sum(wrong) != 0) return 1;
    switch (e->bits == 8 ? 0 : e->zeros ? e->group + 1 : e->group) {
    case 32: encode_groups(e, row, w, 32, 0); break;
    case 33: encode_groups(e, row, w, 32, 1); break;
    case 64: encode_groups(e, row, w, 64, 0); break;
    case 65: encode_groups(e, row, w, 64, 1); break;
    case 128: encode_groups(e, row, w, 128, 0); break;
    case 129: encode_groups(e, row, w, 128, 1); break;
    default: encode_groups(e, row, w, e->group, 0);
    }
    return 0;
}

INLINE float scale_at(const struct encoded *e, size_t index) {
    if (e->scale_type == SCALE_FP32) return ((const float *)e->scales)[index];
    const uint16_t stored = ((const uint16_t *)e->scales)[index];
    return e->scale_type == SCALE_FP16 ? of_half(stored) : of_bf16(stored);
}

void COMPARE(const struct encoded *e, int row) {
    const int groups = e->cols / e->group;
    floats most = floats_zero(), total = floats_zero(), squared = floats_zero(), square = floats_zero();
    for (int g = 0; g < groups; g++) {
        const size_t at = (size_t)row * groups + g;
        const float scale = scale_at(e, at);
        float zero = e->bits == 8 ? 128 : 8;
        if (e->zeros) zero = (float)(e->zeros[(size_t)(row / 8) * groups + g] >> 4 * (row % 8) & 15);
        for (int i = g * e->group; i < (g + 1) * e->group; i += TILE) {
            const size_t value = (size_t)row * e->cols + i;
            floats x = values_at(e->weight, value, e->weight_type);
            lanes codes = e->bits == 8 ? lanes_u8(e->words + value) : lanes_nibbles(e->words + value / 2);
            floats decoded = floats_mul(floats_sub(floats_of(codes), floats_set(zero)), floats_set(scale));
            floats d = floats_sub(floats_as(decoded, e->scale_type), x);
            floats magnitude = floats_max(d, floats_sub(floats_zero(), d));
            most = floats_max(most, magnitude), total = floats_add(total, magnitude);
            squared = floats_add(squared, floats_mul(d, d)), square = floats_add(square, floats_mul(x, x));
        }
    }
    float *out = e->out + (size_t)row * 4, largest[TILE];
    floats_store(largest, most);
    for (int l = 1; l < TILE; l++) largest[0] = largest[l] > largest[0] ? largest[l] : largest[0];
    out[0] = largest[0], out[1] = floats_sum(total), out[2] = floats_sum(squared), out[3] = floats_sum(square);
}
