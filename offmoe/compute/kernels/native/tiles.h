/* The kernels, once for all instruction sets: a file that includes this has chosen its sixteen lanes.
 *
 *   lanes   16 x 32 bits: the 16 rows of one word        floats  16 x float
 *   runs    sums of byte products that are not widened yet (AVX2 keeps 16 bits as long as they fit), else lanes: with
 *           WIDE_RUNS they can begin with a sum of 32 bits
 *
 * What moves: every word of the weight once, in address order, prefetched 2 KB ahead; a core's share of memory bandwidth
 * bounds one token, arithmetic bounds four or more. Integer sums are exact within a group; groups are added in float32.
 * All functions below are one inlined body per kind with constant token and tile counts.
 */
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
enum { AHEAD = 2048, BF16_AHEAD = 2048, SCALES_AHEAD = 512, HIGH_AHEAD = 512, SUPERS_AHEAD = 128 };

/* What follows from the kind alone, so that the compiler knows it. */
INLINE int is_octets(int kind) { return kind == KIND_INT8 || kind == KIND_INT8_GROUPS || kind == KIND_FP8; }
INLINE int has_pairs(int kind) { return kind == KIND_INT2 || kind == KIND_INT3; }
INLINE int has_high(int kind) { return kind == KIND_INT3 || kind == KIND_INT5 || kind == KIND_INT6; }
INLINE int has_small_groups(int kind) { return has_pairs(kind) || kind == KIND_INT6; } /* of 16 inputs */
INLINE int is_signed(int kind) { return is_octets(kind) || kind == KIND_IQ4; }
/* What the values of codes are relative to: a constant, a number per group, or a float minimum per group. */
enum form { FORM_PLAIN, FORM_ZEROS, FORM_MINIMA };
INLINE enum form form_of(const struct weight *w, int kind) {
    if (kind == KIND_INT2 || ((kind == KIND_INT4 || kind == KIND_INT5) && w->minima)) return FORM_MINIMA;
    return kind == KIND_INT4 && w->zeros ? FORM_ZEROS : FORM_PLAIN;
}
/* The constant. Kernels of int8 activations may have another for signed bytes, which they take as unsigned ones. */
INLINE int zero_of(int kind) {
    switch (kind) {
    case KIND_INT3: return 4;
    case KIND_INT4: return 8;
    case KIND_MXFP4: return 12;
    case KIND_INT5: return 16;
    case KIND_INT6: return 32;
    default: return is_signed(kind) ? S8_ZERO : 0;
    }
}
INLINE int largest_code(int kind) {
    return kind == KIND_INT6 ? 63 : kind == KIND_INT5 ? 31 : kind == KIND_MXFP4 ? 24 : kind == KIND_INT3 ? 7 : kind == KIND_INT2 ? 3 : 15;
}
/* Steps of eight inputs, or four, that a group takes. */
INLINE int words_of_group(const struct weight *w, int kind) {
    return kind == KIND_INT5 ? 4 : has_small_groups(kind) ? 2 : w->group / (is_octets(kind) ? 4 : 8);
}

/* Where 16 rows of a plane with an entry per group begin, and their float16 of two levels. */
struct place {
    size_t group, super;
};
INLINE struct place place_of(const struct weight *w, int tile, int g, int groups, int kind) {
    const int per_super = has_small_groups(kind) ? 16 : 8, planes = kind == KIND_INT2 || w->minima ? 2 : 1;
    const size_t supers = (size_t)tile * (groups / per_super) + g / per_super;
    return (struct place){((size_t)tile * groups + g) * TILE, supers * planes * TILE};
}

