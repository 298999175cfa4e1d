/* Columns of 16 rows of bf16, side by side and as floats: what many tokens are multiplied with (multiply.h). */
#ifdef __AVX2__
#include <immintrin.h>
/* Eight vectors of eight 32-bit numbers, as their transpose. */
static inline void transpose8(__m256i *v) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
        b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

/* out float [count][16]: `count` columns, a multiple of 16, of rows that are `stride` bytes apart. Two neighbors of a row
 * are transposed as one number of 32 bits. */
static inline void columns_bf16(const uint8_t *rows, size_t stride, int count, float *out) {
    const __m256i top = _mm256_set1_epi32((int32_t)0xffff0000);
    for (int at = 0; at < count; at += 16, rows += 32, out += 16 * TILE)
        for (int half = 0; half < 2; half++) {
            __m256i v[8];
            UNROLL for (int r = 0; r < 8; r++) v[r] = _mm256_loadu_si256((const __m256i *)(rows + (8 * half + r) * stride));
            transpose8(v);
            UNROLL for (int i = 0; i < 8; i++) {
                float *even = out + 2 * i * TILE + 8 * half;
                _mm256_storeu_si256((__m256i *)even, _mm256_slli_epi32(v[i], 16));
                _mm256_storeu_si256((__m256i *)(even + TILE), _mm256_and_si256(v[i], top));
            }
        }
}
#else
static inline void columns_bf16(const uint8_t *rows, size_t stride, int count, float *out) {
    for (int r = 0; r < TILE; r++)
        for (int i = 0; i < count; i++) out[i * TILE + r] = of_bf16(((const uint16_t *)(rows + r * stride))[i]);
}
#endif
