/* Decoders of GGUF blocks (offmoe/quant/gguf_formats.py defines the values), once for all instruction sets.
 *
 * What moves: the blocks once in, bf16 or float32 once out. Every value is formed by the same float32 operations in the
 * same order as in torch's definition, so products and sums must not become one operation (-ffp-contract=off). A type
 * of 4 bits has only 16 values per scale: they are formed once, and nibbles look them up. decode_vectors.h does the same
 * with vectors, for blocks whose scales are finite.
 */
#include <stdint.h>
#include <string.h>

#include "half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    return of_half(h);
#endif
}

/* Where values go: bf16 or float32. streams: vectors are written past the caches; only bf16 at a multiple of 64 bytes. */
struct sink {
    void *out;
    int is_bf16, streams;
};

INLINE void put(const struct sink *s, int at, const float *values, int n) {
    if (s->is_bf16) {
        uint16_t *out = (uint16_t *)s->out + at;
        for (int i = 0; i < n; i++) out[i] = bf16_of(values[i]);
    } else
        memcpy((float *)s->out + at, values, (size_t)n * sizeof(float));
}

/* The 16 values of one scale, looked up by the low (shift 0) or high (shift 4) halves of 16 octets. */
struct table {
    float values[16];
    uint16_t rounded[16];
};

/* levels * step + shift; a difference is a sum with the negated minimum, which rounds alike. */
INLINE struct table shifted(const float *levels, float step, float shift, int is_bf16) {
    struct table t;
    for (int i = 0; i < 16; i++) t.values[i] = levels[i] * step + shift;
    for (int i = 0; i < 16; i++) t.rounded[i] = is_bf16 ? bf16_of(t.values[i]) : 0;
    return t;
}

INLINE struct table scaled(const float *levels, float step, int is_bf16) {
    struct table t;
    for (int i = 0; i < 16; i++) t.values[i] = levels[i] * step;
    for (int i = 0; i < 16; i++) t.rounded[i] = is_bf16 ? bf16_of(t.values[i]) : 0;
    return t;
}

INLINE void put_nibbles(const struct sink *s, int at, const struct table *t, const uint8_t *octets, int shift) {
    if (s->is_bf16)
        for (int i = 0; i < 16; i++) ((uint16_t *)s->out)[at + i] = t->rounded[octets[i] >> shift & 15];
    else
        for (int i = 0; i < 16; i++) ((float *)s->out)[at + i] = t->values[octets[i] >> shift & 15];
}