INLINE floats scaled(const struct weight *w, const void *plane, size_t at, size_t super) {
    switch (w->scale_type) {
    case SCALE_BF16: return floats_bf16((const uint16_t *)plane + at);
    case SCALE_FP16: return floats_fp16((const uint16_t *)plane + at);
    case SCALE_FP32: return floats_load((const float *)plane + at);
    case SCALE_TWO_LEVELS: return floats_mul(floats_s8((const int8_t *)plane + at), floats_fp16(w->supers + super));
    default: return floats_mul(floats_power2((const uint8_t *)plane + at), floats_set(0.5f)); /* doubled values */
    }
}
INLINE floats scales_at(const struct weight *w, struct place p, int kind) {
    if (kind != KIND_INT2) return scaled(w, w->scales, p.group, p.super);
    return floats_mul(floats_of(lanes_low(lanes_u8((const uint8_t *)w->scales + p.group))), floats_fp16(w->supers + p.super));
}
INLINE floats minima_at(const struct weight *w, struct place p, int kind) {
    if (kind != KIND_INT2) return scaled(w, w->minima, p.group, p.super + TILE);
    const lanes codes = lanes_high(lanes_u8((const uint8_t *)w->scales + p.group));
    return floats_mul(floats_of(codes), floats_fp16(w->supers + p.super + TILE));
}

INLINE void prefetch_scales(const struct weight *w, struct place p, int kind) {
    const int two = w->scale_type == SCALE_TWO_LEVELS, octets = two || w->scale_type == SCALE_E8M0;
    __builtin_prefetch((const uint8_t *)w->scales + p.group * (octets ? 1 : w->scale_type == SCALE_FP32 ? 4 : 2) + SCALES_AHEAD);
    if ((kind == KIND_INT4 || kind == KIND_INT5) && w->minima)
        __builtin_prefetch((const uint8_t *)w->minima + p.group * (two ? 1 : 2) + SCALES_AHEAD);
    if (two) __builtin_prefetch(w->supers + p.super + SUPERS_AHEAD);
}

/* What a group has besides its nibbles or bytes: a word of pairs, and the bits above what its words hold. */
struct rest {
    lanes pairs, high;
};
INLINE struct rest rest_at(const struct weight *w, int tile, int g, int groups, int kind) {
    struct rest r;
    const size_t at = ((size_t)tile * groups + g) * 64;
    if (has_pairs(kind)) {
        __builtin_prefetch(w->words + at + AHEAD);
        r.pairs = lanes_load(w->words + at);
    }
    if (kind == KIND_INT3) { /* a word of two groups */
        const size_t both = ((size_t)tile * (groups / 2) + g / 2) * 64;
        __builtin_prefetch(w->high + both + HIGH_AHEAD);
        r.high = lanes_load(w->high + both);
        if (g & 1) r.high = lanes_right(r.high, 4);
    } else if (has_high(kind)) {
        __builtin_prefetch(w->high + at + HIGH_AHEAD);
        r.high = lanes_load(w->high + at);
    }
    return r;
}

/* The next word of a weight; none is read where a group has one word of pairs. */
INLINE lanes next_word(const uint8_t **p, int kind) {
    if (has_pairs(kind)) return lanes_set(0);
    const lanes v = lanes_load(*p);
    __builtin_prefetch(*p + AHEAD);
    *p += 64;
    return v;
}

/* The codes of a word's inputs 0 2 4 6 and 1 3 5 7, as bytes. What they take of the rest is shifted out of it. */
struct halves {
    lanes even, odd;
};
INLINE struct halves codes_of(lanes v, struct rest *r, int kind) {
    const lanes none = lanes_set(0);
    struct halves c = {lanes_low(v), lanes_high(v)};
    if (kind == KIND_MXFP4) c.even = lanes_e2m1(c.even), c.odd = lanes_e2m1(c.odd);
    if (kind == KIND_IQ4) c.even = lanes_iq4(c.even), c.odd = lanes_iq4(c.odd);
    if (has_pairs(kind)) {
        c.even = lanes_with(none, r->pairs, 0, 3), c.odd = lanes_with(none, lanes_right(r->pairs, 2), 0, 3);
        r->pairs = lanes_right(r->pairs, 4);
    }
    if (kind == KIND_INT3) {
        c.even = lanes_with(c.even, r->high, 2, 4), c.odd = lanes_with(c.odd, r->high, 1, 4);
        r->high = lanes_right(r->high, 2);
    }
    if (kind == KIND_INT5) {
        c.even = lanes_with(c.even, r->high, 4, 16), c.odd = lanes_with(c.odd, r->high, 3, 16);
        r->high = lanes_right(r->high, 2);
    }
    if (kind == KIND_INT6) {
        c.even = lanes_with(c.even, r->high, 4, 48), c.odd = lanes_with(c.odd, r->high, 2, 48);
        r->high = lanes_right(r->high, 4);
    }
    return c;
}

