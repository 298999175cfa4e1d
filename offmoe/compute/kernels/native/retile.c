/* One GGUF matrix put into tiles (offmoe.h, struct weight): the same codes, scales and minima in another order.
 *
 * What moves: the blocks once in, as many bytes once out (Q4_K: 3 % more), in the calling thread, which is a reader's.
 * Rows of a tile are taken one after the other, block by block, so what a tile's blocks become stays in the first cache.
 * 64-bit operations do what vectors would, on every processor; what takes most of the time has SSE2, which every x86-64 has.
 */
#include <string.h>

#include "offmoe.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Where a row's part of one block goes; entries of the same row are TILE apart. */
struct target {
    uint32_t *words, *high;
    uint8_t *scales, *minima; /* int8, or float16 */
    uint16_t *supers;
};

INLINE uint64_t eight(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

INLINE uint32_t four(const uint8_t *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

INLINE uint16_t half_at(const uint8_t *p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

/* The low halves of eight bytes, one behind the other. */
INLINE uint32_t low_halves(uint64_t x) {
    x &= 0x0f0f0f0f0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (uint32_t)(x | x >> 16);
}

/* Even bytes of eight, in order. */
INLINE uint32_t even_bytes(uint64_t x) {
    x &= 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (uint32_t)(x | x >> 16);
}

/* Eight bytes as two words: the even ones, the odd ones. */
INLINE void put_pairs(const uint8_t *p, uint32_t *w) {
    const uint64_t x = eight(p);
    w[0] = even_bytes(x);
    w[1] = even_bytes(x >> 8);
}

/* Exchange the fields of n bits of `a` that stand above those in the mask, and those of `b` in the mask: a step of a
 * transposition of fields within every byte. */
INLINE void swap_fields(uint32_t *a, uint32_t *b, int n, uint32_t mask) {
    const uint32_t differing = (*a >> n ^ *b) & mask;
    *b ^= differing;
    *a ^= differing << n;
}

#if defined(__SSE2__)
/* The even and the odd bytes of 32. */
struct pairs {
    __m128i even, odd;
};
INLINE struct pairs pairs_of(const uint8_t *p) {
    const __m128i a = _mm_loadu_si128((const __m128i *)p), b = _mm_loadu_si128((const __m128i *)p + 1);
    const __m128i low = _mm_set1_epi16(255);
    return (struct pairs){_mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low)),
                          _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}

/* Four words, `stride` words apart. */
INLINE void put_lanes(__m128i x, uint32_t *to, const int stride) {
    to[0] = (uint32_t)_mm_cvtsi128_si32(x);
    to[stride] = (uint32_t)_mm_cvtsi128_si32(_mm_shuffle_epi32(x, 1));
    to[2 * stride] = (uint32_t)_mm_cvtsi128_si32(_mm_shuffle_epi32(x, 2));
    to[3 * stride] = (uint32_t)_mm_cvtsi128_si32(_mm_shuffle_epi32(x, 3));
}

/* Words of 32 octets: of low halves from `low` on, of high halves from `high` on. */
INLINE void put_32(const uint8_t *octets, uint32_t *low, uint32_t *high) {
    const __m128i mask = _mm_set1_epi8(15);
    const struct pairs p = pairs_of(octets);
    const __m128i odd_low = _mm_slli_epi16(_mm_and_si128(p.odd, mask), 4);
    const __m128i even_high = _mm_and_si128(_mm_srli_epi16(p.even, 4), mask);
    put_lanes(_mm_or_si128(_mm_and_si128(p.even, mask), odd_low), low, TILE);
    put_lanes(_mm_or_si128(even_high, _mm_andnot_si128(mask, p.odd)), high, TILE);
}

INLINE void swap_lanes(__m128i *a, __m128i *b, const int n, int mask) { /* swap_fields, four times */
    const __m128i differing = _mm_and_si128(_mm_xor_si128(_mm_srli_epi32(*a, n), *b), _mm_set1_epi8((char)mask));
    *b = _mm_xor_si128(*b, differing);
    *a = _mm_xor_si128(*a, _mm_slli_epi32(differing, n));
}

INLINE __m128i every_second(__m128i a, __m128i b, const int first) { /* words `first` and first + 2 of both */
    const __m128 x = _mm_castsi128_ps(a), y = _mm_castsi128_ps(b);
    return _mm_castps_si128(first ? _mm_shuffle_ps(x, y, 0xdd) : _mm_shuffle_ps(x, y, 0x88));
}

/* The pairs of Q2_K and Q3_K, and those of Q6_K above its nibbles, 64 octets: a word per 16 inputs. Lanes are the halves of both 128 inputs. */
INLINE void put_pairs_of_256(const uint8_t *octets, uint32_t *high) {
    const struct pairs p = pairs_of(octets), q = pairs_of(octets + 32);
    __m128i w[4] = {every_second(p.even, q.even, 0), every_second(p.odd, q.odd, 0), every_second(p.even, q.even, 1),
                    every_second(p.odd, q.odd, 1)};
    swap_lanes(w, w + 1, 2, 0x33);
    swap_lanes(w + 2, w + 3, 2, 0x33);
    swap_lanes(w, w + 2, 4, 0x0f);
    swap_lanes(w + 1, w + 3, 4, 0x0f);
    UNROLL for (int j = 0; j < 4; j++) {
        uint32_t lanes[4];
        put_lanes(w[j], lanes, 1);
        UNROLL for (int half = 0; half < 4; half++) high[(8 * (half / 2) + 2 * j + half % 2) * TILE] = lanes[half];
    }
}

/* A block of 32 nibbles: 16 octets whose low halves are inputs 0 .. 15 and whose high halves are inputs 16 .. 31. */
INLINE void put_block(const uint8_t *octets, uint32_t *words) {
    const __m128i a = _mm_loadu_si128((const __m128i *)octets), mask = _mm_set1_epi8(15);
    const __m128i both = _mm_packus_epi16(_mm_and_si128(a, _mm_set1_epi16(255)), _mm_srli_epi16(a, 8));
    const __m128i odd = _mm_shuffle_epi32(both, 0xee); /* even bytes are the first eight */
    const __m128i low = _mm_or_si128(_mm_and_si128(both, mask), _mm_slli_epi16(_mm_and_si128(odd, mask), 4));
    const __m128i high = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(both, 4), mask), _mm_andnot_si128(mask, odd));
    put_lanes(_mm_unpacklo_epi64(low, high), words, TILE);
}
#else
/* Words of 8 * n octets: of low halves from `low` on, of high halves from `high` on. */
INLINE void put_halves(const uint8_t *octets, int n, uint32_t *low, uint32_t *high) {
    UNROLL for (int i = 0; i < n; i++) {
        const uint64_t x = eight(octets + 8 * i);
        low[i * TILE] = low_halves(x);
        high[i * TILE] = low_halves(x >> 4);
    }
}