static const float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const float CENTERED[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const float IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const float E2M1_TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 32 values of one table: low halves, then high halves. */
INLINE void put_block(const struct sink *s, int at, struct table t, const uint8_t *octets) {
    put_nibbles(s, at, &t, octets, 0);
    put_nibbles(s, at + 16, &t, octets, 4);
}

INLINE void q4_0(const uint8_t *b, const struct sink *s, int at) {
    put_block(s, at, scaled(CENTERED, half_at(b), s->is_bf16), b + 2);
}

INLINE void q4_1(const uint8_t *b, const struct sink *s, int at) {
    put_block(s, at, shifted(CODES, half_at(b), half_at(b + 2), s->is_bf16), b + 4);
}

INLINE void iq4_nl(const uint8_t *b, const struct sink *s, int at) {
    put_block(s, at, scaled(IQ4_LEVELS, half_at(b), s->is_bf16), b + 2);
}

/* Half of 2^(e - 127). */
INLINE float half_of_power(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x200000u << e : (uint32_t)(e - 1) << 23;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void mxfp4(const uint8_t *b, const struct sink *s, int at) {
    put_block(s, at, scaled(E2M1_TWICE, half_of_power(b[0]), s->is_bf16), b + 1);
}

INLINE float iq4_xs_scale(const uint8_t *b, int j) {
    const int low = b[4 + j / 2] >> 4 * (j & 1) & 15, high = b[2 + j / 4] >> 2 * (j & 3) & 3;
    return (float)((low | high << 4) - 32);
}

INLINE void iq4_xs(const uint8_t *b, const struct sink *s, int at) {
    const float d = half_at(b);
    for (int j = 0; j < 8; j++)
        put_block(s, at + 32 * j, scaled(IQ4_LEVELS, d * iq4_xs_scale(b, j), s->is_bf16), b + 8 + 16 * j);
}

/* The eight steps and negated minima of Q4_K and Q5_K: two float16, then 12 bytes that hold 6 bits of each. */
struct eighths {
    float step[8], shift[8];
};

INLINE struct eighths eighths_of(const uint8_t *b) {
    struct eighths e;
    const float d = half_at(b), dmin = half_at(b + 2);
    const uint8_t *p = b + 4;
    for (int j = 0; j < 4; j++) {
        e.step[j] = d * (float)(p[j] & 63);
        e.shift[j] = -(dmin * (float)(p[j + 4] & 63));
        e.step[j + 4] = d * (float)((p[j + 8] & 15) | (p[j] >> 6) << 4);
        e.shift[j + 4] = -(dmin * (float)(p[j + 8] >> 4 | (p[j + 4] >> 6) << 4));
    }
    return e;
}

INLINE void q4_k(const uint8_t *b, const struct sink *s, int at) {
    const struct eighths e = eighths_of(b);
    UNROLL for (int j = 0; j < 8; j++) {
        const struct table t = shifted(CODES, e.step[j], e.shift[j], s->is_bf16);
        const uint8_t *octets = b + 16 + 32 * (j / 2);
        put_nibbles(s, at + 32 * j, &t, octets, 4 * (j & 1));
        put_nibbles(s, at + 32 * j + 16, &t, octets + 16, 4 * (j & 1));
    }
}

/* Codes of 5 bits in a block of 32: fifth bits as one little-endian word, then nibbles. */
INLINE void five_bits(const uint8_t *fifth, const uint8_t *octets, int *codes) {
    const uint32_t bits = fifth[0] | fifth[1] << 8 | fifth[2] << 16 | (uint32_t)fifth[3] << 24;
    for (int i = 0; i < 16; i++) {
        codes[i] = (octets[i] & 15) | (int)(bits >> i & 1) << 4;
        codes[i + 16] = octets[i] >> 4 | (int)(bits >> (i + 16) & 1) << 4;
    }
}

INLINE void q5_0(const uint8_t *b, const struct sink *s, int at) {
    int codes[32];
    float v[32];
    const float d = half_at(b);
    five_bits(b + 2, b + 6, codes);
    for (int i = 0; i < 32; i++) v[i] = (float)(codes[i] - 16) * d;
    put(s, at, v, 32);
}

INLINE void q5_1(const uint8_t *b, const struct sink *s, int at) {
    int codes[32];
    float v[32];
    const float d = half_at(b), m = half_at(b + 2);
    five_bits(b + 4, b + 8, codes);
    for (int i = 0; i < 32; i++) v[i] = (float)codes[i] * d + m;
    put(s, at, v, 32);
}

INLINE void q8_0(const uint8_t *b, const struct sink *s, int at) {
    float v[32];
    const float d = half_at(b);
    for (int i = 0; i < 32; i++) v[i] = (float)(int8_t)b[2 + i] * d;
    put(s, at, v, 32);
}

INLINE void q2_k(const uint8_t *b, const struct sink *s, int at) {
    float v[16];
    const float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int g = 0; g < 16; g++) {
        const uint8_t *octets = b + 16 + 32 * (g / 8) + 16 * (g & 1);
        const int shift = 2 * (g / 2 % 4);
        const float step = d * (float)(b[g] & 15), least = dmin * (float)(b[g] >> 4);
        for (int i = 0; i < 16; i++) v[i] = (float)(octets[i] >> shift & 3) * step - least;
        put(s, at + 16 * g, v, 16);
    }
}

INLINE void q3_k(const uint8_t *b, const struct sink *s, int at) {
    float v[32];
    const float d = half_at(b + 108);
    const uint8_t *p = b + 96;
    for (int j = 0; j < 8; j++) {
        const uint8_t *octets = b + 32 + 32 * (j / 4);
        const int shift = 2 * (j % 4);
        float step[2];
        for (int k = 0; k < 2; k++) {
            const int g = 2 * j + k, low = g < 8 ? p[g] & 15 : p[g - 8] >> 4, high = p[8 + g % 4] >> 2 * (g / 4) & 3;
            step[k] = d * (float)((low | high << 4) - 32);
        }
        for (int i = 0; i < 32; i++) v[i] = (float)(((octets[i] >> shift & 3) | (b[i] >> j & 1) << 2) - 4);
        for (int i = 0; i < 16; i++) v[i] *= step[0];
        for (int i = 16; i < 32; i++) v[i] *= step[1];
        put(s, at + 32 * j, v, 32);
    }
}

INLINE void q5_k(const uint8_t *b, const struct sink *s, int at) {
    float v[32];
    const struct eighths e = eighths_of(b);
    for (int j = 0; j < 8; j++) {
        const uint8_t *octets = b + 48 + 32 * (j / 2), *fifth = b + 16;
        const int shift = 4 * (j & 1);
        for (int i = 0; i < 32; i++)
            v[i] = (float)((octets[i] >> shift & 15) | (fifth[i] >> j & 1) << 4) * e.step[j] + e.shift[j];
        put(s, at + 32 * j, v, 32);
    }
}

INLINE void q6_k(const uint8_t *b, const struct sink *s, int at) {
    uint8_t codes[256];
    float v[16];
    const float d = half_at(b + 208);
    UNROLL for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) {
            const uint8_t low = b[64 * (j / 4) + 32 * (j & 1) + i], high = b[128 + 32 * (j / 4) + i];
            codes[32 * j + i] = (low >> 4 * (j / 2 % 2) & 15) | (high >> 2 * (j % 4) & 3) << 4;
        }
    for (int g = 0; g < 16; g++) {
        const float step = d * (float)(int8_t)b[192 + g];
        for (int i = 0; i < 16; i++) v[i] = (float)(codes[16 * g + i] - 32) * step;
        put(s, at + 16 * g, v, 16);
    }
}