/* Weights times int8 activations. */
INLINE void int8_tiles_of(const struct weight *const *w, const int *tile, const struct block *x, float *const *y, const int M,
                          const int NT, const int kind, const enum form form) {
    const int words = words_of_group(w[0], kind), groups = w[0]->cols / w[0]->group;
    const int longest = run_words(words, largest_code(kind)), run = longest < words ? longest : words;
    const int split = M <= 2; /* two sums hide the latency of few tokens */
    const int32_t *a = x->data, *sums = x->sum;
    const float *sa = x->scale, *float_sums = x->sum;
    const uint8_t *p[2];
    floats f[MAX_BLOCK][2];
    UNROLL for (int t = 0; t < NT; t++) {
        p[t] = w[t]->words + (size_t)tile[t] * groups * words * 64;
        UNROLL for (int m = 0; m < M; m++) f[m][t] = floats_zero();
    }
    for (int g = 0; g < groups; g++, sums += M, float_sums += M, sa += M) {
        lanes c[MAX_BLOCK][2];
        struct rest rest[2];
        struct place place[2];
        UNROLL for (int t = 0; t < NT; t++) {
            place[t] = place_of(w[t], tile[t], g, groups, kind);
            rest[t] = rest_at(w[t], tile[t], g, groups, kind);
        }
        UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) c[m][t] = lanes_set(form == FORM_PLAIN ? sums[m] : 0);
        if (is_octets(kind)) {
            for (int j = 0; j < words; j++, a += M) {
                UNROLL for (int t = 0; t < NT; t++) {
                    const lanes v = next_word(&p[t], kind);
                    UNROLL for (int m = 0; m < M; m++) c[m][t] = lanes_dot_s8(c[m][t], v, a[m]);
                }
            }
        } else if (is_signed(kind)) {
            for (int j = 0; j < words; j++, a += 2 * M) {
                UNROLL for (int t = 0; t < NT; t++) {
                    const struct halves v = codes_of(next_word(&p[t], kind), &rest[t], kind);
                    UNROLL for (int m = 0; m < M; m++) {
                        c[m][t] = lanes_dot_s8(c[m][t], v.even, a[2 * m]);
                        c[m][t] = lanes_dot_s8(c[m][t], v.odd, a[2 * m + 1]);
                    }
                }
            }
        } else {
            for (int done = 0; done < words; done += run) {
                runs r[MAX_BLOCK][2][2];
                UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) {
                    r[m][t][0] = WIDE_RUNS ? c[m][t] : runs_zero();
                    r[m][t][1] = runs_zero();
                }
                for (int j = 0; j < run; j++, a += 2 * M) {
                    UNROLL for (int t = 0; t < NT; t++) {
                        const struct halves v = codes_of(next_word(&p[t], kind), &rest[t], kind);
                        UNROLL for (int m = 0; m < M; m++) {
                            r[m][t][0] = runs_dot(r[m][t][0], v.even, a[2 * m]);
                            r[m][t][split] = runs_dot(r[m][t][split], v.odd, a[2 * m + 1]);
                        }
                    }
                }
                UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) {
                    c[m][t] = WIDE_RUNS ? r[m][t][0] : runs_add(c[m][t], r[m][t][0]);
                    if (split) c[m][t] = runs_add(c[m][t], r[m][t][1]);
                }
            }
        }
        UNROLL for (int t = 0; t < NT; t++) {
            if (kind == KIND_INT8) { /* one scale per row: below */
                UNROLL for (int m = 0; m < M; m++) f[m][t] = floats_fma(floats_of(c[m][t]), floats_set(sa[m]), f[m][t]);
                continue;
            }
            floats s = scales_at(w[t], place[t], kind);
            prefetch_scales(w[t], place[t], kind);
            if (form == FORM_MINIMA) {
                floats least = minima_at(w[t], place[t], kind);
                UNROLL for (int m = 0; m < M; m++) {
                    f[m][t] = floats_fma(floats_mul(floats_of(c[m][t]), floats_set(sa[m])), s, f[m][t]);
                    f[m][t] = floats_fma(least, floats_set(float_sums[m]), f[m][t]);
                }
            } else if (form == FORM_ZEROS) {
                floats z = floats_of(lanes_u8(w[t]->zeros + place[t].group));
                UNROLL for (int m = 0; m < M; m++) {
                    floats v = floats_fma(z, floats_set(float_sums[m]), floats_of(c[m][t]));
                    f[m][t] = floats_fma(floats_mul(v, floats_set(sa[m])), s, f[m][t]);
                }
            } else {
                UNROLL for (int m = 0; m < M; m++)
                    f[m][t] = floats_fma(floats_mul(floats_of(c[m][t]), floats_set(sa[m])), s, f[m][t]);
            }
        }
    }
    UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) {
        if (kind == KIND_INT8) f[m][t] = floats_mul(f[m][t], scales_at(w[t], (struct place){(size_t)tile[t] * TILE, 0}, kind));
        floats_store(y[t] + m * TILE, f[m][t]);
    }
}