INLINE void put_32(const uint8_t *octets, uint32_t *low, uint32_t *high) { put_halves(octets, 4, low, high); }

/* A block of 32 nibbles: 16 octets whose low halves are inputs 0 .. 15 and whose high halves are inputs 16 .. 31. */
INLINE void put_block(const uint8_t *octets, uint32_t *words) { put_halves(octets, 2, words, words + 2 * TILE); }

/* The pairs of Q2_K and Q3_K, and those of Q6_K above its nibbles, 64 octets: a word per 16 inputs. */
INLINE void put_pairs_of_256(const uint8_t *octets, uint32_t *high) {
    UNROLL for (int half = 0; half < 4; half++) {
        uint32_t w[4]; /* pairs of four groups, in each byte: of inputs 2b, 2b + 1, 8 + 2b, 8 + 2b + 1 */
        put_pairs(octets + 16 * half, w);
        put_pairs(octets + 16 * half + 8, w + 2);
        swap_fields(w, w + 1, 2, 0x33333333);
        swap_fields(w + 2, w + 3, 2, 0x33333333);
        swap_fields(w, w + 2, 4, 0x0f0f0f0f);
        swap_fields(w + 1, w + 3, 4, 0x0f0f0f0f);
        UNROLL for (int j = 0; j < 4; j++) high[(8 * (half / 2) + 2 * j + half % 2) * TILE] = w[j];
    }
}
#endif

INLINE void put_half(const uint8_t *p, void *plane) { memcpy(plane, p, 2); }

/* Four bytes, TILE apart. */
INLINE void put_four(uint32_t x, uint8_t *plane) {
    UNROLL for (int i = 0; i < 4; i++) plane[i * TILE] = (uint8_t)(x >> 8 * i);
}

/* float16 with the other sign: what is added at rest is subtracted in tiles. */
INLINE void put_negated(const uint8_t *p, void *plane) {
    const uint16_t x = half_at(p) ^ 0x8000;
    memcpy(plane, &x, 2);
}

INLINE void q4_0(const uint8_t *b, const struct target *t) {
    put_half(b, t->scales);
    put_block(b + 2, t->words);
}

INLINE void mxfp4(const uint8_t *b, const struct target *t) {
    t->scales[0] = b[0];
    put_block(b + 1, t->words);
}

INLINE void q4_1(const uint8_t *b, const struct target *t) {
    put_half(b, t->scales);
    put_negated(b + 2, t->minima);
    put_block(b + 4, t->words);
}

