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
enum { AHEAD = 2048, BF16_AHEAD = 1024, SCALES_AHEAD = 512, BF16_ROWS = 4 };

/* Scales of one group, 16 rows. */
INLINE floats scales_at(const struct weight *w, size_t index) {
    switch (w->scale_type) {
    case SCALE_BF16: return floats_bf16((const uint16_t *)w->scales + index);
    case SCALE_FP16: return floats_fp16((const uint16_t *)w->scales + index);
    case SCALE_FP32: return floats_load((const float *)w->scales + index);
    default: return floats_mul(floats_power2((const uint8_t *)w->scales + index), floats_set(0.5f)); /* doubled values */
    }
}

/* Weights times int8 activations. */
INLINE void int8_tiles(const struct weight *const *w, const int *tile, const struct block *x, float *const *y, const int M,
                       const int NT, const int kind) {
    const int words = w[0]->group / (kind == KIND_INT8 ? 4 : 8), groups = w[0]->cols / w[0]->group;
    const int run = run_words(words, kind == KIND_MXFP4), split = M <= 2; /* two sums hide the latency of few tokens */
    const int32_t *a = x->data, *sums = x->sum;
    const float *sa = x->scale;
    const uint8_t *p[2];
    floats f[MAX_BLOCK][2];
    UNROLL for (int t = 0; t < NT; t++) {
        p[t] = w[t]->words + (size_t)tile[t] * groups * words * 64;
        UNROLL for (int m = 0; m < M; m++) f[m][t] = floats_zero();
    }
    for (int g = 0; g < groups; g++, sums += M, sa += M) {
        lanes c[MAX_BLOCK][2];
        const int zero = kind == KIND_INT8 ? S8_ZERO : kind == KIND_MXFP4 ? 12 : w[0]->zeros ? 0 : 8;
        UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) c[m][t] = lanes_set(-zero * sums[m]);
        if (kind == KIND_INT8) {
            for (int j = 0; j < words; j++, a += M) {
                UNROLL for (int t = 0; t < NT; t++) {
                    lanes v = lanes_load(p[t]);
                    __builtin_prefetch(p[t] + AHEAD);
                    p[t] += 64;
                    UNROLL for (int m = 0; m < M; m++) c[m][t] = lanes_dot_s8(c[m][t], v, a[m]);
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
                        lanes v = lanes_load(p[t]), even = lanes_low(v), odd = lanes_high(v);
                        __builtin_prefetch(p[t] + AHEAD);
                        p[t] += 64;
                        if (kind == KIND_MXFP4) even = lanes_e2m1(even), odd = lanes_e2m1(odd);
                        UNROLL for (int m = 0; m < M; m++) {
                            r[m][t][0] = runs_dot(r[m][t][0], even, a[2 * m]);
                            r[m][t][split] = runs_dot(r[m][t][split], odd, a[2 * m + 1]);
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
            const size_t at = ((size_t)tile[t] * groups + g) * TILE;
            if (kind == KIND_INT8) { /* one scale per row: below */
                UNROLL for (int m = 0; m < M; m++) f[m][t] = floats_fma(floats_of(c[m][t]), floats_set(sa[m]), f[m][t]);
                continue;
            }
            floats s = scales_at(w[t], at);
            __builtin_prefetch((const uint8_t *)w[t]->scales + 2 * at + SCALES_AHEAD);
            if (kind == KIND_INT4 && w[t]->zeros) {
                floats z = floats_of(lanes_u8(w[t]->zeros + at));
                UNROLL for (int m = 0; m < M; m++) {
                    floats v = floats_fma(z, floats_set((float)-sums[m]), floats_of(c[m][t]));
                    f[m][t] = floats_fma(floats_mul(v, floats_set(sa[m])), s, f[m][t]);
                }
            } else {
                UNROLL for (int m = 0; m < M; m++)
                    f[m][t] = floats_fma(floats_mul(floats_of(c[m][t]), floats_set(sa[m])), s, f[m][t]);
            }
        }
    }
    UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) {
        if (kind == KIND_INT8) f[m][t] = floats_mul(f[m][t], scales_at(w[t], (size_t)tile[t] * TILE));
        floats_store(y[t] + m * TILE, f[m][t]);
    }
}

/* Weights times float activations. What fp8 weights are decoded to is 2^8 too small, and of their bytes that are not a
 * number is only kept which rows have them. */
INLINE void float_tiles(const struct weight *const *w, const int *tile, const struct block *x, float *const *y, const int M,
                        const int NT, const int kind) {
    const int values = kind == KIND_INT8 || kind == KIND_FP8 ? 4 : 8; /* of a word */
    const int words = w[0]->group / values, groups = w[0]->cols / w[0]->group;
    const int split = M <= 2;
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
        UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) c[m][t][0] = c[m][t][1] = floats_zero();
        for (int j = 0; j < words; j++, a += values * M) {
            UNROLL for (int t = 0; t < NT; t++) {
                lanes v = lanes_load(p[t]);
                __builtin_prefetch(p[t] + AHEAD);
                p[t] += 64;
                floats bytes[4];
                if (kind == KIND_FP8) nan[t] = floats_e4m3(bytes, v, nan[t]);
                UNROLL for (int i = 0; i < values; i++) {
                    floats q = kind == KIND_INT8    ? floats_byte(v, i)
                               : kind == KIND_FP8   ? bytes[i]
                               : kind == KIND_MXFP4 ? floats_e2m1(v, i)
                                                    : floats_nibble(v, i);
                    UNROLL for (int m = 0; m < M; m++)
                        c[m][t][split & i] = floats_fma(q, floats_set(a[i * M + m]), c[m][t][split & i]);
                }
            }
        }
        UNROLL for (int t = 0; t < NT; t++) {
            const size_t at = ((size_t)tile[t] * groups + g) * TILE;
            floats s = kind == KIND_INT8 ? floats_set(1) : scales_at(w[t], at);
            floats z = floats_zero();
            if (kind == KIND_FP8) s = floats_mul(s, floats_set(256));
            if (kind == KIND_INT4) z = w[t]->zeros ? floats_of(lanes_u8(w[t]->zeros + at)) : floats_set(8);
            UNROLL for (int m = 0; m < M; m++) {
                floats v = split ? floats_add(c[m][t][0], c[m][t][1]) : c[m][t][0];
                if (kind == KIND_INT4) v = floats_fma(z, floats_set(-sums[m]), v);
                f[m][t] = floats_fma(v, s, f[m][t]);
            }
        }
    }
    UNROLL for (int t = 0; t < NT; t++) UNROLL for (int m = 0; m < M; m++) {
        if (kind == KIND_INT8) f[m][t] = floats_mul(f[m][t], scales_at(w[t], (size_t)tile[t] * TILE));
        if (kind == KIND_FP8) f[m][t] = floats_or_nan(f[m][t], nan[t]);
        floats_store(y[t] + m * TILE, f[m][t]);
    }
}

