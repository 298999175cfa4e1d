/* The decoders of GGUF blocks with AVX2, for blocks whose scales are finite: then no value is NaN, and the product of a
 * code and a step, at most 22 bits, is exact, so that a fused operation rounds as the two of the definition do. What a
 * block holds is in decode.h; each function gives the bits of the one of its name there.
 *
 * What bounds: rounding to bf16, 9 operations for 16 values. Codes of 4 bits have 16 values per scale, which are rounded
 * once and looked up, byte by byte; with AVX-512 word by word. AVX512-BF16 rounds 32 values at once, but takes subnormal
 * ones for zero. There are none: values are multiples of 2^-24, as float16 scales are, and MXFP4's least exponents are
 * left to the definition.
 */
#include <immintrin.h>

INLINE __m256i load_32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE __m128i first_16(__m256i v) { return _mm256_castsi256_si128(v); }
INLINE __m128i last_16(__m256i v) { return _mm256_extracti128_si256(v, 1); }
/* What bytes have in n bits from bit `from` on, put at bit `to`. */
INLINE __m256i field(__m256i v, int from, int n, int to) {
    const __m256i kept = _mm256_and_si256(v, _mm256_set1_epi8((char)(((1 << n) - 1) << from)));
    return to >= from ? _mm256_slli_epi16(kept, to - from) : _mm256_srli_epi16(kept, from - to);
}

INLINE int is_finite(const uint8_t *half) { return (half[1] & 0x7c) != 0x7c; }

/* 16 bf16. Past the caches, if the output exceeds them: memory is not read before it is overwritten then. */
INLINE void put_words(const struct sink *s, int at, __m256i words) {
    __m256i *out = (__m256i *)((uint16_t *)s->out + at);
    if (s->streams)
        _mm256_stream_si256(out, words);
    else
        _mm256_storeu_si256(out, words);
}

#if defined(__AVX512BF16__)
#include "decode_bf16.h"
#else
/* Sixteen inputs: those with even numbers, and those with odd ones. */
struct sixteen {
    __m256 even, odd;
};

/* In bf16, in order. A carry into the upper half is what (lower half + 0x7fff + lowest bit of the upper half) has above
 * 16 bits; an average of two words keeps it. */
INLINE __m256i rounded(struct sixteen v) {
    const __m256i a = _mm256_castps_si256(v.even), b = _mm256_castps_si256(v.odd);
    const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
    const __m256i lower = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    const __m256i tie = _mm256_and_si256(_mm256_or_si256(upper, _mm256_set1_epi16(0x7ffe)), _mm256_set1_epi16(0x7fff));
    return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_avg_epu16(lower, tie), 15));
}

INLINE void put_16(const struct sink *s, int at, struct sixteen v) {
    if (s->is_bf16) {
        put_words(s, at, rounded(v));
    } else {
        const __m256 a = _mm256_unpacklo_ps(v.even, v.odd), b = _mm256_unpackhi_ps(v.even, v.odd);
        _mm256_storeu_ps((float *)s->out + at, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps((float *)s->out + at + 8, _mm256_permute2f128_ps(a, b, 0x31));
    }
}

INLINE struct sixteen times(struct sixteen q, float step) {
    const __m256 each = _mm256_set1_ps(step);
    return (struct sixteen){_mm256_mul_ps(q.even, each), _mm256_mul_ps(q.odd, each)};
}

INLINE struct sixteen times_plus(struct sixteen q, float step, float shift) {
    const __m256 each = _mm256_set1_ps(step), more = _mm256_set1_ps(shift);
    return (struct sixteen){_mm256_fmadd_ps(q.even, each, more), _mm256_fmadd_ps(q.odd, each, more)};
}

/* Sixteen bytes without a sign, and with one. */
INLINE struct sixteen of_codes(__m128i bytes) {
    const __m256i x = _mm256_cvtepu16_epi32(bytes);
    return (struct sixteen){_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(255))),
                            _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 8))};
}
INLINE struct sixteen of_signed(__m128i bytes) {
    const __m256i x = _mm256_cvtepi16_epi32(bytes);
    return (struct sixteen){_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24)),
                            _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 8))};
}

/* The values of 16 levels, and how they are looked up. LEVELS puts levels into the order in which a table wants them. */
#if defined(__AVX512BW__)
#define LEVELS(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}
struct lookup {
    __m512 values;
    __m256i words;
};

INLINE struct lookup lookup_of(__m512 values, int is_bf16) {
    struct lookup t = {values, _mm256_setzero_si256()};
    if (is_bf16) {
        const __m512i b = _mm512_castps_si512(values);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
        const __m512i r = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
        t.words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
    }
    return t;
}