/* Fifth bits of 32 inputs: bits 8k + 2b + p become bits 8b + 2k + p, a transposition of four by four pairs. */
INLINE uint32_t transposed_pairs(uint32_t x) {
    uint32_t swapped = (x ^ x >> 6) & 0x00cc00cc;
    x ^= swapped ^ swapped << 6;
    swapped = (x ^ x >> 12) & 0x0000f0f0;
    return x ^ swapped ^ swapped << 12;
}

INLINE void q5_0(const uint8_t *b, const struct target *t) {
    put_half(b, t->scales);
    t->high[0] = transposed_pairs(four(b + 2));
    put_block(b + 6, t->words);
}

INLINE void q5_1(const uint8_t *b, const struct target *t) {
    put_half(b, t->scales);
    put_negated(b + 2, t->minima);
    t->high[0] = transposed_pairs(four(b + 4));
    put_block(b + 8, t->words);
}

INLINE void q8_0(const uint8_t *b, const struct target *t) {
    put_half(b, t->scales);
    UNROLL for (int i = 0; i < 8; i++) t->words[i * TILE] = four(b + 2 + 4 * i);
}

/* What Q4_K and Q5_K begin with: two float16, then 12 bytes that hold eight scales and eight minima of 6 bits. */
INLINE void put_eighths(const uint8_t *b, const struct target *t) {
    const uint32_t x = four(b + 4), y = four(b + 8), z = four(b + 12);
    t->supers[0] = half_at(b);
    t->supers[TILE] = half_at(b + 2);
    put_four(x & 0x3f3f3f3f, t->scales);
    put_four(y & 0x3f3f3f3f, t->minima);
    put_four((z & 0x0f0f0f0f) | (x >> 2 & 0x30303030), t->scales + 4 * TILE);
    put_four((z >> 4 & 0x0f0f0f0f) | (y >> 2 & 0x30303030), t->minima + 4 * TILE);
}

INLINE void put_nibbles_of_256(const uint8_t *octets, uint32_t *words) {
    UNROLL for (int j = 0; j < 4; j++) put_32(octets + 32 * j, words + 8 * j * TILE, words + (8 * j + 4) * TILE);
}

INLINE void q4_k(const uint8_t *b, const struct target *t) {
    put_eighths(b, t);
    put_nibbles_of_256(b + 16, t->words);
}

/* Bits of the eight groups of 32 inputs, in each of 32 octets: a word per group. */
INLINE void put_bits_of_256(const uint8_t *octets, uint32_t *high) {
    uint32_t w[8]; /* in each byte: of inputs 2b, 2b + 1, 8 + 2b, ... */
    UNROLL for (int k = 0; k < 4; k++) put_pairs(octets + 8 * k, w + 2 * k);
    UNROLL for (int k = 0; k < 8; k += 2) swap_fields(w + k, w + k + 1, 1, 0x55555555);
    UNROLL for (int k = 0; k < 8; k++)
        if (!(k & 2)) swap_fields(w + k, w + k + 2, 2, 0x33333333);
    UNROLL for (int k = 0; k < 4; k++) swap_fields(w + k, w + k + 4, 4, 0x0f0f0f0f);
    UNROLL for (int j = 0; j < 8; j++) high[j * TILE] = w[j];
}

INLINE void q5_k(const uint8_t *b, const struct target *t) {
    put_eighths(b, t);
    put_nibbles_of_256(b + 48, t->words);
    put_bits_of_256(b + 16, t->high);
}

INLINE void q2_k(const uint8_t *b, const struct target *t) {
    t->supers[0] = half_at(b + 80);
    t->supers[TILE] = half_at(b + 82);
    UNROLL for (int j = 0; j < 4; j++) put_four(four(b + 4 * j), t->scales + 4 * j * TILE);
    put_pairs_of_256(b + 16, t->words);
}

/* Of four bytes, what is left when 32 is subtracted. */
INLINE uint32_t less_32(uint32_t x) { return ((x | 0x80808080) - 0x20202020) ^ 0x80808080; }

INLINE void q3_k(const uint8_t *b, const struct target *t) {
    const uint32_t x = four(b + 96), y = four(b + 100), z = four(b + 104); /* low halves, then pairs above them */
    t->supers[0] = half_at(b + 108);
    put_four(less_32((x & 0x0f0f0f0f) | (z << 4 & 0x30303030)), t->scales);
    put_four(less_32((y & 0x0f0f0f0f) | (z << 2 & 0x30303030)), t->scales + 4 * TILE);
    put_four(less_32((x >> 4 & 0x0f0f0f0f) | (z & 0x30303030)), t->scales + 8 * TILE);
    put_four(less_32((y >> 4 & 0x0f0f0f0f) | (z >> 2 & 0x30303030)), t->scales + 12 * TILE);
    put_pairs_of_256(b + 32, t->words);
    put_bits_of_256(b, t->high);
}

