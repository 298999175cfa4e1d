/* Sixteen lanes as vectors of the C compiler, which it cuts into whatever registers the target has. See tiles.h. */
#include "half.h"
typedef int32_t lanes __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));
typedef lanes runs;

#define PAIR_TOKENS 1
#define BF16_ROWS 4
#define LARGEST_BLOCK 4
#define MANY_TOKENS 0 /* not measured */
#define SCORE_KEYS 1
#define WEIGH_WORDS 1
#define WIDE_RUNS 1
enum { S8_ZERO = 0 };
static inline int run_words(int words, int top) { (void)top; return words; }
#define EACH for (int l = 0; l < TILE; l++)

static inline lanes lanes_load(const void *p) { lanes a; memcpy(&a, p, sizeof a); return a; }
static inline lanes lanes_set(int32_t x) { return x - (lanes){0}; }
static inline lanes lanes_low(lanes a) { return a & 0x0f0f0f0f; }
static inline lanes lanes_high(lanes a) { return a >> 4 & 0x0f0f0f0f; }
static inline lanes lanes_byte(lanes a, int i) { return a << (24 - 8 * i) >> 24; }
/* Twice the value of a nibble: 0 1 2 3 4 6 8 12, or less than 0. A comparison that holds is -1. */
static inline lanes e2m1(lanes code) {
    lanes m = code & 7, v = m - ((m > 4) & (4 - m)) - ((m > 6) & -2);
    return (v ^ -(code >> 3 & 1)) + (code >> 3 & 1);
}
static inline lanes lanes_e2m1(lanes a) {
    lanes out = {0};
    for (int i = 0; i < 4; i++) out |= (e2m1(a >> 8 * i & 15) + 12) << 8 * i;
    return out;
}
static inline lanes lanes_iq4(lanes a) {
    lanes out = {0};
    for (int i = 0; i < 4; i++) EACH out[l] |= (int32_t)((uint32_t)(uint8_t)IQ4_LEVELS[a[l] >> 8 * i & 15] << 8 * i);
    return out;
}
static inline lanes lanes_right(lanes a, int n) { return a >> n; }
/* `a`, and of every byte of `bits` those that are in the mask once they are shifted to the left by n. */
static inline lanes lanes_with(lanes a, lanes bits, int n, int mask) { return a | (bits << n & mask * 0x01010101); }
static inline lanes lanes_dot_s8(lanes sum, lanes w, int32_t x) {
    for (int i = 0; i < 4; i++) sum += lanes_byte(w, i) * (int32_t)(int8_t)((uint32_t)x >> 8 * i);
    return sum;
}
static inline runs runs_zero(void) { return (lanes){0}; }
static inline runs runs_dot(runs sum, lanes w, int32_t x) { return lanes_dot_s8(sum, w, x); }
static inline lanes runs_add(lanes sum, runs a) { return sum + a; }

static inline floats floats_zero(void) { return (floats){0}; }
static inline floats floats_set(float x) { return x - (floats){0}; }
static inline floats floats_load(const float *p) { floats a; memcpy(&a, p, sizeof a); return a; }
static inline void floats_store(float *p, floats a) { memcpy(p, &a, sizeof a); }
static inline floats floats_of(lanes a) { return __builtin_convertvector(a, floats); }
static inline floats floats_add(floats a, floats b) { return a + b; }
static inline floats floats_mul(floats a, floats b) { return a * b; }
static inline floats floats_fma(floats a, floats b, floats c) { return a * b + c; }
static inline float floats_sum(floats a) { /* halves, as everywhere */
    for (int half = TILE / 2; half; half /= 2)
        for (int l = 0; l < half; l++) a[l] += a[l + half];
    return a[0];
}
static inline void floats_sums(float *out, const floats *v) { *out = floats_sum(*v); } /* of SCORE_KEYS */
static inline floats floats_nibble(lanes a, int i) { return floats_of(a >> 4 * i & 15); }
static inline floats floats_e2m1(lanes a, int i) { return floats_of(e2m1(a >> 4 * i & 15)); }
static inline floats floats_byte(lanes a, int i) { return floats_of(lanes_byte(a, i)); }
static inline floats floats_octet(lanes a, int i) { return floats_of(a >> 8 * i & 127); } /* below 128 */
/* What activations are multiplied by in `pack`, where conversions give multiples of codes (vectors_avx2.h). */
static inline float nibble_unit(int i) { (void)i; return 1; }
static inline float octet_unit(int i) { (void)i; return 1; }
static inline floats floats_bits(lanes a) { floats f; memcpy(&f, &a, sizeof f); return f; }
/* E4M3, 2^-8 of it: its bits as those of a float with 112 added to the exponent (it is below 16, so `or` adds); then what
 * has exponent 0 has a leading one too many, which 2 v - 2^-14 takes away, and for all others that is not less than v. */