INLINE struct lookup scaled_lookup(const float *levels, float step, int is_bf16) {
    return lookup_of(_mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(step)), is_bf16);
}

INLINE struct lookup shifted_lookup(const float *levels, float step, float shift, int is_bf16) {
    const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(step));
    return lookup_of(_mm512_add_ps(product, _mm512_set1_ps(shift)), is_bf16);
}

INLINE void look_up_16(const struct sink *s, int at, const struct lookup *t, const uint8_t *octets, int shift) {
    const __m128i raw = _mm_loadu_si128((const __m128i *)octets);
    if (s->is_bf16) {
        const __m256i words = _mm256_srli_epi16(_mm256_cvtepu8_epi16(raw), shift); /* vpermw reads four bits */
        put_words(s, at, _mm256_permutexvar_epi16(words, t->words));
    } else {
        const __m512i words = _mm512_srli_epi32(_mm512_cvtepu8_epi32(raw), shift);
        _mm512_storeu_ps((float *)s->out + at, _mm512_permutexvar_ps(words, t->values));
    }
}

/* 16 octets of one table: low halves, then high halves. */
INLINE void look_up_block(const struct sink *s, int at, struct lookup t, const uint8_t *octets) {
    look_up_16(s, at, &t, octets, 0);
    look_up_16(s, at + 16, &t, octets, 4);
}

/* 32 octets: low halves of one table, then high halves of another. */
INLINE void look_up_both(const struct sink *s, int at, struct lookup low, struct lookup high, const uint8_t *octets) {
    for (int i = 0; i < 2; i++) {
        look_up_16(s, at + 16 * i, &low, octets + 16 * i, 0);
        look_up_16(s, at + 32 + 16 * i, &high, octets + 16 * i, 4);
    }
}
#else
#define LEVELS(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) {a, c, e, g, i, k, m, o, b, d, f, h, j, l, n, p}
struct lookup {
    struct sixteen values;
    __m256i low, high; /* the bytes of the rounded values, twice */
};

INLINE struct lookup lookup_of(struct sixteen values, int is_bf16) {
    struct lookup t = {values, _mm256_setzero_si256(), _mm256_setzero_si256()};
    if (is_bf16) {
        const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12,
                                               14, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m256i bytes = _mm256_shuffle_epi8(rounded(values), apart);
        t.low = _mm256_permute4x64_epi64(bytes, 0x88);
        t.high = _mm256_permute4x64_epi64(bytes, 0xdd);
    }
    return t;
}

INLINE struct sixteen of_levels(const float *levels) {
    return (struct sixteen){_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
}
INLINE struct lookup scaled_lookup(const float *levels, float step, int is_bf16) {
    return lookup_of(times(of_levels(levels), step), is_bf16);
}
INLINE struct lookup shifted_lookup(const float *levels, float step, float shift, int is_bf16) {
    return lookup_of(times_plus(of_levels(levels), step, shift), is_bf16);
}

INLINE __m256 look_up_8(const struct lookup *t, __m128i codes) {
    const __m256i q = _mm256_cvtepu8_epi32(codes), pair = _mm256_srli_epi32(q, 1);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t->values.even, pair), _mm256_permutevar8x32_ps(t->values.odd, pair),
                            _mm256_castsi256_ps(_mm256_slli_epi32(q, 31)));
}

/* 32 codes below 16, whose second and third quarter are exchanged, as unpacking within halves wants them. */
INLINE void look_up_32(const struct sink *s, int at, const struct lookup *t, __m256i q) {
    if (s->is_bf16) {
        const __m256i low = _mm256_shuffle_epi8(t->low, q), high = _mm256_shuffle_epi8(t->high, q);
        put_words(s, at, _mm256_unpacklo_epi8(low, high));
        put_words(s, at + 16, _mm256_unpackhi_epi8(low, high));
    } else {
        float *out = (float *)s->out + at;
        const __m128i a = first_16(q), b = last_16(q);
        _mm256_storeu_ps(out, look_up_8(t, a));
        _mm256_storeu_ps(out + 8, look_up_8(t, b));
        _mm256_storeu_ps(out + 16, look_up_8(t, _mm_srli_si128(a, 8)));
        _mm256_storeu_ps(out + 24, look_up_8(t, _mm_srli_si128(b, 8)));
    }
}

INLINE void look_up_block(const struct sink *s, int at, struct lookup t, const uint8_t *octets) {
    __m256i q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)octets));
    q = _mm256_blend_epi32(q, _mm256_srli_epi16(q, 4), 0xf0);
    look_up_32(s, at, &t, _mm256_permute4x64_epi64(_mm256_and_si256(q, _mm256_set1_epi8(15)), 0xd8));
}