INLINE void q6_k(const uint8_t *b, const struct target *t) {
    t->supers[0] = half_at(b + 208);
    UNROLL for (int j = 0; j < 4; j++) put_four(four(b + 192 + 4 * j), t->scales + 4 * j * TILE);
    UNROLL for (int j = 0; j < 4; j++) { /* half of 128 inputs: low halves, and those 64 inputs later */
        uint32_t *words = t->words + (16 * (j / 2) + 4 * (j % 2)) * TILE;
        put_32(b + 32 * j, words, words + 8 * TILE);
    }
    put_pairs_of_256(b + 128, t->high);
}

INLINE void iq4_xs(const uint8_t *b, const struct target *t) {
    const uint32_t upper = half_at(b + 2);
    t->supers[0] = half_at(b);
    UNROLL for (int j = 0; j < 8; j++) {
        const int low = b[4 + j / 2] >> 4 * (j & 1) & 15, high = upper >> 2 * j & 3;
        t->scales[j * TILE] = (uint8_t)((low | high << 4) - 32);
        put_block(b + 8 + 16 * j, t->words + 4 * j * TILE);
    }
}

/* Ask memory for what is needed soon: of every `step` bytes up to `count`, the line that they begin in. Addresses may lie
 * outside of the memory. */
INLINE void ask_for(const void *memory, size_t count, size_t step) {
    for (size_t i = 0; i < count; i += step) __builtin_prefetch((const uint8_t *)memory + i);
}

/* Per block: its size, then words, words above nibbles, groups, bytes of a scale, float16 of two levels. Rows are taken
 * across, which no processor foresees, so the next tile's blocks are asked for, in their order, and the lines of the next
 * words: 1.3 to 3 times as fast on a Zen 3 (docs/log.md). */
#define EACH(function, nbytes, n_words, n_high, n_groups, scale_bytes, n_supers)                                    \
    for (size_t tile = 0; tile < (size_t)r->rows / TILE; tile++)                                                    \
        for (size_t k = 0; k < per_row; k++) {                                                                      \
            const size_t at = (tile * per_row + k) * TILE;                                                          \
            for (size_t i = 0; i < TILE; i++) {                                                                     \
                const struct target t = {                                                                           \
                    r->words + at * (n_words) + i,                                                                  \
                    r->high + at * (n_high) + i,                                                                    \
                    (uint8_t *)r->scales + (at * (n_groups) + i) * (scale_bytes),                                   \
                    (uint8_t *)r->minima + (at * (n_groups) + i) * (scale_bytes),                                   \
                    r->supers + at * (n_supers) + i,                                                                \
                };                                                                                                  \
                ask_for(r->blocks + (at + TILE * per_row + i) * (nbytes), (nbytes), 64);                            \
                if (i < (n_words)) /* as many lines as words, among 16 rows */                                      \
                    ask_for(r->words + (at + TILE) * (n_words) + i * TILE, ((n_words) - i) * 64, 64 * TILE);        \
                function(r->blocks + ((tile * TILE + i) * per_row + k) * (nbytes), &t);                             \
            }                                                                                                       \
        }                                                                                                           \
    break;

/* Runs in the calling thread. The caller has checked type, sizes and memory. */
EXPORT void offmoe_retile(const struct retiling *r) {
    const size_t per_row = r->blocks_per_row;
    switch (r->type) {
    case 2: EACH(q4_0, 18, 4, 0, 1, 2, 0)
    case 3: EACH(q4_1, 20, 4, 0, 1, 2, 0)
    case 6: EACH(q5_0, 22, 4, 1, 1, 2, 0)
    case 7: EACH(q5_1, 24, 4, 1, 1, 2, 0)
    case 8: EACH(q8_0, 34, 8, 0, 1, 2, 0)
    case 10: EACH(q2_k, 84, 16, 0, 16, 1, 2)
    case 11: EACH(q3_k, 110, 16, 8, 16, 1, 1)
    case 12: EACH(q4_k, 144, 32, 0, 8, 1, 2)
    case 13: EACH(q5_k, 176, 32, 8, 8, 1, 2)
    case 14: EACH(q6_k, 210, 32, 16, 16, 1, 1)
    case 20: EACH(q4_0, 18, 4, 0, 1, 2, 0) /* IQ4_NL: the nibbles mean something else */
    case 23: EACH(iq4_xs, 136, 32, 0, 8, 1, 1)
    case 39: EACH(mxfp4, 17, 4, 0, 1, 1, 0)
    }
}