static inline floats e4m3(lanes byte) {
    const floats v = floats_bits((byte << 20 & 0x07f00000) | 0x38000000), less = v + v - 0x1p-14f;
    const lanes is_less = less < v, magnitude = ((lanes)less & is_less) | ((lanes)v & ~is_less);
    return floats_bits(magnitude | (byte & (int32_t)0x80000000));
}
/* The four bytes of a word. Those that are not a number, 0x7f and 0xff, leave their highest bits in what is returned. */
static inline lanes floats_e4m3(floats *out, lanes a, lanes nan) {
    UNROLL for (int i = 0; i < 4; i++) out[i] = e4m3(lanes_byte(a, i));
    return nan | ((a & 0x7f7f7f7f) + 0x01010101);
}
static inline floats floats_or_nan(floats a, lanes seen) {
    return floats_bits((lanes)a | ((seen & (int32_t)0x80808080) != 0));
}
static inline floats floats_even_bf16(lanes a) { return floats_bits(a << 16); }
static inline floats floats_odd_bf16(lanes a) { return floats_bits(a & (int32_t)0xffff0000); }
static inline floats floats_bf16(const uint16_t *p) {
    lanes a;
    EACH a[l] = p[l];
    return floats_even_bf16(a);
}
/* Half precision: its bits are those of a float with 112 less in the exponent; subnormals lose a leading one again. */
static inline floats floats_fp16(const uint16_t *p) {
    lanes h, magnitude, special, small;
    EACH h[l] = p[l];
    magnitude = (h & 0x7fff) << 13;
    special = (magnitude >= 0x0f800000) & 0x38000000;
    small = magnitude < 0x00800000;
    floats normal = floats_bits(magnitude + 0x38000000 + special);
    floats subnormal = floats_bits(magnitude + 0x38800000) - 6.103515625e-05f;
    lanes n, s;
    memcpy(&n, &normal, sizeof n);
    memcpy(&s, &subnormal, sizeof s);
    return floats_bits((n & ~small) | (s & small) | (h & 0x8000) << 16);
}
static inline lanes lanes_u8(const uint8_t *p) { lanes a; EACH a[l] = p[l]; return a; }
static inline floats floats_s8(const int8_t *p) { lanes a; EACH a[l] = p[l]; return floats_of(a); }
static inline floats floats_power2(const uint8_t *p) { return floats_bits(lanes_u8(p) << 23); }

/* For the encoder (encode.h). */
static inline floats floats_sub(floats a, floats b) { return a - b; }
static inline floats floats_div(floats a, floats b) { return a / b; }
static inline floats floats_choose(lanes yes, floats a, floats b) { return (floats)(((lanes)a & yes) | ((lanes)b & ~yes)); }
static inline floats floats_min(floats a, floats b) { return floats_choose(a < b, a, b); }
static inline floats floats_max(floats a, floats b) { return floats_choose(a > b, a, b); }
static inline float floats_first(floats a) { return a[0]; }
static inline floats floats_round_bf16(floats a) {
    lanes b = (lanes)a;
    return (floats)((b + (b >> 16 & 1) + 0x7fff) & (int32_t)0xffff0000);
}
static inline floats floats_round_fp16(floats a) {
    uint16_t h[TILE];
    EACH h[l] = half_of(a[l]);
    return floats_fp16(h);
}
static inline void bytes_store(uint8_t *p, floats a) { /* -128 to 127 */
    EACH p[l] = (uint8_t)(int32_t)a[l];
}
static inline lanes lanes_nibbles(const uint8_t *p) { /* of eight bytes, the low one first */
    lanes a;
    EACH a[l] = p[l / 2] >> 4 * (l % 2) & 15;
    return a;
}