/* Rows of bf16, 16 of them as if they were a tile; exact products, float32 sums. */
INLINE void bf16_rows(const struct weight *w, int tile, const struct block *x, float *y, const int M) {
    const size_t stride = (size_t)w->cols * 2;
    for (int row = 0; row < TILE; row += BF16_ROWS) {
        const uint8_t *p = w->words + ((size_t)tile * TILE + row) * stride;
        const float *a = x->data;
        floats f[MAX_BLOCK][BF16_ROWS];
        UNROLL for (int r = 0; r < BF16_ROWS; r++) UNROLL for (int m = 0; m < M; m++) f[m][r] = floats_zero();
        for (int k = 0; k < w->cols; k += 32, p += 64, a += 32 * M) {
            UNROLL for (int r = 0; r < BF16_ROWS; r++) {
                lanes v = lanes_load(p + r * stride);
                floats even = floats_even_bf16(v), odd = floats_odd_bf16(v);
                __builtin_prefetch(p + r * stride + BF16_AHEAD);
                UNROLL for (int m = 0; m < M; m++) {
                    f[m][r] = floats_fma(even, floats_load(a + 32 * m), f[m][r]);
                    f[m][r] = floats_fma(odd, floats_load(a + 32 * m + TILE), f[m][r]);
                }
            }
        }
        UNROLL for (int r = 0; r < BF16_ROWS; r++) UNROLL for (int m = 0; m < M; m++) y[m * TILE + row + r] = floats_sum(f[m][r]);
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
#define ALL_KINDS(M)                                                                                                    \
    FUNCTIONS(int8_tiles, int4_a8, KIND_INT4, M)                                                                        \
    FUNCTIONS(int8_tiles, mxfp4_a8, KIND_MXFP4, M)                                                                      \
    FUNCTIONS(int8_tiles, int8_a8, KIND_INT8, M)                                                                        \
    FUNCTIONS(float_tiles, int4_float, KIND_INT4, M)                                                                    \
    FUNCTIONS(float_tiles, mxfp4_float, KIND_MXFP4, M)                                                                  \
    FUNCTIONS(float_tiles, int8_float, KIND_INT8, M)                                                                    \
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

#define TILES                                                                                                \
    {{SIZES(int4_a8), SIZES(int4_float)}, {SIZES(mxfp4_a8), SIZES(mxfp4_float)},                             \
     {SIZES(int8_a8), SIZES(int8_float)}, {SIZES(fp8_float), SIZES(fp8_float)},                               \
     {SIZES(bf16), SIZES(bf16)}}
#define PAIRS                                                                                                \
    {{SIZES(int4_a8_pair), SIZES(int4_float_pair)}, {SIZES(mxfp4_a8_pair), SIZES(mxfp4_float_pair)},         \
     {SIZES(int8_a8_pair), SIZES(int8_float_pair)}, {SIZES(fp8_float_pair), SIZES(fp8_float_pair)},           \
     {SIZES(bf16_pair), SIZES(bf16_pair)}}