INLINE void int8_tiles(const struct weight *const *w, const int *tile, const struct block *x, float *const *y, const int M,
                       const int NT, const int kind) {
    switch (form_of(w[0], kind)) {
    case FORM_PLAIN: int8_tiles_of(w, tile, x, y, M, NT, kind, FORM_PLAIN); break;
    case FORM_ZEROS: int8_tiles_of(w, tile, x, y, M, NT, kind, FORM_ZEROS); break;
    case FORM_MINIMA: int8_tiles_of(w, tile, x, y, M, NT, kind, FORM_MINIMA);
    }
}

/* Weights times float activations. What fp8 weights are decoded to is 2^8 too small, and of their bytes that are not a
 * number is only kept which rows have them. */
INLINE void float_tiles(const struct weight *const *w, const int *tile, const struct block *x, float *const *y, const int M,
                        const int NT, const int kind) {
    const int values = is_octets(kind) ? 4 : 8; /* of a word */
    const int words = words_of_group(w[0], kind), groups = w[0]->cols / w[0]->group;
    const int split = M <= 2, minima = form_of(w[0], kind) == FORM_MINIMA, octets = has_pairs(kind) || has_high(kind);
    const float *a = x->data, *sums = x->sum;
    const uint8_t *p[2];
    lanes nan[2];
    floats f[MAX_BLOCK][2];
    UNROLL for (int t = 0; t < NT; t++) {
        p[t] = w[t]->words + (size_t)tile[t] * groups * words * 64;
        nan[t] = lanes_set(0);
        UNROLL for (int m = 0; m < M; m++) f[m][t] = floats_zero();
    }
    for (int g = 0; g < groups; g++, sums += M) {
        floats c[MAX_BLOCK][2][2];
        struct rest rest[2];
        struct place place[2];
        UNROLL for (int t = 0; t < NT; t++) {
            place[t] = place_of(w[t], tile[t], g, groups, kind);
            rest[t] = rest_at(w[t], tile[t], g, groups, kind);
            UNROLL for (int m = 0; m < M; m++) c[m][t][0] = c[m][t][1] = floats_zero();
        }
        for (int j = 0; j < words; j++, a += values * M) {
            UNROLL for (int t = 0; t < NT; t++) {
                const lanes v = next_word(&p[t], kind);
                floats bytes[4];
                struct halves both;
                if (kind == KIND_FP8) nan[t] = floats_e4m3(bytes, v, nan[t]);
                if (octets || kind == KIND_IQ4) both = codes_of(v, &rest[t], kind);
                UNROLL for (int i = 0; i < values; i++) {
                    floats q = kind == KIND_FP8     ? bytes[i]
                               : is_octets(kind)    ? floats_byte(v, i)
                               : kind == KIND_MXFP4 ? floats_e2m1(v, i)
                               : kind == KIND_INT4  ? floats_nibble(v, i)
                               : kind == KIND_IQ4   ? floats_byte(i & 1 ? both.odd : both.even, i / 2)
                                                    : floats_octet(i & 1 ? both.odd : both.even, i / 2);
                    UNROLL for (int m = 0; m < M; m++)
                        c[m][t][split & i] = floats_fma(q, floats_set(a[i * M + m]), c[m][t][split & i]);
                }
            }
        }
        UNROLL for (int t = 0; t < NT; t++) {
            const int zero = minima ? 0 : zero_of(kind);
            floats s = kind == KIND_INT8 ? floats_set(1) : scales_at(w[t], place[t], kind);
            floats z = floats_set((float)zero), least = floats_zero();
            if (kind == KIND_FP8) s = floats_mul(s, floats_set(256));
            if (kind != KIND_INT8) prefetch_scales(w[t], place[t], kind);
            if (kind == KIND_INT4 && w[t]->zeros) z = floats_of(lanes_u8(w[t]->zeros + place[t].group));
            if (minima) least = minima_at(w[t], place[t], kind);
            UNROLL for (int m = 0; m < M; m++) {
                floats v = split ? floats_add(c[m][t][0], c[m][t][1]) : c[m][t][0];
                if (kind == KIND_INT4 || octets) v = floats_fma(z, floats_set(-sums[m]), v);
                f[m][t] = floats_fma(v, s, f[m][t]);
                if (minima) f[m][t] = floats_fma(least, floats_set(-sums[m]), f[m][t]);
            }
        }
    }
    UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) {
        if (kind == KIND_INT8) f[m][t] = floats_mul(f[m][t], scales_at(w[t], (struct place){(size_t)tile[t] * TILE, 0}, kind));
        if (kind == KIND_FP8) f[m][t] = floats_or_nan(f[m][t], nan[t]);
        floats_store(y[t] + m * TILE, f[m][t]);
    }
}