INLINE void look_up_both(const struct sink *s, int at, struct lookup low, struct lookup high, const uint8_t *octets) {
    const __m256i q = _mm256_permute4x64_epi64(load_32(octets), 0xd8);
    look_up_32(s, at, &low, field(q, 0, 4, 0));
    look_up_32(s, at + 32, &high, field(q, 4, 4, 0));
}
#endif
#endif

static const float V_CODES[16] = LEVELS(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
static const float V_CENTERED[16] = LEVELS(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
static const float V_IQ4[16] = LEVELS(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
static const float V_E2M1[16] = LEVELS(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);

INLINE void v_q4_0(const uint8_t *b, const struct sink *s) {
    look_up_block(s, 0, scaled_lookup(V_CENTERED, half_at(b), s->is_bf16), b + 2);
}

INLINE void v_q4_1(const uint8_t *b, const struct sink *s) {
    look_up_block(s, 0, shifted_lookup(V_CODES, half_at(b), half_at(b + 2), s->is_bf16), b + 4);
}

INLINE void v_iq4_nl(const uint8_t *b, const struct sink *s) {
    look_up_block(s, 0, scaled_lookup(V_IQ4, half_at(b), s->is_bf16), b + 2);
}

INLINE void v_mxfp4(const uint8_t *b, const struct sink *s) {
    look_up_block(s, 0, scaled_lookup(V_E2M1, half_of_power(b[0]), s->is_bf16), b + 1);
}

INLINE void v_iq4_xs(const uint8_t *b, const struct sink *s) {
    const float d = half_at(b);
    UNROLL for (int j = 0; j < 8; j++)
        look_up_block(s, 32 * j, scaled_lookup(V_IQ4, d * iq4_xs_scale(b, j), s->is_bf16), b + 8 + 16 * j);
}

INLINE uint32_t word_at(const uint8_t *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

/* `factor` times eight bytes. */
INLINE void eight_products(float factor, uint32_t first, uint32_t last, float *out) {
    const __m128i bytes = _mm_cvtsi64_si128((long long)(first | (uint64_t)last << 32));
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(factor)));
}

/* Keeps floats in memory: GCC takes single ones out of registers with two shuffles, a load broadcasts one for nothing. */
#define IN_MEMORY(x) __asm__("" : "+m"(x))

INLINE void v_eighths_of(const uint8_t *b, struct eighths *e) {
    const uint32_t x = word_at(b + 4), y = word_at(b + 8), z = word_at(b + 12);
    eight_products(half_at(b), x & 0x3f3f3f3f, (z & 0x0f0f0f0f) | (x >> 2 & 0x30303030), e->step);
    eight_products(-half_at(b + 2), y & 0x3f3f3f3f, (z >> 4 & 0x0f0f0f0f) | (y >> 2 & 0x30303030), e->shift);
    IN_MEMORY(*e);
}

INLINE void v_q4_k(const uint8_t *b, const struct sink *s) {
    struct eighths e;
    v_eighths_of(b, &e);
    UNROLL for (int j = 0; j < 8; j += 2)
        look_up_both(s, 32 * j, shifted_lookup(V_CODES, e.step[j], e.shift[j], s->is_bf16),
                     shifted_lookup(V_CODES, e.step[j + 1], e.shift[j + 1], s->is_bf16), b + 16 + 16 * j);
}

INLINE void v_q5_k(const uint8_t *b, const struct sink *s) {
    struct eighths e;
    v_eighths_of(b, &e);
    const __m256i fifth = load_32(b + 16);
    UNROLL for (int j = 0; j < 8; j++) {
        const __m256i low = field(load_32(b + 48 + 32 * (j / 2)), 4 * (j & 1), 4, 0);
        const __m256i q = _mm256_or_si256(low, field(fifth, j, 1, 4));
        put_16(s, 32 * j, times_plus(of_codes(first_16(q)), e.step[j], e.shift[j]));
        put_16(s, 32 * j + 16, times_plus(of_codes(last_16(q)), e.step[j], e.shift[j]));
    }
}

/* `factor` times 16 signed bytes. */
INLINE void sixteen_steps(float factor, __m128i bytes, float *out) {
    const __m256 each = _mm256_set1_ps(factor);
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), each));
    const __m256i more = _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8));
    _mm256_storeu_ps(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(more), each));
}

