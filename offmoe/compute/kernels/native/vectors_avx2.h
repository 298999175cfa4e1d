/* Sixteen lanes as two AVX2 registers; byte products by maddubs, or by dpbusd where the target has it. See tiles.h. */
#include <immintrin.h>
typedef struct { __m256i a, b; } lanes;
typedef struct { __m256 a, b; } floats;
typedef lanes runs;

#define PAIR_TOKENS 2
#define BF16_ROWS 4
#define LARGEST_BLOCK 4
/* 4096 x 2048 on 2 cores of a Zen 3, billions of products a second by multiply.c and by rows: 22 and 31 for 8 tokens, 31 and
 * 27 for 12, 51 and 26 for 64, 56 and 28 for 128, where torch's product of float32 has 35. */
#define MANY_TOKENS 12
#define SCORE_KEYS 1
#define WEIGH_WORDS 1
#define LANES(...) ((lanes){__VA_ARGS__})
#define FLOATS(...) ((floats){__VA_ARGS__})

static inline lanes lanes_load(const void *p) {
    return LANES(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
static inline lanes lanes_set(int32_t x) { __m256i v = _mm256_set1_epi32(x); return LANES(v, v); }
static inline __m256i low(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline lanes lanes_low(lanes v) { return LANES(low(v.a), low(v.b)); }
static inline lanes lanes_high(lanes v) { return LANES(low(_mm256_srli_epi16(v.a, 4)), low(_mm256_srli_epi16(v.b, 4))); }
static inline lanes lanes_add(lanes x, lanes y) { return LANES(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
static inline __m256i e2m1_table(void) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)E2M1_PLUS_12)); }
static inline lanes lanes_e2m1(lanes v) {
    return LANES(_mm256_shuffle_epi8(e2m1_table(), v.a), _mm256_shuffle_epi8(e2m1_table(), v.b));
}

static inline __m256i iq4_table(void) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)IQ4_LEVELS)); }
static inline lanes lanes_iq4(lanes v) {
    return LANES(_mm256_shuffle_epi8(iq4_table(), v.a), _mm256_shuffle_epi8(iq4_table(), v.b));
}
static inline lanes lanes_right(lanes v, int n) { return LANES(_mm256_srli_epi32(v.a, n), _mm256_srli_epi32(v.b, n)); }
static inline __m256i with_bits(__m256i v, __m256i bits, int n, int mask) {
    return _mm256_or_si256(v, _mm256_and_si256(_mm256_slli_epi32(bits, n), _mm256_set1_epi8((char)mask)));
}
static inline lanes lanes_with(lanes v, lanes bits, int n, int mask) {
    return LANES(with_bits(v.a, bits.a, n, mask), with_bits(v.b, bits.b, n, mask));
}

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#ifdef __AVXVNNI__
#define DPBUSD _mm256_dpbusd_avx_epi32
#else
#define DPBUSD _mm256_dpbusd_epi32
#endif
#define WIDE_RUNS 1
enum { S8_ZERO = 128 };
static inline int run_words(int words, int top) { (void)top; return words; }
static inline runs runs_dot(runs sum, lanes w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return LANES(DPBUSD(sum.a, w.a, v), DPBUSD(sum.b, w.b, v));
}
static inline lanes runs_add(lanes sum, runs v) { return lanes_add(sum, v); }
static inline lanes lanes_dot_s8(lanes sum, lanes w, int32_t x) {
    __m256i flip = _mm256_set1_epi8(-128);
    return runs_dot(sum, LANES(_mm256_xor_si256(w.a, flip), _mm256_xor_si256(w.b, flip)), x);
}
#else
/* Products are summed in 16 bits as long as they fit: 2 * 15 * 127 eight times, 2 * 31 * 127 four, 2 * 63 * 127 twice. */
#define WIDE_RUNS 0
enum { S8_ZERO = 0 };
static inline int run_words(int words, int top) { (void)words; return top > 31 ? 1 : top > 15 ? 2 : 4; }
static inline runs runs_dot(runs sum, lanes w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return LANES(_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, v)), _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, v)));
}
static inline lanes runs_add(lanes sum, runs v) {
    __m256i one = _mm256_set1_epi16(1);
    return lanes_add(sum, LANES(_mm256_madd_epi16(v.a, one), _mm256_madd_epi16(v.b, one)));
}
static inline __m256i dot_s8(__m256i w, __m256i x) { /* |w| times x with w's sign: at most 2 * 128 * 127, no saturation */
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}
static inline lanes lanes_dot_s8(lanes sum, lanes w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return lanes_add(sum, LANES(dot_s8(w.a, v), dot_s8(w.b, v)));
}
#endif
static inline runs runs_zero(void) { return lanes_set(0); }

