/* Rows put into tiles (offmoe.h): [rows][width] becomes [rows / 16][width][16], entries of 1, 2 or 4 bytes.
 *
 * What moves: every entry once in and once out, in the calling thread, which is a reader's.
 * A line of each of 16 rows is read whole before the next, because rows are often a power of two apart: their lines share
 * two sets of the first cache. SSE2 transposes, which every x86-64 has; elsewhere the compiler's loop does.
 */
#include <string.h>

#include "offmoe.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Rows of at most so many bytes end before a processor foresees them; the next tile's are asked for instead. */
enum { PAGE = 4096 };

/* Columns [from, width) of 16 rows, one entry after the other. */
#define EACH_ENTRY(type, mask)                                                                                       \
    for (size_t c = from; c < width; c++)                                                                            \
        for (size_t i = 0; i < TILE; i++) {                                                                          \
            type entry;                                                                                              \
            memcpy(&entry, rows + i * stride + c * sizeof entry, sizeof entry);                                      \
            entry ^= (type)(mask);                                                                                   \
            memcpy(out + (c * TILE + i) * sizeof entry, &entry, sizeof entry);                                       \
        }

static void bytes_of(const uint8_t *rows, size_t stride, size_t from, size_t width, uint8_t *out) {
    EACH_ENTRY(uint8_t, 0)
}

static void halves_of(const uint8_t *rows, size_t stride, size_t from, size_t width, uint8_t *out) {
    EACH_ENTRY(uint16_t, 0)
}

static void words_of(const uint8_t *rows, size_t stride, size_t from, size_t width, uint32_t flip, uint8_t *out) {
    EACH_ENTRY(uint32_t, flip)
}

#if defined(__SSE2__)
INLINE __m128i load(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE void store(uint8_t *p, __m128i x) { _mm_storeu_si128((__m128i *)p, x); }

/* Four columns of four rows: 16 bytes of each column. */
INLINE void four_words(const uint8_t *rows, size_t stride, __m128i flip, uint8_t *out) {
    const __m128i a = load(rows), b = load(rows + stride), c = load(rows + 2 * stride), d = load(rows + 3 * stride);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
    store(out, _mm_xor_si128(flip, _mm_unpacklo_epi64(ab, cd)));
    store(out + 64, _mm_xor_si128(flip, _mm_unpackhi_epi64(ab, cd)));
    store(out + 128, _mm_xor_si128(flip, _mm_unpacklo_epi64(ab2, cd2)));
    store(out + 192, _mm_xor_si128(flip, _mm_unpackhi_epi64(ab2, cd2)));
}

/* Eight columns of eight rows: 16 bytes of each column. */
INLINE void eight_halves(const uint8_t *rows, size_t stride, uint8_t *out) {
    __m128i x[8], y[8];
    UNROLL for (int i = 0; i < 8; i++) x[i] = load(rows + (size_t)i * stride);
    UNROLL for (int i = 0; i < 4; i++) { /* pairs of rows i and i + 4 */
        y[2 * i] = _mm_unpacklo_epi16(x[i], x[i + 4]);
        y[2 * i + 1] = _mm_unpackhi_epi16(x[i], x[i + 4]);
    }
    UNROLL for (int i = 0; i < 2; i++) /* rows i, i + 2, i + 4, i + 6 of two columns */
        UNROLL for (int half = 0; half < 2; half++) {
            x[4 * i + 2 * half] = _mm_unpacklo_epi16(y[2 * i + half], y[2 * i + 4 + half]);
            x[4 * i + 2 * half + 1] = _mm_unpackhi_epi16(y[2 * i + half], y[2 * i + 4 + half]);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        store(out + 64 * i, _mm_unpacklo_epi16(x[i], x[i + 4]));
        store(out + 64 * i + 32, _mm_unpackhi_epi16(x[i], x[i + 4]));
    }
}

static void tile_of_words(const uint8_t *rows, size_t stride, size_t width, uint32_t mask, uint8_t *out) {
    const __m128i flip = _mm_set1_epi32((int)mask);
    const int is_narrow = 4 * width <= PAGE;
    size_t c = 0;
    for (; c + 16 <= width; c += 16) {
        if (is_narrow)
            for (size_t i = TILE; i < 2 * TILE; i++) __builtin_prefetch(rows + i * stride + 4 * c);
        for (size_t i = 0; i < TILE; i += 4)
            UNROLL for (size_t j = 0; j < 16; j += 4)
                four_words(rows + i * stride + 4 * (c + j), stride, flip, out + 64 * (c + j) + 4 * i);
    }
    words_of(rows, stride, c, width, mask, out);
}

static void tile_of_halves(const uint8_t *rows, size_t stride, size_t width, uint8_t *out) {
    size_t c = 0;
    for (; c + 8 <= width; c += 8)
        for (size_t i = 0; i < TILE; i += 8) eight_halves(rows + i * stride + 2 * c, stride, out + 32 * c + 2 * i);
    halves_of(rows, stride, c, width, out);
}
#else
static void tile_of_words(const uint8_t *rows, size_t stride, size_t width, uint32_t mask, uint8_t *out) {
    words_of(rows, stride, 0, width, mask, out);
}

static void tile_of_halves(const uint8_t *rows, size_t stride, size_t width, uint8_t *out) {
    halves_of(rows, stride, 0, width, out);
}
#endif

/* Runs in the calling thread. The caller has checked sizes and memory. */
EXPORT void offmoe_tile(const struct tiling *t) {
    for (int row = 0; row < t->count; row += TILE) {
        const uint8_t *rows = t->rows + (size_t)row * t->stride;
        uint8_t *out = t->tiles + (size_t)row * t->width * t->entry_bytes;
        if (t->entry_bytes == 4) tile_of_words(rows, t->stride, t->width, t->flip, out);
        if (t->entry_bytes == 2) tile_of_halves(rows, t->stride, t->width, out);
        if (t->entry_bytes == 1) bytes_of(rows, t->stride, 0, t->width, out);
    }
}