INLINE void v_q6_k(const uint8_t *b, const struct sink *s) {
    float step[16];
    sixteen_steps(half_at(b + 208), _mm_loadu_si128((const __m128i *)(b + 192)), step);
    IN_MEMORY(step);
    UNROLL for (int j = 0; j < 8; j++) {
        const __m256i low = field(load_32(b + 64 * (j / 4) + 32 * (j & 1)), 4 * (j / 2 % 2), 4, 0);
        const __m256i high = field(load_32(b + 128 + 32 * (j / 4)), 2 * (j % 4), 2, 4);
        const __m256i q = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
        put_16(s, 32 * j, times(of_signed(first_16(q)), step[2 * j]));
        put_16(s, 32 * j + 16, times(of_signed(last_16(q)), step[2 * j + 1]));
    }
}

INLINE void v_q2_k(const uint8_t *b, const struct sink *s) {
    float step[16], shift[16];
    const __m128i packed = _mm_loadu_si128((const __m128i *)b), mask = _mm_set1_epi8(15);
    sixteen_steps(half_at(b + 80), _mm_and_si128(packed, mask), step);
    sixteen_steps(-half_at(b + 82), _mm_and_si128(_mm_srli_epi16(packed, 4), mask), shift);
    IN_MEMORY(step);
    IN_MEMORY(shift);
    UNROLL for (int j = 0; j < 8; j++) {
        const __m256i q = field(load_32(b + 16 + 32 * (j / 4)), 2 * (j % 4), 2, 0);
        put_16(s, 32 * j, times_plus(of_codes(first_16(q)), step[2 * j], shift[2 * j]));
        put_16(s, 32 * j + 16, times_plus(of_codes(last_16(q)), step[2 * j + 1], shift[2 * j + 1]));
    }
}

INLINE void v_q3_k(const uint8_t *b, const struct sink *s) {
    float step[16];
    const uint32_t x = word_at(b + 96), y = word_at(b + 100), z = word_at(b + 104); /* low halves, then pairs above */
    const __m128i scales = _mm_setr_epi32((int)((x & 0x0f0f0f0f) | (z << 4 & 0x30303030)),
                                          (int)((y & 0x0f0f0f0f) | (z << 2 & 0x30303030)),
                                          (int)((x >> 4 & 0x0f0f0f0f) | (z & 0x30303030)),
                                          (int)((y >> 4 & 0x0f0f0f0f) | (z >> 2 & 0x30303030)));
    sixteen_steps(half_at(b + 108), _mm_sub_epi8(scales, _mm_set1_epi8(32)), step);
    IN_MEMORY(step);
    const __m256i third = load_32(b);
    UNROLL for (int j = 0; j < 8; j++) {
        const __m256i low = field(load_32(b + 32 + 32 * (j / 4)), 2 * (j % 4), 2, 0);
        const __m256i q = _mm256_sub_epi8(_mm256_or_si256(low, field(third, j, 1, 2)), _mm256_set1_epi8(4));
        put_16(s, 32 * j, times(of_signed(first_16(q)), step[2 * j]));
        put_16(s, 32 * j + 16, times(of_signed(last_16(q)), step[2 * j + 1]));
    }
}

/* Codes of 5 bits in a block of 32: fifth bits as one word, then nibbles. */
INLINE __m256i v_five_bits(const uint8_t *fifth) {
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i each = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((int)word_at(fifth)), spread);
    const __m256i present = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
    __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(fifth + 4)));
    low = _mm256_and_si256(_mm256_blend_epi32(low, _mm256_srli_epi16(low, 4), 0xf0), _mm256_set1_epi8(15));
    return _mm256_or_si256(low, _mm256_and_si256(present, _mm256_set1_epi8(16)));
}

INLINE void v_q5_0(const uint8_t *b, const struct sink *s) {
    const float d = half_at(b);
    const __m256i q = _mm256_sub_epi8(v_five_bits(b + 2), _mm256_set1_epi8(16));
    put_16(s, 0, times(of_signed(first_16(q)), d));
    put_16(s, 16, times(of_signed(last_16(q)), d));
}

INLINE void v_q5_1(const uint8_t *b, const struct sink *s) {
    const float d = half_at(b), m = half_at(b + 2);
    const __m256i q = v_five_bits(b + 4);
    put_16(s, 0, times_plus(of_codes(first_16(q)), d, m));
    put_16(s, 16, times_plus(of_codes(last_16(q)), d, m));
}

INLINE void v_q8_0(const uint8_t *b, const struct sink *s) {
    const float d = half_at(b);
    const __m256i q = load_32(b + 2);
    put_16(s, 0, times(of_signed(first_16(q)), d));
    put_16(s, 16, times(of_signed(last_16(q)), d));
}