/* Rows of bf16, 16 of them as if they were a tile; exact products, float32 sums.
 *
 * One row is a few KB, too short for the processor's own prefetching, so several are read side by side, and the end of
 * some prefetches the beginning of the next. Lines come into the second level of the cache: rows of 4 KB fall into the
 * same few lines of the first. One core of a Zen 4 reads 18.5 GB/s when they come into the first, 512 bytes ahead, and
 * 23.3 so; from memory as such, 26.8.
 */
INLINE void bf16_rows(const struct weight *w, int tile, const struct block *x, float *y, const int M) {
    const size_t stride = (size_t)w->cols * 2, ahead = stride < BF16_AHEAD ? stride : BF16_AHEAD;
    const int rows = M <= 2 ? BF16_ROWS : 4; /* what registers hold */
    for (int row = 0; row < TILE; row += rows) {
        const uint8_t *p = w->words + ((size_t)tile * TILE + row) * stride;
        const float *a = x->data;
        floats f[MAX_BLOCK][BF16_ROWS];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int m = 0; m < M; m++) f[m][r] = floats_zero();
        for (int at_end = 0; at_end < 2; at_end++) {
            const size_t far = ahead + (at_end ? (rows - 1) * stride : 0);
            for (size_t left = at_end ? ahead : stride - ahead; left; left -= 64, p += 64, a += 32 * M) {
                UNROLL for (int r = 0; r < rows; r++) {
                    lanes v = lanes_load(p + r * stride);
                    floats even = floats_even_bf16(v), odd = floats_odd_bf16(v);
                    __builtin_prefetch(p + r * stride + far, 0, 2);
                    UNROLL for (int m = 0; m < M; m++) {
                        f[m][r] = floats_fma(even, floats_load(a + 32 * m), f[m][r]);
                        f[m][r] = floats_fma(odd, floats_load(a + 32 * m + TILE), f[m][r]);
                    }
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int m = 0; m < M; m++) y[m * TILE + row + r] = floats_sum(f[m][r]);
    }
}

#define FUNCTIONS(body, name, kind, M)                                                                                  \
    static void name##_##M(const struct weight *w, int tile, const struct block *x, float *y) {                        \
        body(&w, &tile, x, &y, M, 1, kind);                                                                            \
    }                                                                                                                  \
    static void name##_pair_##M(const struct weight *const *w, const int *tile, const struct block *x, float *const *y) { \
        if (M <= PAIR_TOKENS) {                                                                                        \
            body(w, tile, x, y, M, 2, kind);                                                                           \
        } else {                                                                                                       \
            name##_##M(w[0], tile[0], x, y[0]);                                                                        \
            name##_##M(w[1], tile[1], x, y[1]);                                                                        \
        }                                                                                                              \
    }
