/* Sixteen lanes as one AVX-512 register, byte products by dpbusd. See tiles.h. */
#include <immintrin.h>
typedef __m512i lanes;
typedef __m512 floats;
typedef lanes runs;

#define PAIR_TOKENS 8
#define BF16_ROWS 8
#define LARGEST_BLOCK 8
#define MANY_TOKENS 0 /* not measured */
#define SCORE_KEYS 4
#define WEIGH_WORDS 4
#define WIDE_RUNS 1
enum { S8_ZERO = 128 };
static inline int run_words(int words, int top) { (void)top; return words; }

static inline lanes lanes_load(const void *p) { return _mm512_loadu_si512(p); }
static inline lanes lanes_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline lanes lanes_low(lanes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline lanes lanes_high(lanes v) { return lanes_low(_mm512_srli_epi16(v, 4)); }
static inline __m512i e2m1_table(void) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)E2M1_PLUS_12)); }
static inline lanes lanes_e2m1(lanes v) { return _mm512_shuffle_epi8(e2m1_table(), v); }
static inline __m512i iq4_table(void) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)IQ4_LEVELS)); }
static inline lanes lanes_iq4(lanes v) { return _mm512_shuffle_epi8(iq4_table(), v); }
static inline lanes lanes_right(lanes v, int n) { return _mm512_srli_epi32(v, (unsigned)n); }
static inline lanes lanes_with(lanes v, lanes bits, int n, int mask) {
    return _mm512_or_si512(v, _mm512_and_si512(_mm512_slli_epi32(bits, (unsigned)n), _mm512_set1_epi8((char)mask)));
}
static inline runs runs_zero(void) { return _mm512_setzero_si512(); }
static inline runs runs_dot(runs sum, lanes w, int32_t x) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)); }
static inline lanes runs_add(lanes sum, runs v) { return _mm512_add_epi32(sum, v); }
static inline lanes lanes_dot_s8(lanes sum, lanes w, int32_t x) {
    return runs_dot(sum, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x);
}

static inline floats floats_zero(void) { return _mm512_setzero_ps(); }
static inline floats floats_set(float x) { return _mm512_set1_ps(x); }
static inline floats floats_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void floats_store(float *p, floats v) { _mm512_storeu_ps(p, v); }
static inline floats floats_of(lanes v) { return _mm512_cvtepi32_ps(v); }
static inline floats floats_add(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats floats_mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
static inline floats floats_fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline float floats_sum(floats v) { /* halves, as everywhere */
    __m256 s = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline void floats_sums(float *out, const floats *v) { /* of SCORE_KEYS, each as floats_sum adds */
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); /* four of each */
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xee));
    s = _mm512_add_ps(s, _mm512_movehdup_ps(s));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
}
/* permutexvar reads the lowest four bits of a lane: a table of sixteen floats is the conversion. */
static inline floats floats_nibble(lanes v, int i) {
    floats table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * i), table);
}
static inline floats floats_octet(lanes v, int i) { /* below 128 */
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8 * i), _mm512_set1_epi32(127)));
}
static inline float nibble_unit(int i) { (void)i; return 1; }
static inline float octet_unit(int i) { (void)i; return 1; }
static inline floats floats_e2m1(lanes v, int i) { /* doubled, as in E2M1_PLUS_12 */
    floats table = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * i), table);
}
static inline floats floats_byte(lanes v, int i) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * i), 24));
}
/* See vectors_portable.h. Few words have a byte with exponent 0 or one that is no number: others do without their part. */
static inline __m512 e4m3_plain(__m512i v, int i) {
    v = _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * i), 4);
    v = _mm512_ternarylogic_epi32(v, _mm512_set1_epi32((int32_t)0x87f00000), _mm512_set1_epi32(0x38000000), 0xea); /* & | */
    return _mm512_castsi512_ps(v);
}
static inline __m512 e4m3(__m512i v, int i) {
    const __m512 signs = _mm512_set1_ps(-0.0f), x = e4m3_plain(v, i), magnitude = _mm512_andnot_ps(signs, x);
    const __m512 less = _mm512_fmadd_ps(magnitude, _mm512_set1_ps(2), _mm512_set1_ps(-0x1p-14f));
    return _mm512_or_ps(_mm512_min_ps(magnitude, less), _mm512_and_ps(x, signs));
}
static inline lanes floats_e4m3(floats *out, lanes v, lanes nan) {
    const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi8(0x7f)), normal = _mm512_sub_epi8(magnitude, _mm512_set1_epi8(8));
    if (__builtin_expect(_mm512_cmpge_epu8_mask(normal, _mm512_set1_epi8(0x77)) == 0, 1)) {
        UNROLL for (int i = 0; i < 4; i++) out[i] = e4m3_plain(v, i);
        return nan;
    }
    UNROLL for (int i = 0; i < 4; i++) out[i] = e4m3(v, i);
    return _mm512_or_si512(nan, _mm512_add_epi8(magnitude, _mm512_set1_epi8(1)));
}
static inline floats floats_or_nan(floats v, lanes seen) {
    return _mm512_mask_mov_ps(v, _mm512_test_epi32_mask(seen, _mm512_set1_epi8(-128)), _mm512_set1_ps(__builtin_nanf("")));
}
static inline floats floats_even_bf16(lanes v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
static inline floats floats_odd_bf16(lanes v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int32_t)0xffff0000)));
}
static inline floats floats_bf16(const uint16_t *p) {
    return floats_even_bf16(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)));
}
static inline floats floats_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline lanes lanes_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline floats floats_s8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline floats floats_power2(const uint8_t *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(lanes_u8(p), 23)); }

/* For the encoder (encode.h). */
static inline floats floats_sub(floats x, floats y) { return _mm512_sub_ps(x, y); }
static inline floats floats_div(floats x, floats y) { return _mm512_div_ps(x, y); }
static inline floats floats_min(floats x, floats y) { return _mm512_min_ps(x, y); }
static inline floats floats_max(floats x, floats y) { return _mm512_max_ps(x, y); }
static inline float floats_first(floats v) { return _mm512_cvtss_f32(v); }
static inline floats floats_round_bf16(floats v) {
    __m512i b = _mm512_castps_si512(v), even = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    b = _mm512_add_epi32(b, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(b, _mm512_set1_epi32((int32_t)0xffff0000)));
}
static inline floats floats_round_fp16(floats v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }
static inline void bytes_store(uint8_t *p, floats v) { /* -128 to 127 */
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
static inline lanes lanes_nibbles(const uint8_t *p) { /* of eight bytes, the low one first */
    __m128i v = _mm_loadl_epi64((const __m128i *)p), mask = _mm_set1_epi8(15);
    return _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(v, mask), _mm_and_si128(_mm_srli_epi16(v, 4), mask)));
}