static inline floats floats_zero(void) { return FLOATS(_mm256_setzero_ps(), _mm256_setzero_ps()); }
static inline floats floats_set(float x) { __m256 v = _mm256_set1_ps(x); return FLOATS(v, v); }
static inline floats floats_load(const float *p) { return FLOATS(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void floats_store(float *p, floats v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
static inline floats floats_of(lanes v) { return FLOATS(_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)); }
static inline floats floats_add(floats x, floats y) { return FLOATS(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static inline floats floats_mul(floats x, floats y) { return FLOATS(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static inline floats floats_fma(floats x, floats y, floats z) {
    return FLOATS(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
static inline float floats_sum(floats v) {
    __m256 s = _mm256_add_ps(v.a, v.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline void floats_sums(float *out, const floats *v) { *out = floats_sum(*v); } /* of SCORE_KEYS */
/* Codes are converted where they stand, as multiples of a power of two, and pack divides activations by that: a shift less
 * for each, a fifth of the operations of float kernels. Both are exact. The highest nibble would be a sign. */
static inline float nibble_unit(int i) { return 1.0f / (float)(1 << 4 * (i < 7 ? i : 6)); }
static inline float octet_unit(int i) { return 1.0f / (float)(1 << 8 * i); }
static inline __m256 nibble(__m256i v, int i) {
    if (i == 7) v = _mm256_srli_epi32(v, 4), i = 6;
    return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15 << 4 * i)));
}
static inline __m256 octet(__m256i v, int i) { return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(127 << 8 * i))); }
static inline floats floats_octet(lanes v, int i) { return FLOATS(octet(v.a, i), octet(v.b, i)); } /* below 128 */
static inline floats floats_nibble(lanes v, int i) { return FLOATS(nibble(v.a, i), nibble(v.b, i)); }
static inline __m256 signed_byte(__m256i v, int i) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24)); }
static inline floats floats_byte(lanes v, int i) { return FLOATS(signed_byte(v.a, i), signed_byte(v.b, i)); }
static inline __m256 e2m1(__m256i v, int i) {
    __m256i code = _mm256_and_si256(_mm256_srli_epi32(v, 4 * i), _mm256_set1_epi32(15));
    __m256i byte = _mm256_and_si256(_mm256_shuffle_epi8(e2m1_table(), code), _mm256_set1_epi32(255));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(byte, _mm256_set1_epi32(12)));
}
static inline floats floats_e2m1(lanes v, int i) { return FLOATS(e2m1(v.a, i), e2m1(v.b, i)); }
static inline floats floats_bits(lanes v) { return FLOATS(_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)); }
/* See vectors_portable.h. Few words have a byte with exponent 0 or one that is no number: others do without their part. */
static inline __m256 e4m3_plain(__m256i v, int i) {
    v = _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 4);
    v = _mm256_and_si256(v, _mm256_set1_epi32((int32_t)0x87f00000));
    return _mm256_castsi256_ps(_mm256_or_si256(v, _mm256_set1_epi32(0x38000000)));
}
static inline __m256 e4m3(__m256i v, int i) {
    const __m256 signs = _mm256_set1_ps(-0.0f), x = e4m3_plain(v, i), magnitude = _mm256_andnot_ps(signs, x);
    const __m256 less = _mm256_fmadd_ps(magnitude, _mm256_set1_ps(2), _mm256_set1_ps(-0x1p-14f));
    return _mm256_or_ps(_mm256_min_ps(magnitude, less), _mm256_and_ps(x, signs));
}
static inline __m256i after(__m256i v) { /* one more than each byte without its sign: 0x80 for what is no number */
    return _mm256_add_epi8(_mm256_and_si256(v, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(1));
}
static inline lanes floats_e4m3(floats *out, lanes v, lanes nan) {
    const lanes more = LANES(after(v.a), after(v.b));
    const __m256i special = _mm256_or_si256(_mm256_or_si256(more.a, _mm256_sub_epi8(more.a, _mm256_set1_epi8(9))),
                                            _mm256_or_si256(more.b, _mm256_sub_epi8(more.b, _mm256_set1_epi8(9))));
    if (__builtin_expect(_mm256_movemask_epi8(special) == 0, 1)) {
        UNROLL for (int i = 0; i < 4; i++) out[i] = FLOATS(e4m3_plain(v.a, i), e4m3_plain(v.b, i));
        return nan;
    }
    UNROLL for (int i = 0; i < 4; i++) out[i] = FLOATS(e4m3(v.a, i), e4m3(v.b, i));
    return LANES(_mm256_or_si256(nan.a, more.a), _mm256_or_si256(nan.b, more.b));
}
static inline __m256 or_nan(__m256 v, __m256i seen) {
    const __m256i top = _mm256_and_si256(seen, _mm256_set1_epi8(-128));
    const __m256i none = _mm256_cmpeq_epi32(top, _mm256_setzero_si256());
    return _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_xor_si256(none, _mm256_set1_epi32(-1))));
}
static inline floats floats_or_nan(floats v, lanes seen) { return FLOATS(or_nan(v.a, seen.a), or_nan(v.b, seen.b)); }
static inline floats floats_even_bf16(lanes v) { return floats_bits(LANES(_mm256_slli_epi32(v.a, 16), _mm256_slli_epi32(v.b, 16))); }
static inline floats floats_odd_bf16(lanes v) {
    __m256i top = _mm256_set1_epi32((int32_t)0xffff0000);
    return floats_bits(LANES(_mm256_and_si256(v.a, top), _mm256_and_si256(v.b, top)));
}
static inline __m256i widen(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline floats floats_bf16(const uint16_t *p) { return floats_even_bf16(LANES(widen(p), widen(p + 8))); }
static inline floats floats_fp16(const uint16_t *p) {
    return FLOATS(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)));
}
static inline lanes lanes_u8(const uint8_t *p) {
    __m128i v = _mm_loadu_si128((const __m128i *)p);
    return LANES(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
static inline floats floats_s8(const int8_t *p) {
    __m128i v = _mm_loadu_si128((const __m128i *)p);
    return floats_of(LANES(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))));
}
static inline floats floats_power2(const uint8_t *p) {
    lanes v = lanes_u8(p);
    return floats_bits(LANES(_mm256_slli_epi32(v.a, 23), _mm256_slli_epi32(v.b, 23)));
}

