/* The parts of decode_vectors.h that AVX512-BF16 does in fewer operations: one rounds 32 values, and one looks 32 up. */

#define LEVELS(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}

/* Sixteen inputs in order. */
struct sixteen {
    __m512 all;
};

INLINE void put_16(const struct sink *s, int at, struct sixteen v) {
    if (s->is_bf16)
        put_words(s, at, (__m256i)_mm512_cvtneps_pbh(v.all));
    else
        _mm512_storeu_ps((float *)s->out + at, v.all);
}

INLINE struct sixteen times(struct sixteen q, float step) {
    return (struct sixteen){_mm512_mul_ps(q.all, _mm512_set1_ps(step))};
}

INLINE struct sixteen times_plus(struct sixteen q, float step, float shift) {
    return (struct sixteen){_mm512_fmadd_ps(q.all, _mm512_set1_ps(step), _mm512_set1_ps(shift))};
}

/* Sixteen bytes without a sign, and with one. */
INLINE struct sixteen of_codes(__m128i bytes) {
    return (struct sixteen){_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
INLINE struct sixteen of_signed(__m128i bytes) {
    return (struct sixteen){_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

/* The values of 16 levels; in bf16 twice, so that the fifth bit of an index means nothing. */
struct lookup {
    __m512 values;
    __m512i words;
};

INLINE struct lookup lookup_of(struct sixteen v) {
    return (struct lookup){v.all, (__m512i)_mm512_cvtne2ps_pbh(v.all, v.all)};
}

INLINE struct lookup scaled_lookup(const float *levels, float step, int is_bf16) {
    (void)is_bf16; /* the compiler drops what is not used */
    return lookup_of(times((struct sixteen){_mm512_loadu_ps(levels)}, step));
}

INLINE struct lookup shifted_lookup(const float *levels, float step, float shift, int is_bf16) {
    (void)is_bf16;
    return lookup_of(times_plus((struct sixteen){_mm512_loadu_ps(levels)}, step, shift));
}

/* 32 words, of each the value of its low four bits; bits above the fifth mean nothing, the fifth is for both halves. */
INLINE void look_up_words(const struct sink *s, int at, const struct lookup *t, __m512i words) {
    const __m512i found = _mm512_permutexvar_epi16(words, t->words);
    __m512i *out = (__m512i *)((uint16_t *)s->out + at);
    if (s->streams)
        _mm512_stream_si512(out, found);
    else
        _mm512_storeu_si512(out, found);
}

INLINE void look_up_floats(const struct sink *s, int at, const struct lookup *t, __m128i octets, int shift) {
    const __m512i words = _mm512_srli_epi32(_mm512_cvtepu8_epi32(octets), shift);
    _mm512_storeu_ps((float *)s->out + at, _mm512_permutexvar_ps(words, t->values));
}

/* 16 octets of one table: low halves, then high halves. */
INLINE void look_up_block(const struct sink *s, int at, struct lookup t, const uint8_t *octets) {
    const __m128i raw = _mm_loadu_si128((const __m128i *)octets);
    if (s->is_bf16) {
        const __m256i words = _mm256_cvtepu8_epi16(raw);
        const __m512i low = _mm512_castsi256_si512(words);
        look_up_words(s, at, &t, _mm512_inserti64x4(low, _mm256_srli_epi16(words, 4), 1));
    } else {
        look_up_floats(s, at, &t, raw, 0);
        look_up_floats(s, at + 16, &t, raw, 4);
    }
}

/* 32 octets: low halves of one table, then high halves of another. */
INLINE void look_up_both(const struct sink *s, int at, struct lookup low, struct lookup high, const uint8_t *octets) {
    const __m256i raw = load_32(octets);
    if (s->is_bf16) {
        const __m512i words = _mm512_cvtepu8_epi16(raw);
        look_up_words(s, at, &low, words);
        look_up_words(s, at + 32, &high, _mm512_srli_epi16(words, 4));
    } else {
        look_up_floats(s, at, &low, first_16(raw), 0);
        look_up_floats(s, at + 16, &low, last_16(raw), 0);
        look_up_floats(s, at + 32, &high, first_16(raw), 4);
        look_up_floats(s, at + 48, &high, last_16(raw), 4);
    }
}