#define BF16_FUNCTIONS(M)                                                                                               \
    static void bf16_##M(const struct weight *w, int tile, const struct block *x, float *y) { bf16_rows(w, tile, x, y, M); } \
    static void bf16_pair_##M(const struct weight *const *w, const int *tile, const struct block *x, float *const *y) { \
        bf16_rows(w[0], tile[0], x, y[0], M);                                                                          \
        bf16_rows(w[1], tile[1], x, y[1], M);                                                                          \
    }
#define BOTH_PRECISIONS(name, kind, M)                                                                                  \
    FUNCTIONS(int8_tiles, name##_a8, kind, M)                                                                          \
    FUNCTIONS(float_tiles, name##_float, kind, M)
#define ALL_KINDS(M)                                                                                                    \
    BOTH_PRECISIONS(int4, KIND_INT4, M)                                                                                 \
    BOTH_PRECISIONS(mxfp4, KIND_MXFP4, M)                                                                               \
    BOTH_PRECISIONS(int8, KIND_INT8, M)                                                                                 \
    BOTH_PRECISIONS(int2, KIND_INT2, M)                                                                                 \
    BOTH_PRECISIONS(int3, KIND_INT3, M)                                                                                 \
    BOTH_PRECISIONS(int5, KIND_INT5, M)                                                                                 \
    BOTH_PRECISIONS(int6, KIND_INT6, M)                                                                                 \
    BOTH_PRECISIONS(groups, KIND_INT8_GROUPS, M)                                                                        \
    BOTH_PRECISIONS(iq4, KIND_IQ4, M)                                                                                   \
    FUNCTIONS(float_tiles, fp8_float, KIND_FP8, M)                                                                      \
    BF16_FUNCTIONS(M)
ALL_KINDS(1)
ALL_KINDS(2)
ALL_KINDS(4)
#if LARGEST_BLOCK == 8
ALL_KINDS(8)
#define SIZES(name) {name##_1, name##_2, name##_4, name##_8}
#else
#define SIZES(name) {name##_1, name##_2, name##_4, NULL}
#endif

#define BY_PRECISION(name) {SIZES(name##_a8), SIZES(name##_float)}
#define TILES                                                                                                        \
    {                                                                                                                \
        [KIND_INT4] = BY_PRECISION(int4), [KIND_MXFP4] = BY_PRECISION(mxfp4), [KIND_INT8] = BY_PRECISION(int8),      \
        [KIND_INT5] = BY_PRECISION(int5), [KIND_INT6] = BY_PRECISION(int6), [KIND_IQ4] = BY_PRECISION(iq4),          \
        [KIND_INT2] = BY_PRECISION(int2), [KIND_INT3] = BY_PRECISION(int3),                                          \
        [KIND_INT8_GROUPS] = BY_PRECISION(groups), [KIND_FP8] = {SIZES(fp8_float), SIZES(fp8_float)},                \
        [KIND_BF16] = {SIZES(bf16), SIZES(bf16)}                                                                     \
    }
#define PAIR_BY_PRECISION(name) {SIZES(name##_a8_pair), SIZES(name##_float_pair)}
#define PAIRS                                                                                                        \
    {                                                                                                                \
        [KIND_INT4] = PAIR_BY_PRECISION(int4), [KIND_MXFP4] = PAIR_BY_PRECISION(mxfp4),                              \
        [KIND_INT2] = PAIR_BY_PRECISION(int2), [KIND_INT3] = PAIR_BY_PRECISION(int3),                                \
        [KIND_INT8] = PAIR_BY_PRECISION(int8), [KIND_INT5] = PAIR_BY_PRECISION(int5),                                \
        [KIND_INT6] = PAIR_BY_PRECISION(int6), [KIND_IQ4] = PAIR_BY_PRECISION(iq4),                                  \
        [KIND_INT8_GROUPS] = PAIR_BY_PRECISION(groups), [KIND_FP8] = {SIZES(fp8_float_pair), SIZES(fp8_float_pair)}, \
        [KIND_BF16] = {SIZES(bf16_pair), SIZES(bf16_pair)}                                                           \
    }