#if defined(__AVX2__)
#include "decode_vectors.h"
#define VECTORS(function, finite) ((finite) ? (v_##function(b, &s), 1) : 0)
#else
#define VECTORS(function, finite) 0
#endif

/* Per type: bytes and values of a block, and when its scales are finite. */
#define EACH(function, nbytes, count, finite)                                                                        \
    for (int i = first; i < last; i++) {                                                                             \
        const struct sink s = {(uint8_t *)d->out + (size_t)i * count * (is_bf16 ? 2 : 4), is_bf16, streams};         \
        const uint8_t *b = d->blocks + (size_t)i * nbytes;                                                           \
        if (!VECTORS(function, finite)) function(b, &s, 0);                                                          \
    }                                                                                                                \
    break;

INLINE void decode_range(const struct decoding *d, int first, int last, const int is_bf16, const int streams) {
    switch (d->type) {
    case 2: EACH(q4_0, 18, 32, is_finite(b))
    case 3: EACH(q4_1, 20, 32, is_finite(b) && is_finite(b + 2))
    case 6: EACH(q5_0, 22, 32, is_finite(b))
    case 7: EACH(q5_1, 24, 32, is_finite(b) && is_finite(b + 2))
    case 8: EACH(q8_0, 34, 32, is_finite(b))
    case 10: EACH(q2_k, 84, 256, is_finite(b + 80) && is_finite(b + 82))
    case 11: EACH(q3_k, 110, 256, is_finite(b + 108))
    case 12: EACH(q4_k, 144, 256, is_finite(b) && is_finite(b + 2))
    case 13: EACH(q5_k, 176, 256, is_finite(b) && is_finite(b + 2))
    case 14: EACH(q6_k, 210, 256, is_finite(b + 208))
    case 20: EACH(iq4_nl, 18, 32, is_finite(b))
    case 23: EACH(iq4_xs, 136, 256, is_finite(b))
    case 39: EACH(mxfp4, 17, 32, b[0] > 1) /* 2^-127 is subnormal */
    }
}

/* Decode blocks first .. last - 1. What is written, and how, are constants for the compiler in each of the three. */
void DECODE(const struct decoding *d, int first, int last) {
    if (d->out_type != SCALE_BF16) {
        decode_range(d, first, last, 0, 0);
#if defined(__AVX2__)
    } else if (d->streams && (uintptr_t)d->out % 64 == 0) {
        decode_range(d, first, last, 1, 1);
        _mm_sfence();
#endif
    } else {
        decode_range(d, first, last, 1, 0);
    }
}