/* For the encoder (encode.h). */
#define EACH2(f, x, y) FLOATS(f((x).a, (y).a), f((x).b, (y).b))
static inline floats floats_sub(floats x, floats y) { return EACH2(_mm256_sub_ps, x, y); }
static inline floats floats_div(floats x, floats y) { return EACH2(_mm256_div_ps, x, y); }
static inline floats floats_min(floats x, floats y) { return EACH2(_mm256_min_ps, x, y); }
static inline floats floats_max(floats x, floats y) { return EACH2(_mm256_max_ps, x, y); }
static inline float floats_first(floats v) { return _mm256_cvtss_f32(v.a); }
static inline __m256 round_bf16(__m256 v) {
    __m256i b = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    b = _mm256_add_epi32(b, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(b, _mm256_set1_epi32((int32_t)0xffff0000)));
}
static inline floats floats_round_bf16(floats v) { return FLOATS(round_bf16(v.a), round_bf16(v.b)); }
static inline floats floats_round_fp16(floats v) {
    return FLOATS(_mm256_cvtph_ps(_mm256_cvtps_ph(v.a, 0)), _mm256_cvtph_ps(_mm256_cvtps_ph(v.b, 0)));
}
static inline void bytes_store(uint8_t *p, floats v) { /* -128 to 127 */
    __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)); /* a0 b0 a1 b1, by halves */
    pairs = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
static inline __m128i nibbles(const uint8_t *p) { /* of eight bytes, the low one first */
    __m128i v = _mm_loadl_epi64((const __m128i *)p), mask = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(v, mask), _mm_and_si128(_mm_srli_epi16(v, 4), mask));
}
static inline lanes lanes_nibbles(const uint8_t *p) {
    __m128i v = nibbles(p);
    return LANES(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
